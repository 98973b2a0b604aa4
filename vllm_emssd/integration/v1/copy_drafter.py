"""The drafter object that vLLM makes and loads while the llma proposer is in use: its
method "custom_class" asks for one. Our runner drafts by itself."""

from __future__ import annotations

from typing import Any


class CopyDrafter:
    def __init__(self, vllm_config: Any) -> None: ...

    def load_model(self, target_model: Any) -> None: ...

    def propose(self) -> None: ...
