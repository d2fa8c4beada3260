"""What is used of the operating system and of this process: files, locks, signals, memory, closing."""
