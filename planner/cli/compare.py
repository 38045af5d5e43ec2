"""`loraplan compare`: configurations side by side, the difference explained by component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.from_config import ShowKeys, config_options, show_keys, take_job, take_reading
from planner.cli.options import Sectioned, Word, calibration_option, format_option, training_options
from planner.cli.terminal import echo_notes
from planner.plan.jobs import is_config, job_of, with_job

if TYPE_CHECKING:
    from planner.importers import Job
    from planner.report.comparison import Compared

MOST = 6


@click.command(cls=Sectioned)
@click.argument("configurations", nargs=-1)
@config_options
@click.option("--model", metavar="MODEL", help="The model of every configuration that names none.")
@click.option("--gpu", metavar="GPU", help="The card of every configuration that names none.")
@click.option("--with", "rival", type=Word("other planner", ("entrenar",)), help="Its answer beside each of ours.")
@calibration_option
@format_option
@training_options
def compare(
    configurations: tuple[str, ...], model: str | None, gpu: str | None, rival: str | None, style: str, **given: Any
) -> int:
    """Compare two to six CONFIGURATIONS: settings that differ, memory and time by component.

    A configuration is KEY=VALUE words in quotes: model, gpu and settings by the names of their options, or a training
    config (.yml, .json, .py), or both; the options below hold for all, --from too.

    \b
    Examples:
      loraplan compare --model Qwen/Qwen2.5-7B --gpu a100-80gb "method=qlora" "method=lora"
      loraplan compare --model Qwen/Qwen2.5-7B "gpu=l4" "gpu=rtx-4090 batch=2"
      loraplan compare --with entrenar --model Qwen/Qwen2.5-7B --gpu l4 "method=qlora"
      loraplan compare --gpu a10g before.yml after.yml "after.yml batch=1"
      loraplan compare --gpu a10g --from qlora.yml "seq-len=2048" "seq-len=4096"

    \b
    Exit codes: 0 compared, 2 could not answer.
    """
    from planner.base.errors import InvalidInput, one_line
    from planner.report import comparison
    from planner.report.tables import escape, json_text, table, wrapped

    least = 1 if rival else 2
    if not given["show_keys"] and not least <= len(configurations) <= MOST:
        raise InvalidInput(f"{len(configurations)} configurations; compare takes {least} to {MOST}")
    items = compared(configurations, model, gpu, given)
    if isinstance(items, ShowKeys):
        return show_keys(items.job, style)
    if rival:
        return _with_entrenar(items, style)
    labels = [item.label for item in items]
    if style == "json":
        click.echo(json_text(_document(items)), nl=False)
        return 0
    if style == "csv":
        click.echo(table("csv", ("section", "name", *labels, "differs"), comparison.rows(items)), nl=False)
        echo_notes(comparison.warnings(items), err=True)
        return 0
    headings = ["", *labels, ""]
    click.echo(table(style, headings, comparison.shown_rows(items)), nl=False)
    click.echo("")
    for line in comparison.sentences(items):
        click.echo(f"- {line}" if style == "markdown" else wrapped(line, 80, "  "))
    for note in comparison.warnings(items):
        line = f"warning: {one_line(note, 1000)}"
        click.echo(f"- {escape(line)}" if style == "markdown" else wrapped(line, 80, "  "))
    return 0


def _with_entrenar(items: list[Compared], style: str) -> int:
    """Print what entrenar-lora plans for each configuration's model and card beside our figures.

    Raises:
        PlannerError: a configuration without a card or an adapter.
    """
    from planner.base.errors import InvalidInput
    from planner.cli.rival import entrenar
    from planner.model.spec import ModelSpec
    from planner.report.comparison import warnings as warnings_of
    from planner.report.lora_report import rival_document, rival_text
    from planner.report.tables import json_text

    found = []
    for item in items:
        p = item.prediction
        if p.gpu is None or p.training.lora is None or not isinstance(p.model, ModelSpec):
            raise InvalidInput(f"configuration {item.label}: --with needs a card and an adapter (lora or qlora)")
        found.append((item.label, entrenar(p.model, p.training, p.gpu)))
    warnings = warnings_of(items)
    if style == "json":
        answers = [{"configuration": label, **(rival_document(rival) or {})} for label, rival in found]
        click.echo(json_text({"schema_version": 1, "entrenar": answers, "warnings": warnings}), nl=False)
        return 0
    if style != "table":
        raise InvalidInput(f"--with is printed as table or json, not as {style}")
    for label, rival in found:
        click.echo(f"{label}: {rival_text(rival)}")
    echo_notes(warnings)
    return 0


def compared(
    texts: tuple[str, ...], model: str | None, gpu: str | None, given: dict[str, Any]
) -> list[Compared] | ShowKeys:
    """Predict each configuration; `given` holds the training options and those of `config_options`.

    Raises:
        PlannerError: with the configuration's letter.
    """
    from planner.base.errors import PlannerError

    reading = take_reading(given)
    job = take_job(reading, given)
    if isinstance(job, ShowKeys):
        return job
    given = {**given, "job": job, "reading": reading}
    found = []
    for number, text in enumerate(texts):
        label = chr(ord("A") + number)
        try:
            found.append(_predicted(label, text, model, gpu, dict(given)))
        except PlannerError as error:
            raise type(error)(f"configuration {label}: {error}") from None
    return found


def _predicted(label: str, text: str, model: str | None, gpu: str | None, given: dict[str, Any]) -> Compared:
    from planner.base.errors import InvalidInput, one_line
    from planner.plan.answering import card_of
    from planner.plan.request import Request, resolve
    from planner.plan.table import key_of, parse_values
    from planner.report.comparison import Compared

    job, reading, calibration = given.pop("job"), given.pop("reading"), given.pop("calibration", None)
    words = text.split()
    files = tuple(word for word in words if is_config(word, several=True))
    if files:
        job = _own_job(label, files, reading, given)
    for word in words:
        name, equals, value = word.partition("=")
        if word in files:
            continue
        if not equals:
            raise InvalidInput(f"{one_line(word)!r} is no setting; write for example batch=4")
        key = key_of(name)
        if key == "model":
            model = value
        elif key == "gpu":
            gpu = value
        else:
            values = parse_values(key, [value])
            if len(values) != 1:
                raise InvalidInput(f"{one_line(word)!r} has {len(values)} values; a configuration has one")
            given[key] = values[0]
    if job is not None:
        given = with_job(job, given)
        model = model or job.model
    if model is None:
        raise InvalidInput("no model; give --model, model=... or a config that names one")
    plan = resolve(Request(model, given, card=card_of(gpu, None), calibration=calibration))
    return Compared(label, plan.predict(), plan.resolved)


def _own_job(label: str, files: tuple[str, ...], reading: dict[str, Any], given: dict[str, Any]) -> Job:
    """Read the configs that a configuration names itself, after those of --from."""
    job = job_of((*reading["configs"], *files), reading, given)
    click.echo(f"{label}: {job.summary}", err=True)
    return job


def _document(items: list[Compared]) -> dict[str, Any]:
    from planner.report import comparison

    labels = [item.label for item in items]
    return {
        "schema_version": 1,
        "configurations": labels,
        "rows": [
            {"section": s, "name": n, **dict(zip(labels, values, strict=True)), "differs": mark == "*"}
            for s, n, *values, mark in comparison.rows(items)
        ],
        "differences": comparison.sentences(items),
        "warnings": comparison.warnings(items),
    }
