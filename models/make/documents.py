"""Text to train on: Python sources and documents that any machine with Python has."""

from __future__ import annotations

import random
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from vllm_emssd.bench.corpus import SKIPPED_DIRS, is_held_out

SUFFIXES = {".py", ".rst", ".md"}
FILE_BYTES = range(800, 200_000)
MAX_PACKAGE_BYTES = 3_000_000  # no installed package may outweigh the others


@dataclass(frozen=True, slots=True)
class Document:
    """One file; `name` is its path below "stdlib/" or below site-packages."""

    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Never trained on: demo, tests and benchmarks cut their prompts from these."""
        return is_held_out(self.name)


def collect_documents(seed: int) -> list[Document]:
    """Every usable file once, in an order that depends on the seed alone."""
    rng, seen = random.Random(seed), set()
    packages: defaultdict[str, list[Document]] = defaultdict(list)
    for root, prefix in (("stdlib", "stdlib/"), ("purelib", "")):
        folder = Path(sysconfig.get_path(root))
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            skipped = SKIPPED_DIRS | {"site-packages"}
            if path.suffix not in SUFFIXES or skipped & {*inside.parts[:-1]}:
                continue
            text = _readable(path)
            if text is not None and text not in seen:
                seen.add(text)
                name = f"{prefix}{inside}"
                packages[name.split("/")[0]].append(Document(name, text))
    documents = []
    for package, files in packages.items():
        rng.shuffle(files)
        budget = MAX_PACKAGE_BYTES
        for document in files:
            budget -= len(document.text)
            if package == "stdlib" or budget > 0:
                documents.append(document)
    rng.shuffle(documents)
    return documents


def _readable(path: Path) -> str | None:
    """Its text, unless it is of an unusual size, generated or not ASCII."""
    if path.stat().st_size not in FILE_BYTES:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    has_long_lines = len(text) / (text.count("\n") + 1) > 100
    is_generated = "generated" in text[:400].lower()
    return None if has_long_lines or is_generated or not text.isascii() else text
