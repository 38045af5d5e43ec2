"""`loraplan lint`: what a training config costs without anybody having meant it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import FORMATS, Sectioned, format_option_of, training_options

if TYPE_CHECKING:
    from planner.device.hardware import Gpu
    from planner.report.lint_view import Linted

_HOW = {"configs": (), "one_gpu": True, "allow_outside": False, "show_keys": False}


@click.command(cls=Sectioned)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--model", help="The base model, where the config names none or one that cannot be read.")
@click.option("--gpu", metavar="GPU", help="A card of the catalogue: adds traps of the hardware, and seconds.")
@click.option("--from", "configs", multiple=True, metavar="FILE", help="A config that belongs to every FILE.")
@click.option("--allow-outside", is_flag=True, help="Read files that a config names outside its own folder.")
@format_option_of((*FORMATS, "github"))
@training_options
def lint(
    files: tuple[str, ...],
    model: str | None,
    gpu: str | None,
    configs: tuple[str, ...],
    allow_outside: bool,
    style: str,
    **given: Any,
) -> int:
    """List the traps in training configs, what each costs on the model in bytes or seconds, and the line to change.

    A dtype that loads fp32 weights, fp4 where nf4 was meant, scales that stay fp32, checkpointing that is off, fp32
    copies by k-bit preparation, experts that stay 16-bit, a paged optimizer that pages nothing, rows cut at a default
    length, bf16 or FlashAttention on a card without them. A config for several GPUs is looked at as if on one.

    \b
    Examples:
      loraplan lint sft.yaml
      loraplan lint configs/*.yml --gpu t4 --format github

    \b
    Exit codes: 0 nothing costs more than 5 %, 1 something does or does not
    start, 2 could not answer.
    """
    from planner.cli.terminal import tell_unanswered
    from planner.plan.answering import card_of
    from planner.report.lint_view import render

    card = card_of(gpu, None)
    reading = {**_HOW, "configs": configs, "allow_outside": allow_outside}
    found = [_linted(name, model, card, reading, given) for name in files]
    click.echo(render(found, style), nl=False)
    tell_unanswered(item.error for item in found)
    if any(trap.serious for item in found for trap in item.traps):
        return 1
    return 2 if any(item.error for item in found) else 0


def _linted(name: str, model: str | None, card: Gpu | None, reading: dict[str, Any], given: dict[str, Any]) -> Linted:
    """Look at one file; one that cannot be read is a finding with its reason (alone, an error)."""
    from planner.base.errors import InvalidInput, PlannerError, one_line
    from planner.plan.jobs import job_of, with_job
    from planner.plan.lint import traps
    from planner.plan.request import Request, resolve
    from planner.report.lint_view import Linted

    try:
        job = job_of((*reading["configs"], name), reading, given)
        options = with_job(job, given)
        base = model or job.model
        if base is None:
            raise InvalidInput(f"{one_line(name, 160)!r} names no model; give it with --model")
        # fp16 in place of bf16 only where the framework chooses by the card: what is written is looked at as written
        dtypes = [v for key in ("autocast", "base_dtype") if (v := job.values.get(key)) and v.value == "bf16"]
        keeps = not all(v.adapts for v in dtypes)
        plan = resolve(Request(base, options, job.stack, card, calibration="none", keeps_dtypes=keeps))
        prediction = plan.predict()
    except (PlannerError, OSError) as error:
        return Linted(name, None, error=one_line(" ".join(str(error).split()), 400))
    found = traps(prediction, plan.resolved.settings)
    return Linted(name, prediction, found, job, plan.resolved.settings, plan.notes)
