"""Every name of vLLM's that the plugin replaces, and how each stands.

`hook_rows` is what `vllm-emssd doctor --hooks` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_emssd.integration.cpu.fixes import CPU_FIXES
from vllm_emssd.integration.cpu.onednn_cache import KERNELS_HOOK
from vllm_emssd.integration.cpu.worker import CPU_RUNNER_HOOK, CPU_RUNNER_V2_HOOK
from vllm_emssd.integration.frontend.method import FRONTEND_HOOK
from vllm_emssd.integration.frontend.serving import SERVING_HOOKS
from vllm_emssd.integration.hooks import hook as hooks
from vllm_emssd.integration.hooks.hook import Hook, State
from vllm_emssd.integration.v1.sampling import LOGITSPROCS_HOOK

# After the worker, whose module must come before vLLM's V2 runner on a CPU.
from vllm_emssd.integration.v2.speculator_hook import INIT_SPECULATOR_HOOK  # isort: skip

INVENTORY: tuple[Hook, ...] = (
    FRONTEND_HOOK,
    *SERVING_HOOKS,
    CPU_RUNNER_HOOK,
    CPU_RUNNER_V2_HOOK,
    LOGITSPROCS_HOOK,
    INIT_SPECULATOR_HOOK,
    *CPU_FIXES,
    KERNELS_HOOK,
)

STATE_MEANS: dict[State, str] = {
    "in place": "in place in this process",
    "ready": "not in place here; the signature is as expected",
    "changed": "does not fit this vLLM",
}


@dataclass(frozen=True, slots=True)
class HookRow:
    """One hook as a person reads it."""

    target: str
    state: State
    detail: str  # of "changed": what differs, and the versions that work
    when: str
    why: str
    upstream: str
    remove_when: str
    patch: str

    @property
    def is_ok(self) -> bool:
        return self.state != "changed"


def hook_rows(inventory: Sequence[Hook] = INVENTORY) -> list[HookRow]:
    """The state of every hook in this process. Imports the modules they are in."""
    rows = []
    for hook in inventory:
        state, detail = hooks.state_of(hook)
        rows.append(
            HookRow(
                target=hook.target,
                state=state,
                detail=detail,
                when=hook.when,
                why=hook.why,
                upstream=hook.upstream,
                remove_when=hook.remove_when,
                patch=hook.patch,
            )
        )
    return rows


def describe(row: HookRow) -> str:
    """A row as a few lines of text."""
    lines = [f"{row.target}", f"    state:       {STATE_MEANS[row.state]}"]
    patch = f" (patches/{row.patch}.patch)" if row.patch else ""
    if row.detail:
        lines.append(f"                 {row.detail}")
    lines += [
        f"    in place:    {row.when}",
        f"    why:         {row.why}",
        f"    upstream:    {row.upstream}{patch}",
        f"    remove when: {row.remove_when}",
    ]
    return "\n".join(lines)
