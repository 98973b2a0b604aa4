"""Results of modules that run under the interpreter, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPO = Path(__file__).resolve().parents[2]


def results_of(module: str, timeout: float = 600) -> Any:
    """Run once, also where it fails. `timeout`: seconds.

    Raises CalledProcessError or TimeoutExpired.
    """
    found = _run(module, timeout)
    if isinstance(found, subprocess.SubprocessError):
        raise found
    return found


@cache
def _run(module: str, timeout: float) -> Any:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", module, str(path)]
        try:
            subprocess.run(command, cwd=REPO, check=True, timeout=timeout)
        except subprocess.SubprocessError as error:
            return error
        return json.loads(path.read_text())
