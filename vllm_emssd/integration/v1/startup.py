"""What makes a V1 runner of ours ready: its parts, and what its forwards cost."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.draft_length import CostTable, DraftLengthPolicy, StepCosts
from vllm_emssd.integration.costs import CONTEXT, FIXED_MS, TIMED_ROWS, time_forwards
from vllm_emssd.integration.cpu.row_padding import ROW_COUNTS, RowPadding
from vllm_emssd.integration.drafting import DraftingRunner, leave_out_adapters
from vllm_emssd.integration.failure_policy import FailurePolicy
from vllm_emssd.integration.forward_clock import ForwardTimer
from vllm_emssd.integration.hooks.hook import installed
from vllm_emssd.integration.kv_cache import draft_group, remake_metadata_builders
from vllm_emssd.integration.metrics import Publisher
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.integration.request_options import RequestLimits
from vllm_emssd.integration.runners import advise_v2, refuse_unprepared_v1
from vllm_emssd.integration.v1.drafter import PagedDrafter
from vllm_emssd.integration.v1.eagle_drafter import EagleDrafter
from vllm_emssd.integration.v1.rejection_sampler import (
    UnpadRejectionSampler,
    UnpadSampler,
)
from vllm_emssd.integration.v1.sampling import LOGITSPROCS_HOOK, UnpadSamplingMixin
from vllm_emssd.integration.v1.thinking_budget import ThinkingBudgets
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import Proposer, plugin_proposer
from vllm_emssd.proposers.copy_lengths import CopyLengths, LengthsByAcceptance
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.eagle import EagleProposer
from vllm_emssd.proposers.hidden_states import HiddenStates
from vllm_emssd.proposers.llma import LlmaProposer
from vllm_emssd.proposers.mixed import MixedProposer


class StartUpMixin(DraftingRunner, UnpadSamplingMixin):
    """Owns the proposer, the draft cursor and the counters of one rank."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        refuse_unprepared_v1(vllm_config, device)
        advise_v2(vllm_config, device)
        spec_config = vllm_config.speculative_config
        with installed([LOGITSPROCS_HOOK]):
            super().__init__(vllm_config, device)
        # Only now: vLLM's draft-model object refuses to be made for an unpadded batch,
        # which it cannot run. It has the weights and buffers; we run the batch.
        spec_config.disable_padded_drafter_batch = spec_config.uses_draft_kv_cache()
        self.sampler = UnpadSampler(
            self.model_config.logprobs_mode, self.model_config.use_fp64_gumbel
        )
        self.rejection_sampler = UnpadRejectionSampler(
            self.sampler, spec_config, self.device
        )
        self.emssd_config = EmssdConfig.carried_by(vllm_config.additional_config)
        self.counters = Counters()
        self._ranks = Ranks(self.device)
        self._cursor: DraftCursor | None = None  # of the draft model, if any
        self.paged_drafter: PagedDrafter | None = None
        self._hidden_states: HiddenStates | None = None  # for an EAGLE head, if any
        self._row_padding: RowPadding | None = None  # with automatic lengths
        self._request_limits = RequestLimits()
        # Of requests that have some: proposed, filler not counted.
        self.num_real_drafts: dict[str, int] = {}
        self._publisher = Publisher(self.counters, vllm_config)
        self._failures = FailurePolicy(self.counters, self.parallel_config)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.speculative_config.method == "eagle3":
            leave_out_adapters(self.drafter.model)
            # What the head shared with the target in place of its own frees a kernel's
            # handle, which while a model is traced fills the log with an error.
            gc.collect()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        if self.emssd_config.uses_draft_model:  # before vLLM asserts it
            draft_group(kv_cache_config, self.drafter._draft_attn_layer_names)
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.vllm_config.reasoning_config is not None:
            self.input_batch.thinking_budget_state_holder = ThinkingBudgets(
                self.vllm_config, self.device
            )
        if self.emssd_config.uses_draft_model:
            self._make_drafter(kv_cache_config)
        self._proposer = self._make_proposer(DraftLengthPolicy())

    def _make_proposer(
        self, policy: DraftLengthPolicy, costs: StepCosts | None = None
    ) -> Proposer:
        """`policy`: of a draft model; `costs`: with automatic lengths."""
        config = self.emssd_config
        check = None if self._ranks.is_alone else self._ranks.check_agreement
        if (make := plugin_proposer(config.proposer)) is not None:
            return make(config, CopyLengths(costs, check))
        lengths = LengthsByAcceptance(costs, check)
        copying = LlmaProposer(config.check_length, config.copy_length, lengths)
        if not config.uses_draft_model:
            return copying
        assert self.paged_drafter is not None
        assert self._cursor is not None
        parts = (
            self.paged_drafter,
            self._cursor,
            policy,
            self.counters,
            check,
            self.vllm_config.kv_transfer_config is not None,
        )
        drafting = DraftModelProposer(*parts)
        if (states := self._hidden_states) is not None:
            drafting = EagleProposer(
                *parts,
                states=states,
                kv_slots=self.paged_drafter.kv_slots,
                block_size=self.drafter.block_size,
            )
        if not config.copies:
            return drafting
        most = config.num_speculative_tokens
        return MixedProposer(copying, drafting, most, weighs_copies=costs is not None)

    def _make_drafter(self, kv_cache_config: KVCacheConfig) -> None:
        remake_metadata_builders(self.drafter)
        group = kv_cache_config.kv_cache_groups[self.drafter.kv_cache_gid]
        shape = kv_cache_config.num_blocks, group.kv_cache_spec.block_size
        trusts_cache = self.vllm_config.kv_transfer_config is None
        self._cursor = DraftCursor(*shape, trust_cached_blocks=trusts_cache)
        parts = (
            self.drafter,
            self.input_batch,
            self.requests,
            min(self.effective_drafter_max_model_len, self.max_model_len),
        )
        if self.speculative_config.uses_draft_model():
            self.paged_drafter = PagedDrafter(*parts)
            return
        self._hidden_states = HiddenStates(*shape, self.max_num_tokens)
        self.paged_drafter = EagleDrafter(
            *parts, states=self._hidden_states, cursor=self._cursor
        )

    def start_automatic_lengths(self) -> None:
        """Measure costs and draft by them from now on: after warm-up, once."""
        if self.emssd_config.draft_length != "auto":
            return
        target, drafter = ForwardTimer(self.model), self.paged_drafter
        samples = self._time_target(target)
        self._row_padding = RowPadding.measured(samples)
        measured = StepCosts(
            CostTable.from_samples(samples),
            CostTable([1], [0.0]),  # without a draft model
            FIXED_MS,
            computed_rows=self.computed_rows,
        )
        if drafter is not None:
            measured.draft, measured.confidence_ms = drafter.measured_costs()
        is_sampled = self.speculative_config.draft_sample_method == "probabilistic"
        policy = self._automatic_lengths(
            measured, target, drafter, may_trim=not is_sampled
        )
        self._proposer = self._make_proposer(policy, policy.costs)

    def _time_target(self, target: ForwardTimer) -> list[tuple[int, float]]:
        """Forwards (rows, ms) with up to a step's rows, and the next count beyond, as
        more may be quicker. It makes the kernels of all row counts too."""
        most = self.max_num_reqs * (1 + self.num_spec_tokens)
        beyond = next((n for n in TIMED_ROWS if n >= most), most)
        max_rows = min(beyond, self.max_num_tokens)

        @torch.inference_mode()
        def run(num_rows: int) -> None:
            hidden_states, _ = self._dummy_run(
                num_rows,
                force_attention=True,
                uniform_decode=num_rows <= most,
                profile_seq_lens=min(CONTEXT, self.max_model_len),
                # There are no graphs on a CPU, but the drafter runs once, not K times.
                is_graph_capturing=True,
            )
            one_each = np.ones(num_rows, dtype=np.int32)
            with self.maybe_select_dummy_loras(self.lora_config, one_each):
                self.model.compute_logits(hidden_states[:num_rows])

        for num_rows in sorted({*ROW_COUNTS} - {*TIMED_ROWS}):
            if num_rows <= max_rows:
                run(num_rows)
        return time_forwards(run, target, max_rows, self.device)
