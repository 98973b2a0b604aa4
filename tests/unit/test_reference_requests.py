"""A reference on its way from the request to the worker."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_emssd.config import parse_speculative_config
from vllm_emssd.integration.frontend import serving
from vllm_emssd.integration.frontend.serving import (
    ADD_REQUEST_HOOK,
    INPUT_PROCESSOR_HOOK,
    attach_tag,
)
from vllm_emssd.integration.request_options import (
    MAX_BYTES_PER_TOKEN,
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


def config_of(asked: dict[str, Any] | None) -> Any:
    """Stands in for vLLM's config, of an engine with emssd or of another."""
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(),
        model_config=SimpleNamespace(served_model_name="served"),
    )
    if asked is not None:
        options, _ = parse_speculative_config(
            {"method": "emssd", **asked}, {"method", "model", "num_speculative_tokens"}
        )
        config.additional_config = {"emssd": options.model_dump()}
        attach_tag(config.speculative_config)
    return config


class Processor:
    """Stands in for vLLM's InputProcessor."""

    def __init__(self, vllm_config: Any, renderer: Any) -> None:
        self.vllm_config = vllm_config
        self.model_config, self.tokenizer = MODEL, ByteTokenizer()
        self.renderer = renderer
        self.kept = self.process_inputs  # as vLLM keeps it, for process_inputs_async

    def process_inputs(self, request_id: str, prompt: Any, params: Any) -> Any:
        assert (request_id, prompt) == ("id", "prompt")
        return SimpleNamespace(sampling_params=params.clone())


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is shown on /metrics: of these engines nothing is to be."""
    shown: list[Any] = []
    monkeypatch.setattr(serving, "show_on_metrics", lambda *args: shown.append(args))
    return shown


def processor_through_hook(asked: dict[str, Any] | None) -> Any:
    hooked = type("Hooked", (Processor,), {})
    hooked.__init__ = INPUT_PROCESSOR_HOOK.make(Processor.__init__)
    config = config_of(asked)
    return hooked(config, renderer=SimpleNamespace(_executor=ThreadPoolExecutor(1)))


def process(params: SamplingParams, asked: dict[str, Any] | None) -> Any:
    """Through the hook: the request's own parameters."""
    processor = processor_through_hook(asked)
    assert processor.kept == processor.process_inputs
    return processor.kept("id", "prompt", params).sampling_params


def test_engine_with_emssd_is_shown_once_and_another_is_not_touched(
    metrics: list[Any],
) -> None:
    ours = processor_through_hook({})
    assert metrics == [(ours, "served")]
    stock = processor_through_hook(None)
    assert len(metrics) == 1
    assert "process_inputs" not in vars(stock)


def add_request(params: SamplingParams, asked: dict[str, Any] | None) -> Any:
    """Through the hook: the parameters that vLLM's own method gets; and the threads in
    which texts were tokenized."""
    threads: list[int] = []
    processor = processor_through_hook(asked)
    encode = processor.tokenizer.encode

    def encode_seen(text: str, **kwargs: Any) -> list[int]:
        threads.append(threading.get_ident())
        return encode(text, **kwargs)

    processor.tokenizer.encode = encode_seen
    engine = SimpleNamespace(
        input_processor=processor, vllm_config=processor.vllm_config
    )

    async def stock(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        assert (self, request_id, prompt) == (engine, "id", "prompt")
        return params

    hook = ADD_REQUEST_HOOK.make(stock)
    sent = asyncio.run(hook(engine, "id", "prompt", params))
    return sent, threads


def test_text_is_tokenized_off_the_event_loop() -> None:
    params = params_of("ab")
    sent, threads = add_request(params, {})
    assert sent.extra_args == {"emssd_reference": [97, 98], "other": 1}
    assert params.extra_args == {"emssd_reference": "ab", "other": 1}
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


@pytest.mark.parametrize(
    ("reference", "asked"), [([97], {}), ("ab", None), (None, {}), (7, {})]
)
def test_any_other_request_is_added_as_it_is(reference: Any, asked: Any) -> None:
    params = params_of(reference)
    sent, threads = add_request(params, asked)
    assert sent is params
    assert threads == []


def test_text_that_is_too_long_is_refused_before_the_engine_sees_it() -> None:
    with pytest.raises(VLLMValidationError, match="21 tokens"):
        add_request(params_of("x" * (LENGTH + 1)), {})


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
