"""`loraplan max` and `loraplan pick`: the largest run on a card, and the card for a run."""

from __future__ import annotations

from typing import Any

import click

from planner.cli.asking import known, request_of
from planner.cli.data_options import data_options
from planner.cli.from_config import model_or_config
from planner.cli.options import (
    MOST_STEPS,
    Number,
    Sectioned,
    Word,
    calibration_option,
    format_option,
    training_options,
)
from planner.cli.terminal import echo_notes, table_width

WORDS = {
    "batch": "micro_batch_size", "micro-batch-size": "micro_batch_size", "seq-len": "seq_len", "length": "seq_len",
    "rank": "r",
}  # fmt: skip
NUMBERS = ("micro_batch_size", "seq_len", "r")


@click.command(cls=Sectioned)
@model_or_config()
@click.option("--gpu", metavar="GPU", help="A card of the catalogue, or local.")
@click.option("--vram", metavar="SIZE", help="Memory of a card of your own, for example 24GiB.")
@click.option(
    "--of", "keys", multiple=True, type=Word("number", NUMBERS, WORDS), default=("micro_batch_size",),
    help="batch (the default), length or rank; twice for a frontier over two.",
)  # fmt: skip
@click.option("--probability", type=float, default=0.95, show_default=True, help="How sure it must be that it fits.")
@click.option("--up-to", type=click.IntRange(1, 2**20), metavar="N", help="The largest value to try.")
@calibration_option
@format_option
@data_options
@training_options
def max_(keys: tuple[str, ...], probability: float, up_to: int | None, style: str, **given: Any) -> int:
    """Find the largest micro batch, length or rank that fits a card.

    Live memory must fit with the probability, and a replay of the allocator, which has none, must end well. Over two
    numbers the allocator is replayed once, and its cache estimated elsewhere.

    \b
    Examples:
      loraplan max meta-llama/Llama-3.1-8B --gpu rtx-4090
      loraplan max Qwen/Qwen2.5-7B --gpu l4 --of length --probability 0.99
      loraplan max Qwen/Qwen2.5-7B --gpu a100-80gb --of batch --of length
      loraplan max --from qlora.yml --gpu a10g

    \b
    Exit codes: 0 there is one, 1 not even the smallest fits, 2 could not answer.
    """
    from planner.plan.limits import reached
    from planner.report.limits import render_reached

    found = reached(request_of(given), keys, probability=probability, up_to=up_to, shared=known())
    if style == "csv":
        echo_notes(found.warnings, err=True)
    click.echo(render_reached(found, style, table_width()), nl=False)
    return 0 if found.any else 1


@click.command(cls=Sectioned)
@model_or_config()
@click.option("--gpu", "gpus", multiple=True, metavar="LIST", help="Candidates; by default every card with a price.")
@click.option(
    "--goal", type=Word("goal", ("usd", "time")), default="usd", show_default=True, help="Cheapest or fastest."
)
@click.option("--tokens", metavar="N", help="Train on this many tokens (default 10M).")
@click.option(
    "--epochs", type=Number(0, MOST_STEPS, min_open=True), metavar="N", help="Passes over --data (default 1)."
)
@click.option("--hours", type=Number(0, min_open=True), metavar="H", help="Time limit.")
@click.option("--budget", type=Number(0, min_open=True), metavar="USD", help="Most it may cost.")
@click.option("--provider", "providers", multiple=True, metavar="NAME", help="Only machines of these providers.")
@click.option("--single", is_flag=True, help="Only machines with one card.")
@calibration_option
@format_option
@data_options
@training_options
def pick(
    gpus: tuple[str, ...], goal: str, tokens: str | None, epochs: float | None, hours: float | None,
    budget: float | None, providers: tuple[str, ...], single: bool, style: str, **given: Any,
) -> int:  # fmt: skip
    """Pick the cheapest or fastest machine that runs the job, and say why not the others.

    \b
    Examples:
      loraplan pick meta-llama/Llama-3.1-8B --tokens 50M
      loraplan pick Qwen/Qwen2.5-7B --goal time --budget 20
      loraplan pick Qwen/Qwen2.5-7B --gpu l4,a10g,rtx-4090 --hours 12
      loraplan pick Qwen/Qwen2.5-7B --data ./train.jsonl --epochs 3 --padding grouped
      loraplan pick --from qlora.yml --tokens 50M

    \b
    Exit codes: 0 there is one, 1 no candidate will do, 2 could not answer.
    """
    from planner.plan.limits import Choice, picked
    from planner.plan.pick import Limits
    from planner.report.limits import render_picked

    choice = Choice(gpus, providers, single, "usd" if goal == "usd" else "time", Limits(hours, budget), tokens, epochs)
    found = picked(request_of(given), choice, known())
    if style == "csv":
        echo_notes(found.warnings, err=True)
    click.echo(render_picked(found, style, table_width()), nl=False)
    return 0 if found.found.answer else 1
