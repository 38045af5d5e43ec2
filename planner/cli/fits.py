"""`loraplan fits`: does one fine-tuning run fit on one card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.asking import known, request_of
from planner.cli.data_options import data_options
from planner.cli.from_config import model_or_config
from planner.cli.options import (
    FORMATS,
    Sectioned,
    Word,
    calibration_option,
    cost_options,
    format_option_of,
    trace_options,
    training_options,
)

if TYPE_CHECKING:  # the command's help needs none of these
    from planner.plan.answer import Answer

_COLOURS = {"YES": "green", "NO": "red", "MAYBE": "yellow"}


@click.command(cls=Sectioned)
@model_or_config(many=True)
@click.option("--gpu", metavar="GPU", help="A card of the catalogue (loraplan gpus), local for this machine's, or cpu.")
@click.option("--vram", metavar="SIZE", help="Memory of a card of your own, for example 24GiB.")
@click.option("--margin", metavar="PERCENT", default="0", help="Share of the card that must stay free.")
@click.option("--explain", is_flag=True, help="Every setting with its origin, model facts, sources, uncertainty.")
@click.option("--explain-time", is_flag=True, help="Where the time of a step goes, by class of operation.")
@cost_options
@calibration_option
@data_options
@click.option(
    "--via",
    type=Word("way to answer", ("program", "trace")),
    default="program",
    show_default=True,
    help="Ask loraplan's own program, or run the real libraries under fake tensors (slower; any model they know).",
)
@click.option("--changes/--no-changes", default=True, help="Search for what would fit if it does not.")
@format_option_of((*FORMATS, "github"))
@trace_options
@training_options
def fits(
    explain: bool, explain_time: bool, via: str, style: str, time_limit: float, use_cache: bool, **given: Any
) -> int:
    """Say whether a fine-tuning run fits on a GPU, where memory and time go, what it costs and what to change.

    MODEL is an id of the catalogue (loraplan models), a model folder, a config.json, a .gguf file, or a hub id in the
    local Hugging Face cache. A training config takes its place: --from qlora.yml, or the file itself; several files
    are checked one by one, in one table.

    \b
    Examples:
      loraplan fits meta-llama/Llama-3.1-8B --gpu rtx-4090 --method qlora
      loraplan fits Qwen/Qwen2.5-7B --vram 16GiB -r 16 --seq-len 4096 --explain
      loraplan fits ./my-model --gpu a100-80gb --stack trl --format json
      loraplan fits --from qlora.yml --gpu a10g
      loraplan fits configs/*.yml --gpu a10g --margin 10 --format github

    \b
    Exit codes: 0 it fits (or no card was named), 1 it does not fit or is too
    close to call, 2 could not answer.
    """
    if style == "github":
        from planner.cli.gate import only_files

        raise only_files()
    from planner.plan.answering import ask
    from planner.plan.request import Tracing
    from planner.plan.verdict import FITS

    tracing = Tracing(time_limit, use_cache) if via == "trace" else None
    answer = ask(request_of(given, tracing=tracing, changes=given["changes"]), known())
    _print(answer._replace(explain=explain, explain_time=explain_time), style)
    return 0 if answer.prediction.verdict in (FITS, None) else 1


def _print(answer: Answer, style: str) -> None:
    if style == "table":
        from planner.cli.terminal import echo_coloured
        from planner.report.fits_text import render

        text = render(answer)
        word = text.split(maxsplit=1)[0]
        echo_coloured(text, word, _COLOURS.get(word, ""))
        return
    from planner.report import fits_data

    click.echo(fits_data.render(answer, style), nl=False)
