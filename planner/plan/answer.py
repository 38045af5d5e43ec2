"""The answer: a prediction by its components."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.base.records import NamedTuple
from planner.device.hardware import CPU, Gpu
from planner.facts.sources import LoadedConfig
from planner.plan.predict import Prediction
from planner.training.settings import Resolved

if TYPE_CHECKING:
    from planner.plan.datarun import DataRun
    from planner.plan.search import Change
    from planner.runs.cost import RunPlan


class Answer(NamedTuple):
    """Everything a report about one run may print."""

    prediction: Prediction
    loaded: LoadedConfig
    resolved: Resolved
    changes: tuple[Change, ...] = ()
    margin_bytes: int = 0
    """Memory of the card that the user wants kept free."""
    explain: bool = False
    explain_time: bool = False
    stack_origin: str = "loraplan default"
    run: RunPlan | None = None
    """The whole run, where an amount was given."""
    mean_tokens: float = 0.0
    """Useful tokens per row; 0 where not given."""
    notes: tuple[str, ...] = ()
    """Warnings about the run's price."""
    data: DataRun | None = None
    """The training data, where it was given."""


class Component(NamedTuple):
    """A part of the memory at the peak: which total it first counts in, and how its size is known."""

    name: str
    nbytes: int
    counter: str
    """allocated, reserved or device."""
    origin: str
    """known (read from headers), computed (from shapes) or assumed (a default)."""


def components(answer: Answer) -> tuple[Component, ...]:
    """Return the owners of the memory at the peak; they sum to the expected device total."""
    p = answer.prediction
    whole = p.model.exact_parameters and p.model.exact_parameters == p.model.num_parameters
    weights = "known" if whole and p.training.quantization.kind == "none" else "computed"
    parts = [
        Component(name, nbytes, "allocated", weights if name == "base weights" else "computed")
        for name, nbytes in p.breakdown.ledger
    ]
    cache = p.reserved.expected - p.allocated.expected
    if cache > 0:
        parts.append(Component("allocator cache", cache, "reserved", "computed"))
    beyond = p.device.expected - p.reserved.expected
    origin = "assumed" if p.gpu is None or p.gpu.assumes_context else "fitted"
    return (*parts, Component(context_name(p.gpu), beyond, "device", origin))


def context_name(gpu: Gpu | None) -> str:
    """What a process holds beside its tensors."""
    return "process" if gpu is not None and gpu.vendor == CPU else "CUDA context"
