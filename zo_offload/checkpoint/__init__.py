"""transformers checkpoints, read and written one chunk of elements at a time."""

from .basis import Basis
from .checkpoint import Checkpoint, save_pretrained

__all__ = ["Basis", "Checkpoint", "save_pretrained"]
