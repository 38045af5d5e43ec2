"""Several training configs, each checked as a job of its own: answered for a card, or looked at for traps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from planner.base.errors import InvalidInput, PlannerError, one_line
from planner.base.records import replace
from planner.plan.answer import Answer
from planner.plan.answering import ask
from planner.plan.jobs import Files, job_of
from planner.plan.lint import Trap, traps
from planner.plan.predict import Prediction
from planner.plan.request import Known, Request, resolve
from planner.training.settings import Setting

if TYPE_CHECKING:
    from planner.importers import Job

MAX_FILES = 1_000


class Check(NamedTuple):
    """One file: the answer for its job, or why there is none."""

    file: str
    answer: Answer | None = None
    error: str = ""
    line: int = 1

    @property
    def verdict(self) -> str | None:
        """fits, does not fit, too close to call, or None without an answer."""
        return self.answer.prediction.verdict if self.answer else None


class Linted(NamedTuple):
    """One file: its traps, or why there is no answer."""

    file: str
    prediction: Prediction | None
    traps: tuple[Trap, ...] = ()
    job: Job | None = None
    settings: Mapping[str, Setting] = {}
    notes: tuple[str, ...] = ()
    error: str = ""


def checked(names: tuple[str, ...], files: Files, base: Request, shared: Known | None = None) -> list[Check]:
    """Answer for each file; one without an answer says why.

    Args:
        names: the files, each a job of its own.
        files: configs that belong to every one of them.
        base: what holds for all of them, with the card.
        shared: what they share.

    Raises:
        InvalidInput: too many files.
    """
    if len(names) > MAX_FILES:
        raise InvalidInput(f"{len(names):,} files at once; at most {MAX_FILES:,}")
    return [_check(name, files, base, shared or Known()) for name in names]


def _check(name: str, files: Files, base: Request, shared: Known) -> Check:
    try:
        job = job_of(files.and_(name), base.settings)
        if job.model is None:
            raise InvalidInput(f"{one_line(name, 160)!r} names no model; add its key, or check it alone with MODEL")
        answer = ask(replace(base, job=job), shared)
    except (PlannerError, OSError) as error:
        return Check(name, error=one_line(" ".join(str(error).split()), 400))
    return Check(name, answer=answer, line=_line(job))


def _line(job: Job) -> int:
    """Return the line to annotate: the model's, which the whole answer hangs on."""
    return next((reading.model.line for reading in reversed(job.readings) if reading.model), 0) or 1


def linted(name: str, files: Files, base: Request, shared: Known | None = None) -> Linted:
    """Look for traps in one file; one that cannot be read is a finding with its reason."""
    try:
        job = job_of(files.and_(name), base.settings)
        if base.model is None and job.model is None:
            raise InvalidInput(f"{one_line(name, 160)!r} names no model; give it with --model")
        prediction, found, settings, notes = _traps(replace(base, job=job), job, shared or Known())
    except (PlannerError, OSError) as error:
        return Linted(name, None, error=one_line(" ".join(str(error).split()), 400))
    return Linted(name, prediction, found, job, settings, notes)


def linted_request(request: Request, shared: Known | None = None) -> Linted:
    """Look for traps in what a request says, of whatever files or objects.

    Raises:
        PlannerError: it cannot be planned.
    """
    shared = shared or Known()
    job = shared.job(request.job, request.settings)
    prediction, found, settings, notes = _traps(replace(request, job=job), job, shared)
    return Linted("the request", prediction, found, job, settings, notes)


def _traps(
    request: Request, job: Job | None, shared: Known
) -> tuple[Prediction, tuple[Trap, ...], Mapping[str, Setting], tuple[str, ...]]:
    # fp16 in place of bf16 only where the framework chooses by the card: what is written is looked at as written
    values = job.values if job is not None else {}
    dtypes = [v for key in ("autocast", "base_dtype") if (v := values.get(key)) and v.value == "bf16"]
    plan = resolve(replace(request, calibration="none", keeps_dtypes=not all(v.adapts for v in dtypes)), shared)
    prediction = plan.predict()
    return prediction, traps(prediction, plan.resolved.settings), plan.resolved.settings, plan.notes
