"""The patches offered to vLLM: what they say, and that they work where they apply."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import check_patches
from scripts.check_patches import MADE_AGAINST, Patch, patches


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.name)
def test_patch_reads_as_a_pull_request(patch: Patch) -> None:
    assert patch.problems() == []


def test_what_is_not_ready_to_send_is_found(tmp_path: Path) -> None:
    path = tmp_path / "0001-silent.patch"
    path.write_text("Subject: [PATCH] x\n\nHook: y\n---\n+++ b/vllm/a.py\n+From: x\n")
    assert Patch(path).problems() == [
        "0001-silent has no 'From:' line",
        "0001-silent has no 'Signed-off-by:' line",
        "0001-silent says 'Hook:'",
        "0001-silent brings no test",
    ]


@pytest.mark.slow  # fetches the release once, and runs engines
def test_patches_work_on_the_release_they_are_made_against() -> None:
    assert check_patches.check(MADE_AGAINST) == []
