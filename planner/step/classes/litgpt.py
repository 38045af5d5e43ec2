"""litgpt's own modules: one projection for q, k and v, LoRA beside it, norms in fp32, head and loss in chunks.

Follows litgpt 0.5.13 (model.py, lora.py, finetune/lora.py, finetune/full.py) and lightning 2.6 (fabric/plugins/
precision) in what they allocate, keep and name; `benchmarks/litgpt_agreement.py` compares it with a trace of them.
Local names stand for those of the frames there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from planner.base.errors import Contradiction
from planner.base.records import replace
from planner.device import cuda_rules
from planner.model.lora import resolve_targets
from planner.model.spec import Attention, Layer, Linear, Mlp, ModelSpec, Norm
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, ITEMSIZE, Engine, Grads, Node, Size, Tensor
from planner.step.habits import ALWAYS, NEVER, Habits, Release
from planner.step.modules import attention, experts, linears, losses, quantized
from planner.step.modules.mixers import MIXERS
from planner.step.modules.weights import LayerWeights, LinearWeights
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import LoraSpec, TrainingSpec

if TYPE_CHECKING:
    from planner.model.spec import Mixer

HEAD_CHUNK = 128
"""Positions of a chunk of the head and of the loss (finetune/lora.py lm_head_chunk_size, utils.py chunk_size)."""
STABLE_EMBEDDING = (0, 44)
"""bitsandbytes release that litgpt takes since its quantized runs put a StableEmbedding in the embedding's place
(October 2024; until the end of that year litgpt asked for 0.42)."""


# --- the model ------------------------------------------------------------------------------------------------------


def own_modules(model: ModelSpec, train: TrainingSpec) -> tuple[ModelSpec, TrainingSpec]:
    """The model as litgpt has it, and the settings with the names of its modules.

    Raises:
        Contradiction: for DoRA, which litgpt does not have.
    """
    made = {id(layer): _own_layer(layer) for layer, _ in model.distinct_layers()}
    own = replace(model, layers=tuple(made[id(layer)] for layer in model.layers))
    if train.lora is None:
        return own, train
    if train.lora.use_dora:
        raise Contradiction("litgpt has no DoRA; use method lora or qlora, or another --stack")
    adapted = {(id(one.layer), one.name) for one in resolve_targets(model, train.lora)}
    names: dict[str, None] = {}
    slices = train.lora.target_slices
    for layer, _ in model.distinct_layers():
        joined = _joined(layer)
        if joined:
            chosen = tuple(i for i, one in enumerate(joined) if (id(layer), one.name) in adapted)
            slices = chosen if 0 < len(chosen) < len(_QKV) else ()
            names |= dict.fromkeys(_own_name(layer, joined[i]) for i in chosen)
        for linear in layer.linears:
            if (id(layer), linear.name) in adapted and linear not in joined:
                names |= dict.fromkeys(_own_names(layer, linear))
    names |= dict.fromkeys(name for where, name in adapted if where == id(None))
    return own, replace(train, lora=replace(train.lora, target_modules=tuple(names), target_slices=slices))


_QKV = ("q", "k", "v")


def _joined(layer: Layer) -> tuple[Linear, ...]:
    """The projections in whose place litgpt has one; none where they are one already, or of latent attention."""
    spec = layer.attention
    return (
        spec.projections if spec is not None and spec.kind == "standard" and len(spec.projections) == len(_QKV) else ()
    )


def _own_name(layer: Layer, projection: Linear) -> str:
    """Name of the projection that takes the place of q, k and v."""
    return projection.name.rpartition(".")[0] + ".qkv"


def _own_names(layer: Layer, linear: Linear) -> tuple[str, ...]:
    """Names of the modules that take a module's place: litgpt has gate and up apart."""
    if layer.mlp is not None and linear is layer.mlp.up and layer.mlp.gated and layer.mlp.gate is None:
        return linear.name + ".gate", linear.name + ".up"
    return (linear.name,)


def _own_layer(layer: Layer) -> Layer:
    return replace(layer, mixer=_own_mixer(layer), mlp=_own_mlp(layer, layer.mlp))


def _own_mixer(layer: Layer) -> Mixer:
    joined = _joined(layer)
    if layer.attention is None or not joined:
        return layer.mixer
    parts = tuple(one.out_features for one in joined)
    fused = replace(joined[0], name=_own_name(layer, joined[0]), out_features=sum(parts), parts=parts)
    return replace(layer.attention, projections=(fused,))


def _own_mlp(layer: Layer, spec: Mlp | None) -> Mlp | None:
    if spec is None or not spec.gated or spec.gate is not None:
        return spec
    gate, up = (
        replace(spec.up, name=name, out_features=spec.up.out_features // 2, parts=())
        for name in _own_names(layer, spec.up)
    )
    return replace(spec, gate=gate, up=up)


def own_state(step: Step, embedding: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Rotary tables, as buffers; in a quantized run a second embedding, and the one in use with its norm.

    That is a StableEmbedding, which no optimizer knows: its gradient is never set to zero, and `main` still names
    the embedding whose place it took (finetune/lora.py).
    """
    eng = step.eng
    buffers: list[Tensor] = []
    spec = step.model.positions("rope")
    if spec is not None:
        width = spec.rotary_dim or spec.head_dim
        buffers += [eng.empty(step.seq * width, FP32, "rotary_tables") for _ in range(2)]
    bnb = QUANTIZATIONS[step.train.quantization.kind].by_bitsandbytes
    if not bnb or step.train.versions.bitsandbytes < STABLE_EMBEDDING:
        return buffers, []
    buffers.append(eng.empty(embedding.numel, embedding.dtype, "weight"))
    norm = [eng.empty(step.model.hidden_size, step.embedding_dtype, "weight") for _ in range(2)]
    stable = [embedding, *norm]
    for held in stable:
        eng.leaf(held).grad = eng.empty(held.numel, held.dtype, "gradient")
    return buffers, stable


def tables(step: Step, buffers: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """cos and sin for the longest row are made once, with the model."""
    if step.model.positions("rope") is None:
        return None
    return buffers[0].view(), buffers[1].view()


# --- linear modules -------------------------------------------------------------------------------------------------


def load_adapter(step: Step, held: LinearWeights, lora: LoraSpec) -> None:
    """LoRALinear's A and B; LoRAQKVLinear stacks those of the parts that it adapts."""
    spec, slices, rank, dtype = held.spec, lora.target_slices, lora.r, lora.dtype
    widths = spec.parts if len(spec.parts) == len(_QKV) else (spec.out_features,)
    widths = tuple(widths[i] for i in slices) if slices and len(widths) > 1 else widths
    stacked, width = rank * len(widths), sum(widths)
    a = step.trainable(f"{spec.name}.lora_A", (stacked, spec.in_features), dtype, "adapter")
    b = step.trainable(f"{spec.name}.lora_B", (width, rank), dtype, "adapter")
    held.lora.append((a, b, stacked, width))
    held.rank = rank


def forward(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """LoRALinear.forward: the base, and (dropout(x) @ A.T @ B.T) * scaling."""
    eng, spec = step.eng, held.spec
    m = linears.rows_of(held, x)
    if not held.lora:
        return linears.base_forward(step, held, x, m)
    if len(spec.parts) == len(_QKV):
        return _forward_qkv(step, held, x)
    arg = x
    pretrained = linears.base_forward(step, held, x, m)
    _, b, rank, width = held.lora[0]
    product = ops.linear(eng, _low(step, held, x), b, m, width, rank, op="lora_b")
    lora = ops.scale(eng, product, "lora_scale")
    del product
    out = ops.add(eng, pretrained, lora, "lora_add")
    del arg, pretrained, lora
    return out


def _low(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """dropout(x) @ A.T"""
    a, _, rank, _ = held.lora[0]
    dropped = ops.dropout(step.eng, x, step.lora_dropout, "lora_dropout")
    return ops.linear(step.eng, dropped, a, linears.rows_of(held, x), rank, held.spec.in_features, op="lora_a")


def _forward_qkv(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """LoRAQKVLinear.forward: B as a grouped convolution, copied into zeros where a part is not adapted."""
    eng, spec = step.eng, held.spec
    m = linears.rows_of(held, x)
    arg = x
    pretrained = linears.base_forward(step, held, x, m)
    b, width = held.lora[0][1], held.lora[0][3]
    after_a = _low(step, held, x)
    after_b = _convolutions(step, held, after_a, b)
    padded = after_b if width == spec.out_features else _index_copy(eng, after_b, m * spec.out_features)
    lora = ops.scale(eng, padded, "lora_scale")
    del padded
    out = ops.add(eng, pretrained, lora, "lora_add")
    del arg, pretrained, after_a, after_b, lora
    return out


def _convolutions(step: Step, held: LinearWeights, after_a: Tensor, b: Tensor) -> Tensor:
    """One convolution in groups where all parts are equally wide, else one for each and their concatenation."""
    eng, m = step.eng, after_a.shape[0]
    q, k, _ = held.spec.parts
    stacked, width = held.lora[0][2:]
    if q == k:
        return _convolution(eng, after_a, b, m, width, held.rank)
    number = stacked // held.rank
    widths = held.spec.parts if number == len(_QKV) else _adapted_parts(held, number, width)
    lows = ops.split(eng, after_a, [m * held.rank] * number, "lora_a_grad")
    weights = ops.split(eng, b, [part * held.rank for part in widths], "weight_grad")
    pieces = [
        _convolution(eng, low, weight, m, part, held.rank)
        for low, weight, part in zip(lows, weights, widths, strict=True)
    ]
    return _cat(eng, pieces, "lora_slices")


def _adapted_parts(held: LinearWeights, number: int, width: Size) -> tuple[int, ...]:
    """Widths of the adapted parts; k and v are equally wide, so their sum tells them."""
    q, k, _ = held.spec.parts
    if number == 1:
        return (q,) if width == q else (k,)
    return (q, k) if width == q + k else (k, k)


def _convolution(eng: Engine, x: Tensor, weight: Tensor, m: Size, width: Size, rank: Size) -> Tensor:
    """F.conv1d with a kernel of one: keeps its input and weight; one function makes both gradients."""
    numels, dtype = (x.numel, weight.numel), x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        made = [eng.empty(numels[0], dtype, "lora_b_grad"), eng.empty(numels[1], dtype, "weight_grad")]
        eng.matmul("lora", dtype, m, rank, width, layout="nn")
        eng.matmul("lora", dtype, width, rank, m, layout="tn")
        return list(made)

    made = eng.begin((x, weight), backward, (x, weight))
    out = eng.empty(m * width, dtype, "lora_b")
    eng.matmul("lora", dtype, m, width, rank)
    eng.finish(made, out)
    return out


def _index_copy(eng: Engine, source: Tensor, numel: Size) -> Tensor:
    """zeros.index_copy_(-1, index, source): the source is kept for its shape; its gradient is selected anew."""
    small = source.numel
    zeros = eng.empty(numel, source.dtype, "lora_slices")
    eng.kernel("elementwise", source.dtype, zeros.nbytes)
    eng.indexed(source.dtype, 2 * source.nbytes, small)
    out = zeros.view()

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = ops._grad(grads)
        made = eng.empty(small, grad.dtype, "lora_slices_grad")
        eng.indexed(grad.dtype, 2 * made.nbytes, small)
        return [made]

    eng.link(out, (source,), backward, (source,))
    return out


def _cat(eng: Engine, tensors: Sequence[Tensor], op: str) -> Tensor:
    """torch.cat of any number of tensors; the backward narrows into views."""
    numels = [one.numel for one in tensors]
    total: Size = 0
    for numel in numels:
        total = total + numel
    out = eng.empty(total, tensors[0].dtype, op)
    eng.indexed(out.dtype, 2 * out.nbytes, out.numel)
    eng.link(out, tuple(tensors), lambda node, grads: [ops._grad(grads).view(numel) for numel in numels])
    return out


# --- the block ------------------------------------------------------------------------------------------------------


def layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """Block.forward."""
    eng, spec = step.eng, held.spec
    normed = _norm(step, held, spec.input_norm, x)
    attended = _attention(step, held, normed)
    attended = _norm(step, held, spec.post_attention_norm, attended)
    if spec.parallel and spec.pre_mlp_norm is not None:
        normed = _norm(step, held, spec.pre_mlp_norm, x)
    x = ops.add(eng, attended, x, "residual")
    if not spec.parallel:
        normed = _norm(step, held, spec.pre_mlp_norm, x)
    out = ops.add(eng, _norm(step, held, spec.post_mlp_norm, _mlp(step, held, normed)), x, "residual")
    del normed, attended
    return out


def _norm(step: Step, held: LayerWeights, spec: Norm | None, x: Tensor) -> Tensor:
    return x if spec is None else norm(step, spec, held.norms[spec.name], x)


def norm(step: Step, spec: Norm, weights: tuple[Tensor | None, Tensor | None], x: Tensor) -> Tensor:
    """torch's LayerNorm, or RMSNorm: x * x instead of a power, the weight multiplies in fp32, the cast comes last."""
    eng, arg, rows = step.eng, x, x.rows(spec.size)
    weight, bias = weights
    if spec.kind.startswith("layernorm"):
        out = ops.layer_norm(eng, x, weight, bias, rows)
        del arg
        return out
    source = x.dtype
    x = ops.cast(eng, x, FP32, "norm_input_fp32")
    mean = ops.mean_last(eng, ops.mul(eng, x, x, "pow"), rows)
    normed = ops.mul(eng, x, ops.rsqrt(eng, ops.shift(eng, mean)), "norm")
    out = normed
    if weight is not None:
        if spec.kind == "rms_gemma":
            weight = ops.shift(eng, weight, "norm_weight")
        out = ops.mul(eng, normed, ops.cast(eng, weight, FP32, "norm_weight"), "norm")
    out = ops.cast(eng, out, source, "norm_cast")
    del arg, x, mean, normed, weight
    return out


def _attention(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """CausalSelfAttention.forward; v stays a view of the projection's output unless its heads are repeated."""
    eng, spec = step.eng, held.attention
    t = x.rows(spec.projections[0].in_features)
    arg = x
    qkv = forward(step, held.linears[spec.projections[0].name], x)
    q, k, v = ops.split(eng, qkv, (t * spec.q_size, t * spec.kv_size, t * spec.kv_size))
    if spec.q_norm is not None and spec.k_norm is not None:
        q = norm(step, spec.q_norm, held.norms[spec.q_norm.name], q)
        k = norm(step, spec.k_norm, held.norms[spec.k_norm.name], k)
    rotated: tuple[Tensor, ...] = ()
    if spec.position == "rope":
        part = spec.rotary_dim or spec.head_dim
        turned_q = _rope(step, ops.narrow(eng, q, t * spec.num_heads * part))
        turned_k = _rope(step, ops.narrow(eng, k, t * spec.num_kv_heads * part))
        rest = spec.head_dim - part
        q = _cat(eng, (turned_q, ops.narrow(eng, q, t * spec.num_heads * rest)), "rotary")
        k = _cat(eng, (turned_k, ops.narrow(eng, k, t * spec.num_kv_heads * rest)), "rotary")
        rotated = turned_q, turned_k
        del turned_q, turned_k
    if spec.num_kv_heads != spec.num_heads:
        groups = spec.num_heads // spec.num_kv_heads
        k, v = ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)
    mask = eng.empty(step.seq * step.seq, q.dtype, "attention_mask") if spec.sliding_window else None
    out = _softcapped(step, spec, q, k, v, mask) if spec.logit_softcap else _sdpa(step, spec, q, k, v, mask)
    result = forward(step, held.linears[spec.output.name], out)
    del arg, qkv, q, k, v, rotated, mask, out
    return result


def _rope(step: Step, x: Tensor) -> Tensor:
    """apply_rope: tables are fp32 (they are made anew when the longest row is known), the result is cast back."""
    eng = step.eng
    assert step.cos_sin is not None
    cos, sin = step.cos_sin
    half = x.numel // 2
    x1, x2 = ops.narrow(eng, x, half), ops.narrow(eng, x, half)
    turned = ops.cat_half(eng, ops.negate(eng, x2, strided=True), x1, "rotary")
    first = ops.mul(eng, x, cos, "rotary")
    second = ops.mul(eng, turned, sin, "rotary")
    roped = ops.add(eng, first, second, "rotary", strided=True)
    del first, second
    out = ops.cast(eng, roped, x.dtype, "rotary")
    del turned, x1, x2, roped
    return out


def _sdpa(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """scaled_dot_product_attention over repeated heads: causal, or with the mask of a window, a bias already."""
    eng, b, s, heads = step.eng, step.batch, step.seq, spec.num_heads
    alike = replace(spec, num_kv_heads=heads, sdpa=True, sdpa_since=(0, 0), sliding_window=0)
    if mask is None:
        return attention.fused(step, alike, q, k, v, by_heads=spec.position == "rope")  # torch.cat joins by heads
    buffers = cuda_rules.efficient_backward_workspace(b, s, s, heads, heads, spec.head_dim, ITEMSIZE[q.dtype])
    return attention.fused_attention(
        eng, q, k, v, out_shape=(b * s, spec.q_size), logsumexp_numel=b * heads * cuda_rules.round_up(s, 32), mask=mask,
        workspace_bytes=sum(n for _, n in buffers), flops=4.0 * b * heads * s * s * spec.head_dim,
        op="efficient_attention",
    )  # fmt: skip


def _softcapped(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Whole score matrices, where logits are capped (scaled_dot_product_attention of model.py)."""
    eng, b, s, heads = step.eng, step.batch, step.seq, spec.num_heads
    shape = (b * heads, s, s, spec.head_dim)
    scores = ops.scale(eng, ops.bmm(eng, q, k, shape, "scores", "nt"), "scores")
    scores = ops.scale(eng, ops.pointwise(eng, ops.scale(eng, scores, "scores"), "tanh", False), "scores")
    mask = mask if mask is not None else eng.empty(s * s, q.dtype, "attention_mask")
    scores = ops.add(eng, scores, mask, "scores")
    probabilities = ops.softmax_fp32(
        eng, scores, casts_inside=True, writes_product=step.arch.softmax_backward_product
    )  # fmt: skip
    scores = ops.cast(eng, probabilities, q.dtype, "probabilities")
    del probabilities
    out = ops.bmm(eng, scores, v, (b * heads, s, spec.head_dim, s), "attention")
    del scores, mask
    return ops.contiguous(eng, out, "attention")


def _mlp(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """GptNeoxMLP, LLaMAMLP or GemmaMLP; experts are approximated by those of transformers."""
    eng, spec = step.eng, held.spec.mlp
    if held.spec.experts is not None:
        return experts.experts(step, held, held.spec.experts, x)
    assert spec is not None
    arg = x
    if spec.gate is None:
        x = forward(step, held.linears[spec.up.name], x)
        x = ops.pointwise(eng, x, spec.activation)
        out = forward(step, held.linears[spec.down.name], x)
        del arg, x
        return out
    gate = forward(step, held.linears[spec.gate.name], x)
    up = forward(step, held.linears[spec.up.name], x)
    x = ops.mul(eng, ops.pointwise(eng, gate, spec.activation), up, "mlp")
    out = forward(step, held.linears[spec.down.name], x)
    del arg, gate, up, x
    return out


# --- head and loss --------------------------------------------------------------------------------------------------


def head_and_loss(step: Step, head: LinearWeights, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits as Fabric hands them on, in fp32, and chunked_cross_entropy; the caller keeps the logits.

    With LoRA the head runs on chunks of 128 positions; full fine-tuning has whole logits and chunks their rows.
    """
    eng, train, vocab = step.eng, step.train, step.model.vocab_size
    if train.method == "full":
        logits = [ops.cast(eng, _capped(step, forward(step, head, hidden)), FP32, "outputs_to_fp32")]
        rows = step.batch * (step.seq - 1)
        shifted = ops.narrow(eng, logits[0], rows * vocab, "logits_grad")
        if step.batch != 1:
            shifted = ops.contiguous(eng, shifted, "logits_shifted")
        parts = ops.split(eng, shifted, [part * vocab for part in _rows(rows)], "logits_grad")
        del shifted
    else:
        each = _chunks(step)
        width = step.model.hidden_size
        slices = ops.split(eng, hidden, [(rows, width) for rows in each], "lm_head_grad")
        halves = [_capped(step, forward(step, head, piece)) for piece in slices]
        del slices
        logits = [ops.cast(eng, half, FP32, "outputs_to_fp32") for half in halves]
        _forget_earlier(step, logits)
        del halves
        last = logits[-1].numel - step.batch * vocab
        logits[-1] = ops.narrow(eng, logits[-1], last, "logits_grad")
        parts = list(logits)
        if step.batch != 1:
            parts[-1] = ops.contiguous(eng, parts[-1], "logits_shifted")
    total: Tensor | None = None
    chunk_losses = [losses.cross_entropy(eng, part, part.numel // vocab) for part in parts]
    del parts
    for one in chunk_losses:
        total = one if total is None else ops.add(eng, total, one, "loss")
    assert total is not None
    del one
    return total, logits if train.keeps_outputs else []


def _forget_earlier(step: Step, logits: list[Tensor]) -> None:
    """The logits of the micro batch before have their name until the model returns new ones.

    Their graph is as good as gone, but for what its functions keep as attributes. All that lay beside this forward;
    what it adds to the peak, it adds here at its end.
    """
    eng = step.eng
    if step.train.longest_first or not step.train.keeps_outputs or not step.kept_inputs:
        return
    earlier = []
    for where, nbytes in step.kept_inputs.values():
        if where != eng.layer:
            eng.enter("forward", where)
        earlier.append((where, eng.workspace(nbytes, "earlier_micro_batch")))
    eng.enter("loss")
    old = [eng.empty(part.numel, FP32, "logits_fp32") for part in logits]
    del old
    while earlier:
        where, storage = earlier.pop(0)
        if where != eng.layer:
            eng.enter("forward", where)
        del storage
    eng.enter("loss")


def _rows(rows: Size) -> list[Size]:
    """Rows of every chunk of the loss, at least one."""
    whole: list[Size] = [HEAD_CHUNK for _ in range(rows // HEAD_CHUNK)]
    rest = rows - len(whole) * HEAD_CHUNK
    return [*whole, rest] if rest or not whole else whole


def _chunks(step: Step) -> list[Size]:
    """Rows of every chunk of the head."""
    whole: list[Size] = [step.batch * HEAD_CHUNK for _ in range(step.seq // HEAD_CHUNK)]
    rest = step.seq - len(whole) * HEAD_CHUNK
    return [*whole, step.batch * rest] if rest else whole


def _capped(step: Step, logits: Tensor) -> Tensor:
    """do_softcapping of the final logits: divided, tanh, multiplied."""
    if not step.model.logit_softcap:
        return logits
    eng = step.eng
    scaled = ops.scale(eng, logits, "logits_softcap")
    return ops.scale(eng, ops.pointwise(eng, scaled, "logits_softcap", False), "logits_softcap")


def doubts(model: ModelSpec, training: TrainingSpec) -> Iterator[tuple[str, float]]:
    """What is not known of these modules, with the share of allocated memory that it may be."""
    dense = all(
        layer.experts is None and MIXERS[layer.mixer.kind].in_own_modules for layer, _ in model.distinct_layers()
    )
    four_bit = QUANTIZATIONS[training.quantization.kind].packed_4bit
    if not dense:
        yield "litgpt's experts and latent attention are approximated by those of transformers", 0.15
    elif four_bit and training.versions.bitsandbytes < quantized.KEEPS_NO_INPUT:
        yield "what bitsandbytes before 0.43 kept between litgpt's micro batches is not wholly explained", 0.15
    else:
        yield "litgpt's releases differ", 0.03


# --- habits ---------------------------------------------------------------------------------------------------------


def _whatever_the_release(since: Release) -> Release:
    """What some release of transformers brought to its class, litgpt's modules always had."""
    return NEVER if since == NEVER else ALWAYS


def habits(of_class: Habits) -> Habits:
    """litgpt's modules in the place of a class of transformers, of which experts and latent attention remain."""
    return Habits(
        doubts=doubts,
        rebuild=own_modules,
        layer=layer,
        own_mixers_only=True,
        makes_own_state=own_state,
        load_adapter=load_adapter,
        norm=norm,
        gives_tables=tables,
        counts_positions=False,
        head_and_loss=head_and_loss,
        halves_quantized=True,  # Lightning's .half() (fabric/plugins/precision/bitsandbytes.py)
        adds_bias_apart=False,
        repeats_in_module_before=ALWAYS,
        passes_groups_since=ALWAYS,
        copies_for_sdpa_since=NEVER,
        writes_out_activations=False,
        slices_hidden_since=NEVER,
        scales_in_embedding_since=_whatever_the_release(of_class.scales_in_embedding_since),
        interleaves_tables=of_class.interleaves_tables,
        half_tables=of_class.half_tables,
        fp32_tables_since=_whatever_the_release(of_class.fp32_tables_since),
        fp32_rotary=of_class.fp32_rotary,
        turn=of_class.turn,
        shared_first=of_class.shared_first,
        router_dtype=of_class.router_dtype,
        upcasts_since=of_class.upcasts_since,
    )
