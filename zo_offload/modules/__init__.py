"""A torch model from outside: its parameters, modes and state, and which module uses which weight."""
