"""Sweeps: seconds of a million configurations and of 200,000 table rows, beside one by one and beside other tools.

    python benchmarks/sweep.py [--sample N] [--peers PYTHON] [--small]

One core (numpy is held to one thread). Every figure is printed as wall time and as this process's own time, which other
work on the machine does not stretch as much. N cells are evaluated one by one too: bytes must be equal, seconds to
1e-9. --peers names the Python of an environment with fitcheck-llm and ftuneai, which then answer some of the cells.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planner.base.errors import PlannerError
from planner.facts import catalog, sources
from planner.memory import walk
from planner.model import families
from planner.plan import sweep
from planner.plan.request import Cost, Request
from planner.plan.table import tabulator
from planner.report.grid import write_streamed
from planner.report.table import caption_of, columns_of
from planner.step import architecture, program
from planner.timing import step_time
from planner.timing.coefficients import priors
from planner.training import stacks

MODEL, CARD = "meta-llama/Llama-3.1-8B", "a100-sxm4-80gb"
MILLION = sweep.Axes(
    micro_batch_size=tuple(range(1, 26)),
    seq_len=tuple(128 * n for n in range(1, 51)),
    r=(1, 2, 4, 8, 16, 32, 64, 96, 128, 256),
    gradient_accumulation_steps=tuple(range(1, 21)),
)
CHOICES = (("qlora", "none"), ("qlora", "full"), ("lora", "none"), ("lora", "full"))


class Stopwatch:
    """Wall and process seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.own = time.perf_counter(), time.process_time()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self.wall:.2f} s wall, {time.process_time() - self.own:.2f} s own"


def million(sample: int) -> float:
    """250,000 cells for each of four choices; a sample again by the scalar path. Returns seconds per cell."""
    model = families.build_spec(sources.load_config(MODEL).config, model_id=MODEL)
    card = catalog.gpu(CARD)
    trainings = [
        stacks.to_training_spec(stacks.resolve("custom", method=method, given={"gradient_checkpointing": mode}))
        for method, mode in CHOICES
    ]
    watch = Stopwatch()
    sweeper = sweep.Sweeper(model, MILLION)
    found = [sweeper.cells(training, [card]) for training in trainings]
    count = sum(cells.allocated_bytes.size for cells in found)
    print(f"{count:,} configurations, memory and time: {watch}")
    ours = (time.process_time() - watch.own) / count
    random_ = random.Random(1)
    worst, unequal = 0.0, 0
    watch = Stopwatch()
    for _ in range(sample):
        cells = random_.choice(found)
        place = tuple(random_.randrange(size) for size in MILLION.shape)
        training = sweep.at(cells, place)
        run = program.run(model, training, architecture.architecture(card, training)).record
        unequal += walk.peak_bytes(run) != cells.allocated_bytes[(0, *place)]
        seconds = step_time.step_time(run, training, card, priors(card)).step_s.expected
        worst = max(worst, abs(cells.step_s[(0, *place)] / seconds - 1))
    each = (time.process_time() - watch.own) / sample
    print(f"{sample:,} of them one by one: {watch}; {unequal} differ in bytes, seconds by at most {worst:.1e}")
    print(f"one by one all would take {each * count / 3600:.1f} hours of one core, {each / ours:,.0f} times as long")
    return ours


def table(models: int, cards: int) -> None:
    """50 models x 40 cards x 100 settings to a CSV file."""
    names = []
    for name in catalog.model_ids():
        try:
            families.build_spec(sources.load_config(name).config, model_id=name)
        except PlannerError:
            continue
        names.append(name)
        if len(names) == models:
            break
    lists: dict[str, Any] = {
        "model": names,
        "gpu": [card.gpu_id for card in catalog.gpus() if card.vendor == "NVIDIA"][:cards],
        "micro_batch_size": ["1,2,4,8,16"], "seq_len": ["512,1024,2048,4096,8192"],
        "gradient_checkpointing": ["none,full"], "quantization": ["none,nf4"],
    }  # fmt: skip
    watch = Stopwatch()
    made = tabulator(lists, Request(cost=Cost(tokens="10M")))
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        columns = columns_of([made.wanted], True)
        rows = write_streamed("csv", file, columns, made.blocks(), caption_of([made], final=False))
    print(f"{len(names)} models x {cards} cards, {rows:,} rows to CSV: {watch}")


PEERS = {
    "fitcheck-llm": """
from fitcheck.advisor import SweepSpec, advise
from fitcheck.config_parser import ModelConfig
from fitcheck.estimator import TrainingConfig
from fitcheck.gpu_db import GpuSpec
model = ModelConfig("llama", 8030261248, 4096, 32, 32, 8, 14336, 128256, 128, False)
axes = SweepSpec(tuple(range(1, 26)), tuple(128 * n for n in range(1, 51)), (1, 2, 4, 8)[:RANKS])
training = TrainingConfig(quantization="nf4", grad_checkpoint=True, flash_attn=True)
run = lambda: advise(model, training, GpuSpec("A100", 81920, 80000), axes)
count = 25 * 50 * RANKS
""",
    "ftuneai": """
from ftuneai import Estimator
def run():
    for batch in range(1, 26):
        for n in range(1, 51):
            Estimator(model="meta-llama/Llama-3.1-8B", method="qlora", quantization="4bit", lora_rank=16,
                      batch_size=batch, seq_length=128 * n, flash_attention=True).estimate_memory()
count = 25 * 50
""",
}
"""What each peer is asked, by its public functions: the same micro batches, lengths and ranks, memory only."""


def peers(python: str, ours: float) -> None:
    """Time the other tools on part of the million, in processes of their own; print the ratio per configuration."""
    clock = "import time\nstart = time.process_time(); run(); print((time.process_time() - start) / count)"
    for name, code in PEERS.items():
        text = f"RANKS = 2\n{code}{clock}"
        done = subprocess.run([python, "-c", text], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
            continue
        each = float(done.stdout)
        print(f"{name}: {each * 1e6:,.0f} us per configuration, {each / ours:,.0f} times as long")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=1000)
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--small", action="store_true", help="5 models and 10 cards only")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before numpy is loaded: planner does that when it first sweeps
    ours = million(options.sample)
    table(5 if options.small else 50, 10 if options.small else 40)
    if options.peers:
        peers(options.peers, ours)


if __name__ == "__main__":
    main()
