import sys

from vllm_emssd.cli import main

sys.exit(main())
