"""`loraplan lint`: what a training config costs without anybody having meant it."""

from __future__ import annotations

from typing import Any

import click

from planner.cli.asking import known, request_of
from planner.cli.options import FORMATS, Sectioned, format_option_of, training_options


@click.command(cls=Sectioned)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--model", help="The base model, where the config names none or one that cannot be read.")
@click.option("--gpu", metavar="GPU", help="A card of the catalogue: adds traps of the hardware, and seconds.")
@click.option("--from", "configs", multiple=True, metavar="FILE", help="A config that belongs to every FILE.")
@click.option("--allow-outside", is_flag=True, help="Read files that a config names outside its own folder.")
@format_option_of((*FORMATS, "github"))
@training_options
def lint(files: tuple[str, ...], configs: tuple[str, ...], allow_outside: bool, style: str, **given: Any) -> int:
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
    from planner.base.records import replace
    from planner.cli.terminal import tell_unanswered
    from planner.plan.cards import card_of
    from planner.plan.checks import linted
    from planner.plan.jobs import Files
    from planner.report.lint_view import render

    request, shared = request_of(given), known()
    request = replace(request, gpu=card_of(request.gpu))
    reading = Files(configs, one_gpu=True, allow_outside=allow_outside)
    found = [linted(name, reading, request, shared) for name in files]
    click.echo(render(found, style), nl=False)
    tell_unanswered(item.error for item in found)
    if any(trap.serious for item in found for trap in item.traps):
        return 1
    return 2 if any(item.error for item in found) else 0
