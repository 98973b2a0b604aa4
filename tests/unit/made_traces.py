"""Traces made up for tests: acceptance is given, tokens do not matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_emssd.simulate.costs import CostFile, ModelCosts
from vllm_emssd.simulate.traces import TRACE_FORMAT, RequestTrace, Trace, TraceHeader


def header(k: int) -> TraceHeader:
    return TraceHeader(
        format=TRACE_FORMAT,
        target="target",
        draft="draft",
        k=k,
        confidence="made up",
        provenance={"command": "a test"},
    )


def request(
    num_prompt: int, accepted: Sequence[int], k: int, confidence: float = 0.5
) -> RequestTrace:
    num_output = len(accepted) + k
    return RequestTrace(
        prompt_ids=list(range(num_prompt)),
        output_ids=list(range(100, 100 + num_output)),
        accepted=list(accepted),
        confidences=[[confidence] * k for _ in accepted],
    )


def trace(*requests: RequestTrace) -> Trace:
    k = len(requests[0].confidences[0])
    return Trace(header=header(k), requests=list(requests))


def constant_trace(
    accepted: int, k: int, num_requests: int = 4, num_output: int = 40
) -> Trace:
    """The same acceptance everywhere, and a confidence that tells it."""
    sure = 0.95 if accepted else 0.05
    return trace(
        *(request(5, [accepted] * num_output, k, sure) for _ in range(num_requests))
    )


def random_trace(seed: int, k: int, num_requests: int = 5, longest: int = 30) -> Trace:
    rng = np.random.default_rng(seed)
    return trace(
        *(
            request(
                int(rng.integers(1, 20)),
                rng.integers(0, k + 1, rng.integers(1, longest)).tolist(),
                k,
            )
            for _ in range(num_requests)
        )
    )


def straight_costs(draft_row_ms: float = 1.0, speculation_ms: float = 0.5) -> CostFile:
    """Target: 9 ms and 1 a row; fixed: 1 ms and 1 a request."""
    return CostFile(
        target=ModelCosts(model="target", points=[(1, 10.0), (1000, 1009.0)]),
        draft=ModelCosts(
            model="draft",
            points=[(1, draft_row_ms), (1000, 1000 * draft_row_ms)],
        ),
        fixed=[(1, 2.0), (1000, 1001.0)],
        speculation_ms=speculation_ms,
        provenance={"machine": "none"},
    )
