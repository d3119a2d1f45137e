"""Training of the embedded demonstration model, one script per stage."""
