"""Fetch SmolLM2-135M-Instruct, once, and say where it is.

    python -m scripts.fetch_smollm2

It is what `vllm-emssd bench` fetches where there is no checkout. The repository has an
EAGLE-3 head for it, models/smollm2-eagle3.
"""

import sys

from vllm_emssd.bench.smollm2 import FetchError, fetch

if __name__ == "__main__":
    try:
        print(f"chat model: {fetch()}")
    except FetchError as error:
        sys.exit(str(error))
