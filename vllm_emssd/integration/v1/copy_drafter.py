"""The drafter object vLLM holds while the llma proposer is in use.

vLLM's method "custom_class" makes it and asks it to load; our runner drafts by
itself, so nothing else is asked of it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from vllm.config import VllmConfig


class CopyDrafter:
    def __init__(self, vllm_config: VllmConfig) -> None:
        del vllm_config

    def load_model(self, target_model: nn.Module) -> None:
        """There is no model to load."""

    def propose(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "vllm-emssd: the stock runner asked for drafts; the emssd worker class is "
            "not in use. Remove --worker-cls or the custom_class method."
        )
