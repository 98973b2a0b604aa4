"""What both of vLLM's runners do around drafting, from the scheduler's output on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_cursor import AdmittedRequest
from vllm_emssd.draft_length import AutoDraftLength, FixedDraftLength, StepCosts
from vllm_emssd.integration.costs import StepCostMeter
from vllm_emssd.integration.forward_clock import TimedByClock
from vllm_emssd.integration.kv_cache import keep_windows_whole, refuse_states
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.proposers.mixed import DRAFT_MODEL, LLMA


class DraftingRunner:
    """Goes in front of either of vLLM's runners. What makes the drafts there is its
    `_proposer`: it has a `policy` if its lengths can be automatic."""

    emssd_config: EmssdConfig
    _ranks: Ranks
    _proposer: Any  # made with the KV cache
    step_costs: StepCostMeter | None = None  # with automatic lengths
    _automatic: AutoDraftLength | None = None  # likewise

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        refuse_states(specs)
        uses_draft_model = self.emssd_config.uses_draft_model
        return keep_windows_whole(specs) if uses_draft_model else specs

    def _automatic_lengths(
        self,
        measured: StepCosts,
        target: TimedByClock,
        drafter: TimedByClock | None,
        **options: bool,
    ) -> AutoDraftLength:
        """Lengths by these costs, which live forwards keep fresh from now on."""
        self.step_costs = StepCostMeter(measured, target, drafter, self._ranks)
        most = self.emssd_config.max_draft_tokens
        self._automatic = AutoDraftLength(self.step_costs.costs, most, **options)
        return self._automatic

    def fix_draft_length(self, num_draft_tokens: int | None) -> None:
        """See the worker's `emssd_fix_draft_length`."""
        config, automatic = self.emssd_config, self._automatic
        if automatic is None or not config.uses_draft_model:
            raise ValueError(
                'draft lengths can be fixed while the engine runs with "draft_length": '
                '"auto" and a draft model'
            )
        most = config.num_speculative_tokens
        if num_draft_tokens is not None and not 0 <= num_draft_tokens <= most:
            raise ValueError(
                f"{num_draft_tokens} drafts: give 0 to {most}, the engine's "
                "num_speculative_tokens, or None for automatic lengths"
            )
        if config.copies:
            self._proposer.only = None if num_draft_tokens is None else DRAFT_MODEL
        if num_draft_tokens is None:
            self._draft_automatically()
        else:
            self._proposer.policy = FixedDraftLength(num_draft_tokens)

    def use_proposer(self, proposer: str | None) -> None:
        """See the worker's `emssd_use_proposer`."""
        if self.emssd_config.proposer != "mixed":
            raise ValueError('only "proposer": "mixed" has proposers to choose from')
        if proposer not in (DRAFT_MODEL, LLMA, None):
            raise ValueError(
                f'{proposer!r} makes no drafts here: give "{DRAFT_MODEL}", "{LLMA}", '
                "or None for both"
            )
        self._proposer.only = proposer
        if self._automatic is not None:
            self._draft_automatically()

    def _draft_automatically(self) -> None:
        assert self._automatic is not None
        self._automatic.forget_drafts()  # what became of them was not observed
        self._proposer.policy = self._automatic


def block_updates(
    scheduler_output: SchedulerOutput, group: int
) -> tuple[list[AdmittedRequest], list[tuple[str, list[int]]]]:
    """A step's block allocations, as `DraftCursor.update_blocks` takes them: of new and
    resumed requests, and what others got in addition."""
    admitted = [
        AdmittedRequest(new.req_id, new.block_ids[group], new.num_computed_tokens)
        for new in scheduler_output.scheduled_new_reqs
    ]
    extended = []
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, block_ids, num_computed_tokens in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is None:
            continue
        if req_id in cached.resumed_req_ids:
            admitted.append(
                AdmittedRequest(req_id, block_ids[group], num_computed_tokens)
            )
        else:
            extended.append((req_id, block_ids[group]))
    return admitted, extended


def max_draft_tokens(
    num_tokens: np.ndarray,
    num_speculative_tokens: int,
    max_model_len: int,
    drafter_max_len: int | None = None,
    max_num_tokens: np.ndarray | None = None,
) -> np.ndarray:
    """Most drafts of each request: K, what the model length leaves room for (one place
    stays for the token that the target adds), and what the drafter can take. [num_reqs]

    Args:
        num_tokens: [num_reqs] int64, an upper bound of the known tokens.
        drafter_max_len: None where drafts need no drafter.
        max_num_tokens: [num_reqs] int64 with all that a request may emit, beyond which
            automatic lengths make no drafts; fixed ones do, as stock does.
    """
    room = max_model_len - num_tokens - 1
    if drafter_max_len is not None:
        room = np.minimum(room, drafter_max_len - num_tokens + 1)
    if max_num_tokens is not None:
        room = np.minimum(room, max_num_tokens - num_tokens - 1)
    return np.clip(room, 0, num_speculative_tokens)


def without_first_blocks(
    tables: torch.Tensor, num_skipped: torch.Tensor
) -> torch.Tensor:
    """Block tables, [num_reqs, num_blocks], each from its block `num_skipped`,
    [num_reqs], on; behind its end stands the last one."""
    columns = torch.arange(tables.shape[1], device=tables.device)
    columns = columns + num_skipped.to(torch.int64)[:, None]
    return tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))


def leave_out_adapters(head: torch.nn.Module) -> None:
    """A head shares layers with the target, whose LoRA adapters go by the rows of the
    target's batch."""
    for module in head.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, BaseLayerWithLoRA):
                setattr(module, name, layer.base_layer)
