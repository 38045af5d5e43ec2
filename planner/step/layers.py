"""One decoder layer: norms, attention, feed-forward and residuals, in the order of the class.

Local names and their lifetimes follow transformers 5.23 (models/*/modeling_*.py): what a frame still holds when an
allocation happens is part of the peak. `arg` names stand for the arguments that nn.Module.__call__ keeps alive while
a module runs.
"""

from __future__ import annotations

from planner.model import Norm
from planner.step import ops
from planner.step.attention import DROPOUT, OWN_CODE, attention
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.feed_forward import experts, mlp
from planner.step.linears import LayerWeights
from planner.step.norms import norm


def decoder_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """One decoder layer: norms, attention, feed-forward, residuals in the class's order."""
    spec = held.spec
    arg = x
    try:
        if step.model.model_type == OWN_CODE:
            out = _qwen_layer(step, held, x)
        else:
            out = _parallel_layer(step, held, x) if spec.parallel else _sequential_layer(step, held, x)
    finally:  # a recomputation may stop early
        step.unused_probabilities = None
    del arg
    return out


def _layer_norm(step: Step, held: LayerWeights, spec: Norm | None, x: Tensor) -> Tensor:
    return x if spec is None else norm(step, spec, held.norms[spec.name], x, step.tokens)


def _feed_forward(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    if held.spec.experts is not None:
        return experts(step, held, held.spec.experts, x)
    assert held.spec.mlp is not None
    return mlp(step, held, held.spec.mlp, x)


def _branch(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """What happens to a branch's output before the addition."""
    if held.spec.hidden_dropout:
        x = ops.dropout(step.eng, x, DROPOUT, "hidden_dropout")
    return ops.scale(step.eng, x, "residual") if held.spec.residual_multiplier else x


def _sequential_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    eng, spec = step.eng, held.spec
    late = spec.norm_after_residual
    residual = x
    x = x if late else _layer_norm(step, held, spec.input_norm, x)
    x = attention(step, held, x)
    x = _layer_norm(step, held, spec.post_attention_norm, x)
    x = ops.add(eng, residual, _branch(step, held, x), "residual")
    if late:
        x = _layer_norm(step, held, spec.input_norm, x)
    residual = x
    x = x if late else _layer_norm(step, held, spec.pre_mlp_norm, x)
    x = _feed_forward(step, held, x)
    x = _layer_norm(step, held, spec.post_mlp_norm, x)
    x = ops.add(eng, residual, _branch(step, held, x), "residual")
    return _layer_norm(step, held, spec.pre_mlp_norm, x) if late else x


def _qwen_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """QWenBlock.forward: the usual order, but every result keeps a name until the layer returns."""
    eng, spec = step.eng, held.spec
    normed = _layer_norm(step, held, spec.input_norm, x)
    attended = attention(step, held, normed)
    summed = ops.add(eng, attended, x, "residual")
    normed = _layer_norm(step, held, spec.pre_mlp_norm, summed)
    fed = _feed_forward(step, held, normed)
    out = ops.add(eng, summed, fed, "residual")
    del normed, attended, fed
    return out


def _parallel_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    eng, spec = step.eng, held.spec
    residual = x
    normed = _layer_norm(step, held, spec.input_norm, x)
    attended = _branch(step, held, attention(step, held, normed))
    second = normed if spec.pre_mlp_norm is None else _layer_norm(step, held, spec.pre_mlp_norm, x)
    fed = _branch(step, held, _feed_forward(step, held, second))
    out = ops.add(eng, ops.add(eng, fed, attended, "residual"), residual, "residual")
    del normed, second
    return out
