"""Cold start-up: median wall time of `loraplan fits` beside that of `import click`, and their ratio.

    python benchmarks/startup.py [--runs N] [--limit RATIO]

Each run is a new process; the two take turns, so that a busy machine slows both. Compiled bytecode is used, as after
an installation. With --limit the exit code is 1 when the ratio is larger. To see where the time goes:
`python -X importtime -m planner.cli.main fits meta-llama/Llama-3.1-8B --gpu rtx-4090`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FITS = ("fits", "meta-llama/Llama-3.1-8B", "--gpu", "rtx-4090")


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Run a command to its end and return the wall time; 0 and 1 (does not fit) are answers."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode not in (0, 1) or (command[-1] == FITS[-1] and not done.stdout):
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return wall


def main() -> int:
    """Measure and print; the exit code says whether the limit was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21, help="runs of each command")
    parser.add_argument("--limit", type=float, help="largest ratio that passes")
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
        seconds(command, environment)
    walls: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            walls[name].append(seconds(command, environment))

    print(f"{options.runs} runs each, milliseconds\n{'':58}{'median':>8}{'min':>8}{'max':>8}")
    for name, values in walls.items():
        print(f"{name:58}" + "".join(f"{1000 * v:8.1f}" for v in (statistics.median(values), min(values), max(values))))
    _, click, fits = (statistics.median(values) for values in walls.values())
    print(f"loraplan fits / import click: {fits / click:.2f}")
    return int(options.limit is not None and fits / click > options.limit)


if __name__ == "__main__":
    sys.exit(main())
