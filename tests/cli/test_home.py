"""A home folder that is missing, read-only or another user's costs what would lie in it, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import InvalidInput
from planner.facts import calibration_files
from planner.facts.catalog import gpu
from planner.plan import trace_cache
from planner.timing.coefficients import Calibration, Coefficients, priors

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("LORAPLAN_DATA", "XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@contextmanager
def another_user() -> Iterator[None]:
    """Without root's rights, for which every folder is open."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user id that no home folder is known for: "~" stays as it is. Returns the working folder."""
    for name in FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are others there")
def test_a_home_that_may_not_be_entered_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0)
    monkeypatch.setenv("LORAPLAN_DATA", str(home / "data"))
    monkeypatch.setattr(calibration_files.data_files, "data_path", lambda *parts: str(tmp_path / "shipped"))
    with another_user():
        found, notes = calibration_files.known()
    home.chmod(0o700)
    assert found == []
    assert len(notes) == 1
    assert str(home) in notes[0]
    assert "may not be read" in notes[0]


def test_without_a_home_no_trace_is_kept(no_home: Path) -> None:
    trace_cache.write("x", {"summary": 1})
    assert trace_cache.read("x") is None
    assert not list(no_home.iterdir())


def test_without_a_home_a_calibration_needs_a_name(no_home: Path) -> None:
    card = gpu("l4")
    device: dict[str, Any] = {"kind": "cuda", "name": card.name}
    calibration = Calibration(
        gpu_id=card.gpu_id, device=device, formula_version=1, created="2026-01-02", versions={},
        coefficients=Coefficients(priors(card), 0.04, "test"), repeatability=0.02,
        context_bytes=None, bursts=1, report={},
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="no home folder"):
        calibration_files.write(calibration)
    assert not list(no_home.iterdir())


@pytest.mark.parametrize("words", ["fits openai-community/gpt2 --gpu t4", "calibrate list", "models gpt2"])
def test_commands_answer_with_a_home_that_cannot_be_made(words: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in FOLDERS}
    # a folder below a file: even root cannot make one
    environment |= {"HOME": str(tmp_path / "file" / "home"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [sys.executable, "-m", "planner.cli.main", *words.split()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "error" not in done.stderr
