"""The window of device memory: which block is fetched, used and flushed, where and when."""
