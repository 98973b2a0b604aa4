"""Recording agrees with drafting the plain way: one position, no cache, at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.tiny_llama import tiny_llama
from vllm_emssd.bench.request import Request
from vllm_emssd.simulate import recorder
from vllm_emssd.simulate.recorder import TraceRecorder

K, MAX_TOKENS = 3, 7
PROMPTS = [[5, 9, 2], [1], [7, 7, 30, 12, 4]]


@pytest.fixture(scope="module")
def pair() -> dict[str, LlamaForCausalLM]:
    """The drafter is the target's first layers, so that they agree now and then."""
    sizes = {"vocab_size": 40, "initializer_range": 0.3}  # far from uniform
    target = tiny_llama(0, **sizes)
    draft = tiny_llama(1, num_hidden_layers=1, **sizes)
    draft.load_state_dict(target.state_dict(), strict=False)
    return {"target": target, "draft": draft}


@pytest.fixture
def load_pair(
    pair: dict[str, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_load", lambda name, dtype: pair[name])
    monkeypatch.setattr(
        recorder.transformers.AutoTokenizer, "from_pretrained", lambda name: None
    )


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM, token_ids: list[int], count: int
) -> tuple[list[int], list[float]]:
    known, confidences = list(token_ids), []
    for _ in range(count):
        probs = model(input_ids=torch.tensor([known])).logits[0, -1].softmax(dim=-1)
        known.append(int(probs.argmax()))
        confidences.append(float(probs.max()))
    return known[len(token_ids) :], confidences


@pytest.mark.usefixtures("load_pair")
def test_every_position_is_what_drafting_there_gives(
    pair: dict[str, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MAX_AT_ONCE", 4)  # more positions than go at once
    made = TraceRecorder("target", "draft", K, "float32", "a test")
    all_accepted = []
    for prompt_ids in PROMPTS:
        trace = made.record_ids(prompt_ids, MAX_TOKENS)
        trace.check(made.header)
        output_ids, _ = greedy(pair["target"], prompt_ids, MAX_TOKENS + K)
        assert trace.output_ids == output_ids
        for p in range(MAX_TOKENS):
            known = prompt_ids + output_ids[:p]
            drafts, confidences = greedy(pair["draft"], known, K)
            agrees = [
                draft == token
                for draft, token in zip(drafts, output_ids[p:], strict=False)
            ]
            assert trace.accepted[p] == [*agrees, False].index(False)
            assert trace.confidences[p] == pytest.approx(confidences, abs=1e-3)
        all_accepted += trace.accepted
    assert 0 in all_accepted
    assert max(all_accepted) > 0


@pytest.mark.usefixtures("load_pair")
def test_a_draft_is_accepted_where_the_target_sampled_it(
    pair: dict[str, LlamaForCausalLM],
) -> None:
    made = TraceRecorder("target", "draft", K, "float32", "a test")
    trace = made.record_ids(PROMPTS[0], MAX_TOKENS, temperature=1.0)
    trace.check(made.header)
    assert trace.output_ids != greedy(pair["target"], PROMPTS[0], MAX_TOKENS + K)[0]
    for p in range(MAX_TOKENS):
        drafts, _ = greedy(pair["draft"], PROMPTS[0] + trace.output_ids[:p], K)
        agrees = [d == t for d, t in zip(drafts, trace.output_ids[p:], strict=False)]
        assert trace.accepted[p] == [*agrees, False].index(False)
    assert made.record_ids(PROMPTS[0], MAX_TOKENS, temperature=1.0) == trace


@pytest.mark.usefixtures("load_pair")
def test_sampling_follows_the_temperature(pair: dict[str, LlamaForCausalLM]) -> None:
    """Of its first token, 2,000 times."""
    logits = pair["target"](input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].detach()
    probs = (logits / 0.7).softmax(dim=-1)
    dice = torch.Generator().manual_seed(1)
    found = torch.tensor([recorder._sample(logits, 0.7, dice) for _ in range(2000)])
    shares = torch.bincount(found, minlength=len(probs)) / len(found)
    assert (shares - probs).abs().max() < 0.05
    assert recorder._sample(logits, 0.0, dice) == int(logits.argmax())


@pytest.mark.usefixtures("load_pair")
def test_other_sampling_is_refused() -> None:
    made = TraceRecorder("target", "draft", K, "float32", "a test")
    asked = Request(PROMPTS[0], MAX_TOKENS, {"temperature": 1.0, "top_k": 3})
    with pytest.raises(ValueError, match="leave out"):
        recorder.record_trace(made, [asked])
