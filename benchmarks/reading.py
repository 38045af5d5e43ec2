"""What reading a training config adds to `loraplan fits`: the same run asked by flags and by `--from`, in milliseconds.

    python benchmarks/reading.py [--runs N] [--limit MILLISECONDS]

Each run is a new process; the two take turns, so that a busy machine slows both. With --limit the exit code is 1 when
the difference of the medians of processor time, which other work disturbs less than wall time, is larger.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
base_model: meta-llama/Llama-3.1-8B
adapter: qlora
load_in_4bit: true
sequence_len: 2048
lora_r: 32
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
optimizer: adamw_bnb_8bit
bf16: true
gradient_checkpointing: true
attn_implementation: flash_attention_2
"""
FLAGS = """\
fits meta-llama/Llama-3.1-8B --gpu rtx-4090 --stack axolotl --method qlora --seq-len 2048 -r 32 --alpha 16
--targets all-linear --batch 2 --grad-accum 4 --optimizer adamw-8bit --checkpointing full --attention flash2
--autocast bf16 --base-dtype bf16 --compute-dtype bf16 --dropout 0
"""


def milliseconds(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run the command to its end and return wall time and processor time."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "planner.cli.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * wall, 1000 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def main() -> int:
    """Measure and print; the exit code says whether the limit was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="runs of each command")
    parser.add_argument("--limit", type=float, help="most milliseconds that pass")
    options = parser.parse_args()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "qlora.yml")
        config.write_text(CONFIG, encoding="utf-8")
        commands = {"flags": FLAGS.split(), "--from": ["fits", "--from", str(config), "--gpu", "rtx-4090"]}
        for arguments in commands.values():  # compiles the bytecode, warms the file cache
            milliseconds(arguments, environment)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, arguments in commands.items():
                runs[name].append(milliseconds(arguments, environment))
    added = 0.0
    for place, what in enumerate(("wall time", "processor time")):
        flags, config_runs = ([run[place] for run in runs[name]] for name in commands)
        added = statistics.median(config_runs) - statistics.median(flags)
        print(
            f"{what:15} flags {statistics.median(flags):7.1f} ms, --from {statistics.median(config_runs):7.1f} ms: "
            f"reading adds {added:.1f} ms (least to least {min(config_runs) - min(flags):.1f} ms)"
        )
    return int(options.limit is not None and added > options.limit)


if __name__ == "__main__":
    sys.exit(main())
