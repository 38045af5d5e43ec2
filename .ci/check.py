"""Set everything up and run every check: `python3 .ci/check.py`. Needs Python 3.10 or newer and nothing else.

Makes a virtual environment (.venv, or the folder given with --venv), installs the package in editable mode with the
real libraries it is tested against, then runs ruff, mypy and pytest. Words after `--` replace pytest's arguments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
"""Installed first and alone, so that a build already on the machine (CPU only, say) is taken as it is."""
EXTRAS = ".[test,trace,dev]"


def run(*command: str | Path) -> int:
    """Run a command in the checkout, showing it, and return its exit code."""
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode


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
    parser.add_argument("pytest", nargs="*", default=["-q", "-n", "2"], help="arguments for pytest, after --")
    options = parser.parse_args()
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
    if failed:
        print("failed:", *failed, sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
