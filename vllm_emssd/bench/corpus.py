"""Text that is on any machine with Python, and that the shipped models never saw."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HELD_OUT_ONE_IN = 40
HELD_OUT_ONE_IN_STDLIB = 12
SKIPPED_DIRS = frozenset(
    {"test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "_vendor"}
)
FILE_BYTES = range(3_000, 200_000)
MIN_PROSE_CHARS = 400


@dataclass(frozen=True, slots=True)
class Text:
    source: str
    text: str


def is_held_out(name: str) -> bool:
    """By a hash of the path below the standard library ("stdlib/...") or
    site-packages: neither model of the shipped pair was trained on the file."""
    digest = hashlib.sha256(name.encode()).digest()
    one_in = HELD_OUT_ONE_IN_STDLIB if name.startswith("stdlib/") else HELD_OUT_ONE_IN
    return int.from_bytes(digest[:4], "big") % one_in == 0


@cache
def held_out_sources() -> tuple[Text, ...]:
    """Held-out Python files of the standard library, in a fixed order."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        skipped = SKIPPED_DIRS | {"site-packages"}
        name = f"stdlib/{relative}"
        if skipped & set(relative.parts) or not is_held_out(name):
            continue
        text = _readable(path)
        if text is not None:
            texts.append(Text(name, text))
    random.Random(0).shuffle(texts)
    return tuple(texts)


def _readable(path: Path) -> str | None:
    if path.stat().st_size not in FILE_BYTES:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    is_generated = "generated" in text[:400].lower()
    return None if is_generated or not text.isascii() else text


@cache
def prose() -> tuple[Text, ...]:
    """Topics of Python's own manual (`pydoc_data`, too large for the training text)."""
    from pydoc_data.topics import topics

    texts = [
        Text(f"pydoc topic {name}", text)
        for name, text in sorted(topics.items())
        if len(text) >= MIN_PROSE_CHARS and text.isascii()
    ]
    random.Random(0).shuffle(texts)
    return tuple(texts)
