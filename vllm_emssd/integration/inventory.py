"""Every name of vLLM's that the plugin replaces, and when."""

from __future__ import annotations

from vllm_emssd.integration.cpu_fixes import CPU_FIXES
from vllm_emssd.integration.frontend import FRONTEND_HOOK, VALIDATION_HOOK
from vllm_emssd.integration.hooks import Hook
from vllm_emssd.integration.references import REFERENCE_HOOKS
from vllm_emssd.integration.sampling_v1 import LOGITSPROCS_HOOK
from vllm_emssd.integration.worker import CPU_RUNNER_HOOK

INVENTORY: tuple[Hook, ...] = (
    FRONTEND_HOOK,  # always; passes every other method through
    VALIDATION_HOOK,  # in the front end, from the first "emssd" on
    *REFERENCE_HOOKS,  # likewise
    CPU_RUNNER_HOOK,  # while the worker makes its device ready
    LOGITSPROCS_HOOK,  # while the runner is made
    *CPU_FIXES,  # in an emssd worker on a CPU
)
