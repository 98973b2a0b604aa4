"""How many drafts each request makes: policies without a dependency on vLLM."""

from vllm_emssd.draft_length.auto import AutoDraftLength
from vllm_emssd.draft_length.cost import CostTable, StepCosts
from vllm_emssd.draft_length.policy import (
    Copies,
    DraftLengthPolicy,
    FixedDraftLength,
    StepInfo,
)

__all__ = [
    "AutoDraftLength",
    "Copies",
    "CostTable",
    "DraftLengthPolicy",
    "FixedDraftLength",
    "StepCosts",
    "StepInfo",
]
