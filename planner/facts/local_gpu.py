"""The GPU of this machine as the driver reports it: name, total memory, what is in use now (NVML)."""

from __future__ import annotations

import os
from typing import Any

from planner.base.errors import InvalidInput, MissingDependency, UnknownName, one_line
from planner.base.records import replace
from planner.base.units import gib
from planner.device.hardware import Gpu
from planner.facts import catalog


def local_gpu(index: str = "") -> Gpu:
    """Return this machine's GPU number `index`; the first that CUDA_VISIBLE_DEVICES allows when empty.

    Raises:
        MissingDependency: pynvml is not installed.
        InvalidInput: no driver, no GPU, or no GPU of that number.
    """
    try:
        import pynvml
    except ImportError:
        raise MissingDependency(
            "--gpu local needs nvidia-ml-py (pip install 'loraplan[local]'); or name the card, or pass --vram"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise InvalidInput(
            f"--gpu local: no NVIDIA driver answers ({one_line(str(error))}); name the card, or pass --vram"
        ) from None
    try:
        return _read(pynvml, index)
    except pynvml.NVMLError as error:
        raise InvalidInput(f"--gpu local: the driver says {one_line(str(error))}; name the card instead") from None
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: Any, index: str) -> Gpu:
    count = nvml.nvmlDeviceGetCount()
    number = _number(index, count)
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    raw = nvml.nvmlDeviceGetName(handle)
    name = one_line(raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw), 80)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    # total minus free, not "used": the driver keeps a part for itself that no process can have
    taken = int(memory.total) - int(memory.free)
    try:
        known = catalog.gpu(name)
    except UnknownName:
        known = Gpu(gpu_id="local", name=name, vendor="NVIDIA", memory_bytes=int(memory.total))
    return replace(
        known,
        name=name,
        memory_bytes=int(memory.total),
        memory_basis="nvml",
        used_by_others_bytes=taken,
        compute_capability=(int(major), int(minor)),
        notes=f"GPU {number} of this machine; {gib(taken)} GiB are taken now",
    )


def _number(index: str, count: int) -> int:
    if count < 1:
        raise InvalidInput("--gpu local: the driver lists no GPU; name the card, or pass --vram")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    text = index or (visible if visible.isascii() and visible.isdigit() else "0")
    if not (text.isascii() and text.isdigit() and len(text) < 5 and int(text) < count):
        raise InvalidInput(f"--gpu local:{one_line(text, 20)} is not a GPU of this machine; it has 0 to {count - 1}")
    return int(text)
