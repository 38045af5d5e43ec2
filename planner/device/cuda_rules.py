"""What CUDA kernels allocate inside themselves: sizes of side outputs, workspaces and hidden temporaries.

Standard library only. The analytical program and the tracer (`calibrate.oracle.trace`) both read these rules, so that
each fact has one home. Every function turns shapes into bytes and names its source. Shapes: b rows, s tokens,
h heads, d head size, v vocabulary.
"""

from __future__ import annotations

from typing import Literal

from planner.base.records import record, replace

SdpaKernel = Literal["flash", "efficient", "cudnn", "math"]


@record
class Architecture:
    """The facts about a GPU and its libraries that decide which kernels run, and switches for each rule.

    All switches off (see `plain`) leaves exactly what PyTorch's CPU kernels do, which the tests compare with real
    CPU runs.
    """

    capability: tuple[int, int] = (8, 0)
    num_sms: int = 108
    torch: tuple[int, int] = (2, 13)
    bitsandbytes: tuple[int, int] = (0, 50)
    warmup_limit: int = 0
    """Most bytes that from_pretrained's first block takes on this card (step/loading.py); 0: no limit."""
    cudnn_attention: bool = False
    """PyTorch prefers cuDNN's attention (newest releases on sm90/sm100 with a recent cuDNN)."""
    sdpa_kernels: bool = True
    fused_dropout: bool = True
    autocast_lists: bool = True
    fused_softmax_cast: bool = True
    softmax_backward_product: bool = True
    gemm_4bit_dequantizes: bool = True
    int8_kernels: bool = True
    attention_workspaces: bool = True
    blas_workspaces: bool = True
    host_scalars: bool = True
    """Optimizer step counters and Python scalars stay on the host and are not counted."""

    @property
    def on_cpu(self) -> bool:
        """Whether these are a CPU's kernels (`plain`)."""
        return not self.sdpa_kernels

    @classmethod
    def plain(cls) -> Architecture:
        """Every CUDA rule switched off."""
        return cls(
            sdpa_kernels=False,
            fused_dropout=False,
            autocast_lists=False,
            fused_softmax_cast=False,
            softmax_backward_product=False,
            gemm_4bit_dequantizes=False,
            int8_kernels=False,
            attention_workspaces=False,
            blas_workspaces=False,
            host_scalars=False,
        )


@record
class Rule:
    """A named difference between CUDA and the CPU, as the trace and the program apply it to one architecture."""

    name: str
    """The switch of `Architecture` that turns it on, with underscores as blanks."""
    applied: bool
    what: str
    source: str

    def describe(self) -> dict[str, str | bool]:
        """Return the rule as plain JSON values."""
        return {"name": self.name, "applied": self.applied, "what": self.what, "source": self.source}


def rules(arch: Architecture) -> tuple[Rule, ...]:
    """Return every rule with what it does on this architecture and the source it was read in."""
    capability = ".".join(map(str, arch.capability))
    kernel = sdpa_kernel("bf16", has_mask=False, head_dim=128, v_head_dim=128, arch=arch)
    workspace = cublas_workspace_bytes(arch.capability)
    facts = {
        "sdpa_kernels": f"scaled_dot_product_attention runs CUDA's kernels (bf16, no mask, on {capability}: {kernel})",
        "attention_workspaces": "an attention kernel's backward allocates its accumulators (dq in fp32; dk and dv for "
        "every query head where heads are grouped)",
        "fused_dropout": "dropout keeps a mask of one byte an element",
        "autocast_lists": "autocast runs norms, sums and losses in fp32 by CUDA's lists",
        "fused_softmax_cast": "a softmax from fp16 to fp32 converts inside its kernel",
        "softmax_backward_product": "the backward of a softmax writes gradient times output first",
        "gemm_4bit_dequantizes": "a 4-bit product of more than some dozen rows dequantizes its whole weight to 16 bit",
        "int8_kernels": "an 8-bit product keeps an int32 result and, for bf16, an fp16 one beside its output",
        "blas_workspaces": f"{cublas_handles()} cuBLAS handles hold {workspace:,} bytes each",
        "host_scalars": "optimizer step counters and Python scalars stay in host memory",
    }
    return tuple(
        Rule(name=name.replace("_", " "), applied=getattr(arch, name), what=what, source=_RULE_SOURCES[name])
        for name, what in facts.items()
    )


_RULE_SOURCES = {
    "sdpa_kernels": "ATen/native/transformers/cuda/sdp_utils.cpp",
    "attention_workspaces": "flash_attn/flash_api.cpp mha_bwd; ATen .../cuda/attention_backward.cu",
    "fused_dropout": "ATen/native/Dropout.cpp is_fused_kernel_acceptable",
    "autocast_lists": "ATen/autocast_mode.h AT_FORALL_FP32",
    "fused_softmax_cast": "ATen/native/SoftMax.cpp softmax",
    "softmax_backward_product": "ATen/native/cuda/SoftMax.cu softmax_backward_cuda_out",
    "gemm_4bit_dequantizes": "bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit",
    "int8_kernels": "bitsandbytes 0.50 backends/default/ops.py int8_scaled_mm, backends/cuda/ops.py int8_mm_dequant",
    "blas_workspaces": "ATen/cuda/CublasHandlePool.cpp parseChosenWorkspaceSize",
    "host_scalars": "torch/optim/optimizer.py: state step on the CPU unless capturable or fused",
}


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


# --- matrix products -------------------------------------------------------------------------------------------


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """Workspace of one cuBLAS handle: 4096 KiB x 2 + 16 KiB x 8 before Hopper, 32 MiB on Hopper and Blackwell.

    Source: ATen/cuda/CublasHandlePool.cpp parseChosenWorkspaceSize (default ":4096:2:16:8", sm90/sm100 ":4096:8").
    Checked on a T4: 8 519 680 B a handle.
    """
    return 32 * 2**20 if capability[0] in (9, 10) else 2 * 4096 * 1024 + 8 * 16 * 1024


_REPRESENTATIVES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9))
"""One compute capability of each kind that the rules of this module tell apart."""


def program_class(arch: Architecture, *, four_bit: bool = True) -> Architecture:
    """All that the rules of this module read of an architecture beside the size of the cuBLAS workspaces.

    Cards of one class run the same program; `blas_bytes` says how much of its memory is theirs. `four_bit`: whether the
    base is a 4-bit one, whose fused kernels differ more.
    """
    rows, newer = fused_4bit_rows(arch.capability), arch.capability >= (8, 0)
    kind = next(
        c for c in _REPRESENTATIVES if (c >= (8, 0)) == newer and (fused_4bit_rows(c) == rows or not four_bit)
    )  # fmt: skip
    return replace(arch, capability=kind, num_sms=0)


def blas_bytes(arch: Architecture) -> int:
    """Bytes of all cuBLAS workspaces: there from the load on, so levels of one class differ by them alone."""
    return cublas_handles() * cublas_workspace_bytes(arch.capability) if arch.blas_workspaces else 0


def cublas_handles(*, trains: bool = True) -> int:
    """Handles that own a workspace: one of the forward thread and one of autograd's device thread."""
    return 2 if trains else 1


CUBLASLT_WORKSPACE_BYTES = 1 << 20
"""Workspace of one cuBLASLt handle and stream (ATen/cuda/CublasHandlePool.cpp parseCUDABlasLtWorkspaceSize)."""


def cublaslt_handles(*, biased: bool, recomputes: bool) -> int:
    """Threads that run a linear with a bias, which is addmm with the bias in cuBLASLt's epilogue, and hold a workspace.

    The forward's, and autograd's where it recomputes. Source: ATen/native/cuda/Blas.cpp addmm_out_cuda_impl (a bias
    of one dimension), CublasHandlePool.cpp getCUDABlasLtWorkspace. Seen on an H200 with torch 2.11.
    """
    return (1 + recomputes) if biased else 0


# --- 4-bit weights ---------------------------------------------------------------------------------------------

BLOCKSIZE_4BIT = 64
NESTED_BLOCKSIZE = 256


def absmax_blocks(elements: int) -> int:
    """Quantization blocks of a 4-bit weight (64 elements each)."""
    return -(-elements // BLOCKSIZE_4BIT)


def static_4bit_bytes(elements: int, *, double_quant: bool) -> tuple[tuple[str, int], ...]:
    """Storages that one 4-bit weight owns after loading, by name.

    Source: bitsandbytes.functional.quantize_4bit: packed weight, absmax, the 16-entry code table and, with double
    quantization, 8-bit absmax with its own fp32 absmax, a 256-entry code table and the offset.
    """
    blocks = absmax_blocks(elements)
    packed, code = ("weight", -(-elements // 2)), ("code", 64)
    if not double_quant:
        return (packed, ("absmax", 4 * blocks), code)
    nested = (("absmax", blocks), ("state2.absmax", 4 * -(-blocks // NESTED_BLOCKSIZE)), ("state2.code", 1024))
    return (packed, *nested, ("offset", 4), code)


def gemm_4bit_temporaries(n: int, k: int, *, double_quant: bool, compute_bytes: int) -> tuple[tuple[str, int], ...]:
    """Buffers, all alive together, of a 4-bit forward product that dequantizes the weight [n, k] first.

    Source: bitsandbytes 0.50 backends/cuda/ops.py _dequant_linear_fallback: absmax_dq, absmax, B_dq, then F.linear
    allocates the output.
    """
    scales = 4 * absmax_blocks(n * k)
    weight = ("B_dq", n * k * compute_bytes)
    return (("absmax_dq", scales), ("absmax", scales), weight) if double_quant else (weight,)


FUSED_4BIT_ROWS = {(7, 5): 32, (8, 0): 4, (8, 6): 16, (8, 7): 4, (9, 0): 4, (10, 0): 4, (10, 3): 4, (11, 0): 4}
"""Rows of input up to which every weight of a model meets bitsandbytes' fused 4-bit kernel, by compute capability, else
8; without 16-bit matrix units, and for fp32, 7. _gemm_4bit_use_custom_cuda lets larger weights go further (64 rows on
sm90, 128 on sm80, 256 elsewhere, for wide outputs): there a dequantization is counted that does not happen."""


def gemm_4bit_dequantizes(m: int, n: int, k: int, *, compute_bytes: int, arch: Architecture) -> bool:
    """Whether bitsandbytes' CUDA gemm_4bit dequantizes the whole weight instead of running its fused kernel.

    Source: bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit: above a number of input rows that depends on the GPU and
    the weight's shape, and always where k is not a multiple of the block size. Seen on an H200: at 128 rows every
    weight of an 8B model is dequantized.
    """
    return bool(k % BLOCKSIZE_4BIT) or m > fused_4bit_rows(arch.capability, compute_bytes)


def fused_4bit_rows(capability: tuple[int, int], compute_bytes: int = 2) -> int:
    """Most rows of input that the fused 4-bit kernel takes for every weight."""
    if capability < (7, 5) or compute_bytes == 4:
        return 7
    return FUSED_4BIT_ROWS.get(capability, 8)


def int8_matmul_temporaries(outputs: int, dtype: str) -> tuple[tuple[str, int], ...]:
    """Buffers of an 8-bit product with `outputs` results of `dtype`, alive when the result is allocated.

    Source: bitsandbytes 0.50 backends/default/ops.py int8_scaled_mm (int32 product) and backends/cuda/ops.py
    int8_mm_dequant (always fp16, then cast).
    """
    product = ("out_i32", 4 * outputs)
    return (product,) if dtype == "fp16" else (product, ("out_fp16", 2 * outputs))


# --- attention -------------------------------------------------------------------------------------------------


def flash_backward_workspace(b: int, s_q: int, s_k: int, h: int, h_kv: int, d: int) -> tuple[tuple[str, int], ...]:
    """Buffers inside FlashAttention-2's backward (16-bit), alive with dq, dk, dv.

    Source: flash_attn/flash_api.cpp mha_bwd: softmax_d fp32 [b, h, ceil128(s)], dq_accum fp32
    [b, ceil128(s), h, ceil32(d)], and for grouped heads dk/dv for every query head (2 bytes each).
    """
    s_pad = round_up(s_q, 128)
    d_pad = round_up(d, 32) if d <= 128 else round_up(d, 64)
    buffers = [("softmax_d", 4 * b * h * s_pad), ("dq_accum", 4 * b * s_pad * h * d_pad)]
    if h_kv != h:
        expanded = 2 * b * s_k * h * d
        buffers += [("dk_expanded", expanded), ("dv_expanded", expanded)]
    return tuple(buffers)


def cudnn_backward_workspace(b: int, s_q: int, s_k: int, h: int, h_kv: int, d: int) -> tuple[tuple[str, int], ...]:
    """The one workspace of cuDNN's attention backward, as its plan asks for it (cudnn/MHA.cpp get_workspace_size).

    Closed source; read off recordings of an H200 (cuDNN 9.19, head sizes 64 and 128, data/measurements): the buffers
    of FlashAttention-2 without padded rows, and 256 bytes.
    """
    buffers = [("softmax_sum", 4 * b * h * s_q), ("dq_accum", 4 * b * s_q * h * d), ("alignment", 256)]
    if h_kv != h:
        expanded = 2 * b * s_k * h * d
        buffers += [("dk_expanded", expanded), ("dv_expanded", expanded)]
    return tuple(buffers)


def softmax_backward_temporary(scores: int, grad_bytes: int) -> int:
    """CUDA's softmax backward writes grad * output (in grad's dtype) before its kernel; log_softmax does not.

    Source: ATen/native/cuda/SoftMax.cu softmax_backward_cuda_out: `Tensor tmp = grad * output`.
    """
    return scores * grad_bytes


def softmax_casts_inside(input_dtype: str, output_dtype: str) -> bool:
    """Whether CUDA softmax converts on the fly: no fp32 copy going in, a half grad_input coming out.

    Source: ATen/native/SoftMax.cpp softmax(input, dim, dtype): only for a Half input (not bf16) and dtype float32.
    """
    return input_dtype == "fp16" and output_dtype == "fp32"


def sdpa_kernel(
    dtype: str,
    *,
    has_mask: bool,
    head_dim: int,
    v_head_dim: int,
    arch: Architecture,
    grouped: bool = False,
    force_flash: bool = False,
) -> SdpaKernel:
    """The kernel that torch's scaled_dot_product_attention picks on CUDA; `grouped`: fewer key than query heads.

    Source: ATen/native/transformers/cuda/sdp_utils.cpp: flash needs sm80, 16-bit, no mask, equal head sizes up to 256;
    the memory-efficient kernel takes the rest (bf16 from sm80 on), grouped heads only since torch 2.14
    (pytorch/pytorch#191085); math is what is left. transformers repeats the heads itself when there is a mask.
    """
    half = dtype in ("bf16", "fp16")
    if force_flash and half and not has_mask:
        return "flash"
    same = head_dim == v_head_dim
    if arch.cudnn_attention and half and same and head_dim <= 128:
        return "cudnn"
    if half and not has_mask and same and head_dim <= 256 and arch.capability >= (8, 0):
        return "flash"
    if (grouped and arch.torch < (2, 14)) or (dtype == "bf16" and arch.capability < (8, 0)):
        return "math"
    return "efficient"


CUDNN_FIRST = (2, 11)
"""First torch release whose wheels bring a cuDNN above 9.15.0 (2.10 has the rule already:
huggingface/transformers#48163; seen on an H200 with torch 2.11 and cuDNN 9.19)."""


def prefers_cudnn_attention(capability: tuple[int, int], torch: tuple[int, int]) -> bool:
    """Whether scaled_dot_product_attention tries cuDNN first, masks included.

    Source: sdp_utils.cpp check_prefer_cudnn_attention: cuDNN above 9.15.0 on sm90, sm100 and sm103.
    """
    return torch >= CUDNN_FIRST and capability in ((9, 0), (9, 3), (10, 0), (10, 3))


def efficient_backward_workspace(
    b: int, s_q: int, s_k: int, h: int, h_kv: int, d: int, itemsize: int
) -> tuple[tuple[str, int], ...]:
    """Buffers inside the memory-efficient kernel's backward, alive with dq, dk, dv.

    Source: ATen/native/transformers/cuda/attention_backward.cu: delta fp32 [b, h, s]; 16-bit inputs accumulate dq in
    fp32 (mem_eff_attention/kernel_backward.h workspace_elements_gq, blocks of 64); grouped heads (torch 2.14) write
    dk and dv for every query head and reduce them afterwards (pytorch/pytorch#191085). Not verified: the split of keys
    for few heads, which adds fp32 dk and dv.
    """
    buffers = [("delta", 4 * b * h * s_q)]
    if itemsize == 2:
        buffers.append(("dq_accum", 4 * b * h * round_up(s_q, 64) * round_up(d, 32)))
    if h_kv != h:
        expanded = b * s_k * h * d * itemsize
        buffers += [("dk_expanded", expanded), ("dv_expanded", expanded)]
    return tuple(buffers)


def colons_are_slices(torch: tuple[int, int]) -> bool:
    """Whether `:` in an index with several entries makes an autograd node of its own.

    Source: aten/src/ATen/TensorIndexing.h applySlice: up to 2.8 a slice is left out where its end equals the length
    (sym_eq), and `:` ends at the largest integer; since 2.9 where it reaches the length (sym_le).
    """
    return torch < (2, 9)
