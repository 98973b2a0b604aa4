"""References: text that a request brings since its answer will mostly repeat it.

`emssd_reference` in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`), text or
token ids; in chat completions also OpenAI's `prediction`. The front end checks it,
turns text into token ids, and sends those along with the request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.hooks import hook as hooks

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = init_logger("vllm.emssd.references")

REFERENCE_KEY = "emssd_reference"
MAX_BYTES_PER_TOKEN = 32  # of a reference's text, before it is tokenized


def reference_token_ids(
    reference: Any, model_config: ModelConfig, tokenizer: Any
) -> list[int]:
    """Token ids of what a request gave as its reference, perhaps none.

    Raises: VLLMValidationError (HTTP 400) naming the fix.
    """
    max_model_len = model_config.max_model_len
    if isinstance(reference, str):
        num_bytes = len(reference.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_BYTES_PER_TOKEN * max_model_len:
            raise _error(
                f"has {num_bytes} bytes, more than {MAX_BYTES_PER_TOKEN} times the "
                f"model's length of {max_model_len} tokens; shorten it"
            )
        if tokenizer is None:
            raise _error(
                "is text, but the tokenizer was not loaded; give token ids, or remove "
                "--skip-tokenizer-init"
            )
        text = reference.encode("utf-8", "replace").decode()  # no lone surrogates
        token_ids = list(tokenizer.encode(text, add_special_tokens=False))
    elif isinstance(reference, list | tuple):
        token_ids = list(reference)
        for kind in set(map(type, token_ids)) - {int}:
            raise _error(
                "must be text or a list of token ids, found "
                f"{kind.__name__} in the list"
            )
    else:
        raise _error(
            f"must be text or a list of token ids, got {type(reference).__name__}"
        )
    if len(token_ids) > max_model_len:
        raise _error(
            f"has {len(token_ids)} tokens, more than the model's length of "
            f"{max_model_len}; shorten it"
        )
    vocab_size = model_config.get_vocab_size()
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(t for t in token_ids if not 0 <= t < vocab_size)
        raise _error(
            f"has the token id {wrong}; ids of this model are 0 to {vocab_size - 1}"
        )
    return token_ids


def _error(what: str) -> VLLMValidationError:
    return VLLMValidationError(f"{REFERENCE_KEY} {what}.", parameter=REFERENCE_KEY)


def reference_of(params: SamplingParams | None, vocab_size: int) -> np.ndarray | None:
    """In the worker: a new request's reference, [num_tokens] int32, if it has one that
    went through the front end's checks; what did not is left out."""
    extra_args = params.extra_args if params is not None else None
    token_ids = (extra_args or {}).get(REFERENCE_KEY)
    if not isinstance(token_ids, list) or not token_ids:
        return None
    if not all(type(t) is int and 0 <= t < vocab_size for t in token_ids):
        return None
    return np.array(token_ids, dtype=np.int32)


# ---------------------------------------------------------------- in the front end


def has_text_reference(params: Any) -> bool:
    """Whether these parameters hold a text that is to be tokenized."""
    extra_args = getattr(params, "extra_args", None) or {}
    return isinstance(extra_args.get(REFERENCE_KEY), str)


def tokenize_reference(processor: Any, params: SamplingParams) -> None:
    """Put token ids in place of a request's reference, if it has one.

    `params` are the request's own copy: the caller's stay as they are. `processor`:
    vLLM's InputProcessor.

    Raises: VLLMValidationError (HTTP 400) naming the fix.
    """
    extra_args = dict(params.extra_args or {})
    reference = extra_args.get(REFERENCE_KEY)
    if reference is None:
        return
    config = EmssdConfig.carried_by(processor.vllm_config.additional_config)
    if config is not None:
        extra_args[REFERENCE_KEY] = _checked(processor, reference, config)
        params.extra_args = extra_args


def _checked(processor: Any, reference: Any, config: EmssdConfig) -> list[int]:
    token_ids = reference_token_ids(
        reference, processor.model_config, processor.tokenizer
    )
    if not config.copies:
        logger.warning_once(
            "%s is ignored: the proposer '%s' does not follow it. Serve with "
            '"proposer": "mixed" (or "llma", without a draft model).',
            REFERENCE_KEY,
            config.proposer,
        )
        return []
    return token_ids


def prediction_of(request: Any) -> Any:
    """The content of a chat request's `prediction`, which vLLM keeps but ignores:
    text, or parts of text as OpenAI's API has them. None where there is none."""
    prediction = (request.model_extra or {}).get("prediction")
    if prediction is None:
        return None
    content = prediction.get("content") if isinstance(prediction, dict) else None
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else None for p in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise VLLMValidationError(
            'prediction must be {"type": "content", "content": TEXT}, where TEXT may '
            'be a list of {"type": "text", "text": TEXT}.',
            parameter="prediction",
        )
    return content


def _make_to_sampling_params(
    stock: Callable[..., SamplingParams],
) -> Callable[..., SamplingParams]:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        params = stock(self, *args, **kwargs)
        prediction = prediction_of(self)
        extra_args = params.extra_args or {}
        if prediction is not None and extra_args.get(REFERENCE_KEY) is None:
            params.extra_args = {**extra_args, REFERENCE_KEY: prediction}
        return params

    return to_sampling_params


PREDICTION_HOOK = hooks.Hook(
    target=(
        "vllm.entrypoints.openai.chat_completion.protocol:"
        "ChatCompletionRequest.to_sampling_params"
    ),
    why="vLLM accepts OpenAI's prediction field but does not hand it on",
    signature="self, max_tokens, default_sampling_params",
    upstream="predicted outputs in the OpenAI server",
    remove_when="vLLM hands prediction on in SamplingParams",
    make=_make_to_sampling_params,
    when="in processes that a config for emssd reaches; requests with prediction only",
)
