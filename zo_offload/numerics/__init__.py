"""The computation of one visit of a parameter: noise, the fused pass and its slow reference, pending updates."""
