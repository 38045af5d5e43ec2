"""Files that commands write are complete under their name, or what was there before stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planner.base.outputs import whole_file
from planner.cli.main import main

SMALL = "openai-community/gpt2"


def test_the_name_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    with whole_file(path) as file:
        file.write("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert os.listdir(tmp_path) == ["new.txt"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path, "wb") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["old.txt"]


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with whole_file(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with whole_file(tmp_path / "whole"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_file_is_written_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    with whole_file(pipe) as file:
        file.write("through")
    assert reader.communicate(timeout=10)[0] == "through"
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["", "folder", "no-such/file"])
def test_a_place_that_cannot_be_written_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["table", SMALL, "--gpu", "t4", "--format", "csv", "-o", name])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error
    assert "internal error" not in error


@pytest.mark.extra
def test_a_killed_run_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("old\n")
    sizes = ",".join(map(str, range(8, 8192, 8)))
    arguments = [SMALL, "--gpu", "all", "--seq-len", sizes, "--batch", "1..64", "--format", "csv", "-o", str(path)]
    process = subprocess.Popen([sys.executable, "-m", "planner.cli.main", "table", *arguments], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while process.poll() is None and not any(f.stat().st_size for f in tmp_path.glob(".*.tmp")):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert path.read_text() == "old\n"
