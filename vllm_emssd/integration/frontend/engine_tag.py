"""What marks vLLM's config as one for emssd, in every process that the config reaches.

The tag is an attribute of vLLM's SpeculativeConfig. vLLM pickles it along with the
config, but hashes chosen fields only: so it may hold what differs from start to start,
for which `additional_config` would make vLLM compile the model anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ATTRIBUTE = "emssd_tag"


@dataclass
class EngineTag:
    """One per config; a copy of the config has a tag of its own."""

    counters_dir: str | None = None  # set by the process that serves the engine

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled: the config came from another process (Ray Serve makes it in a
        task), and this process may be the one that serves the engine."""
        from vllm_emssd.integration.frontend.serving import install_serving_hooks

        self.__dict__.update(state)
        install_serving_hooks()


def attach_tag(spec_config: Any) -> None:
    setattr(spec_config, _ATTRIBUTE, EngineTag())


def tag_of(spec_config: Any) -> EngineTag | None:
    """The tag of vLLM's SpeculativeConfig; None for any other method, or none."""
    return getattr(spec_config, _ATTRIBUTE, None)
