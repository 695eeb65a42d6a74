"""Weights in and out: the project's own model folder."""
