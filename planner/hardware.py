"""Gpu and Instance: what a run is placed on. Memory in bytes, bandwidth in bytes/s, dense rates in FLOP/s."""

from __future__ import annotations

from planner.errors import InvalidInput
from planner.records import record
from planner.units import MiB

CPU = "CPU"
"""Vendor of a processor used as the device."""

CONTEXT_BYTES = (128 * MiB, 350 * MiB, 640 * MiB)
"""CUDA context of a PyTorch process, low/expected/high: assumed. It holds the driver's state and the kernels that
were loaded (lazily since CUDA 11.7), so it grows with the number of libraries and differs between drivers."""


@record
class Gpu:
    """One accelerator, or a CPU, as software sees it. Rates are dense; 0 means no source states it."""

    gpu_id: str
    name: str
    vendor: str = ""
    architecture: str = ""
    memory_bytes: int
    """Memory the driver reports (the usable capacity before the CUDA context)."""
    memory_basis: str = "reported"
    """Where memory_bytes comes from: reported (host), cloud-api, marketing (GB read as 10**9 bytes), user, nvml."""
    used_by_others_bytes: int = 0
    context_bytes: tuple[int, int, int] = CONTEXT_BYTES
    """Low, expected and high device memory of a process beyond what its allocator reserves."""
    compute_capability: tuple[int, int] | None = None
    bandwidth_bytes_per_s: float = 0.0
    fp32_flops_per_s: float = 0.0
    tf32_flops_per_s: float = 0.0
    fp16_flops_per_s: float = 0.0
    bf16_flops_per_s: float = 0.0
    bf16_native: bool | None = None
    measured_matmul_flops_per_s: float = 0.0
    """Best dense 16-bit product in a public microbenchmark."""
    measured_bandwidth_bytes_per_s: float = 0.0
    """Device memory in a public microbenchmark."""
    sm_count: int = 0
    l2_bytes: int = 0
    tdp_w: float = 0.0
    sources: tuple[str, ...] = ()
    notes: str = ""

    def __post_init__(self) -> None:
        if self.memory_bytes < 1:
            raise InvalidInput(f"{self.gpu_id}: memory is {self.memory_bytes} bytes; must be positive")

    @property
    def synchronous(self) -> bool:
        """Whether an operation returns when it is done (a CPU), instead of being queued (a GPU)."""
        return self.vendor == CPU

    @property
    def rooms(self) -> tuple[int, int, int]:
        """What is left of `free_bytes` beside a small, an expected and a large context."""
        small, expected, large = (self.free_bytes - context for context in self.context_bytes)
        return small, expected, large

    @property
    def free_bytes(self) -> int:
        """Memory left for one training process, its CUDA context included."""
        return self.memory_bytes - self.used_by_others_bytes


@record
class Instance:
    """A priced machine. USD per hour on demand, with the date the price was read."""

    provider: str
    instance_type: str
    region: str
    gpu_id: str
    gpu_count: int
    usd_per_hour: float
    price_date: str
    source: str
    notes: str = ""
