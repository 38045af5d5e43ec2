"""Seconds of one prediction, and what predicting time adds: `python benchmarks/prediction.py [--repeats N]`."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

from planner.facts import catalog, sources
from planner.model import families
from planner.plan.predict import predict
from planner.training import stacks

MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B", "google/gemma-2-9b", "deepseek-ai/DeepSeek-V2-Lite")


def main() -> None:
    """Print medians per model: with time, without (a card without rates), and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    card = catalog.gpu("a100-sxm4-80gb")
    blind = replace(card, bandwidth_bytes_per_s=0.0)
    for name in MODELS:
        model = families.build_spec(sources.load_config(name).config, model_id=name)
        training = stacks.to_training_spec(
            stacks.resolve("hf-trainer", method="qlora", given={"seq_len": 2048, "target_modules": ("all-linear",)})
        )
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for timed, gpu in ((True, card), (False, blind)):
                start = time.perf_counter()
                predict(model, training, gpu)
                seconds[timed].append(time.perf_counter() - start)
        with_time, without = (statistics.median(seconds[timed]) for timed in (True, False))
        print(
            f"{name:32} {1000 * with_time:7.1f} ms  without time {1000 * without:7.1f} ms  {with_time / without:.2f} x"
        )


if __name__ == "__main__":
    main()
