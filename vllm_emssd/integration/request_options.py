"""What a request may say in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`).

`emssd_max_draft_tokens`: most drafts of it in a step; 0 is no speculation.
`emssd_reference`: text or token ids that its answer will mostly repeat; in chat
completions also OpenAI's `prediction`. The front end checks both, turns text into token
ids, and sends those along. Workers leave out what did not go through these checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from pydantic import BaseModel, ValidationError
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from vllm_emssd.config import EmssdConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = init_logger("vllm.emssd.references")

MAX_DRAFT_TOKENS_KEY = "emssd_max_draft_tokens"
REFERENCE_KEY = "emssd_reference"
MAX_BYTES_PER_TOKEN = 32  # of a reference's text, before it is tokenized


def _option(params: SamplingParams, key: str, default: Any = None) -> Any:
    return (params.extra_args or {}).get(key, default)


# ------------------------------------------------------------ limits of drafts


def check_request_limit(params: SamplingParams) -> None:
    """Raises VLLMValidationError (HTTP 400) naming the fix."""
    limit = _option(params, MAX_DRAFT_TOKENS_KEY, default=0)
    if not _is_limit(limit):
        raise VLLMValidationError(
            f"{MAX_DRAFT_TOKENS_KEY} must be an integer, at least 0 (no drafts), got "
            f"{limit!r}.",
            parameter=MAX_DRAFT_TOKENS_KEY,
        )


def _is_limit(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


class RequestLimits:
    """In the worker: the limits of the requests that have one."""

    def __init__(self) -> None:
        self._limits: dict[str, int] = {}

    def admit(self, new_requests: Sequence[NewRequestData]) -> None:
        # A streaming session's next input does not keep the limit of the last.
        self.release(new.req_id for new in new_requests)
        for new in new_requests:
            limit = _option(new.sampling_params, MAX_DRAFT_TOKENS_KEY)
            if _is_limit(limit):
                self._limits[new.req_id] = limit

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._limits.pop(req_id, None)

    def apply(self, max_draft_tokens: np.ndarray, req_ids: Sequence[str]) -> None:
        """Lower `max_draft_tokens` [num_reqs] in place."""
        for row, req_id in enumerate(req_ids if self._limits else ()):
            limit = self._limits.get(req_id, max_draft_tokens[row])
            max_draft_tokens[row] = min(max_draft_tokens[row], limit)


# ------------------------------------------------------------------ references


def reference_of(params: SamplingParams, vocab_size: int) -> np.ndarray | None:
    """In the worker: a new request's reference, [num_tokens] int32, if it has one."""
    token_ids = _option(params, REFERENCE_KEY)
    if not isinstance(token_ids, list) or not token_ids:
        return None
    if not all(type(t) is int and 0 <= t < vocab_size for t in token_ids):
        return None
    return np.array(token_ids, dtype=np.int32)


def has_text_reference(params: Any) -> bool:
    """Whether these parameters hold a text that is to be tokenized."""
    extra_args = getattr(params, "extra_args", None) or {}
    return isinstance(extra_args.get(REFERENCE_KEY), str)


def tokenize_reference(processor: Any, params: SamplingParams) -> None:
    """Put token ids in place of a request's reference, if it has one.

    `params` are the request's own copy: the caller's stay as they are. `processor`:
    vLLM's InputProcessor, of an engine with emssd.

    Raises: VLLMValidationError (HTTP 400) naming the fix.
    """
    reference = _option(params, REFERENCE_KEY)
    if reference is None:
        return
    config = EmssdConfig.carried_by(processor.vllm_config.additional_config)
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
        token_ids = []
    params.extra_args = {**(params.extra_args or {}), REFERENCE_KEY: token_ids}


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


class _Part(BaseModel):
    text: str


class _Prediction(BaseModel):
    content: str | list[_Part]


def prediction_of(request: Any) -> str | None:
    """The text of a chat request's `prediction`, which vLLM keeps but ignores; None
    where there is none."""
    prediction = (request.model_extra or {}).get("prediction")
    if prediction is None:
        return None
    try:
        content = _Prediction.model_validate(prediction).content
    except ValidationError as error:
        raise VLLMValidationError(
            'prediction must be {"type": "content", "content": TEXT}, where TEXT may '
            'be a list of {"type": "text", "text": TEXT}.',
            parameter="prediction",
        ) from error
    return content if isinstance(content, str) else "".join(p.text for p in content)
