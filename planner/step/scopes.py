"""Units: whose a parameter is, and the scopes where strategies hook into the step, so that no module asks for them.

A strategy is a `Handler` in `step.handlers`. In a step with handlers a, b the order for every unit is: a and b before
the forward, the forward, b and a after it; in the backward a and b before the unit's first node (and before anything
is recomputed for it), b and a after its last one, when its gradients have been accumulated. Recomputing runs the
forward again, and with it what is before it, inside the backward; `step.eng.recomputing` tells. Embeddings, head and
loss have no scope in the forward; in the backward they are the unit OUTSIDE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.base.records import NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

    from planner.step.context import Step
    from planner.step.engine import LayerForward, Tensor


class Unit(NamedTuple):
    """What a strategy gathers, frees, recomputes and steps as one: a decoder layer, or all that is outside them."""

    layer: int
    """Of the record: an emulated layer or pattern of layers; -1: outside."""
    sublayer: int = 0
    """Which layer of a pattern."""


OUTSIDE = Unit(-1)
"""Embeddings, final norm and head."""


class Owner(NamedTuple):
    """Whose a parameter is."""

    unit: Unit
    module: str
    """Path of the module inside its decoder layer, or in the model for what is outside ("self_attn.q_proj")."""
    role: str
    """Its name in the module: weight (and all that is kept of a quantized one), bias, lora_A, lora_B, ..."""
    trainable: bool


class Handler:
    """A strategy. What it does not override does nothing."""

    @property
    def watches_backward(self) -> bool:
        """Whether it has something to do there."""
        own = type(self)
        return (own.before_backward, own.after_backward) != (Handler.before_backward, Handler.after_backward)

    def wrap(self, step: Step, forward: LayerForward) -> LayerForward:
        """What runs in the place of a unit's whole forward, once a step: the forward, or it inside a checkpoint."""
        return forward

    def before_forward(self, step: Step, unit: Unit, x: Tensor) -> None:
        """The unit is going to run on x, for the first time or again."""

    def after_forward(self, step: Step, unit: Unit) -> None:
        """It has run to its end; a recomputation that has all it needs stops before."""

    def before_backward(self, step: Step, unit: Unit) -> None:
        """The backward comes to the unit; nothing of it is recomputed yet."""

    def after_backward(self, step: Step, unit: Unit) -> None:
        """The backward leaves the unit: its gradients are whole."""


class Scope:
    """`with step.unit(unit, x):` around a unit's forward.

    A class and no generator: what contextlib keeps of an exception would hold the tensors of its frames.
    """

    __slots__ = ("step", "unit", "x")

    def __init__(self, step: Step, unit: Unit, x: Tensor) -> None:
        self.step = step
        self.unit = unit
        self.x: Tensor | None = x

    def __enter__(self) -> None:
        x, self.x = self.x, None
        assert x is not None, "a scope is entered once"
        for handler in self.step.handlers:
            handler.before_forward(self.step, self.unit, x)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for handler in reversed(self.step.handlers):
                handler.after_forward(self.step, self.unit)


class Backwards:
    """Passes what the engine tells about the backward on to the handlers (planner.step.engine.Watcher)."""

    __slots__ = ("step",)

    def __init__(self, step: Step) -> None:
        self.step = step

    def before_backward(self, unit: Unit) -> None:
        """To every handler, in order."""
        for handler in self.step.handlers:
            handler.before_backward(self.step, unit)

    def after_backward(self, unit: Unit) -> None:
        """To every handler, in reverse order."""
        for handler in reversed(self.step.handlers):
            handler.after_backward(self.step, unit)
