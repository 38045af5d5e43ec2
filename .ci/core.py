"""Test an installation of the core: `python .ci/core.py`. Nothing but click and yaml beside the package itself.

Builds and installs the package into a new virtual environment that is thrown away, runs its commands there from another
folder, and then every test that is not marked `oracle` or `extra`. `--no-tests` leaves the tests out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import check

ROOT = check.ROOT
CORE = {"loraplan", "click", "pyyaml"}
"""All that an installation of the core may bring."""
TOOLS = {"pip", "setuptools", "wheel", "colorama"}
"""What a new virtual environment holds already (colorama: click's, on Windows)."""
SOURCES = ("loraplan", "planner", "calibrate", "data", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
MODEL = "openai-community/gpt2"
CONFIG = f"model_name_or_path: {MODEL}\nuse_peft: true\nlora_target_modules: [c_attn]\ndtype: bfloat16\n"

ANSWERS: tuple[tuple[str, int, str], ...] = (
    (f"fits {MODEL} --gpu t4", 0, "YES"),
    ("fits meta-llama/Llama-3.1-70B --gpu t4", 1, "NO"),
    (f"fits {MODEL} --gpu t4 --explain", 0, "highest level in each part of the step"),
    ("fits --from sft.yaml --gpu t4", 0, "YES"),
    ("fits sft.yaml sft.yaml --gpu t4 --format csv", 0, "sft.yaml"),
    ("lint sft.yaml", 0, "sft.yaml"),
    (f"table {MODEL} --gpu t4,l4 --batch 1,4 --format csv", 0, "device_bytes"),
    (f"lora {MODEL} --format csv", 0, "c_attn"),
    (f"simulate {MODEL} --gpu t4 --rows 10", 0, "10 rows"),
    ("gpus", 0, "t4"),
    ("models gpt2", 0, MODEL),
    ("calibrate list", 0, "h200"),
)
"""Command, exit code, words of its output."""

REFUSALS: tuple[tuple[str, str], ...] = (
    (f"table {MODEL} --gpu t4 --batch 1..512", "loraplan[tables]"),
    (f"table {MODEL} --gpu t4 --batch 1,4 -o rows.parquet", "loraplan[tables]"),
    (f"max {MODEL} --gpu t4", "loraplan[tables]"),
    (f"pick {MODEL} --gpu t4", "loraplan[tables]"),
    (f"trace {MODEL}", "loraplan[trace]"),
    (f"fits {MODEL} --gpu t4 --via trace", "loraplan[trace]"),
    (f"fits {MODEL} --gpu local", "loraplan[local]"),
    ("fits some/unknown-model --gpu t4", "loraplan[hub]"),
    (f"simulate {MODEL} --gpu t4 --rows 100 --plot out.png", "loraplan[plots]"),
    ("calibrate run --device cpu --out run", "loraplan[calibrate]"),
)
"""Command and the extra that its one line names; the exit code is 2 and nothing else is printed."""

WALK = """
import click, json
from planner.cli.main import cli
def walk(command, words):
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from walk(command.get_command(context, name), [*words, name])
print(json.dumps(list(walk(cli, []))))
"""


def start(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python in a folder away from the checkout."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LORAPLAN_DATA", "HF_HUB_OFFLINE")
    }
    env |= {"HOME": str(folder), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [str(python), *words], cwd=folder, env=env, capture_output=True, encoding="utf-8", check=False, timeout=300
    )


def wrong(python: Path, folder: Path) -> list[str]:
    """Run every command; return a line for each that did not do what it should."""
    found = []
    (folder / "sft.yaml").write_text(CONFIG, encoding="utf-8")

    def call(words: str, code: int) -> subprocess.CompletedProcess[str]:
        done = start(python, folder, "-m", "planner.cli.main", *words.split())
        if done.returncode != code or "Traceback" in done.stderr:
            found.append(f"loraplan {words}: exit code {done.returncode}, not {code}\n{done.stderr[-2000:]}")
        return done

    for words, code, expected in ANSWERS:
        if expected not in call(words, code).stdout:
            found.append(f"loraplan {words}: does not print {expected!r}")
    for words, extra in REFUSALS:
        done = call(words, 2)
        if done.stdout or extra not in done.stderr or not done.stderr.splitlines()[-1].startswith("error: "):
            found.append(f"loraplan {words}: no line that names {extra}\n{done.stdout}{done.stderr[-2000:]}")
    answer = json.loads(call(f"fits {MODEL} --gpu t4 --format json", 0).stdout)
    if answer["verdict"] != "fits" or answer["device"]["expected"] <= 0:
        found.append(f"loraplan fits --format json: {answer['verdict']}")
    for words in json.loads(start(python, folder, "-c", WALK).stdout):
        if not re.search(r"^ +loraplan ", call(" ".join([*words, "--help"]), 0).stdout, re.MULTILINE):
            found.append(f"loraplan {' '.join(words)} --help: no example")
    return found


def installed(python: Path, folder: Path) -> set[str]:
    """Lower-case names of what is in the environment."""
    listed = start(python, folder, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    return {item["name"].lower() for item in json.loads(listed.stdout)}


def main() -> int:
    """Install, run, test; return 0 only if everything was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tests", action="store_true", help="only the commands")
    parser.add_argument("pytest", nargs="*", default=["-q"], help="arguments for pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraplan-core-") as scratch:
        folder, source = Path(scratch, "elsewhere"), Path(scratch, "source")
        folder.mkdir()
        source.mkdir()
        for name in SOURCES:  # setuptools leaves build/ and *.egg-info where it builds
            (source / name).symlink_to(ROOT / name)
        python = check.python_of(Path(scratch, "venv"))
        if check.run(python, "-m", "pip", "install", "-q", source):
            return 1
        more = installed(python, folder) - CORE - TOOLS
        if more:
            print("the core brings more than it should:", *sorted(more))
            return 1
        found = wrong(python, folder)
        print(*found, f"{len(found)} of the core's commands went wrong", sep="\n", flush=True)
        if options.no_tests:
            return 1 if found else 0
        tools = ("pytest", "hypothesis")
        if check.run(python, "-m", "pip", "install", "-q", *tools):
            return 1
        failed = check.run(python, "-m", "pytest", "--core", "-p", "no:cacheprovider", *options.pytest)
        return 1 if found or failed else 0


if __name__ == "__main__":
    sys.exit(main())
