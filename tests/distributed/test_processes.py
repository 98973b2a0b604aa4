"""What the distributed tests count as left behind."""

from __future__ import annotations

import sys
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from tests.distributed.processes import Tree

pytestmark = pytest.mark.distributed

LEAVES_A_SEGMENT = """
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=1)
resource_tracker.unregister(segment._name, "shared_memory")
print(segment.name, end="")
"""


def test_a_segment_left_behind_is_seen_unless_another_process_uses_it(
    tmp_path: Path,
) -> None:
    tree = Tree([sys.executable, "-c", LEAVES_A_SEGMENT], tmp_path / "log")
    assert tree.wait(60) == 0
    segment = shared_memory.SharedMemory(tree.text)
    try:
        assert tree.text not in tree.segments(0)
        segment.close()
        assert tree.text in tree.segments(0)
    finally:
        segment.unlink()
    assert tree.text not in tree.segments(0)
