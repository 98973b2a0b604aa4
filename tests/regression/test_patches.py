"""The patches offered to vLLM: what they say, and that they work where they apply."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.compat.patches import MADE_AGAINST, PATCHES, changed_tests, check
from scripts.compat.release import prepared

SENDER = r"^(From|Signed-off-by): .+ <.+@.+>$"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_reads_as_a_pull_request(patch: Path) -> None:
    message = patch.read_text().partition("\n---\n")[0]
    found = re.findall(SENDER, message, re.MULTILINE)
    assert found == ["From", "Signed-off-by"]
    assert re.search(r"^Subject: \[PATCH\] (\[[\w .]+\])+ \w", message, re.MULTILINE)
    said = re.sub(SENDER, "", message, flags=re.MULTILINE)
    assert not re.search("emssd|Hook:|Remove when:", said)
    assert changed_tests(patch)


@pytest.mark.slow  # fetches the release once, and runs engines
def test_patches_work_on_the_release_they_are_made_against() -> None:
    assert check(prepared(MADE_AGAINST)) == []
