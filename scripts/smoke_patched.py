"""Run by `scripts/check_patches`, with a patched copy of vLLM as `vllm`: emssd works
and installs no hook, and the patches do what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tests.conftest  # noqa: F401  the environment of engines
from tests.engine import (
    DRAFT_MODEL,
    LLMA,
    STOCK,
    DraftRowCounter,
    EngineConfig,
    draft_model,
    greedy,
    prompts,
    running,
    stats,
    stop_counting_others,
)

NUM_PROMPTS = 4
MAX_TOKENS = 24
UNPADDED_STOCK = STOCK | {"disable_padded_drafter_batch": True}
FAVOURITE = 100  # a token id


def check_no_hook_is_needed() -> None:
    from vllm_emssd.integration.inventory import hook_rows

    states = {row.target: row.state for row in hook_rows()}
    unpatched = {target: s for target, s in states.items() if s != "upstream"}
    assert not unpatched, unpatched
    print(f"{len(states)} hooks, none needed")


def check_parameters(llm: Any) -> None:
    """`min_p` and `logit_bias` on drafted rows: a token that must come, one that may
    not, and the likeliest alone."""
    from vllm import SamplingParams

    text = list(prompts()[:NUM_PROMPTS])

    def tokens(**options: Any) -> list[list[int]]:
        params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, **options)
        outputs = llm.generate(text, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    plain = tokens(temperature=0)
    assert all(
        set(ids) == {FAVOURITE}
        for ids in tokens(temperature=0, logit_bias={FAVOURITE: 100})
    )
    banned = plain[0][1]
    biased = tokens(temperature=0, logit_bias={banned: -100})
    assert all(banned not in ids for ids in biased)
    assert tokens(temperature=1, min_p=1.0) == plain


def check_references(llm: Any) -> None:
    """A reference as parameter or as OpenAI's `prediction` is copied; a bad one is
    refused."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMValidationError

    prompt = prompts()[0]

    def answer(params: Any) -> tuple[str, int]:
        before = stats(llm)["num_accepted_tokens"]
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        accepted = stats(llm)["num_accepted_tokens"] - before
        return output.outputs[0].text, accepted

    def with_extra_args(**extra_args: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, extra_args=extra_args
        )

    text, without = answer(with_extra_args())
    request = ChatCompletionRequest(
        messages=[],
        temperature=0,
        ignore_eos=True,
        prediction={"type": "content", "content": [{"type": "text", "text": text}]},
    )
    for params in (
        with_extra_args(emssd_reference=text),
        request.to_sampling_params(40, {}),
    ):
        again, accepted = answer(params)
        assert again == text
        assert accepted > without, (accepted, without)
    try:
        answer(with_extra_args(emssd_reference=7))
    except VLLMValidationError:
        return
    raise AssertionError("a bad reference was accepted")


def run(speculative_config: dict[str, Any] | None) -> tuple[list[list[int]], int, int]:
    """Greedy tokens, rows fed to a draft model, if any, and, of emssd, the rows that
    stock's padded batch would have fed."""
    stop_counting_others()
    num_padded_rows = 0
    with running(EngineConfig(speculative_config)) as llm:
        has_model = bool(speculative_config) and "model" in speculative_config
        rows = DraftRowCounter(draft_model(llm)) if has_model else None
        tokens = greedy(llm, list(prompts()[:NUM_PROMPTS]), MAX_TOKENS)
        num_rows = rows.num_rows if rows else 0
        if speculative_config and speculative_config["method"] == "emssd":
            counts = stats(llm)
            assert counts["num_accepted_tokens"] > 0, counts
            num_padded_rows = counts["num_padded_draft_rows"]
            check_parameters(llm)
            if not has_model:
                check_references(llm)
    return tokens, num_rows, num_padded_rows


def main() -> None:
    import vllm

    print(f"vLLM {vllm.__version__} in {Path(vllm.__file__).parent}")
    check_no_hook_is_needed()
    plain, _, _ = run(None)
    ours, our_rows, padded_rows = run(DRAFT_MODEL)
    assert ours == plain
    copied, _, _ = run(LLMA)
    assert copied == plain
    unpadded, fewer_rows, _ = run(UNPADDED_STOCK)
    assert unpadded == plain
    assert our_rows < fewer_rows < padded_rows, (our_rows, fewer_rows, padded_rows)
    print(
        "draft rows for the same tokens: "
        f"padded {padded_rows}, stock unpadded {fewer_rows}, emssd {our_rows}"
    )
    from vllm_emssd.integration import hooks

    assert not hooks._originals, hooks._originals
    check_no_hook_is_needed()


if __name__ == "__main__":
    main()
