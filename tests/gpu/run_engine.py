"""One engine on a GPU; prints what it saw as one line of JSON.

python -m tests.gpu.run_engine SIDE VARIANT OPTIONS
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    MIXED,
    STOCK,
    STOCK_EAGLE3,
    EngineConfig,
    model_runner,
    prompts,
    running,
    vllm_counters,
)

SIDES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "stock": STOCK,
    "emssd": DRAFT_MODEL,
    "ragged": DRAFT_MODEL,
    "auto": DRAFT_MODEL | {"draft_length": "auto"},
    "trimmed": DRAFT_MODEL | {"enable_adaptive_verification": True},
    "stock, eagle3": STOCK_EAGLE3,
    "emssd, eagle3": EAGLE3,
    "ragged, eagle3": EAGLE3,
    "llma": LLMA,
    "mixed": MIXED,
}
BATCH = 24  # requests
GPU_SHARE = 0.05  # several run at once; the K/V cache has a size of its own


def speculative_config(side: str, options: dict[str, Any]) -> dict[str, Any] | None:
    config = SIDES[side]
    if config is None:
        return None
    draft, sampled = options.get("draft"), options.get("sampled")
    config = config | ({"model": draft} if draft else {})
    return config | ({"draft_sample_method": "probabilistic"} if sampled else {})


def main(side: str, variant: str, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    is_sampled = bool(options.get("sampled"))
    dtype = options.pop("dtype")
    config = speculative_config(side, options)
    regex = options.get("regex")
    max_tokens = options.get("max_tokens", 128 if regex else 64)
    ours = ("draft", "sampled", "regex", "max_tokens")  # the rest is vLLM's
    options = {k: v for k, v in options.items() if k not in ours}
    if side.startswith(("emssd", "ragged", "auto", "trimmed")):
        options["async_scheduling"] = variant == "async"
    texts = [prompts()[i % len(prompts())] for i in range(BATCH)]
    params = SamplingParams(
        temperature=float(is_sampled),
        seed=0,
        max_tokens=max_tokens,
        ignore_eos=regex is None,
        structured_outputs=StructuredOutputsParams(regex=regex) if regex else None,
    )
    engine = EngineConfig(
        config,
        dtype=dtype,
        kv_cache_bytes=1 << 30,
        options={
            "enforce_eager": True,
            "max_num_seqs": 128,
            "gpu_memory_utilization": GPU_SHARE,
        }
        | options,
    )
    with running(engine) as llm:
        if side.startswith("ragged"):
            from tests.v2.runs import RaggedLengths

            model_runner(llm).speculator.policy = RaggedLengths()
        is_ours = config is not None and config["method"] == "emssd"
        costs = llm.collective_rpc("emssd_costs") if is_ours else []
        outputs = llm.generate(texts, params, use_tqdm=False)
        counters = vllm_counters(llm)
        costs += llm.collective_rpc("emssd_costs") if is_ours else []
        ranks = llm.collective_rpc("emssd_stats") if is_ours else [{}]
    accepted = int(counters.get("vllm:spec_decode_num_accepted_tokens", 0))
    drafted = int(counters.get("vllm:spec_decode_num_draft_tokens", 0))
    return {
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "num_accepted_tokens": accepted,
        "accepted_share": accepted / max(drafted, 1),
        "counts": ranks[0],
        "costs": [costs[0], costs[-1]] if costs else [],
        "ranks_count_alike": all(counts == ranks[0] for counts in ranks),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
