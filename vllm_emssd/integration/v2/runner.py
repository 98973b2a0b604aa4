"""vLLM's V2 model runner with the unpadded speculator.

The runner keeps all it does: ragged verification, structured output, logprobs and
sampling go through stock's own paths. This class puts our speculator in, passes on
the scheduler's block allocations and the target's acceptance, tells the scheduler how
many drafts each request has, and with automatic lengths measures what forwards cost.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.async_utils import AsyncOutput, StepTimingCollector
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration.costs import CONTEXT, FIXED_MS, time_forwards
from vllm_emssd.integration.drafting import DraftingRunner
from vllm_emssd.integration.forward_clock import TimedByClock, clock_of
from vllm_emssd.integration.hooks.hook import Hook, installed
from vllm_emssd.integration.metrics import Publisher
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.integration.runners import refuse_deployment, refuse_options
from vllm_emssd.integration.v2.copy_speculator import CopySpeculator
from vllm_emssd.integration.v2.drafting_speculator import DraftingSpeculator
from vllm_emssd.integration.v2.eagle_speculator import UnpadEagleSpeculator
from vllm_emssd.integration.v2.lora_state import RowLoraState
from vllm_emssd.integration.v2.rejection_sampler import UnpadRejectionSamplerV2
from vllm_emssd.integration.v2.speculator import UnpadSpeculator
from vllm_emssd.metrics import Counters

logger = init_logger("vllm.emssd.v2")

INIT_SPECULATOR_HOOK = Hook(
    target="vllm.v1.worker.gpu.model_runner:init_speculator",
    why="the V2 runner builds its speculator by a closed list",
    signature="vllm_config, device, req_states",
    remove_when="a subclass of the V2 runner can choose its speculator",
    make=lambda stock: _make_speculator,
    when="while an emssd worker makes its V2 runner",
    patch="0007-speculator-registry",
)


def _make_speculator(
    vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> DraftingSpeculator | CopySpeculator:
    config = EmssdConfig.carried_by(vllm_config.additional_config)
    speculator: type[DraftingSpeculator | CopySpeculator] = UnpadSpeculator
    if not config.uses_draft_model:
        speculator = CopySpeculator
    elif vllm_config.speculative_config.method == "eagle3":
        speculator = UnpadEagleSpeculator
    return speculator(vllm_config, device, req_states=req_states)


class TargetTiming(TimedByClock, StepTimingCollector):
    """Takes the place of vLLM's collector, which the runner tells of each forward, and
    can time them all."""

    def __init__(self) -> None:
        super().__init__()
        self._num_rows = 0  # of a forward that began

    def record_batch(self, input_batch: InputBatch, full_cudagraph: bool) -> None:
        super().record_batch(input_batch, full_cudagraph)
        self._num_rows = input_batch.num_tokens_after_padding

    def forward_start(self) -> None:
        super().forward_start()
        self.clock.start()

    def model_executed(self) -> None:
        """The forward was called, if there was one."""
        if self._num_rows:
            self.clock.stop(self._num_rows)
        self._num_rows = 0


class UnpadGPUModelRunnerV2(DraftingRunner, GPUModelRunner):
    speculator: DraftingSpeculator | CopySpeculator
    rejection_sampler: RejectionSampler | None
    cudagraph_manager: ModelCudaGraphManager | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.emssd_config = EmssdConfig.carried_by(vllm_config.additional_config)
        refuse_options(self.emssd_config)
        refuse_deployment(vllm_config)
        with installed([INIT_SPECULATOR_HOOK]):
            super().__init__(vllm_config, device)
        self._is_async = vllm_config.scheduler_config.async_scheduling
        # With acceptance not yet recorded, oldest first; None for a step of no rows.
        self._outputs: deque[AsyncOutput | None] = deque()
        self._ranks = Ranks(self.device)
        self.lora_state = RowLoraState(self.max_num_reqs)
        self.step_timing = self._target_timing = TargetTiming()
        self._publisher: Publisher | None = None  # once the warm-up is over

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if type(self.rejection_sampler) is RejectionSampler:  # no model's own
            self.rejection_sampler = UnpadRejectionSamplerV2(
                self.sampler, self.vllm_config.speculative_config, self.device
            )
            # Where sampling is sharded, vLLM drops logprobs of named tokens, which its
            # own rejection sampler has none of.
            dims = self.sampler.get_logprobs_dims
            self.sampler.get_logprobs_dims = lambda slots, **_: dims(slots)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        # Adaptive verification wants them itself. A head's first pass is recorded for K
        # + 1 rows of each request, and replayed on the target's attention metadata, of
        # which FlashAttention 3 lays out some by the number of requests with padding.
        if self.adaptive_verification is None and not self.speculator.has_head:
            self._want_varlen_graphs()

    def _want_varlen_graphs(self) -> None:
        """Stock records decoding steps in which all requests have K drafts; let it
        record those of any lengths instead, none among them, where attention can."""
        graphs = self.cudagraph_manager
        assert graphs is not None
        mode = graphs.cudagraph_mode
        are_decodes_apart = (
            mode.separate_routine() and mode.decode_mode() == CUDAGraphMode.FULL
        )
        is_plain = self.fast_prefill is None and self.ubatch_runner is None
        if not are_decodes_apart or not is_plain:
            return
        unsupported = get_varlen_cudagraph_unsupported_backend(
            self.attn_groups, self.vllm_config, self.decode_query_len
        )
        if unsupported is not None:
            logger.warning(
                "Steps with other than K drafts run without full CUDA graphs: %s "
                "cannot be replayed with any number of rows a request.",
                unsupported[0],
            )
            return
        self.cudagraph_manager = ModelCudaGraphManager(
            self.vllm_config,
            self.device,
            mode,
            decode_query_len=self.decode_query_len,
            lora_capture_cases=self.lora_capture_cases,
            varlen_decode=True,
        )

    def start_automatic_lengths(self) -> None:
        """Warm-up is over, whose requests do not count: where it was asked for, measure
        costs and draft by them from now on."""
        self._record_acceptance(num_late=0)
        self.speculator.forget_warm_up()
        if self.emssd_config.draft_length == "auto":
            assert isinstance(self.speculator, DraftingSpeculator)
            self.speculator.policy = self._automatic_lengths(
                self._measured_costs(self.speculator),
                self._target_timing,
                self.speculator.drafter,
                may_trim=False,
                uses_confidence=False,
            )
        self.speculator.counters.reset()
        self._publisher = Publisher(self.speculator.counters, self.vllm_config)

    def _measured_costs(self, speculator: DraftingSpeculator) -> StepCosts:
        device, target, drafter = self.device, self._target_timing, speculator.drafter
        target.clock = clock_of(device)
        most = self.max_num_reqs * self.decode_query_len
        most = min(most, self.max_num_tokens - self.max_num_reqs)  # see _dummy_run
        speculator.skips_dummy_drafting = True
        samples = time_forwards(
            lambda num_rows: self._dummy_run(num_rows, context_len=CONTEXT),
            target,
            max(most, 1),
            device,
        )
        speculator.skips_dummy_drafting = False
        target_costs = CostTable.from_samples(samples, self._computed_rows())
        drafter.clock = clock_of(device)
        drafted = time_forwards(
            lambda num_reqs: speculator.dummy_forward(num_reqs, self._dummy_run),
            drafter,
            drafter.max_num_reqs,
            device,
        )
        target.take_timings()  # of dummy runs that made drafts
        num_reqs = range(drafter.max_num_reqs + 1)
        draft_costs = CostTable.from_samples(
            drafted, map(drafter.computed_rows, num_reqs)
        )
        return StepCosts(target_costs, draft_costs, FIXED_MS)

    def _computed_rows(self) -> list[int]:
        """Of a decoding step with 0, 1, 2, ... rows, as far as CUDA graphs go."""
        graphs, query_len = self.cudagraph_manager, self.decode_query_len
        assert graphs is not None
        most = self.compilation_config.max_cudagraph_capture_size or 0
        return [
            graphs.dispatch(
                -(-rows // query_len), rows, None, 0, max_query_len=query_len
            ).num_tokens
            for rows in range(most + 1)
        ]

    @property
    def counters(self) -> Counters:
        self._record_acceptance()
        return self.speculator.counters

    @property
    def _proposer(self) -> DraftingSpeculator | CopySpeculator:  # type: ignore[override]
        return self.speculator

    # ------------------------------------------------------------ a step

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        self._record_acceptance()
        if self._is_async:
            scheduler_output = self.speculator.with_drafts_made(scheduler_output)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._verifies = bool(drafts)
        if self.lora_config is not None:
            self.lora_state.num_drafts = {r: len(d) for r, d in drafts.items()}
        self._set_verification_costs(scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        self._target_timing.model_executed()
        if scheduler_output.total_num_scheduled_tokens == 0:
            self._outputs.append(None)
        return output

    def _set_verification_costs(self, scheduler_output: SchedulerOutput) -> None:
        """Adaptive verification decides by the costs that automatic lengths go by."""
        adaptive, meter = self.adaptive_verification, self.step_costs
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if adaptive is not None and meter is not None and drafts:
            adaptive.cost_tables = meter.costs.by_rows_verified(
                len(scheduler_output.num_scheduled_tokens),
                scheduler_output.total_num_scheduled_tokens,
                max(map(len, drafts.values())),
            )

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """The next input of a streaming session comes as a new request, which has a
        slot already."""
        new_ids = {new.req_id for new in scheduler_output.scheduled_new_reqs}
        self.speculator.release(new_ids & self.req_states.req_id_to_index.keys())
        super().add_requests(scheduler_output)

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.speculator.release(scheduler_output.finished_req_ids)
        self.speculator.preempt(scheduler_output.preempted_req_ids or ())
        super().finish_requests(scheduler_output)

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.speculator.update_requests(scheduler_output)
        super().update_requests(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        self.speculator.num_grammar_valid = grammar_valid_drafts(grammar_output)
        output = super().sample_tokens(grammar_output)
        if isinstance(output, AsyncOutput):
            self._outputs.append(output)
            if self.step_costs is not None:
                self.step_costs.step_done(
                    self.speculator.num_decoding, verifies=self._verifies
                )
        return output

    def _record_acceptance(self, num_late: int | None = None) -> None:
        """How many tokens steps sampled, all but the last `num_late`: by default those
        whose output the engine has read, which with async scheduling are all but one.
        """
        if num_late is None:
            num_late = 1 if self._is_async else 0
        while len(self._outputs) > num_late:
            output = self._outputs.popleft()
            if output is not None:
                output.copy_event.synchronize()
                self.speculator.record_acceptance(output.num_sampled_tokens_np)
        if self._publisher is not None:
            self._publisher.step_done()

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Ragged drafts for the scheduler, which mostly counts them: without a grammar
        in the batch stock leaves their ids on the device and says -1, which is also
        its padding; here it is 0."""
        drafts = super().take_draft_token_ids()
        if drafts is None:
            return None
        lens = self.speculator.draft_lens
        return DraftTokenIds(
            drafts.req_ids,
            [
                [max(token, 0) for token in tokens[: lens[req_id]]]
                for req_id, tokens in zip(
                    drafts.req_ids, drafts.draft_token_ids, strict=True
                )
            ],
        )


def grammar_valid_drafts(grammar_output: GrammarOutput | None) -> dict[str, int]:
    """Drafts that their grammar permits, of the requests under one. Async scheduling
    learns of them when their rows are being computed."""
    if grammar_output is None:
        return {}
    req_ids = grammar_output.structured_output_request_ids
    num_valid = grammar_output.num_acceptable_drafts or ()
    return dict(zip(req_ids, num_valid, strict=bool(num_valid)))


class UnpadCPUModelRunnerV2(UnpadGPUModelRunnerV2, CPUModelRunner):
    pass
