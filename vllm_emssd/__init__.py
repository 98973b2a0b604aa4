"""Unpadded, per-request speculative decoding for vLLM.

`register` is the entry point that vLLM calls in every process. It only makes the method
name "emssd" known to vLLM's front end; everything else is set up when a user asks for
the method.
"""

import logging

__version__ = "0.1.0"


def register() -> None:
    """Install the front-end hook (idempotent).

    On a vLLM that it does not fit, the method stays unknown and a warning says why:
    users who did not enable emssd must still be served.
    """
    try:
        from vllm_emssd.integration.hooks.compat import check_vllm_version

        check_vllm_version()
        from vllm_emssd.integration.frontend.method import FRONTEND_HOOK
        from vllm_emssd.integration.hooks.hook import install

        install([FRONTEND_HOOK])
    except (ImportError, RuntimeError) as error:
        logging.getLogger("vllm.emssd").warning(
            'vllm-emssd is off, "method": "emssd" is not available: %s', error
        )
