"""One decoder layer: norms, attention, feed-forward and residuals, in the order of the class.

Local names and their lifetimes follow transformers 5.23 (models/*/modeling_*.py): what a frame still holds when an
allocation happens is part of the peak. `arg` names stand for the arguments that nn.Module.__call__ keeps alive while
a module runs.
"""

from __future__ import annotations

from planner.model import Norm
from planner.step import linears, ops, positions
from planner.step.attention import attention
from planner.step.context import Step
from planner.step.eager import DROPOUT
from planner.step.engine import Tensor
from planner.step.feed_forward import Finish, activate, experts, mlp
from planner.step.linears import LayerWeights
from planner.step.norms import norm


def decoder_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """One decoder layer: norms, attention, feed-forward, residuals in the class's order."""
    spec = held.spec
    arg = x
    try:
        if step.train.uses_own_modules and spec.attention.kind == "standard":
            from planner.step import litgpt

            out = litgpt.layer(step, held, x)
        elif step.model.model_type == positions.OWN_CODE:
            out = _qwen_layer(step, held, x)
        elif spec.parallel:
            out = _parallel_layer(step, held, x)
        else:
            own = step.model.model_type in NAMES_ATTENDED and not step.train.uses_own_modules
            out = _named_layer(step, held, x) if own else _sequential_layer(step, held, x)
    finally:  # a recomputation may stop early
        step.unused_probabilities = None
    del arg
    return out


def _layer_norm(step: Step, held: LayerWeights, spec: Norm | None, x: Tensor) -> Tensor:
    return x if spec is None else norm(step, spec, held.norms[spec.name], x, step.tokens)


def _feed_forward(step: Step, held: LayerWeights, x: Tensor, finish: Finish | None = None) -> Tensor:
    if held.spec.experts is not None:
        return experts(step, held, held.spec.experts, x)
    assert held.spec.mlp is not None
    return mlp(step, held, held.spec.mlp, x, finish)


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
    if step.model.model_type in INLINES_MLP and not step.train.uses_own_modules:
        given = [x]
        x = residual
        x = _inlined_mlp(step, held, given)
    else:
        x = _feed_forward(step, held, x)
    x = _layer_norm(step, held, spec.post_mlp_norm, x)
    x = ops.add(eng, residual, _branch(step, held, x), "residual")
    return _layer_norm(step, held, spec.pre_mlp_norm, x) if late else x


INLINES_MLP = ("opt",)
"""Model types whose layer calls fc1 and fc2 itself: fc1's input loses its name when fc1 is done (modeling_opt.py)."""


def _inlined_mlp(step: Step, held: LayerWeights, given: list[Tensor]) -> Tensor:
    spec = held.spec.mlp
    assert spec is not None
    hidden = linears.forward(step, held.linears[spec.up.name], given[0])
    given.clear()
    hidden = activate(step, spec, hidden)
    return linears.forward(step, held.linears[spec.down.name], hidden)


NAMES_ATTENDED = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "llama4_text", "mpt", "stablelm")
"""Model types whose layer gives the attention's output a name of its own, which lives until the layer ends."""

NAMES_NORMED = ("bloom", "falcon", "mpt", "stablelm")
"""Model types whose layer also names the first norm's output apart; bloom and mpt give the second's the same name."""

ADDS_IN_ATTENTION, ADDS_IN_MLP = ("bloom",), ("bloom", "mpt")
"""Model types whose modules take the residual and add it before they return (models/bloom/modeling_bloom.py)."""


def _named_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """A sequential layer whose frame keeps what the others overwrite."""
    eng, spec, kind = step.eng, held.spec, step.model.model_type

    def added(y: Tensor) -> Tensor:
        return ops.add(eng, residual, _branch(step, held, y), "residual")

    residual = x
    normed: Tensor | None = _layer_norm(step, held, spec.input_norm, x)
    assert normed is not None
    if kind in ADDS_IN_ATTENTION:
        attended = x = attention(step, held, normed, added)
    else:
        attended = _branch(step, held, attention(step, held, normed))
        x = ops.add(eng, residual, attended, "residual")
    if kind not in NAMES_NORMED:
        normed = None
    residual = x
    second: Tensor | None = _layer_norm(step, held, spec.pre_mlp_norm, x)
    if kind in ADDS_IN_MLP:
        normed = None
    assert second is not None
    if kind in ADDS_IN_MLP:
        return _feed_forward(step, held, second, added)
    fed = _feed_forward(step, held, second)
    if kind == "stablelm":
        second = None
    out = added(fed)
    del attended, normed, second
    return out


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
    if step.model.model_type == "gpt_neox":  # norms without names: each output dies with its branch
        attended = _branch(step, held, attention(step, held, _layer_norm(step, held, spec.input_norm, x)))
        fed = _branch(step, held, _feed_forward(step, held, _layer_norm(step, held, spec.pre_mlp_norm, x)))
        return ops.add(eng, ops.add(eng, fed, attended, "residual"), residual, "residual")
    normed = _layer_norm(step, held, spec.input_norm, x)
    falcon = step.model.model_type == "falcon" and not step.train.uses_own_modules
    second = _layer_norm(step, held, spec.pre_mlp_norm, x) if falcon and spec.pre_mlp_norm else normed
    attended = attention(step, held, normed)
    attended = attended if falcon else _branch(step, held, attended)
    if spec.pre_mlp_norm is not None and not falcon:
        second = _layer_norm(step, held, spec.pre_mlp_norm, x)
    fed = _feed_forward(step, held, second)
    if falcon:  # FalconDecoderLayer: mlp_output += attention_output, then one dropout
        out = ops.add(eng, residual, _branch(step, held, ops.add_in_place(eng, fed, attended)), "residual")
    else:
        out = ops.add(eng, ops.add(eng, _branch(step, held, fed), attended, "residual"), residual, "residual")
    del normed, second
    return out
