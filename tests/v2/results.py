"""Results of modules that run under the interpreter, in a process of their own.

    python -m tests.v2.results tests.v2.runs RESULTS.json [ARGUMENT ...]

It must be in place before vLLM is imported, so the tests start each module once, and
look at what its `run_all` returned.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.v2 import interpreter

REPO = Path(__file__).resolve().parents[2]
COMPILING = "tests.v2.compiled"  # does without


def results_of(module: str, timeout: float = 600, only: tuple[str, ...] = ()) -> Any:
    """Run once, also where it fails. `timeout`: seconds; `only`: arguments of its
    `run_all`.

    Raises CalledProcessError or TimeoutExpired.
    """
    found = _run(module, timeout, only)
    if isinstance(found, subprocess.SubprocessError):
        raise found
    return found


@cache
def _run(module: str, timeout: float, only: tuple[str, ...]) -> Any:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "tests.v2.results", module, str(path), *only]
        try:
            subprocess.run(command, cwd=REPO, check=True, timeout=timeout)
        except subprocess.SubprocessError as error:
            return error
        return json.loads(path.read_text())


def prepare(module: str) -> None:
    if module == COMPILING:
        interpreter.pretend_cpu_backend()  # or vLLM takes it that there is no Triton
    else:
        interpreter.install()
        import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner


def main(module: str, path: str, *arguments: str) -> None:
    prepare(module)
    results = import_module(module).run_all(*arguments)
    Path(path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
elif __name__ == "__mp_main__":  # in a worker that vLLM spawned
    prepare(sys.argv[1])
