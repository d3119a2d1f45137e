"""Evaluation: pictures drawn by code, and classifiers that judge the engine's pictures by them."""
