"""Replay time of one 8B QLoRA run (two steps, every request) through the allocator: `python benchmarks/allocator.py`.

Prints the best of several replays for the native and the expandable layout. The aim is 0.3 s.
"""

from __future__ import annotations

import time

from planner.device.cuda_rules import Architecture
from planner.facts import catalog
from planner.memory import allocator, sequence
from planner.model.families import build_spec
from planner.step import program
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

MODEL = "meta-llama/Llama-3.1-8B"
ROUNDS = 5
GIB = 2**30


def events(checkpointing: str) -> list[tuple[int, int]]:
    """Every request of loading and two steps."""
    record = catalog.model_record(MODEL)
    assert record is not None
    training = TrainingSpec(
        lora=LoraSpec(r=16),
        quantization=QuantizationSpec(kind="nf4", double_quant=True),
        gradient_checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    run = program.run(build_spec(record.config, model_id=MODEL), training, Architecture())
    return sequence.expand(run.record)


def main() -> None:
    """Print one line per layout."""
    for checkpointing in ("full", "none"):
        requests = events(checkpointing)
        for expandable in (False, True):
            settings = allocator.Settings(expandable_segments=expandable)
            best = float("inf")
            for _ in range(ROUNDS):
                start = time.perf_counter()
                replayed = allocator.replay(requests, settings)
                best = min(best, time.perf_counter() - start)
            print(
                f"{MODEL} checkpointing {checkpointing:4} {'expandable' if expandable else 'native':10} "
                f"{len(requests):,} events {best:.3f} s  allocated {replayed.peak_allocated / GIB:.3f} GiB, "
                f"reserved {replayed.peak_reserved / GIB:.3f} GiB"
            )


if __name__ == "__main__":
    main()
