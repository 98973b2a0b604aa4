"""How many drafts each request makes: policies without a dependency on vLLM."""

from vllm_emssd.draft_length.agreement import AgreedDraftLength
from vllm_emssd.draft_length.auto import AutoDraftLength
from vllm_emssd.draft_length.cost import CostTable
from vllm_emssd.draft_length.fixed import FixedDraftLength
from vllm_emssd.draft_length.goodput import StepCosts
from vllm_emssd.draft_length.override import OverridableDraftLength
from vllm_emssd.draft_length.policy import Copies, DraftLengthPolicy, DraftOpportunity
from vllm_emssd.draft_length.survival import Survival

__all__ = [
    "AgreedDraftLength",
    "AutoDraftLength",
    "Copies",
    "CostTable",
    "DraftLengthPolicy",
    "DraftOpportunity",
    "FixedDraftLength",
    "OverridableDraftLength",
    "StepCosts",
    "Survival",
]
