"""LoRA in fused kernels."""

from __future__ import annotations

from planner.device import cuda_rules
from planner.step.context import Step
from planner.step.engine import FP16, Grads, Node, Tensor
from planner.step.modules.linears import rows_of
from planner.step.modules.weights import LinearWeights
from planner.training.quantizations import QUANTIZATIONS


def fused_lora(step: Step, group: list[LinearWeights], x: Tensor) -> list[Tensor]:
    """Projections that share an input, with their adapters, as one autograd function.

    Saves x and, with dropout, one dropped copy of x per projection; no adapter outputs, no masks. The base weights
    are dequantized one at a time (GPTQ: all of the group before the first product). The 4-bit backward writes the
    input's gradient over x. Source: fms-acceleration plugins/fused-ops-and-kernels fused_ops/unsloth_lora
    {bnb,gptq}/fast_lora.py at 24bdadb2.
    """
    eng, k = step.eng, group[0].spec.in_features
    m = rows_of(group[0], x)
    all_first = QUANTIZATIONS[group[0].kind].grouped
    weights = [_fused_weight(step, held, x.dtype) for held in group] if all_first else []
    outs, kept = [], [x]
    for held in group:
        weight = None if all_first else _fused_weight(step, held, x.dtype)
        n = held.spec.out_features
        out = eng.empty((m, n), x.dtype, "linear_4bit")
        eng.matmul("matmul", x.dtype, m, n, k)
        del weight
        if step.lora_dropout:
            noise = eng.empty(m * k, x.dtype, "lora_dropout")
            kept.append(eng.empty(m * k, x.dtype, "lora_dropout"))
            del noise
        low = eng.empty(m * held.rank, x.dtype, "lora_a")
        product = eng.empty(m * n, x.dtype, "lora_b")
        eng.matmul("lora", x.dtype, m, held.rank, k)
        eng.matmul("lora", x.dtype, m, n, held.rank)
        del low, product
        outs.append(out)
    del weights, out
    adapters = [t for held in group for pair in held.lora for t in pair[:2]]
    in_place = not all_first
    numel, dtype = x.numel, x.dtype
    numels = [t.numel for t in adapters]

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        gradients: list[Tensor | None] = [eng.empty(n, dtype, "weight_grad") for n in numels]
        result = node.saved[0].view() if in_place else eng.empty(numel, dtype, "linear_4bit_grad")
        for held in group:
            weight = _fused_weight(step, held, dtype)
            eng.matmul("matmul", dtype, m, k, held.spec.out_features)
            del weight
            if step.lora_dropout:
                mask = eng.empty(numel, "int8", "lora_dropout_grad")
                product = eng.empty(numel, dtype, "lora_dropout_grad")
                masked = eng.empty(numel, dtype, "lora_dropout_grad")
                del mask, product, masked
            # dB and dA, the gradient through B, the result's share, and x A^T anew (it was not kept)
            n, r = held.spec.out_features, held.rank
            for rows, columns, inner in ((r, n, m), (m, r, n), (k, r, m), (m, k, r), (m, r, k)):
                eng.matmul("lora", dtype, rows, columns, inner)
        return [result, *gradients]

    eng.link(outs, (x, *adapters), backward, tuple(kept))
    return outs


def _fused_weight(step: Step, held: LinearWeights, dtype: str) -> Tensor:
    """The dequantized weight; 4-bit: with its fp32 absmax, freed when the weight exists. GPTQ: always fp16."""
    eng, n = step.eng, held.spec.weight_elements
    gptq = QUANTIZATIONS[held.kind].grouped
    absmax = None if gptq else eng.workspace(4 * cuda_rules.absmax_blocks(n), "dequantize")
    weight = eng.empty(n, FP16 if gptq else dtype, "dequantize")
    eng.kernel("dequantize", dtype, n // 2 + weight.nbytes, count=2)
    del absmax
    return weight
