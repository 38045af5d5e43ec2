"""`loraplan max` and `loraplan pick`: the largest run on a card, and the card for a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

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
from planner.cli.terminal import echo_notes

if TYPE_CHECKING:
    from planner.model.spec import ModelSpec
    from planner.plan.datarun import DataRun
    from planner.plan.largest import Largest
    from planner.plan.pick import Candidate, HoursOf
    from planner.plan.request import Plan
    from planner.plan.rows import Caption

WORDS = {
    "batch": "micro_batch_size", "micro-batch-size": "micro_batch_size", "seq-len": "seq_len", "length": "seq_len",
    "rank": "r",
}  # fmt: skip
UNITS = {"micro_batch_size": "rows per micro batch", "seq_len": "tokens per row", "r": "LoRA rank"}
STEPS = {"micro_batch_size": 1, "seq_len": 64, "r": 1}
LIMITS = {"micro_batch_size": 512, "seq_len": 131_072, "r": 1024}
FRONTIER = 24
"""Values of the first number of a frontier: powers of two and their one and a half."""


@click.command(cls=Sectioned)
@model_or_config()
@click.option("--gpu", metavar="GPU", help="A card of the catalogue, or local.")
@click.option("--vram", metavar="SIZE", help="Memory of a card of your own, for example 24GiB.")
@click.option(
    "--of", "keys", multiple=True, type=Word("number", tuple(UNITS), WORDS), default=("micro_batch_size",),
    help="batch (the default), length or rank; twice for a frontier over two.",
)  # fmt: skip
@click.option("--probability", type=float, default=0.95, show_default=True, help="How sure it must be that it fits.")
@click.option("--up-to", type=click.IntRange(1, 2**20), metavar="N", help="The largest value to try.")
@calibration_option
@format_option
@data_options
@training_options
def max_(
    model: str, gpu: str | None, vram: str | None, keys: tuple[str, ...], probability: float, up_to: int | None,
    calibration: str | None, style: str, **given: Any,
) -> int:  # fmt: skip
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
    from planner.base.errors import InvalidInput

    names = tuple(dict.fromkeys(keys))
    plan = _run(model, gpu, vram, calibration, given, names)
    if len(names) > 2:
        raise InvalidInput("a frontier is over two numbers; give --of at most twice")
    if len(names) == 2:
        return _frontier(plan, names, probability, up_to, style)
    return _single(plan, names[0], probability, up_to, style)


def _run(
    model: str,
    gpu: str | None,
    vram: str | None,
    calibration: str | None,
    given: dict[str, Any],
    names: tuple[str, ...],
) -> Plan:
    """The run whose numbers are raised; data decides its length."""
    from planner.base.errors import Contradiction, InvalidInput
    from planner.cli.data_options import known, take
    from planner.plan.answering import card_of
    from planner.plan.request import Request, resolve

    data = take(given)
    if data and "seq_len" in names:
        raise Contradiction("the length is what the data decides; look for the largest batch or rank, or drop --data")
    card = card_of(gpu, vram)
    if card is None:
        raise InvalidInput("no card; name one with --gpu or give its memory with --vram")
    return resolve(Request(model, given, card=card, calibration=calibration, data=data), known())


def _candidates(key: str, model: ModelSpec, up_to: int | None) -> list[int]:
    """Every value of a step's multiple, and the smaller powers of two."""
    most = up_to or (model.max_position_embeddings if key == "seq_len" else 0) or LIMITS[key]
    step = STEPS[key]
    small = [2**n for n in range(20) if 2**n < step and 2**n <= most]
    return small + list(range(step, most + 1, step))


def _single(plan: Plan, key: str, probability: float, up_to: int | None, style: str) -> int:

    from planner.base.units import gib
    from planner.plan.largest import largest
    from planner.plan.verdict import ANSWERS

    model, card = plan.spec, plan.card
    assert card is not None
    found = largest(model, plan.training, card, key, _candidates(key, model, up_to), probability, plan.chosen)
    p = found.prediction
    warnings = tuple(dict.fromkeys((*plan.notes, *p.warnings))) if p is not None else plan.warnings
    if style == "table":
        if p is None or found.value is None:
            click.echo(f"none: not even the smallest fits {card.name}; limit: {_why(found)}")
            echo_notes(warnings)
            return 1
        click.echo(f"{found.value:,} {UNITS[key]} on {card.name}")
        click.echo(f"limit: {_why(found)}")
        need = f"{gib(p.device.expected)} GiB ({gib(p.device.low)} to {gib(p.device.high)}) of {gib(p.capacity_bytes)}"
        click.echo(f"peak {need}; fits says {ANSWERS[p.verdict]}")
        if p.time is not None:
            click.echo(f"{p.time.step_s.expected:,.3f} s per step, {p.time.tokens_per_s:,.0f} tokens/s")
        echo_notes(warnings)
        return 0
    row = (
        model.model_id, card.gpu_id, found.value, found.probability, p.verdict if p else None,
        p.allocated.expected if p else None, p.device.expected if p else None,
        p.time.step_s.expected if p and p.time else None, p.time.tokens_per_s if p and p.time else None,
        found.limited_by,
    )  # fmt: skip
    columns = ["model", "gpu", key, "probability", "verdict", "allocated_bytes", "device_bytes", "step_s",
               "tokens_per_s", "limited_by"]  # fmt: skip
    _print(columns, [row], style, warnings=warnings)
    return 0 if found.value is not None else 1


def _why(found: Largest) -> str:
    """What limits the answer, and how sure the part of it is that has a probability."""
    share = "over 99.9 %" if found.probability > 0.999 else f"{100 * found.probability:.1f} %"
    live = f"live memory, {share} sure to fit"
    if found.limited_by == "live memory":
        return live
    if found.limited_by == "what was tried":
        return f"what was tried (--up-to raises it); {live}"
    return f"the allocator's replay, which has no probability; {live}"


def _frontier(plan: Plan, keys: tuple[str, ...], probability: float, up_to: int | None, style: str) -> int:
    from planner.plan.largest import frontier
    from planner.plan.rows import Caption

    model, card = plan.spec, plan.card
    assert card is not None
    first = sorted({value for n in range(FRONTIER // 2) for value in (2**n, 3 * 2**n)})
    most = up_to or LIMITS[keys[0]]
    axes = {keys[0]: [v for v in first if v <= most], keys[1]: _candidates(keys[1], model, None)}
    if keys[0] == "seq_len":
        axes[keys[0]] = [v for v in (n * 64 for n in first) if v <= (model.max_position_embeddings or most)]
    corners = frontier(model, plan.training, card, axes, probability, plan.chosen)
    rows = [(model.model_id, card.gpu_id, c.first, c.second, c.allocated_bytes, c.tokens_per_s) for c in corners]
    columns = ["model", "gpu", *keys, "allocated_bytes", "tokens_per_s"]
    _print(columns, rows, style, Caption((CACHE,), {"basis": CACHE}), plan.warnings)
    return 0 if rows else 1


CACHE = (
    "live memory (without unsplit blocks) and time exact; room is left for the allocator's cache, estimated from a "
    "replay of one pair"
)


def _print(
    columns: list[str],
    rows: list[tuple[Any, ...]],
    style: str,
    caption: Caption | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Print a table with the notes of its plan: below it, under `warnings` in JSON, on stderr beside CSV."""
    import sys

    from planner.cli.terminal import table_width
    from planner.plan import rows as plan_rows
    from planner.report import grid as report

    caption = caption or plan_rows.Caption((), {})
    lines = (*caption.lines, *(f"warning: {note}" for note in warnings))
    caption = plan_rows.Caption(lines, {**caption.data, "warnings": list(warnings)})
    if style == "csv":
        echo_notes(warnings, err=True)
        arrays = {name: [row[n] for row in rows] for n, name in enumerate(columns)}
        report.write_streamed("csv", sys.stdout, columns, [plan_rows.Block({}, arrays, len(rows))], caption)
        return
    width = table_width() if style == "table" else 0
    click.echo(report.whole(style, columns, rows, caption, width).rstrip("\n"))


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
    model: str, gpus: tuple[str, ...], goal: str, tokens: str | None, epochs: float | None, hours: float | None,
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
    from planner.plan.pick import Limits
    from planner.plan.pick import pick as choose

    spec, candidates, amount, run, warnings = _candidates_of(model, gpus, providers, single, (tokens, epochs), given)
    hours_of = _hours_on_data(spec, run, epochs) if run else None
    found = choose(spec, candidates, amount, "usd" if goal == "usd" else "time", Limits(hours, budget), hours_of)
    rows = [_row(item, f"picked{_paid_for(found.answer)}") for item in ([found.answer] if found.answer else [])]
    rows += [_row(item, item.reason) for item in found.rejected]
    columns = ["gpu", "machine", "cards", "usd_per_hour", "device_bytes", "hours", "usd", "reason"]
    if style == "table" and not any(row[2] and row[2] > 1 for row in rows):  # a line of 80 columns has little room
        columns, rows = [c for c in columns if c != "cards"], [(*row[:2], *row[3:]) for row in rows]
    if style == "table" and found.answer is not None:
        a = found.answer
        where = f" ({a.candidate.price.instance_type})" if a.candidate.price and a.candidate.price.instance_type else ""
        cost_words = f"{a.usd:,.2f} USD" if a.usd is not None else "no price known"
        much = f"{epochs or 1:g} epochs of {len(run.found.lengths):,} rows" if run else f"{tokens or TOKENS} tokens"
        click.echo(f"{a.candidate.gpu.name}{where}: {a.hours:,.2f} h, {cost_words} for {much}\n")
    _print(columns, rows, style, warnings=warnings)
    return 0 if found.answer else 1


def _row(item: Any, reason: str) -> tuple[Any, ...]:
    price = item.candidate.price
    machine = price.instance_type if price else None
    rate, cards = (price.usd_per_hour, price.gpu_count) if price else (None, None)
    return item.candidate.gpu.gpu_id, machine, cards, rate, item.device_bytes, item.hours, item.usd, reason


def _paid_for(item: Any) -> str:
    """That a machine has more cards than the run uses."""
    price = item.candidate.price
    return f": pays for {price.gpu_count} cards, uses one" if price and price.gpu_count > 1 else ""


def _candidates_of(
    model: str, gpus: tuple[str, ...], providers: tuple[str, ...], single: bool, much: tuple[str | None, float | None],
    given: dict[str, Any],
) -> Any:  # fmt: skip
    """The model, a candidate per card with its cheapest allowed machine, the amount of training, the data, the notes.

    Raises:
        PlannerError: unknown names, or no candidate at all.
    """
    from planner.base.errors import Contradiction, InvalidInput, unknown
    from planner.base.units import parse_count
    from planner.cli.data_options import known, take
    from planner.facts import calibration_files, catalog
    from planner.plan.pick import Candidate
    from planner.plan.request import Request, counted, resolve
    from planner.plan.table import cards_of
    from planner.runs import cost
    from planner.timing.coefficients import time_words

    calibration = given.pop("calibration", None)
    data, (tokens, epochs) = take(given), much
    if data and tokens is not None:
        raise Contradiction("--tokens and --data say the same thing twice; give one of them")
    if epochs is not None and not data:
        raise Contradiction("--epochs counts passes over --data; give both")
    machines = catalog.instances()
    offered = {item.provider for item in machines}
    for name in providers:
        if name not in offered:
            raise unknown("provider", name, sorted(offered))
    machines = [m for m in machines if (not providers or m.provider in providers) and (not single or m.gpu_count == 1)]
    names = [name for text in gpus for name in text.split(",")]
    cards = cards_of(names) if names else cards_of(list(dict.fromkeys(m.gpu_id for m in machines)))
    chosen, shared = calibration_files.select_each(cards, calibration), known()
    plans = [resolve(Request(model, given, card=c, calibration=chosen[c.gpu_id], data=data), shared) for c in cards]
    found = [
        Candidate(card, cost.cheapest(card, machines), plan.training, chosen[card.gpu_id])
        for card, plan in zip(cards, plans, strict=True)
    ]
    if not found:
        raise InvalidInput("no candidate: no machine of these providers has a card of the catalogue")
    notes = counted((plan.common_warnings, 1) for plan in plans)
    warnings = [f"{note}{f' ({n} of {len(plans)} cards)' if n < len(plans) else ''}" for note, n in notes]
    if any(item.borrowed for item in chosen.values()):
        warnings.append(time_words(chosen))
    amount = cost.Amount(tokens=parse_count(TOKENS if tokens is None else tokens))
    return plans[0].spec, found, amount, plans[0].data, warnings


TOKENS = "10M"
"""What `pick` trains on where nothing is said."""


def _hours_on_data(model: ModelSpec, run: DataRun, epochs: float | None) -> HoursOf:
    """Hours on a candidate, from the distribution of lengths."""
    from planner.plan.datarun import hours_on
    from planner.plan.predict import predict_on

    def hours(candidate: Candidate) -> float:
        return hours_on(run, predict_on(model, candidate.training, candidate.gpu, candidate.chosen), epochs or 1.0)

    return hours
