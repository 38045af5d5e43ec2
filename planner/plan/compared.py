"""Configurations side by side: from words and configs to a prediction of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.base.errors import InvalidInput, PlannerError, one_line
from planner.base.records import NamedTuple, replace
from planner.plan.jobs import Files, is_config, job_of
from planner.plan.predict import Prediction
from planner.plan.request import Known, Request, resolve
from planner.plan.values import key_of, parse_values
from planner.training.settings import Resolved

if TYPE_CHECKING:
    from planner.importers import Job

MOST = 6
"""Configurations beside each other."""


class Compared(NamedTuple):
    """One configuration with its answer."""

    label: str
    prediction: Prediction
    resolved: Resolved


def label_of(number: int) -> str:
    """The letter of a configuration."""
    return chr(ord("A") + number)


def compared(
    configurations: Sequence[str | Request], base: Request, files: Files | None = None, shared: Known | None = None
) -> list[Compared]:
    """Predict each configuration.

    Args:
        configurations: KEY=VALUE words and names of training configs over `base`, or whole requests.
        base: what holds for all of them.
        files: the configs that belong to every configuration, read again before those that one names itself.
        shared: what they share.

    Raises:
        PlannerError: with the configuration's letter.
    """
    shared = shared or Known()
    found = []
    for number, one in enumerate(configurations):
        label = label_of(number)
        try:
            request = one if isinstance(one, Request) else _request(label, one, base, files or Files(()), shared)
            plan = resolve(request, shared)
            found.append(Compared(label, plan.predict(), plan.resolved))
        except PlannerError as error:
            raise type(error)(f"configuration {label}: {error}") from None
    return found


def _request(label: str, text: str, base: Request, files: Files, shared: Known) -> Request:
    """The request of one configuration: its words over what holds for all."""
    words = text.split()
    own = tuple(word for word in words if is_config(word, several=True))
    job = shared.job(base.job, base.settings)
    if own:
        job = _own_job(label, files.and_(*own), base, shared)
    said: dict[str, object] = {}
    named: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if word in own:
            continue
        if not equals:
            raise InvalidInput(f"{one_line(word)!r} is no setting; write for example batch=4")
        key = key_of(name)
        if key in ("model", "gpu"):
            named[key] = value
            continue
        values = parse_values(key, [value])
        if len(values) != 1:
            raise InvalidInput(f"{one_line(word)!r} has {len(values)} values; a configuration has one")
        said[key] = values[0]
    model = named.get("model", base.model)
    if model is None and (job is None or job.model is None):
        raise InvalidInput("no model; give --model, model=... or a config that names one")
    return replace(base, model=model, job=job, gpu=named.get("gpu", base.gpu), settings=base.settings.but(said))


def _own_job(label: str, files: Files, base: Request, shared: Known) -> Job:
    """Read the configs that a configuration names itself, after those of all."""
    job = job_of(files, base.settings)
    if shared.tell is not None:
        shared.tell(f"{label}: {job.summary}")
    return job
