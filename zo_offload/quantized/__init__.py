"""Quantized checkpoints: finds the scheme of their tensors, and decodes the weights as its library does."""
