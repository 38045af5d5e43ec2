"""The README is true: its commands print what it shows, its Python runs, and every command's help has an example.

`make readme` (.ci/readme.py) writes the current output of every command into it.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from planner.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"


def tool(name: str) -> ModuleType:
    """A script of .ci, which is no package."""
    where = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert where is not None
    assert where.loader is not None
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return module


readme = tool("readme")
loraplan, sessions, tidy, CONSOLE = readme.loraplan, readme.sessions, readme.tidy, readme.CONSOLE
RELEASE = re.compile(r"\b(torch|transformers|peft|bitsandbytes|accelerate) [\d.]+")
PYCON = re.compile(r"^```pycon\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def any_release(output: str) -> str:
    """Tidy output in which every release of a traced library is the same: the numbers follow the installed ones."""
    return RELEASE.sub(r"\1 0", tidy(output))


def commands() -> list[tuple[str, str]]:
    text = README.read_text(encoding="utf-8")
    return [pair for block in CONSOLE.findall(text) for pair in sessions(block)]


@pytest.mark.oracle
@pytest.mark.parametrize(("command", "shown"), commands(), ids=lambda value: value.split("\n")[0][:60])
def test_the_readme_shows_what_is_printed(command: str, shown: str) -> None:
    code, output = loraplan(command)
    assert code in (0, 1), output
    assert any_release(output) == any_release(shown), "run: make readme"


def test_the_readme_python_runs() -> None:
    blocks = PYCON.findall(README.read_text(encoding="utf-8"))
    assert blocks
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for number, block in enumerate(blocks):
        printed: list[str] = []
        runner.run(parser.get_doctest(block, {}, f"block {number}", str(README), 0), out=printed.append)
        assert not printed, "".join(printed)


def test_the_readme_has_the_two_lines() -> None:
    text = README.read_text(encoding="utf-8")
    (install,) = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
    assert "pip install" in install
    assert "loraplan fits " in install
    (check,) = re.findall(r"^python3 \.ci/check\.py$", text, re.MULTILINE)
    assert check in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_names_files_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    names = re.findall(r"`((?:planner|calibrate|data|tests|benchmarks|\.ci)/[\w./-]*)`", text)
    names += re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]


def every_command(command: click.Command = cli, words: tuple[str, ...] = ("loraplan",)) -> list[str]:
    """`loraplan`, `loraplan fits`, `loraplan gpus show`, ..."""
    found = [" ".join(words)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found += every_command(child, (*words, name))
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("command", every_command())
def test_help_has_examples_that_run(command: str) -> None:
    code, output = loraplan(f"{command} --help")
    assert code == 0, output
    examples = re.findall(r"^ +(loraplan .*)$", output, re.MULTILINE)
    assert examples, "no example in the help"
    for example in examples:
        # The reader's own files and GPU stand for themselves.
        if not re.search(r"(\./|\.(json|csv|gguf|ya?ml)\b|\blocal\b)", example):
            code, output = loraplan(example)
            assert code in (0, 1), output


# --- the figures of README and docs -------------------------------------------------------------------------------


def test_the_readme_shows_the_accuracy_of_the_docs() -> None:
    text = README.read_text(encoding="utf-8")
    assert readme.SUMMARY.search(text)
    assert readme.with_summary(text, readme.ACCURACY.read_text(encoding="utf-8")) == text, "run: make readme"


def test_a_changed_figure_is_found_with_its_per_cent() -> None:
    before = "peak 10.00 GiB, 1,000 tokens/s; version 0.1.0\nsame 5\n"
    after = "peak 10.04 GiB, 1,020 tokens/s; version 0.1.0\nsame 5\nnew line with 7\n"
    found = [(change.before, change.after, round(change.per_cent, 3)) for change in readme.changes(before, after)]
    assert found == [("10.00", "10.04", 0.4), ("1,000", "1,020", 2.0)]
    assert readme.percent("0", "1") == float("inf")
    assert readme.percent("-2.0", "-1.0") == 50.0
    assert not list(readme.changes(before, before))


def test_a_reason_goes_under_unreleased() -> None:
    text = "# Changes\n\n## Unreleased\n\n### Added\n\n- a\n\n## 0.1.0\n\n- old\n"
    once = readme.with_reason(text, "because")
    assert once == (
        "# Changes\n\n## Unreleased\n\n### Added\n\n- a\n\n### Changed figures\n\n- because\n\n## 0.1.0\n\n- old\n"
    )
    assert "- because\n- again\n" in readme.with_reason(once, "again")
    assert "## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("because", "code"), [(None, 1), ("a source was read anew", 0)])
def test_a_large_change_is_not_written_without_a_reason(
    because: str | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "| * | time | 10 |\n\nOf 3 runs that say whether they fitted, the verdict is right for 3.\n"
    old = "# x\n\n```console\n$ loraplan fits\npeak 10.0 GiB\n```\n<!-- accuracy: y -->\n<!-- /accuracy -->\n"
    for name, text in (("README.md", old), ("CHANGELOG.md", "## Unreleased\n"), ("accuracy.md", ""), ("facts.csv", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, file in (("README", "README.md"), ("CHANGELOG", "CHANGELOG.md"), ("ACCURACY", "accuracy.md")):
        monkeypatch.setattr(readme, name, tmp_path / file)
    monkeypatch.setattr(readme, "FACTS", tmp_path / "facts.csv")
    monkeypatch.setattr(readme, "loraplan", lambda line: (0, page if "validate" in line else "peak 10.1 GiB\n"))
    monkeypatch.setattr(sys, "argv", ["readme.py", *(["--because", because] if because else [])])
    assert readme.main() == code
    assert "10.0 -> 10.1 (+1.00 %)" in capsys.readouterr().out
    assert ("peak 10.1 GiB" in (tmp_path / "README.md").read_text(encoding="utf-8")) == (code == 0)
    told = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (f"- {because}\n" in told) == (code == 0)
