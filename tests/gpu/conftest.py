"""These tests need a GPU. Without one each is skipped with the reason, and none of them has been run on one yet."""

from __future__ import annotations

import pytest
import torch


def reason() -> str:
    """Why the GPU tests cannot run here; "" if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return ""


def pytest_collection_modifyitems(items):
    why = reason()
    for item in items:
        if "/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))
