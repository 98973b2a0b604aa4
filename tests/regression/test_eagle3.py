"""An EAGLE-3 head: its rows, what it missed while lengths were 0, and what it cannot.

Tokens and acceptance are compared with stock's in `test_against_stock.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams

from models.make.eagle3_head import Eagle3Head
from tests.engine import (
    DRAFT,
    DRAFT_MODEL,
    EAGLE3,
    EAGLE3_HEAD,
    NUM_SPECULATIVE_TOKENS,
    STOCK_EAGLE3,
    TARGET,
    EngineConfig,
    greedy,
    model_runner,
    prompts,
    running,
    stats,
    stop_counting_others,
)
from tests.lossless.test_auto import random_costs
from tests.regression.runs import BATCHES, run
from tests.tiny_llama import tiny_llama

AUTO = {"draft_length": "auto", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
TEXTS = list(prompts()[:4])
LONG = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)


def test_rows_are_stocks_less_those_of_rejected_drafts() -> None:
    """A step's first forward has a row for each new token, at most K + 1 a request."""
    counts, stock = run("eagle3").first.counts, run("eagle3, stock").first
    assert counts is not None
    first = counts["num_accepted_tokens"] + counts["num_request_steps"]
    later = counts["num_draft_tokens"]  # at most K - 1 rows of each K drafts
    prompt_rows = counts["num_draft_rows"] - counts["num_draft_rows_decode"]
    assert counts["num_draft_rows_decode"] <= first + later
    most = 2 * NUM_SPECULATIVE_TOKENS * counts["num_request_steps"]
    assert counts["num_draft_rows_decode"] <= most
    assert prompt_rows == run("eagle3").first.num_prompt_tokens
    assert stock.draft_rows is not None
    num_rejected = counts["num_draft_tokens"] - counts["num_accepted_tokens"]
    saved = stock.draft_rows - counts["num_draft_rows"]
    # And what stock drafts for nothing: in a request's last step, and before it beyond
    # the end of its output.
    max_at_the_end = (3 * NUM_SPECULATIVE_TOKENS - 1) * sum(BATCHES)
    assert num_rejected <= saved <= num_rejected + max_at_the_end
    assert counts["num_padded_draft_rows"] == pytest.approx(stock.draft_rows, rel=0.02)


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped head, with a vocabulary of some tokens only."""
    target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    tokens = torch.arange(1, 2048, 3)
    head = Eagle3Head(target, [1, 3, 5], 1024, tokens)
    head.load(Path(EAGLE3_HEAD))
    folder = tmp_path_factory.mktemp("heads") / "few"
    head.save(folder, TARGET, torch.float32)
    return folder


def answers(llm: Any) -> list[list[list[int]]]:
    """Greedy, sampled with a seed, and under a grammar."""
    words = StructuredOutputsParams(regex=r"[a-z]{3}( [a-z]{2,9}){6}")
    return [
        greedy(llm, TEXTS),
        greedy(llm, TEXTS, temperature=0.9, seed=3),
        greedy(llm, TEXTS, structured_outputs=words, ignore_eos=False),
    ]


@cache
def plain_answers() -> list[list[list[int]]]:
    with running(EngineConfig()) as llm:
        return answers(llm)


@pytest.mark.parametrize("lengths", ["auto", "mixed"])
def test_tokens_are_the_targets(lengths: str, few_tokens: Path) -> None:
    expected = plain_answers()
    options: dict[str, Any] = {
        "auto": AUTO | {"model": str(few_tokens)},
        "mixed": {"proposer": "mixed"},
    }[lengths]
    config = EngineConfig(
        EAGLE3 | options, prefix_caching=True, max_num_batched_tokens=192
    )
    stop_counting_others()
    with running(config) as llm:
        costs = random_costs(llm) if lengths == "auto" else nullcontext()
        with costs:
            for _ in range(2):
                assert answers(llm) == expected
        assert stats(llm)["num_accepted_tokens"] > 50
        assert stats(llm)["num_failed_proposals"] == 0


def emitted_after(
    llm: Any, text: list[int], num_without: int, let_draft: Callable[[bool], Any]
) -> list[int]:
    """Tokens emitted in each of the first steps with drafts, once a request has
    emitted `num_without` tokens without."""
    engine, seen, num_tokens = llm.llm_engine, [], 0
    let_draft(num_without == 0)
    engine.add_request("one", {"prompt_token_ids": text}, LONG)
    while len(seen) < 12:
        for output in engine.step():
            if output.request_id != "one":
                continue
            new = len(output.outputs[0].token_ids) - num_tokens
            num_tokens += new
            if num_tokens == num_without:
                let_draft(True)
            if num_tokens > num_without + 1:
                seen.append(new)
    engine.abort_request(["one"])
    return seen


def test_drafts_after_200_steps_without_are_those_of_a_head_that_saw_all() -> None:
    """Unless fewer hidden states are kept than were missed: then it begins anew."""
    with running(EngineConfig(EAGLE3 | AUTO)) as llm:

        def let_draft(is_on: bool) -> None:
            length = NUM_SPECULATIVE_TOKENS if is_on else 0
            llm.collective_rpc("emssd_fix_draft_length", args=(length,))

        text = llm.get_tokenizer().encode(TEXTS[0])
        (answer,) = greedy(llm, [TEXTS[0]], max_tokens=200)
        expected = emitted_after(llm, text + answer, 0, let_draft)
        runner = model_runner(llm)
        assert emitted_after(llm, text, 200, let_draft) == expected
        assert sum(expected) > len(expected)
        assert stats(llm)["num_draft_restarts"] == 0

        # Room for the prompt, not for 220 tokens more.
        states = runner._hidden_states
        states._buffer = states._buffer[:64]
        emitted_after(llm, text[:30], 220, let_draft)
        assert stats(llm)["num_draft_restarts"] == 1


@pytest.mark.slow  # of stock alone: what the test above it would see without us
def test_stocks_first_drafts_after_200_steps_without_are_rejected() -> None:
    """It makes none for a whole batch while one request is too long for the head."""
    config = EngineConfig(STOCK_EAGLE3 | {"max_model_len": 512})
    with running(config) as llm:
        engine = llm.llm_engine

        def let_draft(is_on: bool) -> None:
            engine.abort_request(["long"])
            if not is_on:
                engine.add_request("long", {"prompt_token_ids": [9] * 600}, LONG)

        text = llm.get_tokenizer().encode(TEXTS[0])[:100]
        (answer,) = greedy(llm, [{"prompt_token_ids": text}], max_tokens=200)
        before = emitted_after(llm, text + answer, 0, let_draft)
        after = emitted_after(llm, text, 200, let_draft)
        assert sum(after[:5]) < sum(before[:5]) / 2


# ---------------------------------------------------------------- refusals


def create(head: Path | str, **options: Any) -> Any:
    return EngineArgs(
        model=TARGET,
        max_model_len=512,
        speculative_config=DRAFT_MODEL | {"model": str(head)},
        **options,
    ).create_engine_config()


def test_a_head_is_recognised_by_its_config(tmp_path: Path) -> None:
    head = shutil.copytree(EAGLE3_HEAD, tmp_path / "head")
    assert create(head).speculative_config.method == "eagle3"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 32, "vocab_size": 2048}, "hidden size of 32.* is 384"),
        ({"hidden_size": 384, "vocab_size": 64}, "vocabulary of 64 .* has 2048"),
    ],
)
def test_a_head_of_another_target_is_refused(
    sizes: dict[str, int], words: str, tmp_path: Path
) -> None:
    target = tiny_llama(head_dim=16, **sizes)
    Eagle3Head(target, [1], 32).save(tmp_path / "head", "other", torch.float32)
    with pytest.raises(ValueError, match=words):
        create(tmp_path / "head")


MTP = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_nextn_predict_layers": 1,
}
EAGLE_1 = {"architectures": ["EagleLlamaForCausalLM"]}
P_EAGLE = {"speculators_model_type": "peagle", "mask_token_id": 3}


@pytest.mark.parametrize(
    ("like", "changes", "words"),
    [
        (DRAFT, MTP, 'by its method "mtp" only'),
        (DRAFT, EAGLE_1, "another kind than EAGLE-3"),
        (EAGLE3_HEAD, P_EAGLE, "another kind than EAGLE-3"),
    ],
)
def test_heads_of_other_kinds_are_refused(
    like: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    head = tmp_path / Path(like).name  # vLLM goes by names too
    config = json.loads((Path(like) / "config.json").read_text())
    head.mkdir()
    (head / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=rf"{words}.*remove it to copy"):
        create(head, load_format="dummy")
