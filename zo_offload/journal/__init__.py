"""What a run keeps in its directory, and what must be equal for it to go on."""
