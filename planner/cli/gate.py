"""`loraplan fits` over several training configs: one table, and one exit code that can guard a merge or a launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from planner.base.errors import InvalidInput, PlannerError, one_line
from planner.cli.terminal import tell_unanswered
from planner.plan.jobs import job_of, with_job
from planner.plan.verdict import CLOSE, NO
from planner.plan.words import COST
from planner.report.config_checks import Check, notes, render

if TYPE_CHECKING:
    from planner.importers import Job

MAX_FILES = 1_000


def only_files() -> InvalidInput:
    """Return the error for annotations of a run that has no file to annotate."""
    return InvalidInput("--format github annotates files; name the training configs: loraplan fits configs/*.yml")


def gate(files: tuple[str, ...], reading: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Check every file as a job of its own (files of --from are part of each), print one table, return the exit code.

    0: all fit; 1: one does not fit or is too close to call; 2: one could not be answered and none was refused a fit.
    """
    from planner.plan.answering import card_of, percent_of

    if len(files) > MAX_FILES:
        raise InvalidInput(f"{len(files):,} files at once; at most {MAX_FILES:,}")
    if reading["show_keys"]:
        raise InvalidInput("--show-keys is for the config of one job; name one file")
    unused = [name for name in COST if options.get(name) is not None]
    if unused:
        raise InvalidInput(f"--{unused[0].replace('_', '-')} is for one run, not for several files; drop it")
    card, margin = card_of(options["gpu"], options["vram"]), percent_of(options["margin"])
    if card is None:
        raise InvalidInput("several files are checked against a card; name it with --gpu or --vram")
    checks = [_check(name, card, margin, reading, options) for name in files]
    click.echo(render(checks, card, options["style"]), nl=False)
    if options["style"] == "csv":
        for line in notes(checks):
            click.echo(line, err=True)
    tell_unanswered(check.error for check in checks)
    verdicts = {check.verdict for check in checks}
    return 1 if verdicts & {NO, CLOSE} else 2 if None in verdicts else 0


def _check(name: str, card: Any, margin: float, reading: Mapping[str, Any], options: Mapping[str, Any]) -> Check:
    """Answer for one file; a file without an answer is a row with the reason."""
    from planner.plan.answering import answer_of

    try:
        configs = (*reading["configs"], name)
        rest = with_job(job := job_of(configs, dict(reading), dict(options)), dict(options))
        if job.model is None:
            raise InvalidInput(f"{one_line(name, 160)!r} names no model; add its key, or check it alone with MODEL")
        answer = answer_of(job.model, card, margin, _training(rest), search=False)
    except (PlannerError, OSError) as error:
        return Check(name, error=one_line(" ".join(str(error).split()), 400))
    return Check(name, answer=answer, line=_line(job))


def _training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training options alone, as `fits` would get them."""
    from planner.training.options import OPTIONS

    return {key: value for key, value in options.items() if key in OPTIONS or key == "job"}


def _line(job: Job) -> int:
    """Return the line to annotate: the model's, which the whole answer hangs on."""
    return next((reading.model.line for reading in reversed(job.readings) if reading.model), 0) or 1
