"""Set everything up and run every check: `python3 .ci/check.py`. Needs Python 3.10 or newer and nothing else.

Makes a virtual environment (.venv, or the folder given with --venv), installs the package in editable mode with the
real libraries it is tested against, then runs ruff, mypy and pytest. Words after `--` replace pytest's arguments. Then
the command-line tests run once more as on another machine (see `elsewhere`), and .ci/core.py tests an installation with
nothing but click and yaml.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
"""Installed first and alone, so that a build already on the machine (CPU only, say) is taken as it is."""
EXTRAS = ".[test,trace,dev]"


def run(*command: str | Path, **environment: str) -> int:
    """Run a command in the checkout with more in its environment, showing both, and return its exit code."""
    print("+", *(f"{name}={value}" for name, value in environment.items()), *command, flush=True)
    env = {**os.environ, **environment}
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=env, check=False).returncode


def elsewhere(python: Path, seed: int) -> int:
    """Run the command-line tests as on another machine: no figure and no word of an answer may depend on it.

    Long paths, another width, language, time zone and hash seed, a random order of files and of tests, lines broken at
    other places, and a home folder that can be neither read nor written: it lies below a file, because root, who often
    runs this, may write to a folder whatever its mode.
    """
    with tempfile.TemporaryDirectory(prefix="loraplan-") as scratch:
        base = Path(scratch, "a-path-that-is-much-longer-than-a-terminal-is-wide-" * 2)
        base.mkdir()
        file = Path(scratch, "file")
        file.touch()
        order = ("--random-order-bucket=global", f"--random-order-seed={seed}")
        where = ("-p", "no:cacheprovider", "--basetemp", base / "tests", "--wrap-at", str(1 + seed % 60))
        changed: Mapping[str, str] = {
            "COLUMNS": "200", "LC_ALL": "C", "TZ": "Asia/Kolkata", "PYTHONHASHSEED": str(seed),
            "HOME": str(file / "home"),
        }  # fmt: skip
        words = ("-q", "-n", "2", "-m", "command_line and not slow", *order, *where)
        return run(python, "-m", "pytest", *words, **changed)


def python_of(folder: Path) -> Path:
    """Return the interpreter of the virtual environment in `folder`, made if it is not there."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if python.exists() and run(python, "-m", "pip", "--version") == 0:
        return python
    try:
        venv.create(folder, with_pip=True, symlinks=sys.platform != "win32")
    except (subprocess.CalledProcessError, ImportError):
        # Debian ships venv without ensurepip: any pip on the machine can fill the environment from outside.
        venv.create(folder, with_pip=False, clear=True, symlinks=sys.platform != "win32")
        if run(sys.executable, "-m", "pip", "--python", python, "install", "pip"):
            sys.exit("this Python has neither ensurepip nor pip: install your system's python3-venv package")
    return python


def main() -> int:
    """Set up, check, and return 0 only if everything passed."""
    if sys.version_info < (3, 10):  # noqa: UP036 (an older interpreter may start this file)
        sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the virtual environment")
    parser.add_argument("--seed", type=int, help="of the second run's order, as the first line of a run printed it")
    parser.add_argument("pytest", nargs="*", default=["-q", "-n", "2"], help="arguments for pytest, after --")
    options = parser.parse_args()
    seed = random.randrange(1, 2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    python = python_of(options.venv.resolve())
    for what in ([TORCH], ["-e", EXTRAS]):
        if run(python, "-m", "pip", "install", "-q", *what):
            return 1
    checks = (
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("pytest", *options.pytest),
    )
    failed = [" ".join(check) for check in checks if run(python, "-m", *check)]
    if elsewhere(python, seed):
        failed.append(f"the command-line tests on another machine (--seed {seed})")
    if run(python, ROOT / ".ci" / "core.py"):
        failed.append(".ci/core.py")
    if run(python, ROOT / ".ci" / "readme.py", "--against", "changelog"):
        failed.append(".ci/readme.py: a figure changed and CHANGELOG.md does not say why")
    if failed:
        print("failed:", *failed, sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
