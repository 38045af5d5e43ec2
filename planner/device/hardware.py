"""Gpu and Instance: what a run is placed on. Memory in bytes, bandwidth in bytes/s, dense rates in FLOP/s."""

from __future__ import annotations

from planner.base.errors import InvalidInput
from planner.base.records import record
from planner.base.units import MiB

CPU = "CPU"
"""Vendor of a processor used as the device."""

CONTEXT_BYTES = (100 * MiB, 450 * MiB, 1536 * MiB)
"""CUDA context of a PyTorch process on an unknown card, low/expected/high: assumed, see `context_bytes`."""

RESIDENT_THREADS = {
    (7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (11, 0): 1536, (12, 0): 1536, (12, 1): 1536,
}  # fmt: skip
"""Threads that a multiprocessor holds at a time by compute capability, else 2048 (CUDA C++ Programming Guide)."""
CONTEXT_BASE, CONTEXT_PER_THREAD = 28 * MiB, 2_890
"""The line through two measured cards: a T4 with 140.9 MiB (40 x 1024 threads) and an H200 with 771 (132 x 2048)."""
CONTEXT_SHARES = (0.7, 1.0, 2.0)


def context_bytes(sm_count: int, capability: tuple[int, int] | None) -> tuple[int, int, int]:
    """Low, expected and high CUDA context of a PyTorch process: interpolated between two measured cards.

    The driver sets local memory and stacks aside for every thread that can be resident, beside its own state and the
    kernels that were loaded so far (lazily since CUDA 11.7). The upper end has room for what some runs add, measured
    on the H200 with 771 MiB: the communicator of NCCL (558 MiB on one rank) or CUDA_MODULE_LOADING=EAGER (730 and
    more; not for both).
    """
    if sm_count < 1 or capability is None:
        return CONTEXT_BYTES
    threads = sm_count * RESIDENT_THREADS.get(capability, 2048)
    low, expected, high = (int(share * (CONTEXT_BASE + CONTEXT_PER_THREAD * threads)) for share in CONTEXT_SHARES)
    return low, expected, max(high, 640 * MiB)


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
    def assumes_context(self) -> bool:
        """Whether no calibration measured the context of a process on this card."""
        return self.context_bytes in (CONTEXT_BYTES, context_bytes(self.sm_count, self.compute_capability))

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
