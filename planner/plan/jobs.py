"""A training config of another framework as a job of this planner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.training.settings import LIBRARIES

if TYPE_CHECKING:
    from planner.importers import Job

CONFIG_ENDS = (".yml", ".yaml", ".py", ".ipynb")
"""Ends of files that are a training config and never a model."""


def is_config(name: str, several: bool) -> bool:
    """Return whether a name is that of a config; `several`: a .json among others is no model."""
    lower = name.lower()
    return lower.endswith(CONFIG_ENDS) or (several and lower.endswith(".json"))


def job_of(configs: tuple[str, ...], reading: dict[str, Any], rest: dict[str, Any]) -> Job:
    """Read the files of one job under the library releases that the user named; its model is one that can be read.

    Raises:
        PlannerError: the files cannot be read, or their job is not planned.
    """
    from planner.importers import read_job
    from planner.training.versions import parse_versions

    releases = {name: rest[name] for name in LIBRARIES if isinstance(rest.get(name), str) and rest[name]}
    job = read_job(
        configs,
        parse_versions(releases) if releases else None,
        one_gpu=reading["one_gpu"],
        allow_outside=reading["allow_outside"],
    )
    return _with_known_model(job)


def _with_known_model(job: Job) -> Job:
    """Replace a model that cannot be read here by one of the same name that can, with a warning."""
    if job.model is None:
        return job
    from planner.base.errors import UnknownName, one_line
    from planner.facts import sources
    from planner.importers.model_names import stand_ins
    from planner.importers.rules import Missing

    try:
        sources.load_config(job.model, offline=True)
        return job
    except UnknownName:
        found = next(stand_ins(job.model), None)
    if found is None:
        return job
    where = job.model_origin.removeprefix("file ").partition(" ")[0]
    text = f"sizes of {one_line(job.model, 80)} are taken from the catalogue's {found}, a model of the same name"
    return job._replace(model=found, missing=(*job.missing, Missing(text, where, "none")))


def with_job(job: Job, rest: dict[str, Any]) -> dict[str, Any]:
    """Return a command's parameters with the job in them; what the user typed stays as it is."""
    return {**rest, "stack": rest.get("stack") or job.stack, "job": job}
