"""What only a GPU can show. Run by scripts/gpu_check; skipped without one.

Each engine gets a process of its own, so that one failure says nothing of the next
and every worker starts from a clean CUDA context. What it saw is kept in a file for all
tests of the run, which may be several processes' (pytest-xdist).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoTokenizer

from tests.engine import NUM_SPECULATIVE_TOKENS, TARGET
from tests.gpu.run_engine import BATCH

REPO = Path(__file__).resolve().parents[2]
NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU that CUDA can use"),
]
EXACT = {"dtype": "float32", "attention_backend": "TRITON_ATTN"}
FLASH = {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"}
RUNNERS = ("V1", "V2")
VARIANTS = ("async", "sync")  # scheduling of our V2 engines
COMPILED: dict[str, dict[str, Any]] = {  # the first with no padding
    "eager": {"enforce_eager": True},
    "no graphs": {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_mode": "NONE"},
    },
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
    },
}
MAX_ROWS = {  # a request and step
    "": NUM_SPECULATIVE_TOKENS + 1,
    ", eagle3": 2 * NUM_SPECULATIVE_TOKENS,
}
Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(side, runner, variant, **options): see tests/gpu/run_engine.py."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers

    def run(
        side: str, runner: str = "V2", variant: str = "sync", **options: Any
    ) -> Any:
        if side.startswith(("plain", "stock")):
            variant = ""  # is of ours
        asked = [side, variant, json.dumps(options, sort_keys=True)]
        name = sha256(repr((runner, asked)).encode()).hexdigest()
        seen = folder / f"{name}.json"
        with FileLock(folder / f"{name}.lock"):
            if not seen.exists():
                seen.write_text(run_engine(runner, asked))
        return json.loads(seen.read_text())

    return run


def run_engine(runner: str, arguments: list[str]) -> str:
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VLLM_CPU_", "OMP_", "LD_PRELOAD"))
    }
    env["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "V2"))
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.run_engine", *arguments],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def check_rows(
    counts: dict[str, int], variant: str = "sync", drafter: str = ""
) -> None:
    """Scheduled asynchronously, a request may be in one step in vain."""
    num_request_steps = counts["num_request_steps"] + BATCH * (variant == "async")
    most = MAX_ROWS[drafter] * num_request_steps
    assert 0 < counts["num_draft_rows_decode"] <= most
    assert counts["num_accepted_tokens"] > 0


def check_tokens(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    """Says where each request that differs does so first."""
    pairs = zip(ours["token_ids"], plain["token_ids"], strict=True)
    differing = {
        i: next(
            (at for at, (a, b) in enumerate(zip(*both, strict=False)) if a != b),
            min(map(len, both)),
        )
        for i, both in enumerate(pairs)
        if both[0] != both[1]
    }
    assert not differing, f"request: first token that differs: {differing}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("drafter", MAX_ROWS)
def test_v2_float32_tokens_and_acceptance(
    run: Run, drafter: str, variant: str, how: str
) -> None:
    options = EXACT | COMPILED[how]
    with ThreadPoolExecutor() as pool:  # compiling takes a minute
        plain, stock, ours = pool.map(
            lambda side: run(side, variant=variant, **options),
            ("plain", f"stock{drafter}", f"emssd{drafter}"),
        )
    # Compiled, rows are padded to a captured number, and how the target rounds depends
    # on it: any verifier of drafts agrees.
    check_tokens(ours, plain if how == "eager" else stock)
    assert ours["num_accepted_tokens"] == stock["num_accepted_tokens"]
    check_rows(ours["counts"], variant, drafter)


def test_v2_with_adaptive_verification(run: Run) -> None:
    """Which wants full graphs. How the target rounds depends on the number of rows, so
    not all requests are alike."""
    options = EXACT | COMPILED["graphs"]
    plain, ours = run("plain", **options), run("trimmed", variant="async", **options)
    pairs = zip(ours["token_ids"], plain["token_ids"], strict=True)
    assert sum(a == b for a, b in pairs) >= 0.9 * BATCH
    check_rows(ours["counts"], "async")


@pytest.mark.parametrize("side", ["emssd", "auto"])
def test_v2_float32_eager_compiled_and_graphs(run: Run, side: str) -> None:
    """Near ties fall as the target rounds, so not all requests are alike; a draft made
    from a stale buffer is rejected, so acceptance tells of it."""
    eager, *others = (run(side, **EXACT, **how) for how in COMPILED.values())
    for other in others:
        pairs = zip(eager["token_ids"], other["token_ids"], strict=True)
        assert sum(a == b for a, b in pairs) >= 0.9 * BATCH
        if side == "emssd":
            accepted = eager["accepted_share"]
            assert other["accepted_share"] == pytest.approx(accepted, rel=0.05)


@pytest.mark.parametrize("how", ["eager", "graphs"])
def test_v2_waits_for_nothing(
    run: Run, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own check: once it is warm, a wait of the host is an error."""
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    # Longer than other tests', so that the run is of its own.
    ours = run("emssd", variant="async", **FLASH, **COMPILED[how], max_tokens=192)
    check_rows(ours["counts"], "async")


@pytest.mark.parametrize("variant", VARIANTS)
def test_flash_attention_varlen(run: Run, variant: str) -> None:
    """Ragged rows through FlashAttention's varlen kernels, in bfloat16."""
    stock, ours = run("stock", **FLASH), run("emssd", variant=variant, **FLASH)
    check_rows(ours["counts"], variant)
    assert ours["accepted_share"] == pytest.approx(stock["accepted_share"], rel=0.05)


@pytest.mark.parametrize("drafter", MAX_ROWS)
def test_v2_ragged_lengths(run: Run, drafter: str) -> None:
    ragged = run(f"ragged{drafter}", **EXACT)
    check_tokens(ragged, run("plain", **EXACT))
    check_rows(ragged["counts"], drafter=drafter)


@pytest.mark.parametrize("side", ["emssd", "auto"])
def test_v2_structured_output(run: Run, side: str) -> None:
    options = EXACT | {"regex": "[a-z]{3}( [a-z]{2,9}){12}"}
    ours = run(side, **options)
    assert ours["counts"]["num_accepted_tokens"] > 0
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    for token_ids in ours["token_ids"]:
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        assert re.fullmatch(options["regex"], text), text
    if side == "emssd":
        # Near ties are frequent under a grammar, and Triton's attention rounds to TF32
        # by how many rows a request has. Stock verifies the same rows.
        check_tokens(ours, run("stock", **options))


@pytest.mark.parametrize("how", ["eager", "graphs"])
@pytest.mark.parametrize("sampled", [False, True])
def test_v2_automatic_lengths(run: Run, sampled: bool, how: str) -> None:
    """Costs by CUDA events; the target drafts for itself where drafts are sampled."""
    eager = how == "eager"
    options = EXACT | ({"draft": TARGET, "sampled": True} if sampled else {})
    options |= {"enforce_eager": eager}
    auto = run("auto", **options)
    counts, (at_start, after) = auto["counts"], auto["costs"]
    assert all(ms > 0 for model in ("target", "draft") for _, ms in at_start[model])
    assert after["target"] != at_start["target"]
    if sampled:
        assert counts["num_accepted_tokens"] >= 0.98 * counts["num_draft_tokens"]
    elif eager:
        check_tokens(auto, run("plain", **EXACT))
    else:  # rows are padded to other numbers than without drafts, and rounded by them
        plain = run("plain", **options)
        pairs = zip(auto["token_ids"], plain["token_ids"], strict=True)
        num_alike = sum(a == b for a, b in pairs)
        assert num_alike >= 0.9 * BATCH


def test_v1_float32_tokens_and_acceptance(run: Run) -> None:
    plain, stock = run("plain", "V1", **EXACT), run("stock", "V1", **EXACT)
    ours = run("emssd", "V1", **EXACT)
    check_tokens(ours, plain)
    assert ours["num_accepted_tokens"] == stock["num_accepted_tokens"]
    check_rows(ours["counts"])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("side", ["llma", "mixed"])
def test_copies(run: Run, side: str, runner: str) -> None:
    plain, ours = run("plain", runner, **EXACT), run(side, runner, **EXACT)
    check_tokens(ours, plain)
    assert ours["counts"]["num_draft_tokens"] > 0


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_model_drafting_for_itself_is_accepted(run: Run, runner: str) -> None:
    """Sampled drafts judged by the distribution they came from."""
    options = EXACT | {"draft": TARGET, "sampled": True}
    counts = run("emssd", runner, **options)["counts"]
    assert counts["num_accepted_tokens"] >= 0.98 * counts["num_draft_tokens"] > 0


@pytest.mark.skipif(NUM_GPUS < 2, reason="one GPU")
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_tensor_parallel(run: Run, runner: str, backend: str) -> None:
    if backend == "ray":
        pytest.importorskip("ray")
    options = EXACT | {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": backend,
    }
    ours = run("emssd", runner, **options)
    check_tokens(ours, run("plain", runner, **options))
    check_rows(ours["counts"])
    assert ours["ranks_count_alike"]
