"""Every sampling parameter on the V2 runner under the interpreter, plain and emssd.

    python -m tests.v2.parameters RESULTS.json

In a process of its own: see `runs.py`.
"""

from __future__ import annotations

from tests.v2 import interpreter

if __name__ == "__main__":
    interpreter.install()

import json
import sys
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from tests.engine import (
    DRAFT_MODEL,
    EngineConfig,
    prompts,
    running,
    stop_counting_others,
)
from tests.lossless.engines import REASONING, sample
from tests.lossless.test_greedy import CASES, NONE

# The interpreter lacks what top_k and top_p need, or the answers would be too long.
LEFT_OUT = (
    "n",
    "seed, n",
    "seed, all filters",
    "eos",
    "text",
    "json_object",
    "json without white space",
    "repetition_detection",
)
V2_CASES = [case for case in CASES if case not in LEFT_OUT]
ENGINES = {
    "plain": None,
    "fixed": DRAFT_MODEL | {"num_speculative_tokens": 3},
    "one draft": DRAFT_MODEL | {"num_speculative_tokens": 1},
}


def _short(params: SamplingParams) -> SamplingParams:
    params = params.clone()
    params.max_tokens = min(params.max_tokens or 14, 14)
    params.min_tokens = min(params.min_tokens, 9)
    return params


def arrangements(case: str) -> dict[str, list[SamplingParams]]:
    """The case for all of four requests, and beside requests that use none."""
    params = CASES[case]
    each = params if isinstance(params, list) else [params] * 4
    each = [_short(p) for p in each[:4]]
    beside = [p if i % 2 else _short(NONE) for i, p in enumerate(each)]
    return {"all": each, "beside": beside}


def run_all(path: Path) -> None:
    import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner

    texts = [text[: 100 + 30 * i] for i, text in enumerate(prompts()[:4])]
    seen: dict[str, Any] = {}
    for name, config in ENGINES.items():
        stop_counting_others()
        options = {"block_size": 32} | REASONING["options"]
        small: dict[str, Any] = {"max_model_len": 192, "kv_cache_bytes": 16 << 20}
        with running(EngineConfig(config, options=options, **small)) as llm:
            for case in V2_CASES:
                for arrangement, params in arrangements(case).items():
                    out = sample(llm, texts, params)
                    seen[f"{name}: {case}, {arrangement}"] = {
                        "token_ids": out.token_ids,
                        "logprobs": [
                            [sorted(at.items()) for at in positions]
                            for positions in out.logprobs
                        ],
                        "num_draft_tokens": out.num_draft_tokens,
                        "num_accepted_tokens": out.num_accepted_tokens,
                    }
    path.write_text(json.dumps(seen))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
