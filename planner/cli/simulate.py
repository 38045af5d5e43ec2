"""`loraplan simulate`: a training run as a timeline, printed, drawn or replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.data_options import data_options
from planner.cli.from_config import model_or_config
from planner.cli.options import (
    FORMATS,
    MOST_STEPS,
    Sectioned,
    Word,
    calibration_option,
    cost_options,
    format_option_of,
    training_options,
)
from planner.cli.terminal import echo_notes
from planner.plan.words import COST

if TYPE_CHECKING:
    from planner.plan.simulate import Plan
    from planner.report.simulation import Simulation
    from planner.runs.cost import Price
    from planner.training.spec import TrainingSpec

RUN = (
    "learning_rate", "shape", "warmup_steps", "warmup_ratio", "save_steps", "eval_steps", "eval_rows", "drop_last",
    "seed",
)  # fmt: skip
"""Parameters that go into the plan as they are."""


@click.command(cls=Sectioned)
@model_or_config()
@click.option("--gpu", metavar="GPU", required=True, help="A card of the catalogue (loraplan gpus), or local.")
@click.option("--lr", "learning_rate", type=float, default=2e-4, show_default=True, help="Peak learning rate.")
@click.option(
    "--schedule", "shape", type=Word("schedule", ("cosine", "linear", "constant")), default="cosine", show_default=True,
    help="How the learning rate falls.",
)  # fmt: skip
@click.option("--warmup-steps", type=click.IntRange(0, MOST_STEPS), help="Steps of linear warm-up.")
@click.option("--warmup-ratio", type=float, help="The same as a share of the run.")
@click.option("--save-steps", type=click.IntRange(0), default=500, show_default=True, help="Checkpoint every N steps.")
@click.option("--eval-steps", type=click.IntRange(0), default=0, help="Evaluate every N steps.")
@click.option("--eval-rows", type=click.IntRange(0), default=0, help="Rows of an evaluation.")
@click.option("--drop-last", is_flag=True, help="Whole effective batches only (floor), as the course counts.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of the shuffles and the synthetic loss.")
@click.option("--every", type=click.IntRange(0), default=0, help="Print every N-th step.")
@click.option("--speed", type=click.FloatRange(min=0, min_open=True), help="Replay live, so many times as fast.")
@click.option("--plot", metavar="FILE", help="Draw the run (.png, .svg or .pdf).")
@format_option_of((*FORMATS, "jsonl"))
@cost_options
@calibration_option
@data_options
@training_options
def simulate(
    model: str, gpu: str, every: int, speed: float | None, plot: str | None, style: str, calibration: str | None,
    **given: Any,
) -> int:  # fmt: skip
    """Play a training run through: steps, learning rate, time, tokens, memory and cost of every optimizer step.

    Time, memory and tokens are predicted. The loss curve is synthetic: an illustration, and labelled so.

    \b
    Examples:
      loraplan simulate meta-llama/Llama-3.1-8B --gpu rtx-4090 --rows 1000 --epochs 3 --batch 4 --grad-accum 4
      loraplan simulate Qwen/Qwen2.5-7B --gpu l4 --data ./train.jsonl --padding grouped --plot ./run.png
      loraplan simulate Qwen/Qwen2.5-7B --gpu l4 --rows 200 --mean-tokens 300 --seq-len 512 --format csv

    \b
    Exit codes: 0 the run works, 1 it trains nothing or does not fit, 2 could not answer.
    """
    from planner.plan.verdict import FITS

    simulation = _simulation(model, gpu, given, every, calibration)
    if plot:
        from planner.report import data_plots

        data_plots.timeline(simulation.timeline, plot)
    if speed:
        _replay(simulation, speed, style)
    else:
        from planner.report.simulation import render

        click.echo(render(simulation, style), nl=False)
    if style in ("csv", "jsonl"):
        echo_notes((*simulation.notes, *simulation.timeline.warnings()), err=True)
    works = len(simulation.timeline) and not simulation.timeline.out_of_memory_step()
    return 0 if works and simulation.timeline.cost.prediction.verdict == FITS else 1


def _simulation(model: str, gpu: str, given: dict[str, Any], every: int, calibration: str | None) -> Simulation:
    from planner.cli.data_options import take
    from planner.model import adapter
    from planner.model.spec import ModelSpec
    from planner.plan.answering import answer_of, card_of
    from planner.plan.curves import StepCost
    from planner.plan.money import ESTIMATED, price_of
    from planner.plan.simulate import Timeline, closed_form
    from planner.plan.verdict import CLOSE
    from planner.report.answer import run_words
    from planner.report.simulation import Simulation

    wanted = {name: given.pop(name) for name in COST}
    run = {name: given.pop(name) for name in RUN}
    data = take(given)
    card = card_of(gpu, None)
    assert card is not None
    answer = answer_of(model, card, 0.0, given, False, calibration=calibration, data=data)
    found, training = answer.data, answer.prediction.training
    lengths, how, words = (
        (found.found.lengths, found.batching, _data_words(found)) if found else _constant(training, wanted)
    )
    cost = StepCost(answer.prediction, found.seen.shortest if found else training.seq_len)
    price = price_of(card, wanted)
    plan = _plan(run, lengths, how, training.gradient_accumulation_steps, wanted["epochs"], price)
    notes = [*answer.prediction.warnings]
    if training.lora is not None and isinstance(answer.prediction.model, ModelSpec):
        notes += adapter.facts(answer.prediction.model, training).warnings
    if answer.prediction.verdict == CLOSE:
        notes.append(f"whether it fits is {CLOSE}: loraplan fits says by how much")
    if found and found.found.token_error:
        notes.append(ESTIMATED)
    if price is not None:
        import datetime

        notes += price.warnings(datetime.date.today())
    return Simulation(
        timeline=Timeline(plan, cost),
        closed=closed_form(plan, cost),
        run_words=run_words(answer),
        card=card.name,
        data=words,
        every=every,
        notes=tuple(dict.fromkeys(notes)),
        price=_price_words(price) if price else "",
    )


def _price_words(price: Price) -> str:
    where = " ".join(part for part in (price.instance_type or price.source, price.date) if part)
    return f"{price.usd_per_hour:,.3f} USD/h ({where})"


def _plan(run: dict[str, Any], lengths: Any, how: Any, accumulation: int, epochs: float | None, price: Any) -> Plan:
    from planner.plan.simulate import Plan

    return Plan(
        lengths=lengths, batching=how, accumulation=accumulation, epochs=3.0 if epochs is None else epochs,
        usd_per_hour=price.usd_per_hour if price else 0.0, **run,
    )  # fmt: skip


def _data_words(found: Any) -> str:
    scan = found.found
    return f"{len(scan.lengths):,} rows as {scan.template.name}, {scan.lengths.total:,} tokens ({scan.token_label})" + (
        f"; {scan.num_problems:,} rows left out" if scan.num_problems else ""
    )


def _constant(training: TrainingSpec, wanted: dict[str, Any]) -> tuple[Any, Any, str]:
    """Rows of one length, when there is no data: all padded to the length.

    Raises:
        PlannerError: neither data nor a number of rows.
    """
    from itertools import repeat

    from planner.base.errors import Contradiction, InvalidInput
    from planner.plan.money import amount_of
    from planner.runs.dataset.batches import Batching
    from planner.runs.dataset.lengths import Lengths

    if wanted["rows"] is None or wanted["tokens"] is not None:
        raise Contradiction("what is trained? give --data FILE, or --rows N")
    amount_of(wanted)  # checks the ranges
    if wanted["rows"] > 50_000_000:
        raise InvalidInput(f"--rows is {wanted['rows']:,}; a timeline takes at most 50,000,000")
    mean = min(round(wanted["mean_tokens"] or training.seq_len), training.seq_len)
    lengths = Lengths(repeat(max(mean, 1), wanted["rows"]))
    how = Batching(batch=training.micro_batch_size, limit=training.seq_len, padding="max")
    return lengths, how, f"{wanted['rows']:,} rows of {mean:,} tokens, padded to {training.seq_len:,} (no data given)"


def _replay(simulation: Simulation, speed: float, style: str) -> None:
    """Print the steps as they would happen, `speed` times as fast, with a bar on a terminal's stderr."""
    import sys
    import time

    from planner.report import simulation as report

    wanted = {step.step for step in report.shown(simulation)}
    with click.progressbar(
        length=len(simulation.timeline), label="training", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        start = time.monotonic()
        for step in simulation.timeline:
            wait = step.elapsed_s / speed - (time.monotonic() - start)
            if wait > 0:
                time.sleep(wait)
            bar.update(1)
            if style == "jsonl" or step.step in wanted:
                click.echo(report.line(step) if style == "jsonl" else "  ".join(report.table_row(step)).rstrip())
                sys.stdout.flush()
    if style != "jsonl":
        click.echo("")
        click.echo(report.render(simulation, style), nl=False)
