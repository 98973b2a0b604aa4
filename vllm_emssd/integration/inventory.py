"""Every name of vLLM's that the plugin replaces, and when."""

from __future__ import annotations

from vllm_emssd.integration.cpu_fixes import CPU_FIXES
from vllm_emssd.integration.frontend import FRONTEND_HOOK, VALIDATION_HOOK
from vllm_emssd.integration.hooks import Hook
from vllm_emssd.integration.sampling_v1 import LOGITSPROCS_HOOK
from vllm_emssd.integration.worker import CPU_RUNNER_HOOK, CPU_RUNNER_V2_HOOK

# After the worker, whose module must come before vLLM's V2 runner on a CPU.
from vllm_emssd.integration.speculator_v2 import INIT_SPECULATOR_HOOK  # isort: skip

INVENTORY: tuple[Hook, ...] = (
    FRONTEND_HOOK,  # always; passes every other method through
    VALIDATION_HOOK,  # in the front end, from the first "emssd" on
    CPU_RUNNER_HOOK,  # while the worker makes its device ready
    CPU_RUNNER_V2_HOOK,  # instead of it, for the V2 runner
    LOGITSPROCS_HOOK,  # while the V1 runner is made
    INIT_SPECULATOR_HOOK,  # while the V2 runner is made
    *CPU_FIXES,  # in an emssd worker on a CPU
)
