"""Inspects a torch model: its parameters, modes and state, and which module uses which weight."""
