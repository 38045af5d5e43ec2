"""Rates of a card: what a kernel costs by its kind."""

from __future__ import annotations

from planner.base.records import NamedTuple
from planner.device.hardware import Gpu
from planner.step.engine import FP32, ITEMSIZE
from planner.step.kernels import COMPILED, Kernel, KernelKind, Layout, Shape
from planner.timing.arrays import Number, ceil, minimum
from planner.timing.coefficients import Coefficients, old_dequantize_factor
from planner.timing.prices import PRICES
from planner.training.spec import TrainingSpec

TILES = ((256, 128), (128, 128), (128, 64), (64, 64))
"""Output tiles a product may be cut into (CUTLASS and cuBLAS ship these for 16-bit operands)."""

SPLITS = (1, 2, 4, 8, 16, 32)
"""Into how many parts the inner dimension may be cut when there are fewer tiles than multiprocessors."""

FP32_LANES = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64, (8, 7): 128}
"""fp32 lanes of a multiprocessor by compute capability, else 128 (CUDA C++ Programming Guide, arithmetic throughput):
with the data sheet's fp32 rate they give multiprocessors times clock."""

FP32_ATTENTION = "efficient_fp32"
"""The coefficient of fused attention on fp32 inputs, without matrix units: on a CPU, and of xFormers' kernel."""

PORTABLE_VECTORS = ("avx2", "avx", "unknown")
"""Vector units of CPUs without 16-bit products in oneDNN."""


class Priced(NamedTuple):
    """Seconds of one recorded kernel, by what it waits for."""

    compute: Number
    memory: Number
    latency: Number


class Rates:
    """What a card reaches: FLOP/s by dtype, bytes/s, and the efficiencies of its kernels."""

    def __init__(self, gpu: Gpu, coefficients: Coefficients, training: TrainingSpec) -> None:
        self.gpu = gpu
        self.c = {name: item.value for name, item in coefficients.items()}
        self.capability = gpu.compute_capability or (8, 0)
        self.multiprocessors = gpu.sm_count or 100
        self.bytes_per_s = gpu.bandwidth_bytes_per_s * self.c["bandwidth"]
        dequantize = self.c["dequantize"]
        if training.versions.bitsandbytes < (0, 48):
            dequantize /= old_dequantize_factor(self.capability)
        self.bandwidths: dict[str, Number] = {
            "bandwidth": self.bytes_per_s,
            "dequantize": self.bytes_per_s * dequantize,
        }
        """Bytes/s by coefficient; others are added when a kernel asks for them (`traffic_rate`)."""
        self.compiled = training.compile
        self.tf32 = training.tf32 and gpu.tf32_flops_per_s > 0
        self._tiles = self._tile_rates()
        clock = gpu.fp32_flops_per_s / (2 * FP32_LANES.get(self.capability, 128))
        self.indexed_per_s: Number | None = None if gpu.synchronous else clock * self.c["indexed"]
        """Elements that kernels which compute an index for each get through in a second; None: as fast as memory."""

    def peak(self, dtype: str) -> float:
        """Data-sheet FLOP/s of products of `dtype`: without bf16 units (before capability 8.0) those of fp32."""
        gpu = self.gpu
        if dtype == "int8":
            return 2 * (gpu.fp16_flops_per_s or gpu.fp32_flops_per_s)
        if dtype == "bf16" and gpu.bf16_native is False:
            return gpu.fp32_flops_per_s
        if dtype == FP32 and self.tf32:
            return gpu.tf32_flops_per_s
        half = gpu.bf16_flops_per_s if dtype == "bf16" else gpu.fp16_flops_per_s
        return (half if dtype in ("bf16", "fp16") else 0.0) or gpu.fp32_flops_per_s

    def product(self, dtype: str) -> float:
        """FLOP/s that a large product reaches."""
        return self.peak(dtype) * self.c[self.product_name(dtype)]

    def product_name(self, dtype: str) -> str:
        """The coefficient of large products of `dtype`."""
        if dtype == "int8" and not self.gpu.synchronous:
            return "matmul_int8"
        return "matmul_fp32" if self.simt(dtype) else "matmul"

    def simt(self, dtype: str) -> bool:
        """Whether products of `dtype` run without matrix units, at the rate of fp32."""
        return dtype == FP32 if self.gpu.synchronous else self.peak(dtype) == self.gpu.fp32_flops_per_s

    def _tile_rates(self) -> tuple[tuple[int, int, float], ...]:
        """(rows, columns, rate relative to the largest tile): a larger tile uses each loaded operand more often."""
        half = self.c["tile_reuse_half"]
        reuse = [rows * columns / (rows + columns) for rows, columns in TILES]
        share = [r / (r + half) for r in reuse]
        return tuple((*tile, s / share[0]) for tile, s in zip(TILES, share, strict=True))

    def matmul_s(self, shape: Shape, dtype: str, layout: Layout = "nt") -> tuple[Number, Number]:
        """(arithmetic, memory) seconds of a product, cut into whole tiles that fill whole waves of multiprocessors."""
        batch, m, n, k = shape
        if self.gpu.synchronous:
            return self._cpu_matmul_s(shape, dtype, layout)
        rate = self.product(dtype) / self.multiprocessors
        best: Number = None
        for rows, columns, relative in self._tiles:
            tiles = batch * ceil(m / rows) * ceil(n / columns)
            for parts in SPLITS:
                inner = ceil(k / parts)
                waves = ceil(tiles * parts / self.multiprocessors)
                work = 2.0 * rows * columns * (inner + self.c["matmul_k_half"])
                seconds = waves * work / (rate * relative)
                if parts > 1:  # partial results are written and read again
                    seconds = seconds + 2.0 * parts * batch * m * n * ITEMSIZE[FP32] / self.bytes_per_s
                best = seconds if best is None else minimum(best, seconds)
        moved = batch * (m * k + k * n + m * n) * ITEMSIZE[dtype]
        return best, moved / self.bytes_per_s

    def _cpu_matmul_s(self, shape: Shape, dtype: str, layout: Layout) -> tuple[Number, Number]:
        """The same on a CPU, whose kernels take any number of rows: each side costs as if it were a little longer.

        One thread of MKL and oneDNN follows m / (m + 14) from 16 to 320 rows (measured on the development machine).
        """
        batch, m, n, k = shape
        edge = self.c["tile_reuse_half"]
        work = 2.0 * batch * (m + edge) * (n + edge) * (k + self.c["matmul_k_half"])
        moved = batch * (m * k + k * n + m * n) * ITEMSIZE[dtype]
        rate = self.product(dtype)
        if layout != "nt" and self.portable(dtype):
            rate = rate * self.c[f"portable_{layout}"]
        return work / rate, moved / self.bytes_per_s

    def portable(self, dtype: str) -> bool:
        """Whether products of `dtype` run in torch's own loops on a CPU, whose speed depends on the operands' layout.

        oneDNN takes 16-bit products only with AVX-512 (at::mkldnn_bf16_device_check); what is left is
        aten/src/ATen/native/cpu/BlasKernel.cpp.
        """
        return self.gpu.synchronous and not self.simt(dtype) and self.gpu.architecture in PORTABLE_VECTORS

    def traffic_rate(self, coefficient: str) -> Number:
        """Bytes/s of kernels that reach this share of the bandwidth."""
        if coefficient not in self.bandwidths:
            self.bandwidths[coefficient] = self.bytes_per_s * self.c[coefficient]
        return self.bandwidths[coefficient]

    def attention_s(self, kernel: Kernel, tokens_per_row: Number) -> Number:
        """Arithmetic seconds of a fused attention kernel, by the FLOPs that it does."""
        kind, special = kernel.kind, kernel.kind.attention
        assert special is not None
        if kernel.dtype == FP32 and (special.own_fp32 or self.gpu.synchronous):
            return kernel.elements / (self.product(FP32) * self.c[FP32_ATTENTION])
        assert kind.coefficient is not None
        share = self.c[kind.coefficient]
        if special.hopper is not None and self.capability >= (9, 0):
            share = share * self.c[special.hopper]
        if special.short_rows is not None:
            share = share * tokens_per_row / (tokens_per_row + self.c[special.short_rows])
        return kernel.elements / (self.product(kernel.dtype) * share)

    def attention_name(self, kernel: Kernel) -> str:
        """The coefficient of a fused attention kernel."""
        assert kernel.kind.coefficient is not None
        return FP32_ATTENTION if kernel.dtype == FP32 else kernel.kind.coefficient

    def price(self, kernel: Kernel, tokens_per_row: Number) -> Priced:
        """Seconds of one recorded kernel, were it alone."""
        compute, memory = PRICES[kernel.kind.price].seconds(self, kernel, tokens_per_row)
        return Priced(compute, memory, self.c["kernel_latency"] * kernel.count * self.latency_share(kernel))

    def latency_share(self, kernel: Kernel) -> float:
        """Share of the recorded kernels that run: torch.compile merges element-wise ones."""
        return COMPILED[kernel.kind.compiled].latency_share if self.compiled else 1.0

    def launched(self, kernel: Kernel) -> float:
        """Share of the recorded launches that the host still makes."""
        return COMPILED[kernel.kind.compiled].launched_share if self.compiled else 1.0

    def host_s(self, kind: KernelKind, part: str, launches: Number, calls: Number) -> Number:
        """Seconds the host takes to launch kernels of a kind, in `calls` calls.

        A GPU's optimizer also touches every tensor once, however many share a kernel. A recomputation has its own
        cost: non-reentrant checkpoints pack and unpack every saved tensor in Python (torch/utils/checkpoint.py).
        """
        own = {"optimizer": "launch_optimizer", "backward": "launch_backward"}
        if not self.gpu.synchronous:
            own["recomputation"] = "launch_recomputation"
            if part == "optimizer":
                launches = launches + calls
        seconds = launches * self.c[own.get(part, "launch_forward")]
        if kind.call_cost is not None:
            seconds = seconds + calls * self.c[kind.call_cost]
        return seconds


def predictable(gpu: Gpu | None) -> bool:
    """Whether the card's data sheet is known well enough to predict time."""
    return gpu is not None and gpu.bandwidth_bytes_per_s > 0 and gpu.fp32_flops_per_s > 0
