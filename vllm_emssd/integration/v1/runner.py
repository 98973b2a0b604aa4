"""vLLM's V1 model runner with unpadded drafting after each step.

The runner keeps all it does; this class listens to the scheduler's block
allocations, replaces the proposal of drafts, and counts. `UnpadRunnerMixin` goes in
front of vLLM's CPU and GPU runner classes alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_emssd.integration.cpu.row_padding import PaddedRowsMixin
from vllm_emssd.integration.drafting import block_updates, max_draft_tokens
from vllm_emssd.integration.request_options import reference_of
from vllm_emssd.integration.v1.startup import StartUpMixin
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.verification import ScheduledStep, pad_to_longest


class UnpadRunnerMixin(StartUpMixin):
    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        self._has_drafts = bool(scheduler_output.scheduled_spec_decode_tokens)
        finished = scheduler_output.finished_req_ids
        self._proposer.release(finished)
        for req_id in finished:
            self._forget_drafts(req_id)
        self._request_limits.release(finished)
        self._request_limits.admit(scheduler_output.scheduled_new_reqs)
        self._admit_references(scheduler_output)
        if self._cursor is not None:
            updates = block_updates(scheduler_output, self.drafter.kv_cache_gid)
            fresh = self._cursor.update_blocks(*updates)
            if self._hidden_states is not None:
                self._hidden_states.forget(fresh)
        return super()._update_states(scheduler_output)

    def _admit_references(self, scheduler_output: SchedulerOutput) -> None:
        if not self.emssd_config.copies:
            return
        vocab_size = self.model_config.get_vocab_size()
        for new in scheduler_output.scheduled_new_reqs:
            reference = reference_of(new.sampling_params, vocab_size)
            if reference is not None:
                self._proposer.add_reference(new.req_id, reference)

    def _forget_drafts(self, req_id: str) -> None:
        self.num_real_drafts.pop(req_id, None)
        if self.paged_drafter is not None:
            self.paged_drafter.draft_probs.pop(req_id, None)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Stock stops drafting for all once one request is too long; we cap each."""
        return True

    def propose_draft_token_ids(  # type: ignore[override]
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        sampling_metadata: SamplingMetadata,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """What the target accepted is recorded, drafts are planned, and made."""
        if self._hidden_states is not None:
            table = self.input_batch.block_table[self.drafter.kv_cache_gid]
            num_rows = scheduler_output.total_num_scheduled_tokens
            slots = table.slot_mapping.gpu[:num_rows]
            self._hidden_states.keep(aux_hidden_states or [hidden_states], slots)
        step = self._record_verified(scheduler_output, sampled_token_ids)
        batch = self._plan(step)
        drafts = [[] for _ in step.req_ids] if batch is None else self._draft(batch)
        self._publisher.step_done()
        if self.step_costs is not None:
            is_idle = not self._has_drafts and not any(drafts)
            verifies = bool(step.num_draft_tokens.any())
            num_reqs = int(step.is_decode.sum())
            self.step_costs.step_done(num_reqs, not is_idle, verifies)
        return drafts

    def _record_verified(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]
    ) -> ScheduledStep:
        """Tell the proposer what was accepted, and count the step."""
        num_sampled = np.fromiter(map(len, sampled_token_ids), np.int64)
        step = self._scheduled_step(scheduler_output, num_sampled > 0)
        num_real = step.num_draft_tokens - step.num_forbidden
        for req_id in list(self.num_real_drafts):
            i = self.input_batch.req_id_to_index.get(req_id)
            if i is None or not step.is_sampling[i]:
                continue  # left out of the step: its drafts stay pending
            self._forget_drafts(req_id)
            self._tell_proposer(req_id, int(num_real[i]), int(num_sampled[i]) - 1)
        step.count(
            num_sampled,
            self.emssd_config.num_speculative_tokens,
            self.counters,
            has_draft_model=self._cursor is not None,
            has_head=self._hidden_states is not None,
        )
        return step

    def _plan(self, step: ScheduledStep) -> DraftBatch | None:
        """What drafts are made for, and how many at most; None where none are: where
        drafts have not paid for long, most steps end here."""
        proposer, num_reqs = self._proposer, len(step.req_ids)
        if isinstance(proposer, DraftModelProposer) and proposer.skips_step(
            int(step.is_sampling.sum())
        ):
            return None
        input_batch = self.input_batch
        num_tokens = input_batch.num_tokens_no_spec[:num_reqs].astype(np.int64)
        num_computed = input_batch.num_computed_tokens_cpu[:num_reqs]
        return DraftBatch(
            req_ids=step.req_ids,
            token_ids=input_batch.token_ids_cpu,
            num_tokens=num_tokens,
            num_prompt_tokens=input_batch.num_prompt_tokens[:num_reqs].astype(np.int64),
            num_scheduled_tokens=step.num_scheduled_tokens,
            num_prefilled_tokens=num_computed + step.num_scheduled_tokens,
            is_sampling=step.is_sampling,
            max_draft_tokens=self._max_draft_tokens(num_tokens),
        )

    def _draft(self, batch: DraftBatch) -> list[list[int]]:
        try:
            drafts: list[list[int]] = self._proposer.propose(batch)
        except Exception as error:
            self._failures.take(error)
            drafts = [[] for _ in batch.req_ids]
            # The proposer hears that none of those it may have made were verified.
            self.num_real_drafts.update(dict.fromkeys(batch.req_ids, 0))
        each = zip(batch.req_ids, drafts, strict=True)
        self.num_real_drafts.update((req_id, len(d)) for req_id, d in each if d)
        if not self.emssd_config.unpad_inputs:
            last = batch.token_ids[np.arange(batch.num_reqs), batch.num_tokens - 1]
            drafts = pad_to_longest(drafts, batch.is_sampling.tolist(), last.tolist())
        return drafts

    # ------------------------------------------------------------ parts of a step

    def _scheduled_step(
        self, scheduler_output: SchedulerOutput, is_sampling: np.ndarray
    ) -> ScheduledStep:
        req_ids = self.input_batch.req_ids
        num_reqs = len(req_ids)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        num_rows, num_real = np.zeros((2, num_reqs), dtype=np.int64)
        if drafts:
            num_rows[:] = [len(drafts.get(req_id, ())) for req_id in req_ids]
            num_real[:] = [self.num_real_drafts.get(req_id, 0) for req_id in req_ids]
        scheduled = scheduler_output.num_scheduled_tokens
        num_computed = self.input_batch.num_computed_tokens_cpu[:num_reqs]
        return ScheduledStep(
            req_ids=req_ids,
            num_scheduled_tokens=np.fromiter(
                (scheduled[req_id] for req_id in req_ids), np.int64, num_reqs
            ),
            num_draft_tokens=num_rows,
            is_decode=num_computed >= self.input_batch.num_prompt_tokens[:num_reqs],
            is_sampling=is_sampling,
            num_forbidden=np.maximum(num_rows - num_real, 0),
        )

    def _tell_proposer(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        try:
            self._proposer.record_verified(req_id, num_drafts, num_accepted)
        except Exception as error:
            self._failures.take(error)
            if self._cursor is not None:
                # Whether it moved or not: these drafts must not count later.
                self._cursor.record_fed_drafts(req_id, 0)

    def _max_draft_tokens(self, num_tokens: np.ndarray) -> np.ndarray:
        """Most drafts of each request. [num_reqs] int64"""
        requests, req_ids = self.requests, self.input_batch.req_ids
        num_emitted = [requests[r].sampling_params.max_tokens for r in req_ids]
        limits = self.input_batch.num_prompt_tokens[: len(req_ids)] + num_emitted
        drafter = None if self.emssd_config.copies else self.paged_drafter
        most = max_draft_tokens(
            num_tokens,
            self.num_spec_tokens,
            self.max_model_len,
            None if drafter is None else drafter.max_model_len,
            limits if self.emssd_config.draft_length == "auto" else None,
        )
        most[num_tokens >= limits] = 0  # this step was their last
        most[self._requests_of_custom_logitsprocs()] = 0
        self._request_limits.apply(most, req_ids)
        return most


class UnpadCPUModelRunner(PaddedRowsMixin, UnpadRunnerMixin, CPUModelRunner):
    pass


class UnpadGPUModelRunner(UnpadRunnerMixin, GPUModelRunner):
    pass
