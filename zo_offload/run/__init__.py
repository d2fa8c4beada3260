"""The current run: it is prepared, wired together, stepped, and kept consistent whatever interrupts it."""
