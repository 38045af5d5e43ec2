"""Experts: routing, grouped products, the sum over the experts of a token."""

from __future__ import annotations

from planner.model.spec import Experts
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, INT64, Grads, Node, Size, Tensor
from planner.step.modules import linears, picking
from planner.step.modules.feed_forward import mlp
from planner.step.modules.weights import LayerWeights


def experts(step: Step, held: LayerWeights, spec: Experts, x: Tensor) -> Tensor:
    """A mixture of experts: router, sorted tokens, grouped products, weighted sum (integrations/moe.py)."""
    eng, t = step.eng, x.rows(spec.hidden_size)
    arg = x
    pairs = t * (spec.num_experts if spec.every_token else spec.top_k)
    shared = mlp(step, held, spec.shared, x) if spec.shared is not None and step.habits.shared_first else None
    weights = _route(step, held, spec, x)
    sorted_ids, order = eng.empty(pairs, INT64, "router"), eng.empty(pairs, INT64, "router")
    chosen = picking.gather(eng, x, eng.empty(pairs, INT64, "router"), pairs * spec.hidden_size, "experts")
    width = spec.intermediate_size
    bias = _gathered_bias(step, spec, sorted_ids, 2 * width)
    gate_up = _adapted_parameter(step, held, spec.gate_up_name, held.experts[0])
    projected = _grouped(step, chosen, gate_up, pairs, 2 * width, spec.hidden_size)
    projected = _gate_experts(step, spec, projected, pairs * width)
    down = _adapted_parameter(step, held, spec.down_name, held.experts[1])
    bias = _gathered_bias(step, spec, sorted_ids, spec.hidden_size)
    projected = _grouped(step, projected, down, pairs, spec.hidden_size, width)
    weighted = ops.mul(eng, projected, weights, "experts")
    weighted = picking.gather(eng, weighted, eng.empty(pairs, INT64, "router"), weighted.numel, "experts")
    result = _sum_pairs(step, weighted, t * spec.hidden_size, x.dtype)
    del weighted, projected, bias, sorted_ids, order, chosen
    if spec.shared is not None:
        shared = mlp(step, held, spec.shared, x) if shared is None else shared
        if spec.shared_gate is not None:
            logits = linears.forward(step, held.linears[spec.shared_gate.name], x)
            shared = ops.mul(eng, ops.pointwise(eng, logits, "sigmoid", False), shared, "experts")
        result = ops.add(eng, result, shared, "experts")
    del arg
    return result


def _gathered_bias(step: Step, spec: Experts, experts: Tensor, width: int) -> Tensor | None:
    """The bias of every chosen expert, a row a pair; it is added in place."""
    if not spec.bias:
        return None
    return step.eng.empty(experts.numel * width, step.unquantized_dtype, "experts")


def _gate_experts(step: Step, spec: Experts, fused: Tensor, half: Size) -> Tensor:
    """act(gate) * up; gpt_oss takes every other column, clamps both and writes its swish out."""
    eng = step.eng
    if spec.activation != "clamped_swiglu":
        gate, up = ops.split(eng, fused, (half, half))
        return ops.mul(eng, ops.pointwise(eng, gate, spec.activation), up, "experts")
    gate, up = ops.narrow(eng, fused, half), ops.narrow(eng, fused, half)
    gate = picking.clamp(eng, gate, 1)
    up = picking.clamp(eng, up, 2)
    glu = ops.mul(eng, gate, ops.pointwise(eng, ops.scale(eng, gate, "experts"), "sigmoid", False), "experts")
    return ops.mul(eng, ops.shift(eng, up, "experts"), glu, "experts")


def _adapted_parameter(step: Step, held: LayerWeights, name: str, weight: Tensor) -> Tensor:
    """baddbmm(weight, B, A) over all experts, made whole in every forward (peft lora.ParamWrapper, factors proxy)."""
    pair = next((p for key, p in held.expert_adapters.items() if key.endswith(name)), None)
    if pair is None:
        return weight
    eng = step.eng
    a, b = (ops.cast(eng, t, weight.dtype, "lora_factor") for t in pair)
    number = held.spec.experts.num_experts if held.spec.experts else 1
    rank = step.train.lora.r if step.train.lora else 1
    numels, dtype = (b.numel, a.numel), weight.dtype
    rows, columns = b.numel // (number * rank), a.numel // (number * rank)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        eng.matmul("lora", dtype, rows, rank, columns, number)
        eng.matmul("lora", dtype, rank, columns, rows, number)
        return [eng.empty(numels[0], dtype, "lora_b_grad"), eng.empty(numels[1], dtype, "lora_a_grad")]

    made = eng.begin((b, a), backward, (a, b))
    out = eng.empty(weight.numel, weight.dtype, "lora_weight")
    eng.matmul("lora", dtype, rows, columns, rank, number)
    eng.kernel("elementwise", dtype, 2 * out.nbytes)
    eng.finish(made, out)
    return out


def _route(step: Step, held: LayerWeights, spec: Experts, x: Tensor) -> Tensor:
    """Router logits, softmax in fp32, the top-k weights."""
    eng, t = step.eng, x.rows(spec.hidden_size)
    if spec.router_is_linear:
        logits = linears.forward(step, held.linears[spec.router.name], x)
    else:
        assert held.router is not None
        source = ops.cast(eng, x, FP32, "router") if spec.router_fp32 else x
        weight = _adapted_parameter(step, held, f"{spec.router.name}.weight", held.router)
        weight = ops.cast(eng, weight, FP32, "router") if spec.router_fp32 else weight
        logits = ops.linear(eng, source, weight, t, spec.num_experts, spec.hidden_size, op="router")
    probs = ops.softmax_fp32(eng, logits, casts_inside=False, writes_product=True)
    top = eng.empty(t * spec.top_k, FP32, "router")
    index = eng.empty(t * spec.top_k, INT64, "router")
    full = probs.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [eng.empty(full, FP32, "router_grad")]

    eng.link(top, (probs,), backward, (index,))
    dtypes = {"fp32": FP32, "hidden": x.dtype, "logits": logits.dtype}
    return ops.cast(eng, top, dtypes[step.habits.router_dtype], "router")


def _grouped(step: Step, x: Tensor, weight: Tensor, rows: Size, n: int, k: int) -> Tensor:
    """torch grouped_mm over experts: one product per expert, in the weight's dtype.

    It is not on autocast's lists; transformers casts the input (integrations/moe.py _grouped_mm). The backward makes
    the weight's gradient first.
    """
    eng = step.eng
    x, w = ops.cast(eng, x, weight.dtype, "experts"), weight
    out = eng.empty(rows * n, x.dtype, "experts")
    number = w.numel // (n * k)
    each = rows / number  # tokens of one expert, were all chosen equally often
    eng.matmul("matmul", x.dtype, each, n, k, number)
    need_x, need_w = x.requires_grad, w.requires_grad
    x_numel, w_numel, dtype = x.numel, w.numel, x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        of_weight = eng.empty(w_numel, dtype, "weight_grad") if need_w else None
        if need_w:
            eng.matmul("matmul", dtype, n, k, each, number)
        if need_x:
            eng.matmul("matmul", dtype, each, k, n, number)
        return [eng.empty(x_numel, dtype, "experts_grad") if need_x else None, of_weight]

    saved = ((x,) if need_w else ()) + ((w,) if need_x else ())
    eng.link(out, (x, w), backward, saved)
    return out


def _sum_pairs(step: Step, x: Tensor, numel: Size, dtype: str) -> Tensor:
    """Sum each token's experts; the expanded gradient is written out to be reshaped."""
    eng, pairs, source = step.eng, x.numel, x.dtype
    out = eng.empty(numel, FP32 if eng.autocast else source, "experts")  # sum is on autocast's fp32 list
    eng.kernel("reduce", x.dtype, x.nbytes + out.nbytes)
    eng.link(out, (x,), lambda node, grads: [eng.empty(pairs, source, "experts_grad")])
    return ops.cast(eng, out, dtype, "experts")
