"""What one visit of a parameter computes: noise, the fused pass and its slow reference, pending updates."""
