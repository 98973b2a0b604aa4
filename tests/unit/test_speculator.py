"""What the V2 runner's speculator tells the draft-length policy."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.config.compilation import CUDAGraphMode

import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner
from vllm_emssd.integration.v2.drafting_speculator import PendingDrafts
from vllm_emssd.integration.v2.eagle_speculator import (
    BatchExecutionDescriptor,
    EagleSpeculator,
    UnpadEagleSpeculator,
)
from vllm_emssd.integration.v2.speculator import UnpadSpeculator
from vllm_emssd.metrics import Counters
from vllm_emssd.verification import ScheduledStep


def test_placeholders_under_a_grammar_are_no_rejected_drafts() -> None:
    """All K stay scheduled there, however many were made."""
    observed: list[Any] = []
    speculator = SimpleNamespace(
        _admission_ids=np.arange(3),
        _cursor=SimpleNamespace(record_acceptance=lambda *told: None),
        _source=None,
        is_automatic=True,
        policy=SimpleNamespace(observe_step=lambda *seen: observed.extend(seen)),
    )
    step = ScheduledStep(
        ["free", "none made", "two made"],
        num_scheduled_tokens=np.full(3, 5),
        num_draft_tokens=np.full(3, 4),
        is_decode=np.ones(3, dtype=bool),
        is_sampling=np.ones(3, dtype=bool),
        num_forbidden=np.array([0, 4, 2]),
    )
    accepted = np.array([3, 0, 2])
    unverified: Any = SimpleNamespace(slots=np.arange(3))
    pending = PendingDrafts(
        step, np.arange(3), unverified, np.zeros(3, dtype=bool), None
    )
    UnpadSpeculator._settle(speculator, pending, accepted)  # type: ignore[arg-type]
    num_drafts, num_accepted = observed
    assert num_drafts.tolist() == [4, 0, 2]
    assert num_accepted.tolist() == [3, 0, 2]


def test_drafts_that_the_device_left_out_bring_nothing() -> None:
    """They are no drafts that were verified, but were made in vain."""
    learned: list[Any] = []
    counters = Counters()
    speculator: Any = object.__new__(UnpadSpeculator)
    vars(speculator).update(
        _admission_ids=np.arange(2),
        _cursor=SimpleNamespace(record_acceptance=lambda *told: None),
        _source=None,
        is_automatic=True,
        policy=SimpleNamespace(observe_step=lambda *seen: learned.extend(seen)),
        _pending_steps=deque(),
        num_speculative_steps=4,
        counters=counters,
    )
    step = ScheduledStep(
        ["two left out", "none left out"],
        num_scheduled_tokens=np.full(2, 5),
        num_draft_tokens=np.full(2, 4),
        is_decode=np.ones(2, dtype=bool),
        is_sampling=np.ones(2, dtype=bool),
    )
    rejected: Any = SimpleNamespace(wait=lambda: np.array([0, 1]))
    unverified: Any = SimpleNamespace(slots=np.arange(2))
    copied = np.zeros(2, dtype=bool)
    pending = PendingDrafts(step, np.arange(2), unverified, copied, rejected)
    speculator._pending_steps.append(pending)
    speculator.record_acceptance(np.array([3, 4]))  # two accepted, and three
    num_made, num_accepted = learned
    assert num_made.tolist() == [4, 4]
    assert num_accepted.tolist() == [2, 3]
    assert counters.num_draft_tokens == 2 + 4


@pytest.mark.parametrize(
    ("is_automatic", "num_speculative_steps", "expected"),
    [(True, 4, {2, 3, 4}), (True, 7, {2, 3, 4}), (False, 7, {4})],
)
def test_a_head_has_graphs_of_each_number_of_drafts(
    monkeypatch: pytest.MonkeyPatch,
    is_automatic: bool,
    num_speculative_steps: int,
    expected: set[int],
) -> None:
    """Which vLLM then finds by the number. Copies may be longer."""
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import cudagraph_utils

    full, recorded = CUDAGraphMode.FULL, set()
    batch = BatchExecutionDescriptor(full, 8, 8, uniform_token_count=1)
    graphs = SimpleNamespace(_capture_descs={full: [batch]}, graphs=recorded)
    speculator = object.__new__(UnpadEagleSpeculator)
    speculator.decode_cudagraph_manager = graphs
    speculator.supports_decode_metadata_update = True
    speculator.is_automatic, speculator._max_drafts = is_automatic, 4
    speculator.num_speculative_steps = num_speculative_steps
    monkeypatch.setattr(
        EagleSpeculator,
        "capture",
        lambda self: recorded.update(graphs._capture_descs[full]),
    )
    speculator.capture()
    find = cudagraph_utils.SpeculatorCudaGraphManager.specialize_spec_tokens
    assert len(recorded) == len(expected)
    for num_drafts in expected:
        found = find(graphs, batch, num_drafts)
        assert found.cg_mode == full
        assert found.num_speculative_tokens == num_drafts
