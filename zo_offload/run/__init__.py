"""A run under way: prepared, wired together, stepped, and kept whole whatever breaks in."""
