"""`loraplan fits`: does one fine-tuning run fit on one card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.base.records import NamedTuple
from planner.cli.data_options import data_options
from planner.cli.from_config import model_or_config
from planner.cli.options import (
    COST,
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
    from planner.device.hardware import Gpu
    from planner.report.answer import Answer
    from planner.request import Data
    from planner.search import Change

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
    model: str,
    gpu: str | None,
    vram: str | None,
    margin: str,
    explain: bool,
    explain_time: bool,
    calibration: str | None,
    via: str,
    changes: bool,
    style: str,
    time_limit: float,
    use_cache: bool,
    **given: Any,
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
    from planner.cli.data_options import take
    from planner.plan.verdict import FITS

    wanted = {name: given.pop(name) for name in COST}
    data = take(given)
    tracing = Tracing(time_limit, use_cache) if via == "trace" else None
    answer = answer_of(model, card_of(gpu, vram), percent_of(margin), given, changes, tracing, calibration, data)
    answer = answer._replace(explain=explain, explain_time=explain_time)
    answer = _with_cost(answer, wanted)
    _print(answer, style)
    return 0 if answer.prediction.verdict in (FITS, None) else 1


class Tracing(NamedTuple):
    """How long a trace may run, and whether an answer of an earlier one will do."""

    time_limit_s: float
    use_cache: bool


def answer_of(
    model: str,
    card: Gpu | None,
    margin: float,
    given: dict[str, Any],
    search: bool,
    tracing: Tracing | None = None,
    calibration: str | None = None,
    data: Data | None = None,
) -> Answer:
    """Answer for one run; `given` holds what the training options gave.

    Raises:
        PlannerError: the run cannot be planned.
    """
    from planner.cli.data_options import known
    from planner.plan.verdict import FITS
    from planner.report.answer import Answer
    from planner.request import Request, resolve, training_settings

    card, kept = with_margin(card, margin)
    if tracing is not None:
        from planner.cli.trace import traced_answer

        if data:
            from planner.base.errors import Contradiction

            raise Contradiction("--data is planned by loraplan's own program; drop --via trace")
        stack = training_settings(given)
        return traced_answer(model, card, stack, given, tracing.time_limit_s, tracing.use_cache, kept)
    plan = resolve(Request(model, given, card=card, calibration=calibration, data=data), known() if data else None)
    prediction = plan.predict()
    found: tuple[Change, ...] = ()
    if search and prediction.verdict not in (FITS, None):
        from planner.facts import catalog
        from planner.search import nearest_changes

        found = nearest_changes(prediction, catalog.gpus())
    return Answer(
        prediction, plan.loaded.loaded, plan.resolved, found, kept, stack_origin=plan.stack_origin, data=plan.data
    )


def _with_cost(answer: Answer, wanted: dict[str, Any]) -> Answer:
    """Add the whole run's hours and price, if a run was given."""
    if answer.data is not None:
        from planner.cli.money import data_plan

        data, made, remarks = data_plan(answer.prediction, answer.data, wanted)
        return answer._replace(data=data, run=made, notes=remarks)
    if all(value is None for value in wanted.values()):
        return answer
    from planner.cli.money import amount_of, run_plan

    amount = amount_of(wanted)
    plan, notes = run_plan(answer.prediction, amount, wanted)
    return answer._replace(run=plan, mean_tokens=amount.mean_tokens, notes=notes)


def with_margin(card: Gpu | None, percent: float) -> tuple[Gpu | None, int]:
    """The card with a share of its memory taken, and that share in bytes."""
    if card is None or not percent:
        return card, 0
    from planner.base.records import replace

    kept = int(card.memory_bytes * percent / 100)
    return replace(card, used_by_others_bytes=card.used_by_others_bytes + kept), kept


def card_of(gpu: str | None, vram: str | None) -> Gpu | None:
    """Return the card that was named, if one was.

    Raises:
        PlannerError: unknown names, sizes that are none, or both at once.
    """
    if gpu is not None and vram is not None:
        from planner.base.errors import Contradiction

        raise Contradiction("--gpu and --vram name two cards at once; give one of them")
    if vram is not None:
        from planner.base.units import gib, parse_bytes
        from planner.device.hardware import Gpu

        size = parse_bytes(vram)
        return Gpu(gpu_id="custom", name=f"a card with {gib(size)} GiB", memory_bytes=size, memory_basis="user")
    if gpu is None:
        return None
    if gpu.partition(":")[0].lower() == "local":
        from planner.facts.local_gpu import local_gpu

        return local_gpu(gpu.partition(":")[2])
    if gpu.lower() == "cpu":
        from planner.device import processor

        return processor.as_gpu(processor.facts())
    from planner.facts import catalog

    return catalog.gpu(gpu)


def percent_of(text: str) -> float:
    """Return a share given in percent.

    Raises:
        InvalidInput: not a number from 0 to below 100.
    """
    from planner.base.errors import InvalidInput, one_line

    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise InvalidInput(f"--margin is {one_line(text)!r}; write a percentage from 0 to below 100, for example 10")
    return value


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
