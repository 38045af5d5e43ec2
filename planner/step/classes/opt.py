"""OPT (models/opt/modeling_opt.py): the layer calls fc1 and fc2 itself, the query is scaled before attention."""

from __future__ import annotations

from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.habits import NEVER, Habits
from planner.step.modules import feed_forward, linears
from planner.step.modules.weights import LayerWeights


def _inlined_mlp(step: Step, held: LayerWeights, given: list[Tensor]) -> Tensor:
    """fc1 and fc2: the first one's input loses its name when it is done."""
    spec = held.spec.mlp
    assert spec is not None
    hidden = linears.forward(step, held.linears[spec.up.name], given[0])
    given.clear()
    hidden = feed_forward.activate(step, spec, hidden)
    return linears.forward(step, held.linears[spec.down.name], hidden)


HABITS = {
    "opt": Habits(
        inlined_mlp=_inlined_mlp,
        scales_query=True,
        positions_of_rows_before=NEVER,  # OPTLearnedPositionalEmbedding, to this day
        upcasts_since=(4, 48),
        slices_hidden_since=(5, 0),  # not in 4.57
    )
}
