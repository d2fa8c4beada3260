"""Runs a test under the reference and under every variant of the native library this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from zo_offload.kernels import native


@cache
def _load(isa: str) -> native.Library:
    return native.Library(native.LIBRARY, isa)


ISAS = list(native.Library(native.LIBRARY).isas) if native.LIBRARY.exists() else []
VARIANTS = ["reference", *ISAS]

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_isa = pytest.mark.parametrize(
    "isa", ISAS or [pytest.param("none", marks=pytest.mark.skip(reason="the native library is not built"))]
)


@contextmanager
def using(variant: str) -> Iterator[None]:
    """Everything inside runs on this variant."""
    found = None if variant == "reference" else _load(variant)
    before = native.library
    native.library = lambda: found
    try:
        yield
    finally:
        native.library = before
