"""Training data of a plan: what is read, and how it is said that it is being read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.runs.dataset.scan import Scan, Source

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""From the number of bytes to a context whose value takes the bytes read since its last call."""


def read(what: Source, progress: Progress) -> Scan:
    """Scan the files, telling `progress` how far it is.

    Raises:
        PlannerError: data that cannot be read.
    """
    import os

    from planner.runs.dataset.files import kind
    from planner.runs.dataset.scan import scan

    for path in what.paths:
        kind(path)  # refuses what cannot be read before a bar appears
    with progress(sum(os.path.getsize(path) for path in what.paths)) as advance:
        return scan(what, advance)


def source(paths: tuple[str, ...], template: str, tokenizer: str | None, model: str | None) -> Source:
    """What to read; a model decides whose vocabulary an estimate stands on.

    Raises:
        PlannerError: an unknown template or model.
    """
    from planner.base.errors import unknown
    from planner.runs.dataset.scan import Source
    from planner.runs.dataset.templates import NAMES
    from planner.runs.dataset.tokens import family_of

    if template not in NAMES:
        raise unknown("template", template, NAMES)
    family = "llama2"
    if model and not tokenizer:
        from planner.plan.models import load_model

        spec = load_model(model).spec
        family = family_of(spec.model_type, spec.vocab_size)
    return Source(paths=paths, template=template, tokenizer=tokenizer, family=family)


def model_notes(model: str | None) -> tuple[str, ...]:
    """What to tell about the model that was named."""
    if model is None:
        return ()
    from planner.plan.models import load_model

    return load_model(model).warnings
