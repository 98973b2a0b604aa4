"""Which vLLM versions this plugin works with, and all that differs between them.

Nothing does yet: the same code runs on all of them. What comes to differ belongs here,
as a function that says which version ends it.
"""

from __future__ import annotations

import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")


def check_vllm_version(version: str | None = None) -> None:
    """Raise RuntimeError where the running vLLM is outside the supported range."""
    version = version or vllm.__version__
    try:
        base_version = Version(version).base_version
    except InvalidVersion:
        base_version = "0.1"
    if base_version == "0.1":  # what a build from source is called without git's tags
        raise RuntimeError(
            f'"method": "emssd" works with vLLM {SUPPORTED_VLLM}, and this one calls '
            f"itself {version!r}. Build it again with its version, e.g. "
            "VLLM_VERSION_OVERRIDE=0.32.0 pip install ."
        )
    if not SUPPORTED_VLLM.contains(base_version):
        raise RuntimeError(
            f'"method": "emssd" works with vLLM {SUPPORTED_VLLM}, found {version}. '
            'Install a vLLM in that range, e.g. pip install "vllm==0.32.*", '
            "or a vllm-emssd made for this vLLM."
        )
