"""docs/adding.md names files, folders and tests that exist, and every kind of thing says which test fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
SECTIONS = TEXT.split("\n## ")[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=[part.splitlines()[0] for part in SECTIONS])
def test_a_kind_says_which_test_fails_if_a_place_is_forgotten(section: str) -> None:
    flat = " ".join(section.split())
    assert re.search(r"Fails: .*`tests/[\w/]+\.py`", flat)
    for path in re.findall(r"`((?:planner|tests|data|calibrate)/[\w/.]+)`", flat):
        assert (ROOT / path).exists(), path
