"""What tests share: the command in this process, words without line ends, a home of its own, marks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wrap-at", type=int, metavar="N",
        help="every report breaks its lines at N columns: a test that then fails looks at where a line ends",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    width = config.getoption("--wrap-at")
    if width is None:
        return
    from planner.report import tables

    real = tables.wrapped

    def wrapped(text: str, _: int = 80, indent: str = "") -> str:
        return real(text, width, indent)

    tables.wrapped = wrapped  # before any report has imported it


def without_line_ends(text: str) -> str:
    """The words of a text with one blank between them: the same wherever its lines were broken."""
    return " ".join(text.split())


class Result:
    """What one call printed and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def said(self) -> str:
        """Stdout without line ends: what a sentence is looked for in."""
        return without_line_ends(self.out)

    @property
    def warned(self) -> str:
        """Stderr without line ends."""
        return without_line_ends(self.err)

    def document(self) -> Any:
        """Stdout as JSON."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Call the command in this process; the hub is never asked."""
    from planner.cli.main import cli

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*args: str) -> Result:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(args))
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def flat() -> Callable[[str], str]:
    """`without_line_ends`, for what a test got elsewhere."""
    return without_line_ends


@pytest.fixture(scope="session")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_folders(_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes the calibrations and traces of whoever runs it: they would change the figures."""
    monkeypatch.setenv("LORAPLAN_DATA", str(_home / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(_home / "cache"))
    for name in ("XDG_DATA_HOME", "HF_HOME", "LORAPLAN_DEBUG", "NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    yield
