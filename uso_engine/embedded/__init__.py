"""Data that ships with the package: the demonstration model uso-tiny, and the program that builds it."""
