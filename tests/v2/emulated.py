"""The drafter over a toy model, launched and replayed, against its text's drafts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.graph_emulator import EmulatedGraph
from tests.v2.toy_speculator import (
    MAX_LEN,
    MAX_REQS,
    VOCAB,
    K,
    ToySpeculator,
    continuation,
)

PADDED = {2: (2, 4, 6), 1: (3, 6)}  # requests of recorded forwards, by rows of each
STEPS = 12
FAULTS = ("moved address", "number of the host", "look")


class EmulatedGraphs:
    """In place of vLLM's graph manager, of forwards with so many rows a request."""

    def __init__(self, drafter: Any, rows: int) -> None:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        self.num_replays = 0
        self._graphs = {}
        self._descs = [
            BatchExecutionDescriptor(CUDAGraphMode.FULL, n * rows, n, rows)
            for n in PADDED[rows]
        ]
        for desc in self._descs:
            graph = self._graphs[desc] = EmulatedGraph()
            graph.record(
                lambda desc=desc: drafter.captured_forward(
                    desc.num_reqs, desc.num_tokens, {}, {}
                )
            )

    def dispatch(self, num_reqs: int, *args: Any, **kwargs: Any) -> Any:
        return next(desc for desc in self._descs if desc.num_reqs >= num_reqs)

    def run_fullgraph(self, desc: Any) -> None:
        self.num_replays += 1
        self._graphs[desc].replay()


class Text:
    """A request as the target sees it, and as the drafter was fed it."""

    def __init__(self, rng: random.Random) -> None:
        self.tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 30))]
        self.num_uncached_tokens = len(self.tokens)

    def accept(self, rng: random.Random, drafts: list[int]) -> None:
        """Some of the drafts, and a token after them."""
        num_accepted = rng.randint(0, len(drafts))
        unfed = max(len(drafts) - max(len(drafts) - 1, 0), 0)
        self.tokens += [*drafts[:num_accepted], rng.randrange(VOCAB)]
        del self.tokens[MAX_LEN:]
        self.num_uncached_tokens += 1 + unfed


def run(seed: int, recorded: bool) -> dict[str, int]:
    """Batches of changing requests and depths. Raises AssertionError."""
    from vllm_emssd.integration.v2.drafter import DeviceDrafter

    rng, stock = random.Random(seed), ToySpeculator()
    token_ids = torch.zeros(MAX_REQS, MAX_LEN, dtype=torch.int32)
    total_len = torch.zeros(MAX_REQS, dtype=torch.int32)
    states = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=token_ids),
        total_len=SimpleNamespace(gpu=total_len),
    )
    drafter = DeviceDrafter(stock, states, MAX_LEN)  # type: ignore[arg-type]
    if recorded:
        drafter.capture()
        stock.graphs = {rows: EmulatedGraphs(drafter, rows) for rows in PADDED}
        stock.cache.zero_()
    texts = [Text(rng) for _ in range(MAX_REQS)]
    num_drafts = 0
    for _ in range(STEPS):
        batch = rng.sample(range(MAX_REQS), rng.randint(1, MAX_REQS))
        for i in batch:
            total_len[i] = len(texts[i].tokens)
            token_ids[i, : len(texts[i].tokens)] = torch.tensor(texts[i].tokens)
        idx_mapping, slots = torch.tensor(batch), np.array(batch)
        lens = np.array([len(texts[i].tokens) for i in batch])
        lacking = np.minimum([texts[i].num_uncached_tokens for i in batch], lens)
        behind = np.flatnonzero(lacking > 2)
        if behind.size:
            drafter.backfill(
                idx_mapping[behind], lacking[behind] - 2, lacking[behind], lens[behind]
            )
        depth = rng.randint(1, K)
        drafter.draft(idx_mapping, depth, lens)
        for row, i in enumerate(slots.tolist()):
            text = texts[i]
            # Beyond the context's end drafts are any tokens.
            made = min(depth, MAX_LEN - len(text.tokens) + 1)
            drafts = stock.draft_tokens[row, :made].tolist()
            assert drafts == continuation(text.tokens, made), (seed, i)
            num_drafts += made
            text.num_uncached_tokens = 0
            text.accept(rng, drafts[: MAX_LEN - len(text.tokens)])
            if len(text.tokens) >= MAX_LEN - 1 and rng.random() < 0.5:
                texts[i] = Text(rng)
    graphs = stock.graphs.values()
    return {"drafts": num_drafts, "replays": sum(g.num_replays for g in graphs)}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Something that a recording holds fast, or that cannot be recorded."""
    from vllm_emssd.integration.v2.drafter import DeviceDrafter

    forward = DeviceDrafter.captured_forward

    def faulty(self: Any, *args: Any, **kwargs: Any) -> None:
        if fault == "moved address":
            self._stock.draft_tokens = self._stock.draft_tokens.clone()
        elif fault == "number of the host":
            self.max_model_len = 9
        elif fault == "look":
            self._num_reqs.item()
        forward(self, *args, **kwargs)
        self.max_model_len = MAX_LEN

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceDrafter, "captured_forward", faulty)
        yield


def error_with(fault: str) -> str | None:
    with planted(fault):
        try:
            run(0, recorded=True)
        except (AssertionError, RuntimeError) as error:
            return repr(error)
    return None


def run_all() -> dict[str, Any]:
    return {
        "launched": [run(seed, recorded=False) for seed in range(4)],
        "replayed": [run(seed, recorded=True) for seed in range(4)],
        "errors": {fault: error_with(fault) for fault in FAULTS},
    }
