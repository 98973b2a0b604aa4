"""How many drafts each request makes: policies without a dependency on vLLM."""

from vllm_emssd.draft_length.fixed import FixedDraftLength
from vllm_emssd.draft_length.policy import DraftLengthPolicy

__all__ = ["DraftLengthPolicy", "FixedDraftLength"]
