"""Run by `scripts/check_patches` where there is Triton, with a patched copy of vLLM as
`vllm`: emssd on the V2 runner, under Triton's interpreter, installs no hook either."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.v2 import interpreter

if __name__ == "__main__":
    interpreter.install()  # before anything imports vLLM

import tests.conftest  # noqa: F401  the environment of engines
from tests.engine import (
    EngineConfig,
    greedy,
    model_runner,
    prompts,
    running,
    stats,
    stop_counting_others,
)
from tests.v2.runs import EMSSD, SMALL

NUM_PROMPTS = 2
MAX_TOKENS = 12


def main() -> None:
    import vllm_emssd.integration.worker  # noqa: F401  before vLLM's V2 runner
    from vllm_emssd.integration import hooks
    from vllm_emssd.integration.speculator_v2 import UnpadSpeculator

    texts = [text[:100] for text in prompts()[:NUM_PROMPTS]]
    with running(EngineConfig(**SMALL)) as llm:
        plain = greedy(llm, texts, MAX_TOKENS)
    stop_counting_others()
    with running(EngineConfig(EMSSD, **SMALL)) as llm:
        assert isinstance(model_runner(llm).speculator, UnpadSpeculator)
        assert greedy(llm, texts, MAX_TOKENS) == plain
        counts = stats(llm)
    assert counts["num_accepted_tokens"] > 0, counts
    assert not hooks._originals, hooks._originals
    print(f"V2 runner: {counts['num_accepted_tokens']} drafts accepted, no hook needed")


if __name__ == "__main__":
    main()
