"""The README is true: its commands print what it shows, its Python runs, and every command's help has an example.

`python tests/test_docs.py` writes the current output of every command into the README.
"""

from __future__ import annotations

import atexit
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache as cache_once
from pathlib import Path

import click
import pytest

from planner.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RELEASE = re.compile(r"\b(torch|transformers|peft|bitsandbytes|accelerate) [\d.]+")
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PYCON = re.compile(r"^```pycon\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@cache_once
def cache() -> str:
    """A cache folder for this run of the tests: a trace shown twice is made once, and none comes from before."""
    folder = tempfile.mkdtemp(prefix="loraplan-docs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def loraplan(line: str) -> tuple[int, str]:
    """Run `loraplan ...` as a reader in the checkout would; return the exit code and all it printed."""
    program, *words = shlex.split(line.replace("\\\n", " "))
    assert program == "loraplan", line
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": cache(),
        "LORAPLAN_DATA": cache(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli.main", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout


def sessions(block: str) -> list[tuple[str, str]]:
    """(command, output) pairs of a console block."""
    parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", block, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def tidy(output: str) -> str:
    """Output as it stands in the README: no blanks at the ends of lines, no empty lines at its end."""
    return "\n".join(line.rstrip() for line in output.rstrip().splitlines()) + "\n"


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
    assert any_release(output) == any_release(shown), "run: python tests/test_docs.py"


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


def rewrite() -> None:
    """Write the current outputs into the README."""

    def renewed(match: re.Match[str]) -> str:
        return "```console\n" + "\n".join(f"$ {c}\n{tidy(loraplan(c)[1])}" for c, _ in sessions(match[1])) + "```"

    README.write_text(CONSOLE.sub(renewed, README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    rewrite()
