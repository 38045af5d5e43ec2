"""What tests share: the command in this process, words without line ends, a home of its own, marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

MODULE_MARK = re.compile(r"^pytestmark = pytest\.mark\.(oracle|extra)$", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wrap-at", type=int, metavar="N",
        help="every report breaks its lines at N columns: a test that then fails looks at where a line ends",
    )  # fmt: skip
    parser.addoption(
        "--core", action="store_true",
        help="only click and yaml are installed: leave out tests marked oracle or extra, let no other be skipped",
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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --core, leave out modules that are marked as a whole: their imports need the libraries."""
    if not config.getoption("--core") or collection_path.suffix != ".py":
        return None
    return bool(MODULE_MARK.search(collection_path.read_text(encoding="utf-8"))) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what calls the command; leave out what the options exclude."""
    left_out = {"oracle", "extra"} if config.getoption("--core") else set()
    if config.getoption("--wrap-at") is not None:
        left_out.add("line_ends")
    for item in items:
        if "planner.cli" in text_of(item.path):
            item.add_marker(pytest.mark.command_line)
    gone = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With --core, a test skipped for a missing library lacks its mark: it would hide what the core can do."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--core") or reporter is None:
        return
    missing = re.compile("could not import|not installed")
    unmarked = [report for report in reporter.stats.get("skipped", []) if missing.search(str(report.longrepr))]
    for report in unmarked:
        reporter.write_line(f"not marked oracle or extra: {report.nodeid} {report.longrepr}")
    if unmarked:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
