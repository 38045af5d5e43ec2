"""Make fake CPU tensors behave as CUDA tensors do, one named rule at a time.

Rules that pick another operator are patches (`cuda_functions`) or autocast registrations (`cuda_autocast_lists`);
memory inside a CUDA kernel is a rule of `kernel_temporaries`. Each rule can be switched off in
`planner.device.cuda_rules.Architecture`; sizes live there too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from torch import nn

from planner.device import cuda_rules
from planner.device.cuda_rules import Architecture

SHORT_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
aten = torch.ops.aten


@contextmanager
def cuda_functions(arch: Architecture, *, force_flash: bool = False) -> Iterator[None]:
    """Replace functions whose CUDA path differs from the CPU path in what it allocates or saves.

    Attributes are patched: a TorchFunctionMode is off inside torch.autograd.backward, where checkpoints recompute.
    """
    patches: list[tuple[Any, str, Any]] = []
    if arch.sdpa_kernels:
        patches.append((nn.functional, "scaled_dot_product_attention", partial(sdpa, arch, force_flash)))
    if arch.fused_dropout:
        patches += [(nn.functional, "dropout", dropout), (torch, "dropout", dropout)]
    if arch.fused_softmax_cast:
        patches += [(nn.functional, "softmax", softmax), (torch, "softmax", softmax)]
    if arch.int8_kernels:
        patches.append((bnb, "matmul", int8_matmul))
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        if arch.fused_dropout:
            stack.enter_context(_dropout_of_kernels())
        yield


@contextmanager
def _dropout_of_kernels() -> Iterator[None]:
    """The dropout that C++ calls (SDPA's math kernel, ATen/native/transformers/attention.cpp) is the fused one too."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl(
            "dropout", lambda x, p, train: torch.native_dropout(x, p, True)[0] if train and p else x, "AutogradCPU"
        )
        yield
    finally:
        library._destroy()


def sdpa(
    arch: Architecture,
    force_flash: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Run the kernel CUDA would choose, as the aten operator that returns CUDA's side outputs.

    SDPA is in CUDA's autocast list; the direct operator is not, so the cast happens here.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) if x.dtype == torch.float32 else x for x in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.float32:
            attn_mask = attn_mask.to(dtype)
    grouped = key.shape[1] != query.shape[1]
    kernel = cuda_rules.sdpa_kernel(
        SHORT_DTYPE[query.dtype], has_mask=attn_mask is not None, head_dim=query.shape[-1],
        v_head_dim=value.shape[-1], arch=arch, grouped=grouped, force_flash=force_flash,
    )  # fmt: skip
    if grouped and not enable_gqa:  # heads are broadcast: no fused kernel does (sdp_utils.cpp)
        kernel = "math"
    if kernel == "flash":
        return flash_attention(query, key, value, dropout_p, is_causal, scale)
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, False, scale=scale
        )[0]
    if kernel == "math":
        with torch.autocast("cpu", enabled=False):  # SDPA is in autocast's list: that rules it out for what is inside
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=grouped
            )[0]
    if grouped:
        return GroupedEfficientAttention.apply(query, key, value, is_causal, scale)
    return efficient_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """FlashAttention as aten calls it: head sizes padded to a multiple of 8.

    Source: ATen/native/transformers/attention.cpp, scaled_dot_product_attention, pad_last_dim<8>.
    """
    size = query.shape[-1]
    scale = scale if scale is not None else size**-0.5
    if size % 8:
        query, key, value = (nn.functional.pad(x, (0, 8 - size % 8)) for x in (query, key, value))
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :size] if size % 8 else out


def efficient_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Memory-efficient attention: a boolean mask is first turned into a bias of the query's dtype.

    Source: ATen/native/transformers/attention.cpp convert_boolean_attn_mask, preprocess_mask (pads to 16 elements).
    """
    if mask is not None:
        if mask.dtype == torch.bool:
            minus_infinity = torch.full((), float("-inf"), dtype=query.dtype)
            mask = torch.where(mask, torch.zeros((), dtype=query.dtype), minus_infinity)
        length = mask.shape[-1]
        if length % 16:
            mask = nn.functional.pad(mask, (0, 16 - length % 16))[..., :length]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    needs_grad = any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


class GroupedEfficientAttention(torch.autograd.Function):
    """The memory-efficient kernel with fewer key than query heads (torch 2.14, see cuda_rules.sdpa_kernel).

    Its backward writes dk and dv for every query head and adds them up; aten's shape function knows equal heads only.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
    ) -> torch.Tensor:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, is_causal, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, lse, seed, offset)
        ctx.settings = is_causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, out, lse, seed, offset = ctx.saved_tensors
        is_causal, scale = ctx.settings
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grads[0], query, key, value, None, out, lse, seed, offset, 0.0, [True, True, True, False], is_causal,
            scale=scale,
        )  # fmt: skip
        heads = (key.shape[1], query.shape[1] // key.shape[1])
        return dq, dk.unflatten(1, heads).sum(2), dv.unflatten(1, heads).sum(2), None, None


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA's fused dropout keeps a 1-byte mask; the CPU composite keeps one in the activation dtype.

    Source: ATen/native/Dropout.cpp is_fused_kernel_acceptable.
    """
    if not training or p == 0 or inplace:
        return input if not inplace else torch.dropout_(input, p, training)
    return torch.native_dropout(input, p, True)[0]


def softmax(input: torch.Tensor, dim: int = -1, _stacklevel: int = 3, dtype: Any = None) -> torch.Tensor:
    """CUDA's softmax converts half to float inside the kernel (see cuda_rules.softmax_casts_inside)."""
    wanted = SHORT_DTYPE.get(dtype, "")
    if torch.is_autocast_enabled("cpu") and dtype is None:
        wanted, dtype = "fp32", torch.float32
    if cuda_rules.softmax_casts_inside(SHORT_DTYPE.get(input.dtype, ""), wanted):
        return torch._softmax(input, dim, True)
    return input.softmax(dim, dtype=dtype)


def int8_matmul(
    inputs: torch.Tensor, weight: torch.Tensor, out: Any = None, state: Any = None, threshold: float = 0.0,
    bias: Any = None,
) -> torch.Tensor:  # fmt: skip
    """bitsandbytes takes another autograd function on a CPU than on CUDA (autograd/_functions.py matmul)."""
    return MatMul8bitLt.apply(inputs, weight, out, bias, state)


# --- autocast ------------------------------------------------------------------------------------------------------

FP32_OPS = (
    "layer_norm", "native_layer_norm", "group_norm", "rsqrt", "reciprocal", "exp", "expm1", "log", "log10", "log1p",
    "log2", "softplus", "logsumexp", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "acos", "asin", "cosh",
    "erfinv", "sinh", "tan", "nll_loss", "nll_loss2d",
)  # fmt: skip
FP32_OPT_DTYPE_OPS = ("log_softmax.int", "cumsum", "sum", "sum.dim_IntList", "prod.dim_int")
FALLTHROUGH_OPS = ("cross_entropy_loss",)


@contextmanager
def cuda_autocast_lists(enabled: bool) -> Iterator[None]:
    """Give CPU autocast CUDA's lists of operations that run in fp32.

    Source: ATen/autocast_mode.h AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE (a dtype that the caller names stays:
    cross_entropy_loss names that of the logits).
    """
    if not enabled:
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    warnings.filterwarnings("ignore", message=".*Warning only once for all operators.*")
    try:
        for name in FP32_OPS:
            library.impl(name, _in_fp32(_overload(name)), "AutocastCPU")
        for name in FP32_OPT_DTYPE_OPS:
            library.impl(name, _with_fp32_dtype(_overload(name)), "AutocastCPU")
        for name in FALLTHROUGH_OPS:
            library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU")
        yield
    finally:
        library._destroy()


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _no_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _upcast(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _in_fp32(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _no_autocast():
            return op(*(_upcast(a) for a in args), **{k: _upcast(v) for k, v in kwargs.items()})

    return run


def _with_fp32_dtype(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _no_autocast():
            first = args[0]
            given = kwargs.get("dtype") or (args[2] if "log_softmax" in str(op) and len(args) > 2 else None)
            if given is None and first.dtype in (torch.float16, torch.bfloat16):
                kwargs["dtype"] = torch.float32
            return op(*args, **kwargs)

    return run


# --- memory inside kernels -----------------------------------------------------------------------------------------


LATE_OPS = frozenset(
    {
        "aten._softmax_backward_data",
        "aten._scaled_dot_product_flash_attention_backward",
        "aten._scaled_dot_product_efficient_attention_backward",
        "aten._scaled_dot_product_cudnn_attention_backward",
    }
)
"""Kernels that allocate their results first: structured kernels, and attention's dq, dk, dv."""


def kernel_temporaries(arch: Architecture) -> Callable[[Any, Sequence[Any], dict[str, Any]], Sequence[tuple[str, int]]]:
    """Return the tracker's rule for buffers that CUDA kernels allocate inside themselves."""
    table: dict[str, Callable[[Sequence[Any], dict[str, Any]], Sequence[tuple[str, int]]]] = {}
    if arch.gemm_4bit_dequantizes:
        table["bitsandbytes.gemm_4bit"] = lambda args, kwargs: _gemm_4bit(args, kwargs, arch)
    if arch.int8_kernels:
        table["bitsandbytes.int8_scaled_mm"] = _int8_scaled_mm
    if arch.softmax_backward_product:
        table["aten._softmax_backward_data"] = _softmax_backward
    if arch.attention_workspaces:
        table["aten._scaled_dot_product_flash_attention_backward"] = _flash_backward
        table["aten._scaled_dot_product_efficient_attention_backward"] = _efficient_backward
        table["aten._scaled_dot_product_cudnn_attention_backward"] = _cudnn_backward
    if not table:
        return lambda func, args, kwargs: ()

    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[tuple[str, int]]:
        found = table.get(str(func).rsplit(".", 1)[0])
        return found(args, kwargs) if found else ()

    return rule


def _gemm_4bit(args: Sequence[Any], kwargs: dict[str, Any], arch: Architecture) -> Sequence[tuple[str, int]]:
    a, (n, k) = args[0], args[2]
    m = a.numel() // k
    if not cuda_rules.gemm_4bit_dequantizes(m, n, k, compute_bytes=a.element_size(), arch=arch):
        return ()
    nested = kwargs.get("absmax_8bit") is not None or (len(args) > 7 and args[7] is not None)
    return cuda_rules.gemm_4bit_temporaries(n, k, double_quant=nested, compute_bytes=a.element_size())


def _int8_scaled_mm(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[tuple[str, int]]:
    a, b = args[0], args[1]
    dtype = kwargs.get("dtype") or (args[5] if len(args) > 5 else None) or torch.float16
    return cuda_rules.int8_matmul_temporaries(a.numel() // a.shape[-1] * b.shape[0], SHORT_DTYPE[dtype])


def _softmax_backward(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[tuple[str, int]]:
    grad = args[0]
    return (("grad*output", cuda_rules.softmax_backward_temporary(grad.numel(), grad.element_size())),)


def _flash_backward(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[tuple[str, int]]:
    query, key = args[1], args[2]
    b, h, s_q, d = query.shape
    return cuda_rules.flash_backward_workspace(b, s_q, key.shape[2], h, key.shape[1], d)


def _cudnn_backward(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[tuple[str, int]]:
    query, key = args[1], args[2]
    b, h, s_q, d = query.shape
    return cuda_rules.cudnn_backward_workspace(b, s_q, key.shape[2], h, key.shape[1], d)


def _efficient_backward(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[tuple[str, int]]:
    query, key = args[1], args[2]
    b, h, s_q, d = query.shape
    # dk and dv of grouped heads are tensors of GroupedEfficientAttention, not hidden buffers: h key heads here.
    return cuda_rules.efficient_backward_workspace(b, s_q, key.shape[2], h, h, d, query.element_size())


@contextmanager
def grouped_mm_dtypes() -> Iterator[None]:
    """Let grouped_mm take fp32 and fp16 as its CUDA kernel does; torch 2.13's shape function still asks for bf16.

    Source: ATen/native/cuda/GroupedBlas.cpp _grouped_mm_cuda (falls back to one mm per group) and
    torch/_meta_registrations.py _meta_grouped_mm_common.
    """
    from torch import _meta_registrations as meta

    original = meta._meta_grouped_mm_common

    def common(mat_a: torch.Tensor, mat_b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = mat_a.dtype
        if wanted not in (torch.float32, torch.float16) or mat_b.dtype != wanted:
            return original(mat_a, mat_b, *args, **kwargs)
        a, b = (torch.empty_like(m, dtype=torch.bfloat16) for m in (mat_a, mat_b))
        out = original(a, b, *args, **{**kwargs, "out_dtype": None})
        return torch.empty_strided(out.size(), out.stride(), dtype=wanted, device=out.device)

    meta._meta_grouped_mm_common = common
    try:
        yield
    finally:
        meta._meta_grouped_mm_common = original


# --- transformers --------------------------------------------------------------------------------------------------


def _no_packed_sequences(position_ids: torch.Tensor) -> None:
    """find_packed_sequence_indices for rows that hold one sequence: its temporaries, then None."""
    first = position_ids[:, :1] - 1
    difference = torch.diff(position_ids, prepend=first, dim=-1)
    mask = (difference != 1).cumsum(-1)
    (mask[:, -1] == 0).all()


@contextmanager
def transformers_as_on_device(*, padded: bool) -> Iterator[None]:
    """Undo what transformers does because it takes fake tensors for tracing: decisions read data there, here not."""
    from transformers import masking_utils

    def fast_all(padding_mask: torch.Tensor) -> bool:
        padding_mask.sum() == padding_mask.numel()  # noqa: B015 (its temporaries)
        return not padded

    replacements = {
        "is_tracing": lambda tensor=None: False,
        "find_packed_sequence_indices": _no_packed_sequences,
        "fast_all": fast_all,
    }
    with ExitStack() as stack:
        for name, value in replacements.items():
            if hasattr(masking_utils, name):
                stack.callback(setattr, masking_utils, name, getattr(masking_utils, name))
                setattr(masking_utils, name, value)
        yield
