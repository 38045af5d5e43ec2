"""One decoder layer: norms, attention, feed-forward and residuals, in the order of the class.

Local names and their lifetimes follow transformers 5.23 (models/*/modeling_*.py): what a frame still holds when an
allocation happens is part of the peak. `arg` names stand for the arguments that nn.Module.__call__ keeps alive while
a module runs.
"""

from __future__ import annotations

from planner.model.spec import Norm
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.modules.eager import DROPOUT
from planner.step.modules.experts import experts
from planner.step.modules.feed_forward import Finish, mlp
from planner.step.modules.mixers import MIXERS
from planner.step.modules.norms import norm
from planner.step.modules.weights import LayerWeights


def decoder_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """One decoder layer: norms, attention, feed-forward, residuals in the class's order."""
    spec, habits = held.spec, step.habits
    arg = x
    try:
        knows = not habits.own_mixers_only or MIXERS[spec.mixer.kind].in_own_modules
        if habits.layer is not None and knows:
            out = habits.layer(step, held, x)
        else:
            out = parallel_layer(step, held, x) if spec.parallel else sequential_layer(step, held, x)
    finally:  # a recomputation may stop early
        step.unused_probabilities = None
    del arg
    return out


def mix(step: Step, held: LayerWeights, x: Tensor, finish: Finish | None = None) -> Tensor:
    """The layer's mixer; `finish` is what follows inside its module."""
    return MIXERS[held.spec.mixer.kind].forward(step, held, x, finish)


def layer_norm(step: Step, held: LayerWeights, spec: Norm | None, x: Tensor) -> Tensor:
    """A norm of the layer over every token, if it has that norm."""
    return x if spec is None else norm(step, spec, held.norms[spec.name], x)


def feed_forward(step: Step, held: LayerWeights, x: Tensor, finish: Finish | None = None) -> Tensor:
    """The layer's experts or MLP; `finish` is what follows inside the MLP."""
    if held.spec.experts is not None:
        return experts(step, held, held.spec.experts, x)
    assert held.spec.mlp is not None
    return mlp(step, held, held.spec.mlp, x, finish)


def branch(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """What happens to a branch's output before the addition."""
    if held.spec.hidden_dropout:
        x = ops.dropout(step.eng, x, DROPOUT, "hidden_dropout")
    return ops.scale(step.eng, x, "residual") if held.spec.residual_multiplier else x


def sequential_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """Attention and its residual, then the feed-forward and its own; norms where the layer has them."""
    eng, spec = step.eng, held.spec
    late = spec.norm_after_residual
    residual = x
    x = x if late else layer_norm(step, held, spec.input_norm, x)
    x = mix(step, held, x)
    x = layer_norm(step, held, spec.post_attention_norm, x)
    x = ops.add(eng, residual, branch(step, held, x), "residual")
    if late:
        x = layer_norm(step, held, spec.input_norm, x)
    residual = x
    x = x if late else layer_norm(step, held, spec.pre_mlp_norm, x)
    if step.habits.inlined_mlp is not None:
        given = [x]
        x = residual
        x = step.habits.inlined_mlp(step, held, given)
    else:
        x = feed_forward(step, held, x)
    x = layer_norm(step, held, spec.post_mlp_norm, x)
    x = ops.add(eng, residual, branch(step, held, x), "residual")
    return layer_norm(step, held, spec.pre_mlp_norm, x) if late else x


def named_layer(
    step: Step,
    held: LayerWeights,
    x: Tensor,
    *,
    names_normed: bool = False,
    forgets_second: bool = False,
    adds_in_attention: bool = False,
    adds_in_mlp: bool = False,
) -> Tensor:
    """A sequential layer whose frame names the attention's output apart: it lives until the layer ends.

    names_normed: the first norm's output has such a name too; forgets_second: the second's has none.
    adds_in_attention, adds_in_mlp: the module takes the residual and adds it before it returns; with adds_in_mlp the
    second norm's output takes the first one's name.
    """
    eng, spec = step.eng, held.spec

    def added(y: Tensor) -> Tensor:
        return ops.add(eng, residual, branch(step, held, y), "residual")

    residual = x
    normed: Tensor | None = layer_norm(step, held, spec.input_norm, x)
    assert normed is not None
    if adds_in_attention:
        attended = x = mix(step, held, normed, added)
    else:
        attended = branch(step, held, mix(step, held, normed))
        x = ops.add(eng, residual, attended, "residual")
    if not names_normed:
        normed = None
    residual = x
    second: Tensor | None = layer_norm(step, held, spec.pre_mlp_norm, x)
    assert second is not None
    if adds_in_mlp:
        normed = None
        return feed_forward(step, held, second, added)
    fed = feed_forward(step, held, second)
    if forgets_second:
        second = None
    out = added(fed)
    del attended, normed, second
    return out


def parallel_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """Attention and feed-forward of the same input, added together."""
    eng, spec = step.eng, held.spec
    residual = x
    second = normed = layer_norm(step, held, spec.input_norm, x)
    attended = mix(step, held, normed)
    attended = branch(step, held, attended)  # a name while the branch's dropout runs
    if spec.pre_mlp_norm is not None:
        second = layer_norm(step, held, spec.pre_mlp_norm, x)
    fed = feed_forward(step, held, second)
    out = ops.add(eng, ops.add(eng, branch(step, held, fed), attended, "residual"), residual, "residual")
    del normed, second
    return out
