"""The drafting half of a simulated step: our proposers, replaying a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vllm_emssd.bench.methods import CHECK_LENGTH
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy, StepCosts
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copy_lengths import LengthsByAcceptance
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.llma import LlmaProposer
from vllm_emssd.simulate.replay_drafter import DrafterSetting, ReplayDrafter
from vllm_emssd.simulate.request import SimulatedRequest


def draft_batch(
    requests: Sequence[SimulatedRequest], k: int, knows_the_end: bool
) -> DraftBatch:
    """As the runner tells a proposer.

    Args:
        knows_the_end: automatic lengths draft no more than a request still wants.
    """

    def each(values: Sequence[int]) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    left = each([r.max_tokens - r.num_output for r in requests])
    most = np.clip(left - 1, 0, k) if knows_the_end else np.where(left > 0, k, 0)
    return DraftBatch(
        req_ids=[r.req_id for r in requests],
        token_ids=np.stack([r.token_ids for r in requests]),
        num_tokens=each([r.num_tokens for r in requests]),
        num_prompt_tokens=each([r.num_prompt for r in requests]),
        num_scheduled_tokens=each([r.num_scheduled for r in requests]),
        num_prefilled_tokens=each([r.num_computed for r in requests]),
        is_sampling=np.array([r.num_sampled > 0 for r in requests]),
        max_draft_tokens=most,
    )


class ModelDrafting:
    """The draft-model proposer and its cursor, on a replayed drafter."""

    def __init__(
        self,
        policy: DraftLengthPolicy,
        counters: Counters,
        setting: DrafterSetting,
        knows_the_end: bool,
    ) -> None:
        self._setting, self._knows_the_end = setting, knows_the_end
        self._drafter = ReplayDrafter(setting)
        # One block a request: nothing is shared, so nothing is found cached.
        self._cursor = DraftCursor(setting.max_num_seqs, setting.max_model_len)
        self._free_blocks = list(range(setting.max_num_seqs))
        self._blocks: dict[str, int] = {}
        self._proposer = DraftModelProposer(
            self._drafter, self._cursor, policy, counters
        )
        self.record_verified = self._proposer.record_verified

    def admit(self, req_id: str, num_cached: int) -> None:
        """A request comes; both models have the K/V of its first tokens."""
        self._blocks[req_id] = block = self._free_blocks.pop()
        self._cursor.update_blocks([AdmittedRequest(req_id, [block], 0)], [])
        self._cursor.advance(req_id, num_cached)

    def draft(self, requests: Sequence[SimulatedRequest]) -> tuple[float, float]:
        """Give every request its next drafts. Returns the milliseconds of forwards, and
        those that launching them takes the host."""
        num_sampling = sum(r.num_sampled > 0 for r in requests)
        if self._proposer.skips_step(num_sampling):
            for request in requests:
                request.drafts = []
            return 0.0, 0.0
        self._drafter.begin_step(requests)
        drafts = self._proposer.propose(self._batch(requests))
        for request, tokens in zip(requests, drafts, strict=True):
            request.drafts = tokens
        return self._drafter.take_ms()

    def _batch(self, requests: Sequence[SimulatedRequest]) -> DraftBatch:
        return draft_batch(requests, self._setting.k, self._knows_the_end)

    def release(self, req_ids: Sequence[str]) -> None:
        self._proposer.release(req_ids)
        self._free_blocks += [self._blocks.pop(req_id) for req_id in req_ids]


class OracleDrafting(ModelDrafting):
    """Just the drafts that will be accepted."""

    def _batch(self, requests: Sequence[SimulatedRequest]) -> DraftBatch:
        batch = super()._batch(requests)
        acceptable = [r.num_acceptable for r in requests]
        most = np.minimum(batch.max_draft_tokens, acceptable)
        return replace(batch, max_draft_tokens=most)


class CopyDrafting:
    """`llma`: copies from the request's own text, which cost rows of the target only.

    Args:
        costs: to choose lengths by; None to verify every copy in full.
        is_oracle: copies end where they would be rejected.
    """

    def __init__(self, costs: StepCosts | None, k: int, is_oracle: bool) -> None:
        self._k, self._is_oracle = k, is_oracle
        self._proposer = LlmaProposer(CHECK_LENGTH, k, LengthsByAcceptance(costs))
        self.record_verified = self._proposer.record_verified
        self.release = self._proposer.release

    def admit(self, req_id: str, num_cached: int) -> None:
        """Nothing is kept of what is cached."""

    def draft(self, requests: Sequence[SimulatedRequest]) -> tuple[float, float]:
        batch = draft_batch(requests, self._k, knows_the_end=True)
        drafts = self._proposer.propose(batch)
        for request, tokens in zip(requests, drafts, strict=True):
            request.drafts = tokens
            if self._is_oracle:
                del tokens[request.num_accepted() :]
        return 0.0, 0.0


class PaddedDrafting(ModelDrafting):
    """vLLM's own `draft_model`: the drafts are those of a fixed length, the rows not.

    The first forward has all rows that the target had and one more a request, at least
    K+2 of a decoding one; the others have one row of every request.
    """

    def __init__(
        self,
        policy: DraftLengthPolicy,
        counters: Counters,
        setting: DrafterSetting,
        knows_the_end: bool,
    ) -> None:
        # What our proposer would feed is neither limited nor counted.
        no_limit = setting.max_num_seqs * setting.max_model_len
        no_limit_setting = replace(setting, max_num_rows=no_limit)
        super().__init__(policy, Counters(), no_limit_setting, knows_the_end)
        self._counters = counters

    def draft(self, requests: Sequence[SimulatedRequest]) -> tuple[float, float]:
        super().draft(requests)
        setting, k = self._setting, self._setting.k
        least = [1 + k if r.is_decode else 0 for r in requests]
        scheduled = [r.num_scheduled for r in requests]
        first = sum(map(max, least, scheduled)) + len(requests)
        prompts = sum(r.num_scheduled for r in requests if not r.is_decode)
        rows = np.array([first] + [len(requests)] * (k - 1))
        self._counters.num_draft_forwards += k
        self._counters.num_draft_rows += int(rows.sum())
        self._counters.num_draft_rows_decode += int(rows.sum()) - prompts
        ms, host_ms = setting.costs.draft.ms(rows), setting.launches.ms(rows)
        return float(ms.sum()), float(host_ms.sum())
