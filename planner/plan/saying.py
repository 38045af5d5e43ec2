"""What a Python program says as a `Request`: settings under our names, the options' or Hugging Face's, and objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from planner.base.errors import Contradiction, InvalidInput, UnknownName, one_line, unknown
from planner.plan.given import NAMES, Settings
from planner.plan.jobs import Files
from planner.plan.request import Cost, Data, Request, Tracing
from planner.plan.values import key_of, value_of
from planner.training.options import OPTIONS

if TYPE_CHECKING:
    from planner.device.hardware import Gpu
    from planner.importers import Job

Model = Any
"""An id, a path, the config of a model as a mapping, or an object whose `to_dict` gives one (PretrainedConfig)."""


def model_of(model: Model | None) -> str | Mapping[str, Any] | None:
    """The model that was named or given.

    Raises:
        InvalidInput: neither a name nor a config.
    """
    if model is None or isinstance(model, (str, Mapping)):
        return model
    if isinstance(model, PathLike):
        return str(fspath(model))
    read = getattr(model, "to_dict", None) or getattr(getattr(model, "config", None), "to_dict", None)
    found = read() if callable(read) else None
    if not isinstance(found, Mapping):
        raise InvalidInput(f"{one_line(type(model).__name__)} is no model; pass an id, a path, a config or its dict")
    return {**found, "_name_or_path": getattr(model, "name_or_path", "") or found.get("_name_or_path") or ""}


def settings_of(said: Mapping[str, Any]) -> tuple[Settings, tuple[str, ...]]:
    """Settings from names and values, and what of them is not planned.

    A name is one of `planner.training.settings` (micro_batch_size), an option's (batch), or one of transformers, PEFT,
    TRL or bitsandbytes (per_device_train_batch_size), with the meaning that it has there.

    Raises:
        UnknownName: a name that is none of these.
        PlannerError: a value that a setting does not take.
    """
    own: dict[str, object] = {}
    foreign: dict[str, Any] = {}
    for name, value in said.items():
        if value is None:
            continue
        key = _own_key(name)
        if key is None:
            foreign[name] = value
        else:
            _set(own, key, value_of(key, value), name)
    if not foreign:
        return Settings(own), ()
    from planner.importers.objects import read_words
    from planner.training.versions import parse_versions

    releases = Settings(own).releases
    found = read_words(foreign, parse_versions(releases) if releases else None)
    for key, value in found.options.items():
        _set(own, key, value, ", ".join(foreign))
    return Settings(own), found.remarks


def _own_key(name: str) -> str | None:
    """The setting that a name of ours means; None: it is one of another library's.

    Raises:
        UnknownName: it is neither.
    """
    if name in OPTIONS:
        return name
    from planner.importers.objects import known_words

    others = known_words()
    if name in others:
        return None
    try:
        key = key_of(name)
    except UnknownName:
        key = ""
    if key not in NAMES:
        raise unknown("setting", name, [*OPTIONS, *others])
    return key


def _set(own: dict[str, object], key: str, value: object, name: str) -> None:
    if key in own and own[key] != value:
        raise Contradiction(f"{one_line(name)} says {key} once more, as {one_line(value)!r} beside {own[key]!r}")
    own[key] = value


def job_of_program(
    config: str | PathLike[str] | Sequence[str | PathLike[str]] | None,
    objects: Sequence[object | None],
    settings: Settings,
    *,
    one_gpu: bool = False,
    allow_outside: bool = False,
) -> Job | Files | None:
    """The config files, or the objects of other libraries, that describe a job.

    Raises:
        PlannerError: both at once, or an object that is not known.
    """
    held = [item for item in objects if item is not None]
    if config is not None and held:
        raise Contradiction(
            "config= names files and args=, peft_config= and quantization_config= hold objects: give one"
        )
    if config is not None:
        return Files(paths_of(config), one_gpu, allow_outside)
    if not held:
        return None
    from planner.importers.objects import read_objects
    from planner.training.versions import parse_versions

    releases = settings.releases
    return read_objects(held, parse_versions(releases) if releases else None, one_gpu=one_gpu)


def paths_of(files: str | PathLike[str] | Sequence[str | PathLike[str]]) -> tuple[str, ...]:
    """Names of files or models, one or several.

    Raises:
        InvalidInput: anything else.
    """
    several = (files,) if isinstance(files, (str, PathLike)) else files
    if isinstance(several, Mapping) or not all(isinstance(name, (str, PathLike)) for name in several):
        raise InvalidInput(f"{one_line(repr(files))} is no name or list of names; write ids or paths")
    return tuple(str(fspath(name)) for name in several)


def data_of(
    data: str | PathLike[str] | Sequence[str | PathLike[str]] | None,
    template: str | None,
    tokenizer: str | None,
    padding: str | None,
) -> Data | None:
    """Training data and how it is read.

    Raises:
        Contradiction: how, without what.
    """
    if data is not None:
        return Data(paths_of(data), template, tokenizer, padding)
    for name, value in (("template", template), ("tokenizer", tokenizer), ("padding", padding)):
        if value is not None:
            raise Contradiction(f"{name} says how rows of data are read; give data too, or drop it")
    return None


def lists_of(said: Mapping[str, Any]) -> dict[str, list[object]]:
    """Alternatives of settings, by our names: a list holds alternatives, a text commas and ranges.

    Raises:
        PlannerError: as `settings_of`.
    """
    lists: dict[str, list[object]] = {}
    for name, value in said.items():
        if value is None:
            continue
        values = list(value) if isinstance(value, (list, tuple, set, range)) else [value]
        key = _own_key(name)
        if key is not None:
            lists.setdefault(key, []).extend(values)
            continue
        for one in values:
            found, _ = settings_of({name: one})
            if len(found) != 1:
                raise InvalidInput(f"{one_line(name)} says several settings at once: list them by our own names")
            for key, meant in found.items():
                lists.setdefault(key, []).append(meant)
    return lists


def request_from(
    model: Model | None,
    gpu: str | Gpu | None,
    said: Mapping[str, Any],
    *,
    vram: str | None = None,
    margin: str | float = 0.0,
    calibration: str | None = None,
    config: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    objects: Sequence[object | None] = (),
    one_gpu: bool = False,
    allow_outside: bool = False,
    data: Data | None = None,
    cost: Cost | None = None,
    tracing: Tracing | None = None,
    changes: bool = False,
) -> Request:
    """What a program says of one run as a request; `said` holds its settings, `objects` those of other libraries.

    Raises:
        PlannerError: a name or value that is none, or objects beside config files.
    """
    settings, remarks = settings_of(said)
    job = job_of_program(config, objects, settings, one_gpu=one_gpu, allow_outside=allow_outside)
    return Request(
        model=model_of(model), settings=settings, job=job, gpu=gpu, vram=vram, margin=margin, calibration=calibration,
        data=data, cost=cost or Cost(), tracing=tracing, changes=changes, remarks=remarks,
    )  # fmt: skip
