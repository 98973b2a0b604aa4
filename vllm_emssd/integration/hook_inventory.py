"""Every name of vLLM's that the plugin replaces, as `vllm-emssd doctor --hooks` prints
it."""

from __future__ import annotations

from vllm_emssd.integration.cpu.fixes import EXPAND_HOOK
from vllm_emssd.integration.cpu.onednn_cache import KERNELS_HOOK
from vllm_emssd.integration.cpu.worker import CPU_RUNNER_HOOK, CPU_RUNNER_V2_HOOK
from vllm_emssd.integration.frontend.method import FRONTEND_HOOK
from vllm_emssd.integration.frontend.serving import SERVING_HOOKS
from vllm_emssd.integration.hooks.hook import Hook, difference, is_installed
from vllm_emssd.integration.v1.sampling import LOGITSPROCS_HOOK

# After the worker, whose module must come before vLLM's V2 runner on a CPU.
from vllm_emssd.integration.v2.runner import INIT_SPECULATOR_HOOK  # isort: skip

INVENTORY: tuple[Hook, ...] = (
    FRONTEND_HOOK,
    *SERVING_HOOKS,
    CPU_RUNNER_HOOK,
    CPU_RUNNER_V2_HOOK,
    LOGITSPROCS_HOOK,
    INIT_SPECULATOR_HOOK,
    EXPAND_HOOK,
    KERNELS_HOOK,
)


def describe(hook: Hook) -> str:
    """A hook and its state in this process, as a few lines of text."""
    if differs := difference(hook):
        state = f"does not fit this vLLM\n                 {differs}"
    elif is_installed(hook):
        state = "in place in this process"
    else:
        state = "not in place here; the signature is as expected"
    lines = [
        hook.target,
        f"    state:       {state}",
        f"    in place:    {hook.when}",
        f"    why:         {hook.why}",
        f"    remove when: {hook.remove_when}",
    ]
    if hook.patch:
        lines.append(f"    offered as:  patches/{hook.patch}.patch")
    return "\n".join(lines)
