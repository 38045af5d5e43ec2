"""The defaults in data/frameworks are those of the installed frameworks: they fail here when a release moves one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from planner.facts import catalog

# Keys of a table that its class does not have: inherited from transformers, or keys of another class.
REQUIRED = object()


def dataclass_defaults(cls: type) -> dict[str, Any]:
    """Every field that can be given, with its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.init:
            factory = field.default_factory
            found[field.name] = factory() if factory is not dataclasses.MISSING else field.default
    return {key: REQUIRED if value is dataclasses.MISSING else value for key, value in found.items()}


def signature_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: REQUIRED if p.default is inspect.Parameter.empty else p.default for p in parameters}


def transformers() -> dict[str, Any]:
    return dataclass_defaults(pytest.importorskip("transformers").TrainingArguments)


def bitsandbytes() -> dict[str, Any]:
    return signature_defaults(pytest.importorskip("transformers").BitsAndBytesConfig.__init__)


def peft() -> dict[str, Any]:
    return dataclass_defaults(pytest.importorskip("peft").LoraConfig)


def trl_sft() -> dict[str, Any]:
    return dataclass_defaults(pytest.importorskip("trl").SFTConfig)


def trl() -> dict[str, Any]:
    return dataclass_defaults(pytest.importorskip("trl").ModelConfig)


def accelerate() -> dict[str, Any]:
    module = pytest.importorskip("accelerate.commands.config.config_args")
    return dataclass_defaults(module.ClusterConfig)


CLASSES: dict[str, Callable[[], dict[str, Any]]] = {
    "transformers": transformers, "bitsandbytes": bitsandbytes, "peft": peft, "trl-sft": trl_sft, "trl": trl,
    "accelerate": accelerate,
}  # fmt: skip
"""Table -> the defaults of the class it describes, asked of the installed package."""


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_installed_framework(name: str) -> None:
    real = CLASSES[name]()
    stated = {
        key: value for keys in catalog.framework_tables()[name]["defaults"].values() for key, value in keys.items()
    }
    assert len(stated) >= 6
    missing = sorted(stated.keys() - real.keys())
    assert not missing, f"{name} has no {missing} any more"
    drifted = {key: (value, real[key]) for key, value in stated.items() if _plain(real[key]) != _plain(value)}
    assert not drifted, f"(table, installed): {drifted}"


def _plain(value: Any) -> Any:
    """Compare as files write values: 8.0 and 8 are the same, true and 1 are not."""
    if isinstance(value, bool) or value is None:
        return ("word", value)
    return ("number", float(value)) if isinstance(value, (int, float)) else value


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_of_the_installed_framework_is_known(name: str) -> None:
    """An argument that no table names would be listed as unknown, and nobody would have looked at what it costs."""
    from planner.importers import frameworks

    known = {key.partition(".")[0] for key in frameworks.framework(name).known}
    real = {key for key in CLASSES[name]() if not key.startswith("_") and key not in ("self", "kwargs")}
    assert not sorted(real - known), f"put into data/frameworks/{name}.json, as neutral or missing"


@pytest.mark.oracle
def test_the_installed_trainer_reads_the_defaults_that_stacks_assume() -> None:
    """The table's optimizer default is for torch 2.8 and later, as the installed one is."""
    torch = pytest.importorskip("torch")
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert release >= (2, 8)
    assert transformers()["optim"] == "adamw_torch_fused"
