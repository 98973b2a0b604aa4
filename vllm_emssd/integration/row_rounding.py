"""Rows of the target rounded up on a CPU, where that is cheap.

oneDNN makes its kernels for one row count each, when it first meets it (15 to 70 ms for
16 layers of hidden size 1024), and is slower at odd ones. Ragged batches have any row
count. So with automatic lengths, whose prices tell what a row more costs, a few rows of
no request are computed along where they cost next to nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_emssd.draft_length import CostTable

if TYPE_CHECKING:
    from vllm_emssd.integration.step_costs import StepCostMeter

_MULTIPLES = (8, 4)  # the first that is cheap enough
_FROM_ROWS = 16  # fewer are few row counts
_MOST_MORE = 0.02  # of the forward's price


def rounded_rows(num_rows: int, most: int, target: CostTable) -> int:
    """Rows to compute for `num_rows`, at most `most`."""
    if num_rows < _FROM_ROWS:
        return num_rows
    price = target.at(num_rows)
    for multiple in _MULTIPLES:
        rounded = -(-num_rows // multiple) * multiple
        if rounded <= most and target.at(rounded) <= (1 + _MOST_MORE) * price:
            return rounded
    return num_rows


class RoundedRowsMixin:
    """Goes in front of vLLM's CPU runner, which takes padded rows as those of a graph:
    they have no request and no K/V slot."""

    _step_costs: StepCostMeter | None
    max_num_tokens: int
    parallel_config: Any
    lora_config: Any
    model_config: Any

    def _determine_batch_execution_and_padding(
        self, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        mode, batch, should_ubatch, across_dp, stats = (
            super()._determine_batch_execution_and_padding(  # type: ignore[misc]
                num_tokens, *args, **kwargs
            )
        )
        if self._rounds_rows and across_dp is None and batch.num_tokens == num_tokens:
            assert self._step_costs is not None
            target = self._step_costs.costs.target
            rounded = rounded_rows(num_tokens, self.max_num_tokens, target)
            batch = replace(batch, num_tokens=rounded)
        return mode, batch, should_ubatch, across_dp, stats

    @property
    def _rounds_rows(self) -> bool:
        """With prices and for a single rank. Not with LoRA, which maps rows one by one,
        and not where a row of nobody would choose experts."""
        return (
            self._step_costs is not None
            and self.parallel_config.world_size == 1
            and self.lora_config is None
            and not self.model_config.is_moe
        )
