"""`loraplan compare`: configurations side by side, the difference explained by component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.asking import known, request_of, settings_of
from planner.cli.from_config import ShowKeys, config_options, files_of, show_keys, take_job
from planner.cli.options import Sectioned, Word, calibration_option, format_option, training_options
from planner.cli.terminal import echo_notes

if TYPE_CHECKING:
    from planner.plan.compared import Compared


@click.command(cls=Sectioned)
@click.argument("configurations", nargs=-1)
@config_options
@click.option("--model", metavar="MODEL", help="The model of every configuration that names none.")
@click.option("--gpu", metavar="GPU", help="The card of every configuration that names none.")
@click.option("--with", "rival", type=Word("other planner", ("entrenar",)), help="Its answer beside each of ours.")
@calibration_option
@format_option
@training_options
def compare(configurations: tuple[str, ...], rival: str | None, style: str, **given: Any) -> int:
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
    from planner.base.errors import InvalidInput
    from planner.plan.compared import MOST
    from planner.report import comparison

    least = 1 if rival else 2
    if not given["show_keys"] and not least <= len(configurations) <= MOST:
        raise InvalidInput(f"{len(configurations)} configurations; compare takes {least} to {MOST}")
    items = compared_of(configurations, given)
    if isinstance(items, ShowKeys):
        return show_keys(items.job, style)
    if rival:
        from planner.course.beside import entrenar_beside
        from planner.report.lora_report import render_rivals

        warnings = comparison.warnings(items)
        click.echo(render_rivals(entrenar_beside(items), style, warnings), nl=False)
        if style == "table":
            echo_notes(warnings)
        return 0
    click.echo(comparison.render(items, style), nl=False)
    if style == "csv":
        echo_notes(comparison.warnings(items), err=True)
    return 0


def compared_of(configurations: tuple[str, ...], given: dict[str, Any]) -> list[Compared] | ShowKeys:
    """Predict each configuration; the parameters say what holds for all.

    Raises:
        PlannerError: with the configuration's letter.
    """
    from planner.plan.compared import compared

    files = files_of(given)
    job = take_job(files, settings_of(given), given["show_keys"])
    if isinstance(job, ShowKeys):
        return job
    return compared(configurations, request_of(given, job=job), files, known())
