"""A training run as a timeline: every optimizer step with its learning rate, tokens, seconds, memory and cost.

Steps, tokens, seconds and memory are predictions: the same batches, priced by the same model, as `closed_form` adds up
in one go. Loss and gradient norm are synthetic: an illustration that is drawn from a seed, bounded, never a forecast.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from planner.base.errors import InvalidInput
from planner.base.records import record
from planner.plan.curves import StepCost
from planner.runs import schedule
from planner.runs.dataset.batches import Batching, epoch, expected_cost, positions, seen_lengths
from planner.runs.dataset.lengths import Lengths
from planner.runs.schedule import Schedule, Steps

DISK_BYTES_PER_S = 5e8
"""How fast a checkpoint is written: assumed (a network disk or one SATA SSD)."""
MAX_STEPS = 10_000_000
"""Steps of a timeline: more are refused."""

# The synthetic loss falls from START towards FLOOR with the learning rate spent on rows; no claim is made about it.
START_LOSS, FLOOR_LOSS, LOWEST_LOSS = 2.5, 0.9, 0.05
LOSS_SCALE = 2e-4 * 6000
"""Learning rate times rows that brings the synthetic loss down by a factor of e."""
LOSS_NOISE, NORM_NOISE = 0.015, 0.15


@record
class Plan:
    """What is trained and how the run is organised."""

    lengths: Lengths
    batching: Batching
    accumulation: int = 1
    epochs: float = 3.0
    drop_last: bool = False
    learning_rate: float = 2e-4
    shape: schedule.Shape = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    save_steps: int = 500
    """A checkpoint after every so many steps, and one at the end; 0: none."""
    eval_steps: int = 0
    """An evaluation after every so many steps; 0: none."""
    eval_rows: int = 0
    seed: int = 42
    usd_per_hour: float = 0.0


class Step(NamedTuple):
    """One optimizer step."""

    step: int
    """From 1."""
    epoch: float
    learning_rate: float
    synthetic_loss: float
    synthetic_grad_norm: float
    rows: int
    tokens: int
    """Positions computed, padding included."""
    useful_tokens: int
    step_s: float
    pause_s: float
    """Checkpoint and evaluation after the step."""
    event: str
    """checkpoint, evaluation, both or empty."""
    tokens_per_s: float
    memory_bytes: float
    """Expected device memory so far: the longest batch decides."""
    elapsed_s: float
    remaining_s: float
    usd: float


@record
class Totals:
    """A whole run."""

    steps: int
    rows: int
    tokens: float
    useful_tokens: float
    train_s: float
    pause_s: float
    usd: float
    memory_bytes: float

    @property
    def seconds(self) -> float:
        """Training and pauses."""
        return self.train_s + self.pause_s

    @property
    def useful_tokens_per_s(self) -> float:
        """Useful tokens over the seconds of training."""
        return self.useful_tokens / self.train_s if self.train_s else 0.0


class Timeline:
    """A simulated run; iterating yields its steps."""

    def __init__(self, plan: Plan, cost: StepCost) -> None:
        self.plan, self.cost = plan, cost
        self.seen = seen_lengths(plan.lengths, plan.batching)
        self.steps = steps_of(plan, self.seen)
        if self.steps.total > MAX_STEPS:
            raise InvalidInput(f"{self.steps.total:,} steps are too many for a timeline; at most {MAX_STEPS:,}")
        warmup = schedule.warmup_of(self.steps.total, plan.warmup_steps, plan.warmup_ratio)
        self.schedule = Schedule(
            peak=plan.learning_rate, shape=plan.shape, warmup_steps=warmup, total_steps=self.steps.total
        )
        self.pauses = Pauses(plan, cost, self.seen)
        self.step_s, self.longest = array("d"), array("q")
        self.num_rows, self.tokens, self.useful = array("q"), array("q"), array("q")
        self._draw()

    def _draw(self) -> None:
        """Draw every batch once; what a step costs is kept in a few numbers."""
        rng = random.Random(self.plan.seed)
        while len(self.step_s) < self.steps.total:
            batches = epoch(self.seen, self.plan.batching, rng)
            for _ in range(self.steps.per_epoch):
                if len(self.step_s) == self.steps.total:
                    return
                self._one(batches)

    def _one(self, batches: Iterator[tuple[int, int, int]]) -> None:
        seconds, longest, rows, tokens, useful = self.cost.step_s, 0, 0, 0, 0
        for _ in range(self.plan.accumulation):
            found = next(batches, None)
            if found is None:
                break
            seconds += self.cost.micro_s(found[0], found[1])
            longest = max(longest, found[1])
            rows, tokens, useful = rows + found[0], tokens + found[0] * found[1], useful + found[2]
        self.step_s.append(seconds)
        self.longest.append(longest)
        self.num_rows.append(rows)
        self.tokens.append(tokens)
        self.useful.append(useful)

    def totals(self) -> Totals:
        """The sum of the steps."""
        train, pause = math.fsum(self.step_s), self.pauses.total_s(self.steps.total)
        return Totals(
            steps=len(self.step_s),
            rows=sum(self.num_rows),
            tokens=float(sum(self.tokens)),
            useful_tokens=float(sum(self.useful)),
            train_s=train,
            pause_s=pause,
            usd=(train + pause) / 3600 * self.plan.usd_per_hour,
            memory_bytes=self.cost.memory_bytes(max(self.longest)) if self.longest else 0.0,
        )

    def __len__(self) -> int:
        return len(self.step_s)

    def __iter__(self) -> Iterator[Step]:
        rng = random.Random(self.plan.seed + 1)
        total_s = self.totals().seconds
        elapsed = learned = 0.0
        longest, memory = 0, 0.0
        for number, seconds in enumerate(self.step_s):
            rate = self.schedule.rate(number)
            learned += rate * self.num_rows[number]
            event, pause = self.pauses.after(number + 1, self.steps.total)
            elapsed += seconds + pause
            if self.longest[number] > longest:
                longest = self.longest[number]
                memory = self.cost.memory_bytes(longest)
            yield Step(
                step=number + 1,
                epoch=(number + 1) / self.steps.per_epoch,
                learning_rate=rate,
                synthetic_loss=synthetic_loss(learned, rng),
                synthetic_grad_norm=synthetic_norm(learned, rng),
                rows=self.num_rows[number],
                tokens=self.tokens[number],
                useful_tokens=self.useful[number],
                step_s=seconds,
                pause_s=pause,
                event=event,
                tokens_per_s=self.tokens[number] / seconds,
                memory_bytes=memory,
                elapsed_s=elapsed,
                remaining_s=max(total_s - elapsed, 0.0),
                usd=elapsed / 3600 * self.plan.usd_per_hour,
            )

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the run's organisation, and where it would run out of memory."""
        plan = self.plan
        notes = list(schedule.warnings(self.steps, self.schedule, plan.batching.batch, plan.accumulation))
        step = self.out_of_memory_step()
        if step:
            notes.append(f"out of memory in step {step:,}: its longest batch needs more than the card has")
        return tuple(notes)

    def out_of_memory_step(self) -> int:
        """The first step whose expected memory exceeds the card; 0 for none."""
        room, longest = self.cost.prediction.capacity_bytes, 0
        for number, length in enumerate(self.longest, 1):
            if length > longest:
                longest = length
                if self.cost.memory_bytes(length) > room:
                    return number
        return 0


class Pauses:
    """Seconds that the training stands still after a step."""

    def __init__(self, plan: Plan, cost: StepCost, seen: Lengths) -> None:
        self.plan = plan
        self.checkpoint_s = checkpoint_bytes(cost) / DISK_BYTES_PER_S if plan.save_steps else 0.0
        self.evaluation_s = 0.0
        if plan.eval_steps and plan.eval_rows:
            whole = expected_cost(seen, plan.batching, cost.forward_s)
            self.evaluation_s = whole * plan.eval_rows / max(len(plan.lengths), 1)

    def after(self, step: int, total: int) -> tuple[str, float]:
        """(what happens, seconds) after step `step` of `total`; the last step saves the model."""
        saves = bool(self.plan.save_steps) and (step % self.plan.save_steps == 0 or step == total)
        evaluates = bool(self.evaluation_s) and step % self.plan.eval_steps == 0
        names = [name for name, happens in (("evaluation", evaluates), ("checkpoint", saves)) if happens]
        return " and ".join(names), evaluates * self.evaluation_s + saves * self.checkpoint_s

    def total_s(self, total: int) -> float:
        """Seconds of all pauses of a run of `total` steps."""
        saves = -(-total // self.plan.save_steps) if self.plan.save_steps else 0
        evaluations = total // self.plan.eval_steps if self.evaluation_s else 0
        return saves * self.checkpoint_s + evaluations * self.evaluation_s


def checkpoint_bytes(cost: StepCost) -> int:
    """What a checkpoint writes: the trained weights and the optimizer's state."""
    ledger = dict(cost.prediction.breakdown.ledger)
    trained = ledger.get("adapters", 0) if cost.training.lora else ledger.get("base weights", 0)
    return int(trained + ledger.get("optimizer state", 0))


def steps_of(plan: Plan, seen: Lengths) -> Steps:
    """The steps of the rows that the model sees (packing makes them fewer)."""
    return schedule.count_steps(
        len(seen), plan.batching.batch, plan.accumulation, plan.epochs, drop_last=plan.drop_last
    )


def closed_form(plan: Plan, cost: StepCost) -> Totals:
    """The totals of the run without drawing a batch: expected values over the shuffles."""
    seen = seen_lengths(plan.lengths, plan.batching)
    steps = steps_of(plan, seen)
    share = steps.total / steps.per_epoch if steps.per_epoch else 0.0
    used = steps.per_epoch * plan.accumulation * plan.batching.batch if plan.drop_last else len(seen)
    micro = expected_cost(seen, plan.batching, cost.micro_s, used)
    tokens = expected_cost(seen, plan.batching, positions, used)
    train = micro * share + cost.step_s * steps.total
    pause = Pauses(plan, cost, seen).total_s(steps.total)
    return Totals(
        steps=steps.total,
        rows=round(used * share),
        tokens=tokens * share,
        useful_tokens=seen.total * used / max(len(seen), 1) * share,
        train_s=train,
        pause_s=pause,
        usd=(train + pause) / 3600 * plan.usd_per_hour,
        memory_bytes=float(cost.prediction.device.expected),
    )


def synthetic_loss(learned: float, rng: random.Random) -> float:
    """An exponential fall from 2.5 towards 0.9 with noise, kept between 0.05 and 2.5; `learned` is rate times rows."""
    smooth = FLOOR_LOSS + (START_LOSS - FLOOR_LOSS) * math.exp(-learned / LOSS_SCALE)
    noisy = smooth * (1 + LOSS_NOISE * max(-3.0, min(3.0, rng.gauss(0, 1))))
    return min(max(noisy, LOWEST_LOSS), START_LOSS)


def synthetic_norm(learned: float, rng: random.Random) -> float:
    """A positive number that falls from about 1.5 to 0.5 with noise."""
    smooth = 0.5 + math.exp(-learned / LOSS_SCALE)
    return smooth * math.exp(NORM_NOISE * max(-3.0, min(3.0, rng.gauss(0, 1))))
