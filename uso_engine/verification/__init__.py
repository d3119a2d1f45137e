"""Checking the engine against reference cases: what the authors' own code computes on small random weights."""
