"""How vLLM's V2 runner comes by our speculator."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.hooks.hook import Hook
from vllm_emssd.integration.v2.copy_speculator import CopySpeculator
from vllm_emssd.integration.v2.drafting_speculator import DraftingSpeculator
from vllm_emssd.integration.v2.eagle_speculator import UnpadEagleSpeculator
from vllm_emssd.integration.v2.speculator import UnpadSpeculator

INIT_SPECULATOR_HOOK = Hook(
    target="vllm.v1.worker.gpu.model_runner:init_speculator",
    why="the V2 runner builds its speculator by a closed list",
    signature="vllm_config, device, req_states",
    remove_when="a subclass of the V2 runner can choose its speculator",
    make=lambda stock: _make_speculator,
    when="while an emssd worker makes its V2 runner",
    patch="0007-speculator-registry",
)


def _make_speculator(
    vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> DraftingSpeculator | CopySpeculator:
    config = EmssdConfig.carried_by(vllm_config.additional_config)
    speculator: type[DraftingSpeculator | CopySpeculator] = UnpadSpeculator
    if not config.uses_draft_model:
        speculator = CopySpeculator
    elif vllm_config.speculative_config.method == "eagle3":
        speculator = UnpadEagleSpeculator
    return speculator(vllm_config, device, req_states=req_states)
