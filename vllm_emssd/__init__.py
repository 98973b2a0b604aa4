"""Unpadded, per-request speculative decoding for vLLM.

`register` is the entry point that vLLM calls in every process. It only teaches
vLLM's front end the method name "emssd"; all else happens in the worker class that
is chosen when a user asks for that method.
"""

__version__ = "0.1.0"


def register() -> None:
    """Install the front-end hook (idempotent, all or nothing)."""
    from vllm_emssd.integration.frontend import install_frontend_hook

    install_frontend_hook()
