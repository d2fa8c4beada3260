"""Access to the operating system and this process: files, locks, signals, memory, closing."""
