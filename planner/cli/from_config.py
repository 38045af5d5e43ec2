"""`--from FILE`: the options of a training config somebody already has, for any command that takes training options.

`@model_or_config()` stands where a command had `@click.argument("model")`. The command gets its model and options as if
they had been typed; the job itself travels in the option `job`, which `planner.plan.request.configure` understands.
`@config_options` adds the options alone, for commands that name models in another way; `take_job` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.base.records import NamedTuple
from planner.plan.jobs import is_config, job_of, with_job

if TYPE_CHECKING:  # a run without --from needs none of these
    from planner.importers import Job

_OPTIONS = ("configs", "one_gpu", "allow_outside", "show_keys")

_Command = TypeVar("_Command", bound=Callable[..., Any])


def model_or_config(*, many: bool = False, required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the argument MODEL (which a config may name) and the options that read configs.

    Args:
        many: several config files in place of MODEL are a gate over all of them (`loraplan fits configs/*.yml`).
        required: a run without a model is refused; otherwise the command gets None.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(model: Any, **rest: Any) -> Any:
            reading = take_reading(rest)
            models = model if many else (model,) if model else ()
            return _run(command, models, reading, rest, required)

        argument = click.argument("model", nargs=-1) if many else click.argument("model", required=False)
        return argument(config_options(run))

    return decorate


def config_options(command: _Command) -> _Command:
    """Add `--from` and what goes with it (parameters `configs`, `one_gpu`, `allow_outside` and `show_keys`)."""
    for option in reversed(_click_options()):
        command = option(command)
    return command


class ShowKeys(NamedTuple):
    """A job of which only the keys are to be shown."""

    job: Job


def take_reading(given: dict[str, Any]) -> dict[str, Any]:
    """Take the parameters of `config_options` out of what a command was given."""
    return {name: given.pop(name) for name in _OPTIONS}


def take_job(reading: dict[str, Any], given: dict[str, Any]) -> Job | ShowKeys | None:
    """Read the job that `--from` names and say so on stderr; what the estimate lacks of it is a note of its plan.

    Raises:
        PlannerError: the files cannot be read, or their job is not planned.
    """
    if not reading["configs"]:
        if reading["show_keys"]:
            raise click.UsageError("--show-keys lists the keys of a config; give one with --from")
        return None
    job = job_of(reading["configs"], reading, given)
    if reading["show_keys"]:
        return ShowKeys(job)
    click.echo(job.summary, err=True)
    return job


def _click_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--from", "configs", multiple=True, metavar="FILE",
            help="Take model and options from a training config (axolotl, TRL, ...); repeatable, later files win.",
        ),
        click.option("--one-gpu", is_flag=True, help="Plan a config for several GPUs as if it ran unsharded on one."),
        click.option("--allow-outside", is_flag=True, help="Read files that a config names outside its own folder."),
        click.option("--show-keys", is_flag=True, help="List what became of every key of the config, and stop."),
    ]  # fmt: skip


def _run(
    command: Callable[..., Any],
    models: tuple[str, ...],
    reading: dict[str, Any],
    rest: dict[str, Any],
    required: bool,
) -> Any:
    files = models if models and all(is_config(name, len(models) > 1) for name in models) else ()
    if len(files) > 1 or (files and rest.get("style") == "github"):
        from planner.cli.gate import gate

        return gate(files, reading, rest)
    if files:
        reading = {**reading, "configs": (*reading["configs"], *files)}
        models = ()
    if len(models) > 1:
        raise click.UsageError("several models at once; give one, or several training configs (.yml, .json, .py)")
    model = models[0] if models else None
    job = take_job(reading, rest)
    if isinstance(job, ShowKeys):
        return show_keys(job.job, rest.get("style", "table"))
    if job is not None:
        rest = with_job(job, rest)
        model = model or job.model
    if model is None and required:
        raise click.UsageError("Missing argument 'MODEL' (no config names it)" if job else "Missing argument 'MODEL'")
    return command(model=model, **rest)


def show_keys(job: Job, style: str) -> int:
    """Print what became of every key of the files."""
    from planner.base.errors import one_line
    from planner.report.tables import json_text, table

    rows = [(key.key, key.use, one_line(str(key.value), 60), key.where) for key in job.keys]
    headers = ("key", "use", "value", "where")
    if style == "json":
        keys = [dict(zip(headers, row, strict=True)) for row in rows]
        document = {"schema_version": 1, "stack": job.stack, "model": job.model, "keys": keys}
        document["warnings"] = [str(missing) for missing in job.missing]
        click.echo(json_text(document), nl=False)
        return 0
    click.echo(table("table" if style == "github" else style, headers, rows), nl=False)
    for missing in job.missing:
        click.echo(f"warning: {missing}", err=True)
    return 0
