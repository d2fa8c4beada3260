"""Perturbed forwards of the unmodified model, in lockstep."""
