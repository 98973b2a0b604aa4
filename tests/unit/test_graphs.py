"""Which steps and draft forwards have CUDA graphs on the V2 runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport

import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner
from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import CostTable
from vllm_emssd.integration.v2 import runner as v2_runner
from vllm_emssd.integration.v2 import speculator as v2_speculator
from vllm_emssd.integration.v2.drafter import DeviceDrafter
from vllm_emssd.integration.v2.runner import (
    GPUModelRunner,
    ModelCudaGraphManager,
    TargetTiming,
    UnpadGPUModelRunnerV2,
)
from vllm_emssd.integration.v2.speculator import UnpadSpeculator

K, NUM_REQS = 5, 32
FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
ALWAYS = AttentionCGSupport.ALWAYS


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu import cudagraph_utils

    stage = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: stage)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *args: lines.append(text % args))
    for module in (v2_runner, v2_speculator):
        monkeypatch.setattr(module, "logger", logger)
    return lines


def attention(support: AttentionCGSupport) -> Any:
    """With graphs of those batches only."""
    builder = SimpleNamespace(
        get_cudagraph_support=lambda *_: support,
        get_varlen_cudagraph_max_query_len=lambda *_: None,
    )
    backend = type("SomeAttention", (), {})
    return SimpleNamespace(
        get_metadata_builder=lambda _: builder, kv_cache_spec=None, backend=backend
    )


def started(
    monkeypatch: pytest.MonkeyPatch,
    support: AttentionCGSupport,
    has_head: bool = False,
    **options: Any,
) -> UnpadGPUModelRunnerV2:
    """A runner with graphs of the target, as if they were recorded."""
    sizes = sorted({1, 2, 4, *range(8, NUM_REQS * (K + 1) + 1, 8)})
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=NUM_REQS),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=sizes[-1]
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=None,
    )

    def with_graphs_of_stock(self: Any) -> None:
        self.cudagraph_manager = ModelCudaGraphManager(
            vllm_config, self.device, CUDAGraphMode.FULL_AND_PIECEWISE, K + 1
        )

    monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", with_graphs_of_stock)
    runner = object.__new__(UnpadGPUModelRunnerV2)
    vars(runner).update(
        vllm_config=vllm_config,
        compilation_config=vllm_config.compilation_config,
        device=torch.device("cpu"),
        emssd_config=EmssdConfig(proposer="draft_model", **options),
        speculator=SimpleNamespace(has_head=has_head),
        adaptive_verification=None,
        attn_groups=[[attention(support)]],
        decode_query_len=K + 1,
        lora_capture_cases=[0],
        fast_prefill=None,
        ubatch_runner=None,
        pcp_manager=None,
        use_pp=False,
    )
    runner.initialize_kv_cache()
    assert runner.cudagraph_manager is not None
    runner.cudagraph_manager._graphs_captured = True
    return runner


def mode_of_step(*args: Any) -> CUDAGraphMode:
    return desc_of_step(*args).cg_mode


def desc_of_step(
    runner: Any, rows: list[int], prompts: dict[int, int] | None = None
) -> Any:
    """How vLLM runs a step with so many rows of each request. `prompts`: how many
    tokens of it were computed, by request; of the others the whole prompt."""
    prompt_len = 64
    computed = [(prompts or {}).get(i, prompt_len) for i in range(len(rows))]
    runner.req_states = SimpleNamespace(
        req_id_to_index={str(i): i for i in range(len(rows))},
        prefill_len=SimpleNamespace(np=np.full(len(rows), prompt_len)),
        num_computed_prefill_tokens=np.array(computed),
    )
    drafts = {str(i): [-1] * (n - 1) for i, n in enumerate(rows) if n > 1}
    for i in prompts or ():
        drafts.pop(str(i), None)
    output: Any = SimpleNamespace(
        num_scheduled_tokens={str(i): n for i, n in enumerate(rows)},
        scheduled_spec_decode_tokens=drafts,
        total_num_scheduled_tokens=sum(rows),
    )
    state, uniform = runner.gather_batch_req_state(output, dummy_run=False)
    max_rows = None if state.has_prefill else max(rows)  # as `execute_model` has it
    graphs = runner.cudagraph_manager
    return graphs.dispatch(
        len(rows), sum(rows), uniform, num_active_loras=0, max_query_len=max_rows
    )


@pytest.mark.parametrize("draft_length", ["fixed", "auto"])
def test_steps_of_any_lengths_have_a_full_graph(
    monkeypatch: pytest.MonkeyPatch, draft_length: str
) -> None:
    """But those with a prompt, as in vLLM."""
    runner = started(monkeypatch, ALWAYS, draft_length=draft_length)
    last = NUM_REQS - 1
    assert mode_of_step(runner, [K + 1] * NUM_REQS) == FULL
    assert mode_of_step(runner, [K + 1] * last + [1]) == FULL
    assert mode_of_step(runner, [1] * NUM_REQS) == FULL
    assert mode_of_step(runner, [1] * NUM_REQS, {last: 63}) == PIECEWISE
    assert mode_of_step(runner, [1] * NUM_REQS) == FULL


@pytest.mark.parametrize("draft_length", ["fixed", "auto"])
def test_graphs_of_a_heads_target_are_those_of_its_first_pass(
    monkeypatch: pytest.MonkeyPatch, draft_length: str
) -> None:
    """As vLLM records that: the pass goes by the target's metadata."""
    support, length = AttentionCGSupport.ALWAYS, draft_length
    runner = started(monkeypatch, support, has_head=True, draft_length=length)
    assert mode_of_step(runner, [K + 1] * NUM_REQS) == FULL
    assert mode_of_step(runner, [K] * NUM_REQS) == PIECEWISE


SIZES = {9: 16, 16: 16, 17: 24, NUM_REQS: NUM_REQS, 190: 192, 192: 192, 193: 193}


@pytest.mark.parametrize(("num_rows", "size"), SIZES.items())
@pytest.mark.parametrize("support", [ALWAYS, AttentionCGSupport.UNIFORM_BATCH])
def test_a_step_costs_what_the_size_costs_that_was_recorded_for_it(
    monkeypatch: pytest.MonkeyPatch,
    support: AttentionCGSupport,
    num_rows: int,
    size: int,
) -> None:
    """Whether graphs are full, or piecewise where attention allows no others."""
    runner = started(monkeypatch, support)
    rows = np.diff(np.arange(NUM_REQS + 1) * min(num_rows, 192) // NUM_REQS)
    rows = rows[rows > 0].tolist()
    if num_rows <= 192:
        desc = desc_of_step(runner, rows)
        assert (desc.num_tokens, desc.cg_mode == FULL) == (
            size,
            support == ALWAYS or num_rows == 192,
        )
    counts = range(1, 400)
    table = CostTable(counts, counts, runner._computed_rows())
    assert table.at(num_rows) == table.ms(np.array([num_rows])) == size


def test_times_are_told_by_the_rows_that_were_computed() -> None:
    timing, told = TargetTiming(), []
    clock: Any = SimpleNamespace(start=lambda: None, stop=told.append)
    timing.clock = clock
    batch: Any = SimpleNamespace(num_tokens=9, num_tokens_after_padding=16, num_reqs=9)
    timing.record_batch(batch, full_cudagraph=True)
    timing.forward_start()
    timing.model_executed()
    assert told == [16]


def test_a_draft_forward_costs_what_the_size_costs_that_was_recorded_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_config = started(monkeypatch, ALWAYS).vllm_config
    drafter, told = object.__new__(DeviceDrafter), []
    made = {
        rows: ModelCudaGraphManager(
            vllm_config, drafter, CUDAGraphMode.FULL_DECODE_ONLY, rows
        )
        for rows in (1, 2)
    }
    for graphs in made.values():
        graphs._graphs_captured = True
        monkeypatch.setattr(graphs, "run_fullgraph", lambda desc: None)
    drafter._stock = SimpleNamespace(graphs_of=made.__getitem__)
    clock: Any = SimpleNamespace(start=lambda: None, stop=told.append)
    drafter.clock = clock
    for rows in (1, 2):
        drafter._forward(drafter._desc(9, rows), 9, np.full(9, 64))
    assert told == [16, 24]
    sizes = [drafter.computed_rows(n) for n in (0, 1, 3, 9, 32, 33)]
    assert sizes == [0, 1, 4, 16, 32, 33]


def test_attention_without_ragged_graphs_is_logged(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    runner = started(monkeypatch, AttentionCGSupport.ALWAYS)
    assert not warnings
    runner = started(monkeypatch, AttentionCGSupport.UNIFORM_BATCH)
    (line,) = warnings
    assert "SomeAttention" in line
    assert mode_of_step(runner, [K + 1] * NUM_REQS) == FULL
    assert mode_of_step(runner, [K + 1] * (NUM_REQS - 1) + [1]) == PIECEWISE


@pytest.mark.parametrize(
    ("support", "can_update", "is_recorded"),
    [
        (AttentionCGSupport.UNIFORM_BATCH, True, True),
        (AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, True, False),
        (AttentionCGSupport.ALWAYS, False, False),
    ],
)
def test_attention_without_graphs_of_draft_forwards_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    support: AttentionCGSupport,
    can_update: bool,
    is_recorded: bool,
) -> None:
    """It has to take two rows a request, and lengths that the device sets."""
    made = SimpleNamespace(
        attn_cg_support=SimpleNamespace(
            min_cg_support=support, min_cg_attn_backend="SomeAttention"
        ),
        supports_decode_metadata_update=can_update,
        vllm_config=None,
        device=None,
        first_graphs=None,
    )
    monkeypatch.setattr(
        v2_speculator,
        "SpeculatorCudaGraphManager",
        lambda *args, decode_query_len: decode_query_len,
    )
    UnpadSpeculator.init_cudagraph_manager(made, CUDAGraphMode.PIECEWISE)
    assert (made.first_graphs, warnings) == (None, [])
    UnpadSpeculator.init_cudagraph_manager(made, CUDAGraphMode.FULL_AND_PIECEWISE)
    if is_recorded:
        assert (made.first_graphs, made.next_graphs, warnings) == (2, 1, [])
    else:
        (line,) = warnings
        assert "SomeAttention" in line
        assert made.first_graphs is None
