"""The window of device memory: the order and the slots of fetches, uses and flushes of blocks."""
