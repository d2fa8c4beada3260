"""Tiny models with random weights; no file, no network."""
