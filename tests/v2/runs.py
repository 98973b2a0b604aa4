"""Runs of the V2 runner under the interpreter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.engine import (
    DRAFT_MODEL,
    LLMA,
    MIXED,
    STOCK,
    TARGET,
    EngineConfig,
    counting,
    counting_draft_rows,
    model_runner,
    prompts,
    running,
    scheduler_of,
    session_tokens,
    stop_counting_others,
)
from tests.planted_failures import break_parts
from tests.v2 import interpreter
from tests.v2.padded_forwards import pad_forwards
from vllm_emssd.draft_length import CostTable, DraftLengthPolicy, StepInfo
from vllm_emssd.draft_length.probing import Probing
from vllm_emssd.metrics import COUNTER_NAMES

K = 3
MAX_TOKENS = (14, 9, 18, 1, 6)
LIMITS = (0, 1, 1, 1, 1)  # drafts that each request allows
LOGPROBS: dict[str, Any] = {
    "logprobs": 2,
    "logit_bias": {201: 3.0},
    "presence_penalty": 0.5,
}
REGEX = r"(foo|bar)(_[a-z]{2}){1,2}"
SMALL = {
    "max_model_len": 128,
    "kv_cache_bytes": 8 << 20,
    "options": {"block_size": 32, "max_num_seqs": 10},  # which vLLM warms up with
}
CACHED = SMALL | {"prefix_caching": True, "max_num_batched_tokens": 48}
TIGHT = SMALL | {  # fewer blocks than wanted: some requests are preempted
    "prefix_caching": True,
    "options": SMALL["options"] | {"num_gpu_blocks_override": 7},
}
FITTED = SMALL | {  # a context of as many tokens as there is memory for: 256
    "max_model_len": -1,
    "kv_cache_bytes": 1_900_000,
    "max_num_batched_tokens": 256,
}


def asynchronous(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"options": config["options"] | {"async_scheduling": True}}


STOCK_K = STOCK | {"num_speculative_tokens": K}
EMSSD = DRAFT_MODEL | {"num_speculative_tokens": K}
ITSELF = EMSSD | {"model": TARGET, "draft_sample_method": "probabilistic"}
AUTO = {"draft_length": "auto"}
TRIM = {"enable_adaptive_verification": True}
COPY = 6  # most tokens copied: more than are drafted
BOTH = MIXED | {"num_speculative_tokens": K, "copy_length": COPY}
BOTH_SAMPLED = BOTH | {"draft_sample_method": "probabilistic"}


class RaggedLengths(DraftLengthPolicy):
    """Any number of drafts, another for each request and step, 0 among them."""

    def plan(self, step: StepInfo) -> np.ndarray:
        self._steps = getattr(self, "_steps", 0) + 1
        wanted = (np.arange(len(step.req_ids)) * 2 + self._steps) % (K + 1)
        return np.minimum(wanted, step.max_draft_tokens)


class PausedLengths(DraftLengthPolicy):
    """No drafts in two steps, not even their prompts fed, and K in the next two."""

    def __init__(self) -> None:
        self.steps = 0

    def skips_step(self, num_sampling: int) -> bool:
        self.steps += 1
        return (self.steps - 1) // 2 % 2 == 0


def texts() -> list[str]:
    return [text[: 100 + 40 * i] for i, text in enumerate(prompts()[: len(MAX_TOKENS)])]


def one_pass(
    llm: Any, limits: Sequence[int] | None = None, **parameters: Any
) -> dict[str, Any]:
    """Generate for all texts. What came out, and what it cost. `limits`: the drafts
    that each request allows."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            **({"temperature": 0, "ignore_eos": True, "max_tokens": n} | parameters)
        )
        for n in MAX_TOKENS
    ]
    for one, limit in zip(params, limits or (), strict=limits is not None):
        one.extra_args = {**(one.extra_args or {}), "emssd_max_draft_tokens": limit}
    started = time.perf_counter()
    with counting(llm) as gained, counting_draft_rows(llm) as rows:
        outputs = llm.generate(texts(), params, use_tqdm=False)
    return {
        "token_ids": [list(o.outputs[0].token_ids) for o in outputs],
        "texts": [o.outputs[0].text for o in outputs],
        "logprobs": [
            [
                {t: e.logprob for t, e in at.items()}
                for at in o.outputs[0].logprobs or ()
            ]
            for o in outputs
        ],
        "num_prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
        "gained": {
            name.removeprefix("vllm:"): n
            for name, n in gained.items()
            if "spec_decode" in name or "preempt" in name or "cache_hits" in name
        },
        "draft_rows": rows.num_rows,
        "counts": {k: v for k, v in gained.items() if k in COUNTER_NAMES},
        "seconds": round(time.perf_counter() - started, 2),
    }


def pass_with(
    llm: Any, lengths: DraftLengthPolicy, **parameters: Any
) -> dict[str, Any]:
    """With draft lengths by another policy."""
    speculator = model_runner(llm).speculator
    policy = speculator.policy
    speculator.policy = lengths
    seen = one_pass(llm, **parameters)
    speculator.policy = policy
    return seen


def edited(answers: list[list[int]]) -> dict[str, Any]:
    """Parameters with a reference, of which the answers are an edit."""
    tokens = [t for answer in answers for t in answer]
    kept = [t for i, t in enumerate(tokens) if i % 7]
    return {"extra_args": {"emssd_reference": kept}}


def copying(llm: Any, name: str) -> dict[str, Any]:
    seen = {"greedy": one_pass(llm)}
    reference = edited(seen["greedy"]["token_ids"])
    seen["edited"] = one_pass(llm, **reference)
    if "tight" in name:
        return seen
    seen["structured"] = one_pass(llm, **structured())
    seen["limited"] = one_pass(llm, LIMITS, **reference)
    if name == "async copying":
        seen["stopped"] = stopped(llm, seen["greedy"])
        seen["aborted"] = aborted(llm)
    return seen


class SpiedSources:
    """Accepted drafts of a mixed speculator by what made them; and of copies how many
    are certain by the drafts' distribution, if there is one."""

    def __init__(self, llm: Any) -> None:
        self.seen: dict[str, Counter[str]] = {
            "accepted": Counter(),
            "certain": Counter(),
        }
        self._speculator = model_runner(llm).speculator

    def __enter__(self) -> dict[str, Counter[str]]:
        speculator = self._speculator
        settle, propose = speculator._settle, speculator.propose

        def spied(pending: Any, num_accepted: Any) -> None:
            is_copied = pending.is_copied
            for was_copied, source in ((is_copied, "copied"), (~is_copied, "drafted")):
                counts = pending.is_wanted & pending.step.is_sampling & was_copied
                self.seen["accepted"][source] += int(num_accepted[counts].sum())
            settle(pending, num_accepted)

        def proposed(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = propose(input_batch, *args, **kwargs)
            if speculator.draft_logits is None:
                return drafts
            slots = input_batch.idx_mapping
            num_made = list(speculator.draft_lens.values())
            for row in np.flatnonzero(speculator._is_copied[slots.numpy()]):
                tokens = drafts[row, : num_made[row], None]
                logits = speculator.draft_logits[slots[row], : num_made[row]]
                is_certain = logits.softmax(dim=-1).gather(1, tokens) == 1
                self.seen["certain"]["yes"] += int(is_certain.sum())
                self.seen["certain"]["no"] += int((~is_certain).sum())
            return drafts

        speculator._settle, speculator.propose = spied, proposed
        return self.seen

    def __exit__(self, *error: Any) -> None:
        del self._speculator._settle, self._speculator.propose


def mixing(llm: Any, name: str) -> dict[str, Any]:
    """Copies and drafts."""
    with SpiedSources(llm) as sources, contextlib.ExitStack() as stack:
        steered = stack.enter_context(SteeredCosts(llm)) if "auto" in name else None
        seen = {"greedy": one_pass(llm)}
        if "tight" not in name:
            seen["structured"] = one_pass(llm, **structured())
        if steered:
            steered.draw()
        reference = edited(seen["greedy"]["token_ids"])
        seen["edited"] = one_pass(llm, **reference)
        if "tight" in name:
            return seen | sources
        seen["seeded"] = one_pass(llm, **reference, seed=7, temperature=1.0)
        if model_runner(llm).speculator.draft_logits is not None:
            seen["sampled"] = one_pass(llm, **reference, temperature=1.0)
        for only in ("draft_model", "llma") if name == "mixed" else ():
            llm.collective_rpc("emssd_use_proposer", args=(only,))
            seen[only] = one_pass(llm, **reference)
    return seen | sources


def structured(**parameters: Any) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(regex=REGEX)
    return {"structured_outputs": grammar, "ignore_eos": False} | parameters


class SteeredCosts:
    """In place of measured costs, others; and each step's draft lengths noted."""

    def __init__(self, llm: Any) -> None:
        self.meter = model_runner(llm).step_costs
        self.speculator = model_runner(llm).speculator
        self.rng: np.random.Generator | None = None
        self.lengths: list[list[int]] = []
        self.num_reqs: list[int] = []
        self.verifies: list[bool] = []
        self.num_forwards: list[int] = []  # of the drafter in each of these steps
        self.num_forwards_before = 0

    def __enter__(self) -> SteeredCosts:
        costs = self.meter.costs
        self.saved = copy.copy(costs)
        costs.fixed_ms, costs.speculation_ms, costs.confidence_ms = 4.0, 0.0, 0.0
        self.meter.step_done = self.step_done
        self.set(0.0, 0.0)
        return self

    def __exit__(self, *error: Any) -> None:
        del self.meter.step_done
        for field in dataclasses.fields(self.saved):
            setattr(self.meter.costs, field.name, getattr(self.saved, field.name))

    def draw(self) -> None:
        """New costs after each step from now on: drafts from free to too expensive."""
        self.rng = np.random.default_rng(0)
        self.lengths, self.num_forwards = [], []
        self.num_reqs, self.verifies = [], []

    def step_done(self, num_reqs: int, verifies: bool) -> None:
        self.num_reqs.append(num_reqs)
        self.verifies.append(verifies)
        self.lengths.append(list(self.speculator.draft_lens.values()))
        num_forwards = self.speculator.counters.num_draft_forwards
        self.num_forwards.append(num_forwards - self.num_forwards_before)
        self.num_forwards_before = num_forwards
        if self.rng is not None:
            self.set(self.rng.choice([0.0, 0.5, 4.0]), self.rng.choice([0.0, 0.5]))

    def set(self, draft_ms: float, row_ms: float) -> None:
        costs, rows = self.meter.costs, [1, 256]
        costs.target = CostTable(rows, [4.0, 4.0 + 255 * row_ms])
        costs.draft = CostTable(rows, [draft_ms, draft_ms + 255 * row_ms / 8])


def automatic(llm: Any, **parameters: Any) -> dict[str, Any]:
    """Automatic lengths by free drafts, by drawn costs, and by measured ones, by which
    drafts are far too expensive here."""
    costs_at_start = llm.collective_rpc("emssd_costs")
    model_runner(llm).speculator.policy._probing = Probing()  # not idle from before
    with SteeredCosts(llm) as steered:
        seen = {"free": one_pass(llm, **parameters)}
        if not parameters:
            seen["structured"] = one_pass(llm, **structured())
        steered.draw()
        drawn = one_pass(llm, **parameters)
        steps = {"lengths": steered.lengths, "num_forwards": steered.num_forwards}
        steps |= {"num_reqs": steered.num_reqs, "verifies": steered.verifies}
        seen["drawn"] = drawn | steps
    measured = one_pass(llm, **parameters)
    costs = costs_at_start + llm.collective_rpc("emssd_costs")
    measured |= {"costs": costs}
    return seen | {"measured": measured}


class Trimming:
    """vLLM's adaptive verification where it asks for CUDA graphs, by other costs."""

    budgets: ClassVar[list[tuple[int, int]]] = []  # verified, of so many

    def __enter__(self) -> None:
        from vllm.config.vllm import VllmConfig
        from vllm.v1.worker.gpu import model_runner as runner
        from vllm.v1.worker.gpu.spec_decode import adaptive_verification as adaptive

        class Manager(adaptive.AdaptiveVerificationManager):
            def reallocate_drafts(self, *args: Any) -> Any:
                num_drafts = sum(self._batch_budget[0].values())
                reallocated = super().reallocate_drafts(*args)
                Trimming.budgets.append((reallocated[2], num_drafts))
                return reallocated

        def make(enable_adaptive_verification: bool, **options: Any) -> Manager:
            assert enable_adaptive_verification
            names = ("req_states", "query_start_loc", "num_bonus_tokens")
            made = {name: options[name] for name in (*names, "max_total_logits")}
            manager = Manager(**made)
            verify_curve = [(n, 4.0 + 2.0 * n) for n in range(1, 129)]
            manager.set_cost_curves([(1, 0.1)], verify_curve)
            return manager

        self._patch = pytest.MonkeyPatch()
        validate = "_validate_adaptive_verification"
        self._patch.setattr(VllmConfig, validate, lambda config: None)
        self._patch.setattr(
            runner, "resolve_adaptive_cudagraph_mode", lambda mode, **options: mode
        )
        self._patch.setattr(runner, "maybe_create_adaptive_verification_manager", make)
        self._patch.setattr(
            adaptive,
            "_assign_draft_token_budget_compiled",
            adaptive._assign_draft_token_budget,
        )

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()


def trimming(llm: Any, name: str) -> dict[str, Any]:
    """Drafts of which the device verifies the likeliest."""
    if "itself" in name:
        return {"sampled": one_pass(llm, temperature=1.0)}
    seen = {}
    with SteeredCosts(llm) as steered:
        for what, length, *costs in (
            ("greedy", K, 0.1, 2.0),
            ("free rows", K, 0.1, 0.0),
            ("auto", None, 0.0, 0.5),
        ):
            llm.collective_rpc("emssd_fix_draft_length", args=(length,))
            steered.set(*costs)
            Trimming.budgets.clear()
            seen[what] = one_pass(llm)
            verified, made = zip(*Trimming.budgets, strict=True)
            seen[what] |= {"num_verified": sum(verified), "num_made": sum(made)}
        steered.set(0.1, 2.0)
        llm.collective_rpc("emssd_fix_draft_length", args=(K,))
        seen["logprobs"] = one_pass(llm, **LOGPROBS)
        seen["structured"] = one_pass(llm, **structured())
        seen["ragged"] = pass_with(llm, RaggedLengths())
    return seen


def stopped(llm: Any, greedy: dict[str, Any]) -> dict[str, Any]:
    """Ended by a token in mid-step, which a step launched meanwhile cannot know."""
    stop = greedy["token_ids"][2][8]
    return one_pass(llm, stop_token_ids=[stop])


def aborted(llm: Any) -> dict[str, Any]:
    """The first request goes away in mid-generation, and its id comes back at once."""
    from vllm import SamplingParams

    engine, tokens = llm.llm_engine, {}
    ids = [f"request {i}" for i in range(len(MAX_TOKENS))]

    def add(i: int) -> None:
        params = SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=MAX_TOKENS[i]
        )
        engine.add_request(ids[i], texts()[i], params)

    for i in range(len(ids)):
        add(i)
    for num_steps in range(1000):
        if num_steps == 4:
            engine.abort_request([ids[0]])
            add(0)
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        if not engine.has_unfinished_requests():
            break
    return {"token_ids": [tokens.get(req_id) for req_id in ids]}


def padded(llm: Any, **runs: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """As with recorded draft forwards, whose batch is padded."""
    speculator = model_runner(llm).speculator
    graphs = pad_forwards(speculator)
    seen: dict[str, Any] = {f"padded, {what}": run() for what, run in runs.items()}
    speculator.first_graphs = speculator.next_graphs = None
    return seen | {"num_replays": [graph.num_replays for graph in graphs]}


class LoggedStats:
    """The lines of the log that tell what was counted, one a step."""

    def __enter__(self) -> list[str]:
        from vllm_emssd.integration import metrics

        self._patch, lines = pytest.MonkeyPatch(), []
        self._patch.setattr(metrics, "INTERVAL_SECONDS", 0.0)
        logger = logging.getLogger("vllm.emssd.stats")
        self._patch.setattr(logger, "info", lambda text, *args: lines.append(args[1]))
        return lines

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()


def failing(llm: Any) -> dict[str, Any]:
    """Healthy, with parts that raise now and then, and healthy again."""
    speculator = model_runner(llm).speculator
    with LoggedStats() as lines:
        one_pass(llm)
        lines.clear()  # of what was counted before, too
        seen = {"healthy": one_pass(llm)}
    seen["healthy"]["lines"] = lines
    with pytest.MonkeyPatch.context() as patch:
        broken = break_parts(
            patch,
            (speculator, "_plan", 4),
            (speculator.drafter, "draft", 2),
            (speculator.drafter, "backfill", 2),
        )
        seen["failing"] = one_pass(llm)
    seen["failing"]["num_failures"] = [part.num_failures for part in broken]
    return seen | {"healed": one_pass(llm)}


def endless(llm: Any) -> dict[str, int]:
    """An answer that no limit but the context's ends."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=2**63)
    (output,) = llm.generate(texts()[:1], params, use_tqdm=False)
    num_tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    return {"num_tokens": num_tokens}


def sessions(llm: Any) -> dict[str, Any]:
    """Greedy tokens of streaming sessions, of three inputs each."""
    inputs = [text[:60] for text in prompts()[:9]]
    return {"token_ids": [session_tokens(llm, inputs[i::3], 7) for i in range(3)]}


def sampling(llm: Any) -> dict[str, Any]:
    """With drafts of the target itself."""

    def run(**parameters: Any) -> dict[str, Any]:
        return one_pass(llm, temperature=1.0, **parameters)

    seen = {"sampled": run(), "structured": run(**structured())}
    for what, lengths in (("ragged", RaggedLengths()), ("paused", PausedLengths())):
        seen[what] = pass_with(llm, lengths, temperature=1.0)
    return seen | padded(llm, sampled=run)


def passes(llm: Any, name: str) -> dict[str, Any]:
    def ragged() -> dict[str, Any]:
        return pass_with(llm, RaggedLengths())

    if "trimmed" in name:
        return trimming(llm, name)
    if name == "fitted":
        speculator = model_runner(llm).speculator
        return {"endless": endless(llm), "limit": speculator.max_model_len}
    if "copying" in name:
        return copying(llm, name)
    if "mixed" in name:
        return mixing(llm, name)
    if name == "auto itself":
        return automatic(llm, temperature=1.0)
    if "itself" in name:
        return sampling(llm)
    if "auto" in name:
        seen = automatic(llm)
        if "tight" in name:
            return seen
        with SteeredCosts(llm) as steered:
            steered.draw()
            return seen | padded(llm, drawn=lambda: one_pass(llm))
    seen = {"greedy": one_pass(llm)}
    if name == "stock":
        return seen
    if "tight" in name:
        return seen | {"ragged": ragged()}
    if "cached" in name:
        return seen | {"again": one_pass(llm), "ragged": ragged()}
    seen["logprobs"] = one_pass(llm, **LOGPROBS)
    seen["structured"] = one_pass(llm, **structured())
    if name in ("plain", "async"):
        seen["stopped"] = stopped(llm, seen["greedy"])
        seen["aborted"] = aborted(llm)
        seen["sessions"] = sessions(llm)
    if name == "plain":
        return seen | {"seeded": one_pass(llm, seed=7, temperature=1.0)}
    seen |= {"ragged": ragged(), "endless": endless(llm)} | failing(llm)
    one_pass(llm, max_tokens=2)  # whose last step's drafts go unused
    seen["limited, structured"] = one_pass(llm, LIMITS, **structured())
    if name == "async":
        return seen
    seen["limited"] = one_pass(llm, LIMITS)
    return seen | padded(
        llm,
        greedy=lambda: one_pass(llm),
        structured=lambda: one_pass(llm, **structured()),
        ragged=ragged,
    )


def run_engines(
    engines: dict[str, EngineConfig],
    passes: Callable[[Any, str], dict[str, Any]],
    only: tuple[str, ...],
) -> dict[str, Any]:
    """By engine; of `only` these, if there are any."""
    seen: dict[str, Any] = {}
    for name in only or engines:
        config, started = engines[name], time.perf_counter()
        is_async = bool(config.options.get("async_scheduling"))
        interpreter.schedule_asynchronously(is_async)
        stop_counting_others()
        with contextlib.ExitStack() as stack:
            if "trimmed" in name:
                stack.enter_context(Trimming())
            llm = stack.enter_context(running(config))
            runner = model_runner(llm)
            seen[name] = passes(llm, name) | {
                "runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
                "scheduler": type(scheduler_of(llm)).__name__,
                "speculator": type(runner.speculator).__name__,
            }
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    return seen


def run_all(*only: str) -> dict[str, Any]:
    engines = {
        "plain": EngineConfig(**SMALL),
        "stock": EngineConfig(STOCK_K, **SMALL),
        "fixed": EngineConfig(EMSSD, **SMALL),
        "cached": EngineConfig(EMSSD, **CACHED),
        "tight": EngineConfig(EMSSD, **TIGHT),
        "fitted": EngineConfig(EMSSD, **FITTED),
        "itself": EngineConfig(ITSELF, **SMALL),
        "async": EngineConfig(EMSSD, **asynchronous(SMALL)),
        "async cached": EngineConfig(EMSSD, **asynchronous(CACHED)),
        "async tight": EngineConfig(EMSSD, **asynchronous(TIGHT)),
        "async itself": EngineConfig(ITSELF, **asynchronous(SMALL)),
        "copying": EngineConfig(LLMA, **CACHED),
        "copying tight": EngineConfig(LLMA, **TIGHT),
        "async copying": EngineConfig(LLMA, **asynchronous(CACHED)),
        "async copying tight": EngineConfig(LLMA, **asynchronous(TIGHT)),
        "mixed": EngineConfig(BOTH, **CACHED),
        "mixed tight": EngineConfig(BOTH, **TIGHT),
        "mixed auto": EngineConfig(BOTH | AUTO, **CACHED),
        "async mixed": EngineConfig(BOTH, **asynchronous(CACHED)),
        "async mixed tight": EngineConfig(BOTH, **asynchronous(TIGHT)),
        "async mixed auto": EngineConfig(BOTH_SAMPLED | AUTO, **asynchronous(CACHED)),
        "async trimmed": EngineConfig(EMSSD | AUTO | TRIM, **asynchronous(SMALL)),
        "async trimmed itself": EngineConfig(ITSELF | TRIM, **asynchronous(SMALL)),
        "auto": EngineConfig(EMSSD | AUTO, **CACHED),
        "auto tight": EngineConfig(EMSSD | AUTO, **TIGHT),
        "auto itself": EngineConfig(ITSELF | AUTO, **CACHED),
        "async auto": EngineConfig(EMSSD | AUTO, **asynchronous(CACHED)),
        "async auto tight": EngineConfig(EMSSD | AUTO, **asynchronous(TIGHT)),
    }
    return run_engines(engines, passes, only)
