"""Cold start-up: CPU and wall time of `loraplan fits` beside those of `import click`, and their ratio.

    python benchmarks/startup.py [--runs N] [--limit RATIO]

Each run is a new process; the commands take turns, so that a busy machine slows all of them. CPU time is what the
system counts for the process (getrusage, user and system), which other processes disturb less than the wall's clock.
Compiled bytecode is used, as after an installation. With --limit the exit code is 1 when the ratio of the CPU times
is larger. To see where the time goes: `python -X importtime -m planner.cli.main fits meta-llama/Llama-3.1-8B
--gpu rtx-4090`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FITS = ("fits", "meta-llama/Llama-3.1-8B", "--gpu", "rtx-4090")


class Cost(NamedTuple):
    """Seconds of one process."""

    cpu: float
    wall: float


def cost(command: list[str], environment: dict[str, str]) -> Cost:
    """Run a command to its end and return what it took; 0 and 1 (does not fit) are answers."""
    before, start = _cpu_of_children(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = Cost(_cpu_of_children() - before, time.perf_counter() - start)
    if done.returncode not in (0, 1) or (command[-1] == FITS[-1] and not done.stdout):
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return found


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Measure and print; the exit code says whether the limit was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="runs of each command")
    parser.add_argument("--limit", type=float, help="largest ratio of the CPU times that passes")
    options = parser.parse_args()

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(ROOT)
    script = Path(sys.executable).parent / "loraplan"
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import click'": [sys.executable, "-c", "import click"],
        f"loraplan {' '.join(FITS)}": [
            *([str(script)] if script.exists() else [sys.executable, "-m", "planner.cli.main"]),
            *FITS,
        ],
    }
    for command in commands.values():  # compiles the bytecode, warms the file cache
        cost(command, environment)
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            costs[name].append(cost(command, environment))

    ratios = {}
    for kind in Cost._fields:
        print(f"{options.runs} runs each, milliseconds of {kind:5}{'':27}{'median':>8}{'min':>8}{'max':>8}")
        medians = []
        for name, found in costs.items():
            values = [1000 * getattr(one, kind) for one in found]
            medians.append(statistics.median(values))
            print(f"{name:58}" + "".join(f"{value:8.1f}" for value in (medians[-1], min(values), max(values))))
        ratios[kind] = medians[2] / medians[1]
        print(f"loraplan fits / import click, {kind}: {ratios[kind]:.2f}\n")
    return int(options.limit is not None and ratios["cpu"] > options.limit)


if __name__ == "__main__":
    sys.exit(main())
