"""FLOPs of matrix products and attention, counted per operation while the trace runs.

A multiplication and an addition are two. Formulas are those of torch.utils.flop_counter (attention without the causal
half, its backward with the recomputed scores); operations it does not know are added here: bitsandbytes' products and
the grouped products of fused experts. FlopCounterMode itself keeps tensors alive under non-reentrant checkpointing,
so the tracker asks for formulas instead. Elementwise work counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.flop_counter import flop_registry

Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], int]
"""(arguments, keyword arguments, result) of a call -> FLOPs."""


def formula(func: Any) -> Formula | None:
    """Return the formula of an operator; None if it counts nothing."""
    own = _OWN.get(str(func).removesuffix(".default").removesuffix(".out"))
    if own is not None:
        return own
    known = flop_registry.get(getattr(func, "_overloadpacket", None))
    if known is None:
        return None
    return lambda args, kwargs, out: int(known(*args, **kwargs, out_val=out))


def _times_weight(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """bitsandbytes: A [..., k] times the transpose of a packed weight whose shape [n, k] is the third argument."""
    n, _ = args[2]
    return 2 * int(args[0].numel()) * int(n)


def _times_int8(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """bitsandbytes: A [..., k] times the transpose of B [n, k]."""
    a, b = args[0], args[1]
    return 2 * int(a.numel()) * int(b.shape[0])


def _grouped(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """aten._grouped_mm: every row (or column of a weight gradient) meets one expert.

    [m, k] x [E, k, n] and [m, k] x [k, n] (split along k) both cost 2mkn; [E, m, k] x [E, k, n] costs 2Emkn.
    """
    a, b = args[0], args[1]
    return 2 * int(a.numel()) * int(b.shape[-1])


def _times_vector(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """aten.mv and aten.dot: one product per element of the matrix."""
    return 2 * int(args[0].numel())


_OWN: dict[str, Formula] = {
    "bitsandbytes.gemm_4bit": _times_weight,
    "bitsandbytes.gemv_4bit": _times_weight,
    "bitsandbytes.int8_scaled_mm": _times_int8,
    "bitsandbytes.int8_mixed_scaled_mm": _times_int8,
    "bitsandbytes.int8_linear_matmul": _times_int8,
    "aten._grouped_mm": _grouped,
    "aten.mv": _times_vector,
    "aten.dot": _times_vector,
}
