"""`loraplan fits` over several training configs: one table, and one exit code that can guard a merge or a launch."""

from __future__ import annotations

from typing import Any

import click

from planner.base.errors import InvalidInput
from planner.base.records import replace
from planner.cli.asking import known, request_of
from planner.cli.terminal import tell_unanswered
from planner.plan.cards import card_of, percent_of
from planner.plan.checks import checked
from planner.plan.jobs import Files
from planner.plan.verdict import CLOSE, NO
from planner.plan.words import COST
from planner.report.config_checks import notes, render


def only_files() -> InvalidInput:
    """Return the error for annotations of a run that has no file to annotate."""
    return InvalidInput("--format github annotates files; name the training configs: loraplan fits configs/*.yml")


def gate(names: tuple[str, ...], files: Files, keys_only: bool, given: dict[str, Any]) -> int:
    """Check every file as a job of its own (files of --from are part of each), print one table, return the exit code.

    0: all fit; 1: one does not fit or is too close to call; 2: one could not be answered and none was refused a fit.
    """
    if keys_only:
        raise InvalidInput("--show-keys is for the config of one job; name one file")
    unused = [name for name in COST if given.get(name) is not None]
    if unused:
        raise InvalidInput(f"--{unused[0].replace('_', '-')} is for one run, not for several files; drop it")
    request = request_of(given, model=None)
    card = card_of(request.gpu, request.vram)
    if card is None:
        raise InvalidInput("several files are checked against a card; name it with --gpu or --vram")
    base = replace(request, gpu=card, vram=None, margin=percent_of(request.margin))
    checks = checked(names, files, base, known())
    click.echo(render(checks, card, given["style"]), nl=False)
    if given["style"] == "csv":
        for line in notes(checks):
            click.echo(line, err=True)
    tell_unanswered(check.error for check in checks)
    verdicts = {check.verdict for check in checks}
    return 1 if verdicts & {NO, CLOSE} else 2 if None in verdicts else 0
