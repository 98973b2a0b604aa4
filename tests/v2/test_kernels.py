"""The kernels by themselves."""

from __future__ import annotations

from tests.v2.copies import OPTIONS, SEEDS
from tests.v2.results import results_of


def test_copies_are_those_of_the_proposer_for_v1() -> None:
    """Token for token: the runs compare them themselves."""
    runs = results_of("tests.v2.copies")
    assert len(runs) == len(OPTIONS) * len(SEEDS)
    for name in ("accepted", "edits", "followed prompts"):
        assert sum(run[name] for run in runs) > 5


def test_the_kernels_compile_for_a_gpu() -> None:
    sizes = results_of("tests.v2.compiled")
    assert len(sizes) == 6
    assert min(sizes.values()) > 0
