"""A reference on its way from the request to the worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_emssd.config import parse_speculative_config
from vllm_emssd.integration.references import (
    MAX_BYTES_PER_TOKEN,
    PROCESS_INPUTS_HOOK,
    prediction_of,
    reference_of,
    reference_token_ids,
)

VOCABULARY, LENGTH = 300, 20
MODEL = SimpleNamespace(max_model_len=LENGTH, get_vocab_size=lambda: VOCABULARY)


class ByteTokenizer:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


def params_of(reference: Any) -> SamplingParams:
    return SamplingParams(extra_args={"emssd_reference": reference, "other": 1})


@pytest.mark.parametrize(
    ("reference", "token_ids"),
    [
        ("", []),
        ("ab", [97, 98]),
        ([], []),
        ((5, 6), [5, 6]),
        ([0, VOCABULARY - 1], [0, VOCABULARY - 1]),
        ([7] * LENGTH, [7] * LENGTH),
        ("x" * LENGTH, [120] * LENGTH),
        ("\ud800", [63]),  # what no encoding knows
    ],
)
def test_text_or_token_ids(reference: Any, token_ids: list[int]) -> None:
    assert reference_token_ids(reference, MODEL, ByteTokenizer()) == token_ids


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (7, "text or a list of token ids, got int"),
        (b"ab", "got bytes"),
        ({"a": 1}, "got dict"),
        ([1, 2.0], "found float in the list"),
        ([1, True], "found bool in the list"),
        ([-1], "token id -1; ids of this model are 0 to 299"),
        ([5, VOCABULARY], "token id 300"),
        ([7] * (LENGTH + 1), "has 21 tokens, more than the model's length of 20"),
        ("x" * (LENGTH + 1), "has 21 tokens, more than the model's length of 20"),
        ("x" * (LENGTH * MAX_BYTES_PER_TOKEN + 1), "has 641 bytes"),
    ],
)
def test_error_says_what_is_wrong(reference: Any, message: str) -> None:
    with pytest.raises(VLLMValidationError, match="emssd_reference") as caught:
        reference_token_ids(reference, MODEL, ByteTokenizer())
    assert message in str(caught.value)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(VLLMValidationError, match="give token ids"):
        reference_token_ids("text", MODEL, None)


def process(params: SamplingParams, asked: dict[str, Any] | None) -> Any:
    """Through the hook: the request's own parameters."""
    options = {}
    if asked is not None:
        config, _ = parse_speculative_config(
            {"method": "emssd", **asked}, {"method", "model", "num_speculative_tokens"}
        )
        options = {"emssd": config.model_dump()}
    processor = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config=options),
        model_config=MODEL,
        tokenizer=ByteTokenizer(),
    )

    def stock(self: Any, request_id: str, prompt: Any, params: Any, tasks: Any) -> Any:
        assert (request_id, prompt, tasks) == ("id", "prompt", "tasks")
        return SimpleNamespace(sampling_params=params.clone())

    hook = PROCESS_INPUTS_HOOK.make(stock)
    return hook(processor, "id", "prompt", params, "tasks").sampling_params


def test_request_carries_token_ids_and_the_users_parameters_stay() -> None:
    params = params_of("ab")
    sent = process(params, {})
    assert sent.extra_args == {"emssd_reference": [97, 98], "other": 1}
    assert params.extra_args == {"emssd_reference": "ab", "other": 1}
    found = reference_of(sent, VOCABULARY)
    assert found is not None
    assert found.tolist() == [97, 98]


def test_proposer_that_does_not_copy_is_sent_nothing() -> None:
    sent = process(params_of("ab"), {"model": "draft"})
    assert reference_of(sent, VOCABULARY) is None
    with pytest.raises(VLLMValidationError, match="emssd_reference"):
        process(params_of(7), {"model": "draft"})


def test_engine_without_emssd_is_left_alone() -> None:
    assert process(params_of(7), None).extra_args["emssd_reference"] == 7


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=8,
    )
)
def test_worker_takes_valid_token_ids_only(reference: Any) -> None:
    """Whatever came past the front end."""
    found = reference_of(params_of(reference), VOCABULARY)
    is_valid = isinstance(reference, list) and all(
        type(t) is int and 0 <= t < VOCABULARY for t in reference
    )
    assert (found is not None) == (is_valid and reference != [])
    assert reference_of(None, VOCABULARY) is None
    assert reference_of(SamplingParams(), VOCABULARY) is None


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (None, None),
        ({"prediction": None}, None),
        ({"prediction": {"type": "content", "content": "ab"}}, "ab"),
        (
            {
                "prediction": {
                    "type": "content",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "text", "text": "b"},
                    ],
                }
            },
            "ab",
        ),
    ],
)
def test_prediction(extra: Any, expected: str | None) -> None:
    assert prediction_of(SimpleNamespace(model_extra=extra)) == expected


@pytest.mark.parametrize(
    "prediction", ["ab", {}, {"content": 7}, {"content": [{"type": "text"}, "b"]}]
)
def test_malformed_prediction_is_refused(prediction: Any) -> None:
    with pytest.raises(VLLMValidationError, match="prediction must be"):
        prediction_of(SimpleNamespace(model_extra={"prediction": prediction}))
