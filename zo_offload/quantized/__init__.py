"""Quantized checkpoints: which scheme their tensors are in, and the weights that its library would make of them."""
