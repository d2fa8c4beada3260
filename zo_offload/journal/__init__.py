"""A run's files, and the facts that must be equal for the run to go on."""
