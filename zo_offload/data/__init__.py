"""From rows to batches to losses: what a model is trained on, and what is asked of it."""
