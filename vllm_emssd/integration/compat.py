"""Which vLLM versions this plugin works with. Differences between them go here."""

from __future__ import annotations

import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")


def check_vllm_version(version: str | None = None) -> None:
    """Raise RuntimeError where the running vLLM is outside the supported range."""
    version = version or vllm.__version__
    if not SUPPORTED_VLLM.contains(Version(version).base_version):
        raise RuntimeError(
            f'"method": "emssd" works with vLLM {SUPPORTED_VLLM}, found {version}. '
            'Install a vLLM in that range, e.g. pip install "vllm==0.32.*", '
            "or a vllm-emssd made for this vLLM."
        )
