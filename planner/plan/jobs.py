"""Training configs of other frameworks as a job of this planner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.base.records import NamedTuple
from planner.plan.given import Settings

if TYPE_CHECKING:
    from planner.importers import Job

CONFIG_ENDS = (".yml", ".yaml", ".py", ".ipynb")
"""Ends of files that are a training config and never a model."""


class Files(NamedTuple):
    """The config files of one job, later ones over earlier ones, and how they are read."""

    paths: tuple[str, ...]
    one_gpu: bool = False
    """Plan a job of several GPUs as if it ran unsharded on one."""
    allow_outside: bool = False
    """Read files that a config names outside its own folder."""

    def and_(self, *paths: str) -> Files:
        """These files and more, read in the same way."""
        return self._replace(paths=(*self.paths, *paths))


def is_config(name: str, several: bool) -> bool:
    """Return whether a name is that of a config; `several`: a .json among others is no model."""
    lower = name.lower()
    return lower.endswith(CONFIG_ENDS) or (several and lower.endswith(".json"))


def job_of(files: Files, said: Settings) -> Job:
    """Read the files of one job under the library releases that the user named; its model is one that can be read.

    Raises:
        PlannerError: the files cannot be read, or their job is not planned.
    """
    from planner.importers import read_job
    from planner.training.versions import parse_versions

    releases = said.releases
    job = read_job(
        files.paths,
        parse_versions(releases) if releases else None,
        one_gpu=files.one_gpu,
        allow_outside=files.allow_outside,
    )
    return with_known_model(job)


def with_known_model(job: Job) -> Job:
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
