"""`loraplan simulate`: a training run as a timeline, printed, drawn or replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.asking import known, request_of
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

if TYPE_CHECKING:
    from planner.report.simulation import Simulation

RUN = (
    "learning_rate", "shape", "warmup_steps", "warmup_ratio", "save_steps", "eval_steps", "eval_rows", "drop_last",
    "seed",
)  # fmt: skip
"""Parameters that say how the run is organised."""


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
def simulate(every: int, speed: float | None, plot: str | None, style: str, **given: Any) -> int:
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
    from planner.plan.simulated import Organised, simulated
    from planner.report.simulation import render, simulation_of

    played = simulated(request_of(given), Organised(**{name: given[name] for name in RUN}), known())
    simulation = simulation_of(played, every)
    if plot:
        from planner.report import data_plots

        data_plots.timeline(simulation.timeline, plot)
    if speed:
        _replay(simulation, speed, style)
    else:
        click.echo(render(simulation, style), nl=False)
    if style in ("csv", "jsonl"):
        echo_notes((*simulation.notes, *simulation.timeline.warnings()), err=True)
    return 0 if played.works else 1


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
