"""Data: from rows to batches to losses."""
