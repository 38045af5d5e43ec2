"""The files of one job put together: later files win, what a file states beats what a framework does unasked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from planner.base.errors import InvalidInput, one_line
from planner.facts import catalog
from planner.importers import frameworks, rules
from planner.importers.document import Document, Entry
from planner.importers.files import read_document
from planner.importers.model_names import inside, readable
from planner.importers.rules import KeyUse, Missing, Reading, Value
from planner.training.spec import Versions
from planner.training.stacks import CUSTOM

MAX_FILES = 20
"""Files of one job, those that its configs name included."""


class Job(NamedTuple):
    """What the files of one job say, in the words of `planner.training.stacks`."""

    files: tuple[str, ...]
    stack: str
    stack_origin: str
    model: str | None
    """The id or path of the base model; None: the files do not name one."""
    model_origin: str
    given: Mapping[str, Value]
    """Options that the files state."""
    defaults: Mapping[str, Value]
    """Options that the frameworks set unasked, as far as their tables know better than `planner.training.stacks`."""
    missing: tuple[Missing, ...]
    """What the estimate lacks; each is a warning."""
    keys: tuple[KeyUse, ...]
    readings: tuple[Reading, ...]

    @property
    def values(self) -> dict[str, Value]:
        """Every option with its value, stated ones first."""
        return {**self.defaults, **self.given}

    @property
    def summary(self) -> str:
        """What was read, in a line."""
        counts = {use: sum(1 for key in self.keys if key.use == use) for use in ("used", "default")}
        rest = sum(1 for key in self.keys if key.use in ("ignored", "unknown", "unsupported"))
        titles = ", ".join(f"{r.framework.title} {r.document.name}" for r in self.readings)
        return (
            f"read {titles}: {counts['used']} keys used, {counts['default']} framework defaults, "
            f"{rest} keys not used (--show-keys)"
        )


def read_job(
    paths: Iterable[str], versions: Versions | None = None, *, one_gpu: bool = False, allow_outside: bool = False
) -> Job:
    """Read the files of one job in order; files that they name come right behind them.

    Raises:
        PlannerError: an unreadable file, keys of no known framework, or a job that is not planned.
    """
    documents = _with_named_files(paths, one_gpu, allow_outside)
    readings = [
        rules.apply(document, framework, versions or Versions(), one_gpu=one_gpu)
        for framework, document in _overlaid(documents)
    ]
    if not readings:
        raise InvalidInput("no config file was given; pass one with --from")
    given, defaults = _merged(readings)
    model, origin = _model(readings, allow_outside)
    stack = next((r for r in reversed(readings) if r.framework.stack), None)
    return Job(
        files=tuple(document.path for document in documents),
        stack=stack.framework.stack or CUSTOM if stack else CUSTOM,
        stack_origin=f"file {stack.document.name}: {stack.framework.title}" if stack else "loraplan default",
        model=model,
        model_origin=origin,
        given=given,
        defaults=defaults,
        missing=tuple(dict.fromkeys(m for r in readings for m in r.missing)),
        keys=tuple(key for r in readings for key in r.keys),
        readings=tuple(readings),
    )


def _with_named_files(paths: Iterable[str], one_gpu: bool, allow_outside: bool) -> list[Document]:
    documents: list[Document] = []
    for path in paths:
        document = read_document(path)
        documents.append(document)
        for key in frameworks.recognise(document).files:
            named = document.get(key)
            if isinstance(named, str) and named.strip():
                documents += _named(named.strip(), key, document, one_gpu, allow_outside)
            elif isinstance(named, dict) and named:
                documents.append(_inline(key, document))
        if len(documents) > MAX_FILES:
            raise InvalidInput(f"more than {MAX_FILES} config files for one job; pass those of one job")
    return documents


def _named(name: str, key: str, document: Document, one_gpu: bool, allow_outside: bool) -> list[Document]:
    """Read a file that a config names: from the config's folder, or its base name beside the config.

    Published configs name files from the root of their repository. With `one_gpu` a file that is not there is left
    out: it would only say how the job is spread over GPUs.
    """
    for wanted in (name, os.path.basename(name)):
        path = inside(wanted, document.path, allow_outside=allow_outside)
        if os.path.isfile(path):
            return [read_document(path)]
    if one_gpu:
        return []
    raise InvalidInput(
        f"{document.where(key)}: {key} names {one_line(name)!r}, which is not in the config's folder and may shard the "
        "job; put the file there, or add --one-gpu to plan without it"
    )


def _inline(key: str, document: Document) -> Document:
    """Return a section of a config as the document it stands for."""
    start = f"{key}."
    entries = {name[len(start) :]: e for name, e in document.entries.items() if name.startswith(start)}
    return Document(document.path, entries, document.kind)


def _overlaid(documents: list[Document]) -> list[tuple[frameworks.Framework, Document]]:
    """Join documents of the same framework: the keys of the later file win."""
    joined: dict[str, tuple[frameworks.Framework, Document]] = {}
    for document in documents:
        framework = frameworks.recognise(document)
        if framework.name in joined:
            _, earlier = joined.pop(framework.name)
            document = _joined(earlier, document)
        joined[framework.name] = (framework, document)
    return list(joined.values())


def _joined(earlier: Document, later: Document) -> Document:
    entries = {
        key: Entry(entry.value, entry.line, document.where(key))
        for document in (earlier, later)
        for key, entry in document.entries.items()
    }
    return later._replace(entries=entries)


def _merged(readings: list[Reading]) -> tuple[dict[str, Value], dict[str, Value]]:
    given: dict[str, Value] = {}
    defaults: dict[str, Value] = {}
    for reading in [r for r in readings if r.framework.weak] + [r for r in readings if not r.framework.weak]:
        for option, value in reading.options.items():
            (given if value.given else defaults)[option] = value
    return given, {option: value for option, value in defaults.items() if option not in given}


def _model(readings: list[Reading], allow_outside: bool) -> tuple[str | None, str]:
    tables = catalog.framework_tables()
    for reading in reversed(readings):
        if reading.model is None:
            continue
        models = tables[reading.framework.name].get("models", {})
        name = readable(reading.model.value, reading.document, models=models, allow_outside=allow_outside)
        return name, reading.model.origin
    return None, ""
