"""What each operation allocates, saves, computes and moves, forward and backward, as torch's CUDA kernels do.

One function per operation. Sizes: elements; m, n, k as in a matrix product [m, k] x [k, n]. The backward formulas are
those of tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp (torch 2.13); the names of the
allocations are what the ledger and the trace comparison print.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.step.engine import (
    BF16,
    FP16,
    FP32,
    INPUT_GRAD,
    ITEMSIZE,
    Dimensions,
    Engine,
    Grads,
    Layout,
    Node,
    Shape,
    Size,
    Tensor,
)

_HALF = (BF16, FP16)


def promote(a: str, b: str) -> str:
    """torch.promote_types for the floating dtypes used here."""
    if a == b:
        return a
    if FP32 in (a, b):
        return FP32
    return FP32 if {a, b} == {BF16, FP16} else a


# --- element-wise --------------------------------------------------------------------------------------------------


def unary(eng: Engine, x: Tensor, op: str, dtype: str | None = None, strided: bool = False) -> Tensor:
    """A pass without backward of its own: output like x. `strided`: x or the output is not contiguous."""
    out = eng.like(x, dtype or x.dtype, op)
    if strided or (out.dtype != x.dtype and x.dtype != FP32):  # fp32 to 16 bits is copied by vectors
        eng.indexed(out.dtype, x.nbytes + out.nbytes, out.numel)
    else:
        eng.kernel("elementwise", out.dtype, x.nbytes + out.nbytes)
    return out


MIXED = 1.4
"""How much longer a pass over two tensors of different dtypes takes: it converts both by run-time switches
(ATen/native/cuda/MemoryAccess.cuh LoadWithCast; H200 profiles: 0.23e12 elements a second instead of 0.32e12)."""


def binary(eng: Engine, a: Tensor, b: Tensor, out: Tensor, strided: bool = False) -> None:
    """Record a pass over two tensors; a broadcast smaller one makes the kernel compute indices."""
    moved = a.nbytes + b.nbytes + out.nbytes
    if a.dtype != b.dtype:
        eng.indexed(out.dtype, moved, MIXED * out.numel)
    elif strided or _differ(a, b):
        eng.indexed(out.dtype, moved, out.numel)
    else:
        eng.kernel("elementwise", out.dtype, moved)


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool(a.numel != b.numel)


def cast(eng: Engine, x: Tensor, dtype: str, op: str = "cast") -> Tensor:
    """x.to(dtype): the same tensor when nothing changes."""
    if x.dtype == dtype:
        return x
    out = unary(eng, x, op, dtype)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        return [grad if grad.dtype == source else unary(eng, grad, "cast_grad", source)]

    source = x.dtype
    eng.link(out, (x,), backward)
    return out


def reshape_view(eng: Engine, x: Tensor, numel: Size | None = None) -> Tensor:
    """A view (reshape, transpose, narrow of one part): same storage, gradient passed through."""
    out = x.view(numel)
    if numel is None:
        eng.link(out, (x,), lambda node, grads: [grads[0]])
    return out


def narrow(eng: Engine, x: Tensor, shape: Size | Dimensions, op: str = "slice_grad") -> Tensor:
    """A slice of x: the backward fills a zero tensor of x's size (slice_backward)."""
    out = x.view(shape)
    full = x.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        padded = eng.empty(full, grad.dtype, op)
        eng.kernel("elementwise", grad.dtype, padded.nbytes)
        eng.indexed(grad.dtype, 2 * grad.nbytes, grad.numel)
        return [padded]

    eng.link(out, (x,), backward)
    return out


def colons(eng: Engine, x: Tensor, number: int, op: str = "slice_grad") -> Tensor:
    """x[:, :] with so many colons: x itself, or in old releases a slice of all of it for each."""
    for _ in range(number if eng.colons_are_slices else 0):
        x = narrow(eng, x, x.numel, op)
    return x


def split(eng: Engine, x: Tensor, shapes: Sequence[Size | Dimensions], op: str = "split_grad") -> list[Tensor]:
    """torch.split/chunk: views; the backward concatenates, filling missing parts with zeros."""
    outs = [x.view(shape) for shape in shapes]
    full = x.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        dtype = next(g.dtype for g in grads if g is not None)
        missing = [eng.empty(n, dtype, op) for n, g in zip(shapes, grads, strict=True) if g is None]
        out = eng.empty(full, dtype, op)
        eng.indexed(dtype, 2 * out.nbytes, out.numel)
        del missing
        return [out]

    eng.link(outs, (x,), backward)
    return outs


def split_heads(eng: Engine, x: Tensor, op: str = "heads_grad") -> Tensor:
    """x.view(b, s, heads, d).transpose(1, 2), whose gradient comes back contiguous: the reshape copies it.

    Slices, as rotate_half takes them, begin that gradient with contiguous zeros (slice_backward), and what is added
    to it lands there.
    """
    out = x.view()
    eng.link(out, (x,), lambda node, grads: [unary(eng, _grad(grads), op, strided=True)])
    return out


def contiguous(eng: Engine, x: Tensor, op: str = "contiguous") -> Tensor:
    """A copy of a strided tensor."""
    out = unary(eng, x, op, strided=True)
    eng.link(out, (x,), lambda node, grads: [grads[0]])
    return out


def add(
    eng: Engine, a: Tensor, b: Tensor, op: str = "add", numel: Size | None = None, strided: bool = False
) -> Tensor:  # fmt: skip
    """a + b: saves nothing; the gradient reaches both sides as it is."""
    dtype = promote(a.dtype, b.dtype)
    out = eng.like(a, dtype, op) if numel is None else eng.empty(numel, dtype, op)
    binary(eng, a, b, out, strided)
    eng.link(out, (a, b), lambda node, grads: [grads[0], grads[0]])
    return out


def add_in_place(eng: Engine, a: Tensor, b: Tensor) -> Tensor:
    """a += b: no new memory."""
    if a.dtype != b.dtype:
        eng.indexed(a.dtype, 2 * a.nbytes + b.nbytes, MIXED * a.numel)
    else:
        eng.kernel("elementwise", a.dtype, 2 * a.nbytes + b.nbytes)
    out = a.view()
    eng.link(out, (a, b), lambda node, grads: [grads[0], grads[0]])
    return out


def scale(eng: Engine, x: Tensor, op: str = "scale") -> Tensor:
    """x * scalar: saves nothing."""
    out = unary(eng, x, op)
    eng.link(out, (x,), lambda node, grads: [unary(eng, _grad(grads), "scale_grad")])
    return out


def subtract(eng: Engine, a: Tensor, b: Tensor, op: str = "subtract") -> Tensor:
    """a - b: saves nothing; b's gradient is a negated copy."""
    out = eng.empty(a.numel, promote(a.dtype, b.dtype), op)
    binary(eng, a, b, out)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [grads[0], unary(eng, _grad(grads), f"{op}_grad")]

    eng.link(out, (a, b), backward)
    return out


def expm1(eng: Engine, x: Tensor, op: str = "expm1") -> Tensor:
    """torch.expm1 (on autocast's fp32 list): saves its result; the backward makes result + 1 first."""
    x = autocast_fp32(eng, x)
    out = unary(eng, x, op)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [_last(unary(eng, _grad(grads), f"{op}_grad"), unary(eng, node.saved[0], f"{op}_grad"))]

    eng.link(out, (x,), backward, (out.view(),))
    return out


def minimum(eng: Engine, x: Tensor, op: str = "minimum") -> Tensor:
    """torch.minimum with a scalar tensor: saves x; the backward halves ties and masks what the scalar won."""

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = _grad(grads)
        ties = eng.empty(grad.numel, "int8", f"{op}_grad")
        half = unary(eng, grad, f"{op}_grad")
        out = unary(eng, grad, f"{op}_grad")
        del ties, half
        eng.empty(grad.numel, "int8", f"{op}_grad")
        return [out]

    made = eng.begin((x,), backward, (x,))
    out = unary(eng, x, op)
    eng.finish(made, out)
    return out


def subtract_bias(eng: Engine, x: Tensor) -> Tensor:
    """x - a frozen vector: saves nothing, the gradient passes through."""
    out = unary(eng, x, "dora_base")
    eng.link(out, (x,), lambda node, grads: [grads[0]])
    return out


def masked_fill(eng: Engine, x: Tensor, mask: Tensor, op: str = "masked_fill") -> Tensor:
    """x.masked_fill(mask, scalar): saves the mask; the gradient is filled anew."""

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [unary(eng, _grad(grads), f"{op}_grad")]

    out = unary(eng, x, op)
    eng.link(out, (x,), backward, (mask,))
    return out


def scale_in_place(eng: Engine, x: Tensor) -> Tensor:
    """x *= scalar: no new memory; the gradient is scaled into a new tensor."""
    eng.kernel("elementwise", x.dtype, 2 * x.nbytes)
    out = x.view()
    eng.link(out, (x,), lambda node, grads: [unary(eng, _grad(grads), "scale_grad")])
    return out


def shift(eng: Engine, x: Tensor, op: str = "shift") -> Tensor:
    """x + scalar."""
    out = unary(eng, x, op)
    eng.link(out, (x,), lambda node, grads: [grads[0]])
    return out


def negate(eng: Engine, x: Tensor, strided: bool = False) -> Tensor:
    """-x."""
    out = unary(eng, x, "neg", strided=strided)
    eng.link(out, (x,), lambda node, grads: [unary(eng, _grad(grads), "neg_grad", strided=strided)])
    return out


def _grad(grads: Grads) -> Tensor:
    grad = grads[0]
    assert grad is not None
    return grad


def mul(eng: Engine, a: Tensor, b: Tensor, op: str = "mul") -> Tensor:
    """a * b with broadcasting of the smaller: each side saves the other when it needs a gradient."""
    dtype = promote(a.dtype, b.dtype)
    big = a if _larger(a, b) else b
    saved = []
    if a.requires_grad:
        saved.append(b)
    if b.requires_grad:
        saved.append(a)
    needs = (a.requires_grad, b.requires_grad)
    types = ((a.dtype, a.nbytes), (b.dtype, b.nbytes))
    broadcasts = _differ(a, b)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = _grad(grads)
        results: list[Tensor | None] = [None, None]
        for side in (1, 0):
            if needs[side]:
                dtype, other = types[1 - side]
                made = eng.empty(grad.numel, promote(grad.dtype, dtype), "mul_grad")
                moved = grad.nbytes + other + made.nbytes
                if broadcasts or dtype != grad.dtype:
                    eng.indexed(made.dtype, moved, made.numel * (MIXED if dtype != grad.dtype else 1.0))
                else:
                    eng.kernel("elementwise", made.dtype, moved)
                results[side] = made
        return results

    made = eng.begin((a, b), backward, tuple(saved))
    out = eng.like(big, dtype, op)
    binary(eng, a, b, out)
    eng.finish(made, out)
    return out


def _larger(a: Tensor, b: Tensor) -> bool:
    return bool(a.numel >= b.numel)


def square(eng: Engine, x: Tensor) -> Tensor:
    """x.pow(2) of a norm."""
    return power(eng, x, "pow")


def power(eng: Engine, x: Tensor, op: str) -> Tensor:
    """x.pow(n) in fp32 (on autocast's fp32 list); the backward holds pow(x, n - 1), n * that, and the product."""
    x = autocast_fp32(eng, x)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        lower = unary(eng, node.saved[0], f"{op}_grad")
        times = unary(eng, lower, f"{op}_grad")
        out = unary(eng, times, f"{op}_grad")
        del lower, times
        return [out]

    made = eng.begin((x,), backward, (x,))
    out = unary(eng, x, op)
    eng.finish(made, out)
    return out


def mean_last(eng: Engine, x: Tensor, rows: Size) -> Tensor:
    """x.mean(-1, keepdim=True): the backward expands and divides into a full-size tensor."""
    out = eng.empty(rows, x.dtype, "mean")
    eng.kernel("reduce", x.dtype, x.nbytes + out.nbytes)
    full = x.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        out = eng.empty(full, _grad(grads).dtype, "mean_grad")
        eng.indexed(out.dtype, out.nbytes, out.numel)
        return [out]

    eng.link(out, (x,), backward)
    return out


def rsqrt(eng: Engine, x: Tensor) -> Tensor:
    """torch.rsqrt: saves its result; three small temporaries in backward."""
    out = unary(eng, x, "rsqrt")

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = _grad(grads)
        first = unary(eng, grad, "rsqrt_grad")
        cube = unary(eng, grad, "rsqrt_grad")
        return [_last(unary(eng, grad, "rsqrt_grad"), first, cube)]

    eng.link(out, (x,), backward, (out.view(),))
    return out


def _last(out: Tensor, *temporaries: Tensor) -> Tensor:
    """Keep `temporaries` alive until `out` exists, as one C++ expression does."""
    return out


def pointwise(eng: Engine, x: Tensor, op: str, saves_input: bool = True) -> Tensor:
    """A fused activation kernel (silu, gelu, relu, tanh, sigmoid): saves input or result, one tensor in backward."""

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [unary(eng, _grad(grads), f"{op}_grad")]

    if saves_input:
        made = eng.begin((x,), backward, (x,))
        out = unary(eng, x, op)
        eng.finish(made, out)
    else:
        out = unary(eng, x, op)
        eng.link(out, (x,), backward, (out.view(),))
    return out


def erf(eng: Engine, x: Tensor, op: str = "erf") -> Tensor:
    """torch.erf: saves x; the backward is 2 / sqrt(pi) * exp(-x^2) * grad, one tensor a pass."""

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        passes = [unary(eng, node.saved[0], f"{op}_grad") for _ in range(4)]
        return [_last(unary(eng, _grad(grads), f"{op}_grad"), *passes)]

    made = eng.begin((x,), backward, (x,))
    out = unary(eng, x, op)
    eng.finish(made, out)
    return out


def dropout(eng: Engine, x: Tensor, p: float, op: str = "dropout") -> Tensor:
    """native_dropout: output like x and a 1-byte mask, both needed later; the identity at p = 0."""
    if p == 0:
        return x
    out = eng.empty(x.numel, x.dtype, op)
    mask = eng.empty(x.numel, "int8", f"{op}_mask")
    eng.kernel("dropout", x.dtype, x.nbytes + out.nbytes + mask.nbytes)
    eng.link(out, (x,), lambda node, grads: [unary(eng, _grad(grads), f"{op}_grad")], (mask,))
    return out


def cat_half(eng: Engine, first: Tensor, second: Tensor, op: str = "cat") -> Tensor:
    """torch.cat of two tensors: saves nothing; the backward narrows into views."""
    if eng.autocast:  # cat is on autocast's list of promotions
        wide = promote(first.dtype, second.dtype)
        first, second = cast(eng, first, wide, op), cast(eng, second, wide, op)
    out = eng.empty(first.numel + second.numel, promote(first.dtype, second.dtype), op)
    eng.indexed(out.dtype, 2 * out.nbytes, out.numel)
    numels = (first.numel, second.numel)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = _grad(grads)
        return [grad.view(numels[0]), grad.view(numels[1])]

    eng.link(out, (first, second), backward)
    return out


def expand_copy(eng: Engine, x: Tensor, factor: int, op: str = "repeat_kv") -> Tensor:
    """expand + reshape of key/value heads: a copy, summed back in backward."""
    if factor == 1:
        return x
    out = eng.empty(x.numel * factor, x.dtype, op)
    eng.indexed(x.dtype, x.nbytes + out.nbytes, out.numel)
    small = x.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        out = eng.empty(small, _grad(grads).dtype, f"{op}_grad")
        eng.kernel("reduce", out.dtype, _grad(grads).nbytes + out.nbytes)
        return [out]

    eng.link(out, (x,), backward)
    return out


# --- autocast ------------------------------------------------------------------------------------------------------


def autocast_half(eng: Engine, x: Tensor, is_weight: bool = False) -> Tensor:
    """Cast for an operation on autocast's 16-bit list. Trainable fp32 leaves are cast once per context.

    Such a leaf may be an activation: the input of a reentrant checkpoint (ATen/autocast_mode.cpp cached_cast).
    """
    target = eng.autocast
    if target is None or x.dtype not in ITEMSIZE or x.dtype == target:
        return x
    leaf = x.requires_grad and x.dtype == FP32 and x.node is not None and x.node.leaf is not None
    if leaf:
        held = eng.cast_cache.get(id(x))
        if held is not None:
            return held[1]
    out = cast(eng, x, target, "autocast_weight" if is_weight else "autocast")
    if leaf:
        eng.cast_cache[id(x)] = (eng.layer, out)
    return out


def autocast_fp32(eng: Engine, x: Tensor) -> Tensor:
    """Cast for an operation on autocast's fp32 list."""
    return cast(eng, x, FP32, "autocast_fp32") if eng.autocast else x


# --- matrix products -----------------------------------------------------------------------------------------------


def matmul_flops(m: Size, n: Size, k: Size) -> Size:
    """2 m n k, as float: int64 would overflow silently in a sweep."""
    return 2.0 * m * n * k


def linear(
    eng: Engine, x: Tensor, weight: Tensor, m: Size, n: Size, k: Size, bias: Tensor | None = None, op: str = "linear"
) -> Tensor:
    """F.linear: x [m, k], weight [n, k] -> [m, n]; saves x for the weight's gradient, the weight for the input's."""
    arg = x  # held by the caller until the product exists
    kind = "lora" if op in ("lora_a", "lora_b") else "matmul"
    b = autocast_half(eng, bias, is_weight=True) if bias is not None else None
    w = autocast_half(eng, weight, is_weight=True)
    x = autocast_half(eng, x)
    need_x, need_w, need_b = x.requires_grad, w.requires_grad, b is not None and b.requires_grad
    saved: list[Tensor] = []
    if need_w:
        saved.append(x)
    if need_x:
        saved.append(w)
    x_numel, w_numel, dtype = x.numel, w.numel, x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        results: list[Tensor | None] = [None, None, None]

        def of_input() -> None:
            if need_x:
                results[0] = _viewed(eng.empty(x_numel, dtype, f"{op}_grad"))
                eng.matmul(kind, dtype, m, k, n, layout="nn")

        if b is not None:
            of_input()
        if need_w:
            results[1] = _viewed(eng.empty(w_numel, dtype, "weight_grad"))
            eng.matmul(kind, dtype, n, k, m, layout="tn")
        if b is None:
            of_input()
        if need_b:
            results[2] = eng.empty(n, dtype, "bias_grad")
            eng.kernel("reduce", dtype, _grad(grads).nbytes)
        return results

    made = eng.begin((x, w, b), backward, tuple(saved))
    out = eng.empty((m, n), x.dtype, op)
    eng.finish(made, out)
    eng.matmul(kind, x.dtype, m, n, k)
    del arg
    return out


def _viewed(grad: Tensor) -> Tensor:
    """A gradient that went through a reshape or a transposition (ATen/native/Linear.cpp, LinearAlgebra.cpp matmul)."""
    grad.is_view = True
    return grad


def bmm(
    eng: Engine, a: Tensor, b: Tensor, shape: Shape, op: str = "bmm", layout: Layout = "nn", scales: bool = False
) -> Tensor:
    """`shape` (batch, m, n, k): batched matrix product of two activations, both saved.

    scales: baddbmm with an alpha, by which the backward multiplies each product into a new tensor.
    """
    batch, m, n, k = shape
    b = autocast_half(eng, b)  # C++ evaluates arguments from the right
    a = autocast_half(eng, a)
    saved = []
    if b.requires_grad:
        saved.append(a)
    if a.requires_grad:
        saved.append(b)
    needs = (a.requires_grad, b.requires_grad)
    numels, dtype = (a.numel, b.numel), a.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        results: list[Tensor | None] = [None, None]
        for side in (0, 1) if scales else (1, 0):  # derivatives in the order of their names: mat2, self; batch1, batch2
            if needs[side]:
                result = eng.empty(numels[side], dtype, f"{op}_grad")
                rows, columns, inner = ((m, k, n), (k, n, m))[side]
                lies: Layout = "tn" if side else INPUT_GRAD[layout]
                eng.matmul("bmm", dtype, rows, columns, inner, batch, layout=lies)
                results[side] = unary(eng, result, f"{op}_grad") if scales else result
                del result
        return results

    made = eng.begin((a, b), backward, tuple(saved))
    out = eng.empty((batch, m, n), a.dtype, op)
    eng.matmul("bmm", a.dtype, m, n, k, batch, layout=layout)
    eng.finish(made, out)
    return out


# --- softmax and norms ---------------------------------------------------------------------------------------------


def softmax_fp32(eng: Engine, x: Tensor, *, casts_inside: bool, writes_product: bool) -> Tensor:
    """softmax(x, dtype=float32); `casts_inside` and `writes_product` are CUDA rules (planner.device.cuda_rules)."""
    if not casts_inside:
        x = cast(eng, x, FP32, "softmax_cast")
    out = eng.like(x, FP32, "softmax")
    eng.kernel("softmax", FP32, x.nbytes + out.nbytes)
    source = x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        out = eng.empty(_grad(grads).numel, source, "softmax_grad")  # a structured kernel: its output exists first
        product = unary(eng, _grad(grads), "softmax_grad_times_output") if writes_product else None
        eng.kernel("softmax", FP32, 2 * _grad(grads).nbytes + out.nbytes)
        del product
        return [out]

    eng.link(out, (x,), backward, (out.view(),))
    return out


def softmax_same(eng: Engine, x: Tensor, *, writes_product: bool) -> Tensor:
    """softmax in x's dtype (fp32 under autocast would need the caller's cast)."""
    out = unary(eng, x, "softmax")

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        out = unary(eng, _grad(grads), "softmax_grad")
        product = unary(eng, _grad(grads), "softmax_grad_times_output") if writes_product else None
        del product
        return [out]

    eng.link(out, (x,), backward, (out.view(),))
    return out


def layer_norm(
    eng: Engine, x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Size, op: str = "layer_norm"
) -> Tensor:
    """torch layer_norm (fp32 under autocast): saves input, mean, rstd."""
    x = autocast_fp32(eng, x)
    if eng.autocast:
        weight = autocast_fp32(eng, weight) if weight is not None else None
        bias = autocast_fp32(eng, bias) if bias is not None else None
    out = eng.like(x, x.dtype, op)
    mean = eng.empty(rows, FP32, op)
    rstd = eng.empty(rows, FP32, op)
    eng.kernel("norm", x.dtype, x.nbytes + out.nbytes)
    saved = tuple(t for t in (x, mean, rstd, weight, bias) if t is not None)
    needs = [t is not None and t.requires_grad for t in (x, weight, bias)]
    shapes = [t.numel if t is not None else 0 for t in (x, weight, bias)]
    dtype = x.dtype
    wtype = weight.dtype if weight is not None else dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        eng.kernel("norm", dtype, 3 * _grad(grads).nbytes)
        types = (dtype, wtype, wtype)
        return [eng.empty(shapes[i], types[i], f"{op}_grad") if needs[i] else None for i in range(3)]

    eng.link(out, (x, weight, bias), backward, saved)
    return out
