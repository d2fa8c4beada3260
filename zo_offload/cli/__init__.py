"""The command line. Only it prints."""

from .command import main

__all__ = ["main"]
