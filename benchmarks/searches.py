"""`max` and `pick` against brute force: every candidate predicted by itself, on drawn cases.

    python benchmarks/searches.py [--cases N] [--seed S]

Prints how many answers differ and the most evaluations of one answer; the exit code is 1 if one differs.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planner.base.errors import PlannerError
from planner.device.hardware import Gpu
from planner.facts import catalog, sources
from planner.model import families
from planner.model.spec import ModelSpec
from planner.plan.intervals import uncertainty
from planner.plan.largest import allowed_verdicts, fit_probability, largest, with_number
from planner.plan.pick import Candidate, Limits, pick
from planner.plan.predict import predict
from planner.runs import cost
from planner.training import stacks
from planner.training.spec import TrainingSpec

MODELS = (
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen2.5-1.5B",
    "microsoft/phi-2",
    "meta-llama/Llama-3.1-8B",
    "google/gemma-2b",
)


def drawn(random_: random.Random) -> tuple[ModelSpec, TrainingSpec]:
    """A model and settings."""
    name = random_.choice(MODELS)
    given = {
        "gradient_checkpointing": random_.choice(("none", "full")),
        "micro_batch_size": random_.choice((1, 2, 4)),
        "seq_len": random_.choice((256, 512, 1024, 2048)),
    }
    method = random_.choice(("lora", "qlora"))
    model = families.build_spec(sources.load_config(name).config, model_id=name)
    return model, stacks.to_training_spec(stacks.resolve("custom", method=method, given=given))


def brute_largest(
    model: ModelSpec, training: TrainingSpec, gpu: Gpu, key: str, values: list[int], probability: float
) -> int | None:
    """Predict every value; the largest that fits at the probability."""
    best = None
    share = sum(part for _, part in uncertainty(model, training))
    for value in values:
        found = predict(model, with_number(training, key, value), gpu)
        room = fit_probability(float(found.allocated.expected), share, gpu)
        if NormalDist().cdf(room) >= probability and found.verdict in allowed_verdicts(probability):
            best = value
    return best


def brute_pick(
    model: ModelSpec, candidates: list[Candidate], amount: cost.Amount, goal: str, limits: Limits
) -> str | None:
    """Predict every card; the cheapest or fastest within the limits."""
    best: tuple[float, float, str] | None = None
    for item in candidates:
        found = predict(model, item.training, item.gpu)
        if found.verdict != "fits" or found.time is None:
            continue
        made = cost.plan(
            found.time, item.gpu, amount, micro_batch_size=item.training.micro_batch_size,
            seq_len=item.training.seq_len, price=item.price,
        )  # fmt: skip
        hours, usd = made.hours.expected, made.usd.expected if made.usd else None
        if limits.hours is not None and hours > limits.hours:
            continue
        if usd is None and (goal == "usd" or limits.usd is not None):
            continue
        if limits.usd is not None and usd is not None and usd > limits.usd:
            continue
        far = float("inf") if usd is None else usd
        key = (far, hours, item.gpu.gpu_id) if goal == "usd" else (hours, far, item.gpu.gpu_id)
        best = key if best is None or key < best else best
    return best[2] if best else None


def main() -> int:
    """Draw, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    cards = [gpu for gpu in catalog.gpus() if gpu.vendor == "NVIDIA" and gpu.compute_capability and gpu.bf16_native]
    wrong, most = 0, 0
    for number in range(options.cases):
        model, training = drawn(random_)
        try:
            if number % 2:
                key = random_.choice(("micro_batch_size", "seq_len", "r"))
                step = {"micro_batch_size": 1, "seq_len": 512, "r": 16}[key]
                values = [step * n for n in range(1, random_.choice((8, 16, 24)))]
                gpu, sure = random_.choice(cards), random_.choice((0.5, 0.95, 0.99))
                found = largest(model, training, gpu, key, values, sure)
                mine, want, asked = (
                    found.value,
                    brute_largest(model, training, gpu, key, values, sure),
                    found.evaluations,
                )
                label = f"max {key} at {sure} on {gpu.gpu_id}"
            else:
                some = random_.sample(cards, 8)
                candidates = [Candidate(gpu, cost.cheapest(gpu, catalog.instances()), training) for gpu in some]
                goal = random_.choice(("usd", "time"))
                limits = Limits(random_.choice((None, 20.0)), random_.choice((None, 10.0)))
                amount = cost.Amount(tokens=20e6)
                picked = pick(model, candidates, amount, "usd" if goal == "usd" else "time", limits)
                mine = picked.answer.candidate.gpu.gpu_id if picked.answer else None  # type: ignore[assignment]
                want, asked = brute_pick(model, candidates, amount, goal, limits), picked.evaluations  # type: ignore
                label = f"pick by {goal} of {', '.join(gpu.gpu_id for gpu in some)}"
        except PlannerError as error:
            print(f"case {number}: {error}")
            wrong += 1
            continue
        most = max(most, asked)
        if mine != want:
            wrong += 1
            print(f"case {number}: {label}: {mine}, brute force {want} ({model.model_id}, {training.method})")
    print(f"{options.cases} cases, {wrong} differ, at most {most} evaluations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
