"""An EAGLE-3 head and a draft model on one worker and on two, under the interpreter."""

from __future__ import annotations

from typing import Any

from tests.engine import EngineConfig, running, stop_counting_others
from tests.v2 import interpreter
from tests.v2.heads import HEAD
from tests.v2.runs import EMSSD, SMALL, texts

NAMED = [5, 17]  # tokens whose logprobs are asked for
TWO = {"tensor_parallel_size": 2}
ENGINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (None, {}),
    "head": (HEAD, TWO),
    "sharded": (EMSSD, TWO | {"enable_batch_sharded_sampling": True}),
}


def run_all() -> dict[str, Any]:
    from vllm import SamplingParams

    interpreter.schedule_asynchronously(False)
    params = SamplingParams(
        temperature=0, max_tokens=18, ignore_eos=True, logprob_token_ids=NAMED
    )
    seen: dict[str, Any] = {}
    for name, (drafts, workers) in ENGINES.items():
        stop_counting_others()
        options = SMALL["options"] | workers
        with running(EngineConfig(drafts, **SMALL | {"options": options})) as llm:
            answers = [
                request.outputs[0]
                for request in llm.generate(texts(), params, use_tqdm=False)
            ]
            seen[name] = {
                "token_ids": [list(answer.token_ids) for answer in answers],
                "logprobs": [
                    [at[token].logprob for at in answer.logprobs for token in NAMED]
                    for answer in answers
                ],
            }
            if drafts:
                seen[name]["counts"] = llm.collective_rpc("emssd_stats")
    return seen
