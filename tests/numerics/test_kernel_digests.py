"""Every instruction set of the CPU library gives the scalar kernels' bits in all that it computes; so does aarch64."""

from __future__ import annotations

import os
import shutil

import pytest

from benchmarks import aarch64
from zo_offload.kernels import native

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(
    not native.LIBRARY.exists() or shutil.which(COMPILER) is None, reason="needs the native library and g++"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> aarch64.Digests:
    program = aarch64.build_program(tmp_path_factory.mktemp("here"), native.LIBRARY, COMPILER)
    return aarch64.digests(program, 6)


def test_the_instruction_sets_of_this_cpu_agree_in_every_case(here):
    assert {isa for isa, _ in here} == set(native.Library(native.LIBRARY).isas)
    assert aarch64.differing(here) == []


def test_cases_depend_on_what_is_computed(here):
    scalar = [digest for (isa, _), digest in here.items() if isa == "scalar"]
    assert len(scalar) > 200 and len(set(scalar)) == len(scalar)


def test_a_case_that_differs_or_lacks_is_named():
    own = {("scalar", "pass bf16 0"): "1", ("scalar", "pass bf16 1"): "2", ("avx2", "pass bf16 0"): "1"}
    other = {("scalar", "pass bf16 0"): "1", ("scalar", "pass bf16 1"): "3"}
    assert aarch64.differing(own, other) == ["avx2 pass bf16 1", "scalar pass bf16 1"]


@pytest.mark.slow
@pytest.mark.skipif(bool(aarch64.missing()), reason=aarch64.missing())
def test_an_emulated_aarch64_has_the_same_bits(here, tmp_path):
    program = aarch64.build_program(tmp_path, aarch64.build_library(tmp_path), aarch64.COMPILER)
    emulated = aarch64.digests(program, 6, aarch64.EMULATED)
    assert {isa for isa, _ in emulated} == {"scalar", "neon"}
    assert aarch64.differing(here, emulated) == []
