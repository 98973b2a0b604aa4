"""Requests with one of two LoRA adapters on the V2 runner, under the interpreter."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.engine import LLMA, EngineConfig, counting, running, stop_counting_others
from tests.lossless.test_lora import RANK, write_adapter
from tests.v2 import interpreter
from tests.v2.heads import HEAD
from tests.v2.runs import EMSSD, SMALL, asynchronous, texts

LORA = SMALL | {
    "options": SMALL["options"]
    | {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
}
ENGINES = {
    "plain": EngineConfig(**LORA),
    "draft_model": EngineConfig(EMSSD, **asynchronous(LORA)),
    "eagle3": EngineConfig(HEAD, **LORA),
    "llma": EngineConfig(LLMA | {"check_length": 1}, **LORA),
}


def run_all() -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    seen: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        adapters = []
        for number in (1, 2):
            path = Path(folder) / str(number)
            path.mkdir()
            write_adapter(path, seed=number)
            adapters.append(LoRARequest(path.name, number, str(path)))
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        for name, config in ENGINES.items():
            interpreter.schedule_asynchronously(name == "draft_model")
            stop_counting_others()
            with running(config) as llm, counting(llm) as gained:
                outputs = llm.generate(
                    texts(),
                    params,
                    use_tqdm=False,
                    lora_request=[adapters[i % 2] for i in range(len(texts()))],
                )
            seen[name] = {
                "token_ids": [list(o.outputs[0].token_ids) for o in outputs],
                "num_accepted_tokens": gained.get("num_accepted_tokens", 0),
            }
    return seen
