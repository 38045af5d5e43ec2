"""`--from FILE`: the options of a training config somebody already has, for any command that takes training options.

`@model_or_config()` stands where a command had `@click.argument("model")`. The command gets its model and options as if
they had been typed; the job itself is the parameter `job`, a field of `planner.plan.request.Request`.
`@config_options` adds the options alone, for commands that name models in another way; `take_job` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.base.records import NamedTuple
from planner.cli.asking import settings_of
from planner.plan.given import Settings
from planner.plan.jobs import Files, is_config, job_of

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
            return _run(command, model if many else (model,) if model else (), rest, required)

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


def files_of(given: dict[str, Any]) -> Files:
    """The configs that `--from` names and how they are read."""
    return Files(tuple(given["configs"]), given["one_gpu"], given["allow_outside"])


def take_job(files: Files, said: Settings, keys_only: bool) -> Job | ShowKeys | None:
    """Read the job that `--from` names and say so on stderr; what the estimate lacks of it is a note of its plan.

    Raises:
        PlannerError: the files cannot be read, or their job is not planned.
    """
    if not files.paths:
        if keys_only:
            raise click.UsageError("--show-keys lists the keys of a config; give one with --from")
        return None
    job = job_of(files, said)
    if keys_only:
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


def _run(command: Callable[..., Any], models: tuple[str, ...], rest: dict[str, Any], required: bool) -> Any:
    files, keys_only = files_of(rest), rest["show_keys"]
    given = {name: value for name, value in rest.items() if name not in _OPTIONS}
    configs = models if models and all(is_config(name, len(models) > 1) for name in models) else ()
    if len(configs) > 1 or (configs and rest.get("style") == "github"):
        from planner.cli.gate import gate

        return gate(configs, files, keys_only, given)
    if configs:
        files, models = files.and_(*configs), ()
    if len(models) > 1:
        raise click.UsageError("several models at once; give one, or several training configs (.yml, .json, .py)")
    job = take_job(files, settings_of(given), keys_only)
    if isinstance(job, ShowKeys):
        return show_keys(job.job, rest.get("style", "table"))
    model = models[0] if models else job.model if job is not None else None
    if model is None and required:
        raise click.UsageError("Missing argument 'MODEL' (no config names it)" if job else "Missing argument 'MODEL'")
    return command(model=model, job=job, **given)


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
