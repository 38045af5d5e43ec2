"""This machine's CPU as a device: its name, cores and the nominal rates that a CPU's coefficients are shares of.

Read from /proc/cpuinfo, nothing is measured: fp32 FLOP/s = threads * clock * FLOPS_PER_CYCLE; bf16 twice that only
where the CPU has bf16 instructions; bytes/s = threads * clock * BYTES_PER_CYCLE.
"""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from planner.base.errors import InvalidInput
from planner.device.hardware import CPU, Gpu

FLOPS_PER_CYCLE = {"avx512f": 64, "avx2": 32, "avx": 16, "asimd": 16}
"""fp32 FLOPs of a core per cycle by vector unit: lanes x 2 (multiply-add) x 2 (units; some AVX-512 cores have one)."""
SCALAR_FLOPS_PER_CYCLE = 8
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
BYTES_PER_CYCLE = 32
"""Bytes a core could move per cycle: the scale of the bandwidth coefficient, above what caches and memory reach."""
ASSUMED_HZ = 2.5e9
"""Clock where the system does not state one."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(threads: int = 1) -> dict[str, Any]:
    """Name, clock and nominal rates of `threads` threads of this machine's CPU, as plain JSON values."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    name = _first(r"^model name\s*:\s*(.+)$", text) or platform.processor() or platform.machine() or "CPU"
    flags = set(_first(r"^(?:flags|Features)\s*:\s*(.+)$", text).split())
    hertz = _clock(name, text)
    vector = next((flag for flag in FLOPS_PER_CYCLE if flag in flags), "")
    native = bool(flags & BF16_FLAGS)
    fp32 = threads * hertz * FLOPS_PER_CYCLE.get(vector, SCALAR_FLOPS_PER_CYCLE)
    return {
        "name": " ".join(name.split()),
        "cores": cores(),
        "threads": threads,
        "clock_hz": hertz,
        "vector": vector or "unknown",
        "bf16_native": native,
        "memory_bytes": memory_bytes(),
        "fp32_flops_per_s": fp32,
        "bf16_flops_per_s": fp32 * (2 if native else 1),
        "bandwidth_bytes_per_s": threads * hertz * BYTES_PER_CYCLE,
    }


def as_gpu(values: dict[str, Any]) -> Gpu:
    """The device that such facts describe (this machine's, or those a calibration was made on)."""
    return Gpu(
        gpu_id="cpu",
        name=values["name"],
        vendor=CPU,
        architecture=values.get("vector", ""),
        memory_bytes=int(values["memory_bytes"]),
        memory_basis="host",
        bandwidth_bytes_per_s=float(values["bandwidth_bytes_per_s"]),
        fp32_flops_per_s=float(values["fp32_flops_per_s"]),
        fp16_flops_per_s=float(values["fp32_flops_per_s"]),
        bf16_flops_per_s=float(values["bf16_flops_per_s"]),
        bf16_native=True,  # it runs without instructions of its own too, which the rate tells
        sm_count=int(values["threads"]),
        sources=("/proc/cpuinfo; rates are nominal (planner/device/processor.py)",),
        notes=f"{values['threads']} of {values['cores']} threads",
    )


def memory_bytes() -> int:
    """This machine's memory.

    Raises:
        InvalidInput: the system does not say.
    """
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        raise InvalidInput("this system does not state its memory; a CPU is a device on Linux and macOS only") from None


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else ""


def _clock(name: str, text: str) -> float:
    """Hertz: the number in the name, which frequency scaling does not move, else the running clock."""
    stated = re.search(r"@\s*([\d.]+)\s*GHz", name)
    if stated:
        return float(stated[1]) * 1e9
    running = _first(r"^cpu MHz\s*:\s*([\d.]+)$", text)
    return round(float(running), -2) * 1e6 if running else ASSUMED_HZ
