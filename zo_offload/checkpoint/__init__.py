"""transformers checkpoints, read and written a run of elements at a time."""

from .checkpoint import Checkpoint, save_pretrained

__all__ = ["Checkpoint", "save_pretrained"]
