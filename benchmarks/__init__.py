"""Measurements, a folder for each question; a record of every one, and the documents' tables made of records."""
