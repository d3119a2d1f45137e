"""Comparing two ways to run the engine on the same requests."""
