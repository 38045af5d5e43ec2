"""The functions: what is said becomes a request, the planner answers, the answer is wrapped. Nothing is computed here.

All take settings as keywords, by any of three names: ours (`micro_batch_size`), the command's (`batch`), or that of
transformers, PEFT, TRL or bitsandbytes (`per_device_train_batch_size`), with the meaning that it has there:
`load_in_4bit=True` alone is fp4 with fp32 compute, as in bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeAlias

from loraplan.results import Answer, Comparison, Lint, Report, Table
from planner.device.hardware import Gpu
from planner.plan.request import Cost, Known, Request, Tracing
from planner.plan.saying import Model, data_of, lists_of, paths_of, request_from

Path: TypeAlias = "str | PathLike[str]"
Paths: TypeAlias = "Path | Sequence[Path]"


def fits(
    model: Model | None = None,
    gpu: str | Gpu | None = None,
    *,
    vram: str | None = None,
    margin: str | float = 0.0,
    config: Paths | None = None,
    args: object | None = None,
    peft_config: object | None = None,
    quantization_config: object | None = None,
    one_gpu: bool = False,
    allow_outside: bool = False,
    calibration: str | None = None,
    data: Paths | None = None,
    template: str | None = None,
    tokenizer: str | None = None,
    padding: str | None = None,
    tokens: str | float | None = None,
    rows: int | None = None,
    epochs: float | None = None,
    mean_tokens: float | None = None,
    price: float | None = None,
    dbu_table: str | None = None,
    dbu_rate: float | None = None,
    via: Literal["program", "trace"] = "program",
    changes: bool = True,
    **settings: Any,
) -> Answer:
    """Say whether a fine-tuning run fits on a GPU, where memory and time go, what it costs and what to change.

    >>> import loraplan
    >>> loraplan.fits("meta-llama/Llama-3.1-8B", "rtx-4090", r=16, max_length=4096).fits
    True

    Args:
        model: a hub or catalogue id, a path, a config as a dict, or a transformers config or model.
        gpu: a card of the catalogue ("rtx-4090"), "local", "cpu", or a `planner.device.hardware.Gpu`.
        vram: memory of a card of your own instead, for example "24GiB".
        margin: percent of the card that must stay free.
        config: training configs (axolotl, TRL, ...); settings given here hold before what they say.
        args: a TrainingArguments or SFTConfig object.
        peft_config: a LoraConfig object.
        quantization_config: a BitsAndBytesConfig object.
        one_gpu: plan a job of several GPUs as if it ran unsharded on one.
        allow_outside: read files that a config names outside its own folder.
        calibration: a calibration's file or id, or "none"; by default the newest of the card.
        data: training files: their lengths decide memory, time and cost; `template`, `tokenizer` (a local one) and
            `padding` (max, longest, grouped or packed) say how rows become batches.
        tokens: train on this many (a number or "10M"), or on `rows`, `epochs` times, of `mean_tokens` useful tokens.
        price: USD per hour; otherwise the cheapest machine of the instance table, with Databricks units per hour of
            `dbu_table` at `dbu_rate` USD each.
        via: "trace" runs the installed libraries under fake tensors instead of loraplan's own program.
        changes: search for what would fit where the run does not.
        settings: see `loraplan.api`.

    Raises:
        LoraPlanError: unknown names, unreadable files, or settings that exclude each other.
    """
    request = request_from(
        model, gpu, settings, vram=vram, margin=margin, calibration=calibration, config=config,
        objects=(args, peft_config, quantization_config), one_gpu=one_gpu, allow_outside=allow_outside,
        data=data_of(data, template, tokenizer, padding),
        cost=Cost(tokens, rows, epochs, mean_tokens, price, dbu_table, dbu_rate),
        tracing=Tracing() if via == "trace" else None, changes=changes,
    )  # fmt: skip
    from planner.plan.answering import ask

    return Answer(ask(request))


def table(
    models: Paths,
    gpus: str | Sequence[str] = (),
    *,
    vram: str | Sequence[str] = (),
    margin: str | float = 0.0,
    config: Paths | None = None,
    one_gpu: bool = False,
    allow_outside: bool = False,
    calibration: str | None = None,
    where: str | Sequence[str] = (),
    sort: str | None = None,
    top: int | None = None,
    pareto: str | None = None,
    tokens: str | float | None = None,
    rows: int | None = None,
    epochs: float | None = None,
    mean_tokens: float | None = None,
    price: float | None = None,
    **lists: Any,
) -> Table:
    """Tabulate verdict, memory, time and cost for every combination of lists.

    >>> import loraplan
    >>> len(loraplan.table("Qwen/Qwen2.5-7B", ["l4", "a10g"], micro_batch_size=[1, 2], seq_len="1024,2048"))
    8

    Args:
        models: ids or paths.
        gpus: cards of the catalogue; "all" is every NVIDIA card.
        vram: memory of cards of your own.
        where: conditions on rows such as "peak<24" or "verdict=fits".
        sort: columns, "time,-usd" (minus: largest first).
        top: only the first rows.
        pareto: only rows that no other row beats in these columns.
        lists: settings with one value or a list of them; texts may hold commas and ranges ("512..8192:512").

    The rest is as in `fits`. Columns end in their unit: bytes, seconds (s), hours, USD.

    Raises:
        LoraPlanError: unknown names or values, or no row has an answer.
    """
    from planner.plan.grid import tables
    from planner.report.table import Look, laid_out

    found: dict[str, Sequence[object]] = {
        "model": [*paths_of(models)],
        "gpu": _several(gpus),
        "vram": _several(vram),
        **lists_of(lists),
    }
    base = request_from(
        None, None, {}, margin=margin, calibration=calibration, config=config, one_gpu=one_gpu,
        allow_outside=allow_outside, cost=Cost(tokens, rows, epochs, mean_tokens, price),
    )  # fmt: skip
    made = tables(found, base, shared=Known())
    return Table("table", *laid_out(made, Look(tuple(_several(where)), sort, top, pareto)), found=made)


def largest(
    model: Model | None = None,
    gpu: str | Gpu | None = None,
    of: str | Sequence[str] = "batch",
    *,
    probability: float = 0.95,
    up_to: int | None = None,
    vram: str | None = None,
    margin: str | float = 0.0,
    config: Paths | None = None,
    args: object | None = None,
    peft_config: object | None = None,
    quantization_config: object | None = None,
    one_gpu: bool = False,
    allow_outside: bool = False,
    calibration: str | None = None,
    **settings: Any,
) -> Table:
    """Find the largest micro batch, length or rank that fits a card; of two of them, the frontier.

    >>> import loraplan
    >>> loraplan.largest("Qwen/Qwen2.5-7B", "l4", "length").found.found.value > 1024
    True

    Args:
        of: batch (rows per micro batch), length (tokens per row) or rank; two for a frontier.
        probability: how sure it must be that live memory fits, between 0 and 1.
        up_to: the largest value to try.

    The rest is as in `fits`.

    Raises:
        LoraPlanError: no card, no such number, or settings that exclude each other.
    """
    from planner.plan.limits import reached
    from planner.plan.values import key_of
    from planner.report.limits import reached_table

    request = request_from(
        model, gpu, settings, vram=vram, margin=margin, calibration=calibration, config=config,
        objects=(args, peft_config, quantization_config), one_gpu=one_gpu, allow_outside=allow_outside,
    )  # fmt: skip
    found = reached(request, [key_of(name) for name in _several(of)], probability=probability, up_to=up_to)
    return Table("largest", *reached_table(found), found=found)


def pick(
    model: Model | None = None,
    gpus: str | Sequence[str] = (),
    *,
    goal: Literal["usd", "time"] = "usd",
    tokens: str | float | None = None,
    hours: float | None = None,
    budget: float | None = None,
    providers: str | Sequence[str] = (),
    single: bool = False,
    data: Paths | None = None,
    template: str | None = None,
    tokenizer: str | None = None,
    padding: str | None = None,
    epochs: float | None = None,
    config: Paths | None = None,
    args: object | None = None,
    peft_config: object | None = None,
    quantization_config: object | None = None,
    one_gpu: bool = False,
    allow_outside: bool = False,
    calibration: str | None = None,
    **settings: Any,
) -> Table:
    """Pick the cheapest or fastest machine that runs the job, and say why not the others.

    >>> import loraplan
    >>> loraplan.pick("Qwen/Qwen2.5-7B", ["l4", "a10g"], tokens="50M").rows[0][-1]
    'picked'

    Args:
        gpus: candidates; by default every card with a price.
        goal: "usd" is cheapest, "time" fastest.
        tokens: how much is trained ("10M" by default); with `data`, `epochs` passes over it.
        hours: the most it may take.
        budget: the most it may cost, in USD.
        providers: only machines of these.
        single: only machines with one card.

    The rest is as in `fits`. The first row is the answer where its reason is "picked".

    Raises:
        LoraPlanError: unknown names, no candidate, or a run that cannot be planned.
    """
    from planner.plan.limits import Choice, picked
    from planner.plan.pick import Limits
    from planner.report.limits import picked_table

    request = request_from(
        model, None, settings, calibration=calibration, config=config,
        objects=(args, peft_config, quantization_config), one_gpu=one_gpu, allow_outside=allow_outside,
        data=data_of(data, template, tokenizer, padding),
    )  # fmt: skip
    choice = Choice(
        tuple(_several(gpus)), tuple(_several(providers)), single, goal, Limits(hours, budget),
        None if tokens is None else str(tokens), epochs,
    )  # fmt: skip
    found = picked(request, choice)
    return Table("picked", *picked_table(found), found=found)


Configuration: TypeAlias = "str | Mapping[str, Any]"
"""KEY=VALUE words and names of training configs, or the arguments of `fits` as a mapping."""


def compare(
    *configurations: Configuration,
    model: Model | None = None,
    gpu: str | Gpu | None = None,
    calibration: str | None = None,
    **settings: Any,
) -> Comparison:
    """Put configurations side by side and explain the difference by component.

    >>> import loraplan
    >>> both = loraplan.compare("method=qlora", {"method": "lora"}, model="Qwen/Qwen2.5-7B", gpu="a100-80gb")
    >>> both.differences[0][:7]
    'B needs'

    Args:
        configurations: two to six: KEY=VALUE words, or mappings of settings (`model` and `gpu` too).
        model: of every configuration that names none.
        gpu: of every configuration that names none.

    The rest is as in `fits` and holds for all.

    Raises:
        LoraPlanError: with the configuration's letter.
    """
    from planner.base.errors import InvalidInput
    from planner.plan.compared import MOST

    if not 2 <= len(configurations) <= MOST:
        raise InvalidInput(f"{len(configurations)} configurations; compare takes 2 to {MOST}")
    return Comparison(_compared(configurations, model, gpu, calibration, settings))


def report(
    *configurations: Configuration,
    model: Model | None = None,
    gpu: str | Gpu | None = None,
    calibration: str | None = None,
    title: str = "LoRA fine-tuning plan",
    **settings: Any,
) -> Report:
    """One HTML page that needs no network: tables, memory and time figures, assumptions, sources.

    >>> import loraplan
    >>> loraplan.report(model="Qwen/Qwen2.5-7B", gpu="l4").save("plan.html")  # doctest: +SKIP

    Args:
        configurations: up to six, as in `compare`; none: the one that `settings` describe.
        title: the heading.

    Raises:
        LoraPlanError: as `compare`; MissingDependency without numpy and matplotlib.
    """
    from planner.base.errors import InvalidInput, require
    from planner.plan.compared import MOST
    from planner.report.figures import drawn
    from planner.report.html_report import page

    if len(configurations) > MOST:
        raise InvalidInput(f"{len(configurations)} configurations; a report takes at most {MOST}")
    items = _compared(configurations or ("",), model, gpu, calibration, settings)
    require("a report", "tables,plots", "numpy", "matplotlib")
    return Report(page(items, drawn(items), title), title)


def _compared(
    configurations: Sequence[Configuration], model: Model | None, gpu: str | Gpu | None, calibration: str | None,
    settings: Mapping[str, Any],
) -> list[Any]:  # fmt: skip
    from planner.plan.compared import compared

    base = request_from(model, gpu, settings, calibration=calibration)
    each: list[str | Request] = []
    for one in configurations:
        if isinstance(one, str):
            each.append(one)
            continue
        own = {"model": model, "gpu": gpu, "calibration": calibration, **settings, **one}
        each.append(request_from(own.pop("model"), own.pop("gpu"), own, calibration=own.pop("calibration")))
    return compared(each, base)


def lint(
    *files: Path,
    model: Model | None = None,
    gpu: str | Gpu | None = None,
    config: Paths = (),
    args: object | None = None,
    peft_config: object | None = None,
    quantization_config: object | None = None,
    allow_outside: bool = False,
    **settings: Any,
) -> Lint:
    """List the traps in training configs, what each costs on the model, and the line to change.

    >>> import loraplan
    >>> loraplan.lint(model="Qwen/Qwen2.5-7B", quantization="fp4").traps[0].name
    'no-double-quant'

    Args:
        files: training configs, each looked at by itself, as if on one GPU.
        model: where a config names none; without `files` the run that settings and objects describe is looked at.
        gpu: adds traps of the hardware, and seconds.
        config: configs that belong to every file.

    The rest is as in `fits`.

    Raises:
        LoraPlanError: a run without files that cannot be planned; files that cannot be read are findings.
    """
    from planner.plan.cards import card_of
    from planner.plan.checks import linted, linted_request
    from planner.plan.jobs import Files

    objects = (args, peft_config, quantization_config)
    request = request_from(model, card_of(gpu), settings, objects=objects, one_gpu=True)
    if not files:
        return Lint([linted_request(request)])
    reading, shared = Files(paths_of(config), one_gpu=True, allow_outside=allow_outside), Known()
    return Lint([linted(str(name), reading, request, shared) for name in paths_of(files)])


def _several(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else [*names]
