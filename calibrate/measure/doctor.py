"""What measuring needs and whether it is there: libraries, driver, GPU, neighbours, disk; each gap with its remedy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from calibrate.measure.device import CudaDevice, Device, open_device
from planner.base.errors import PlannerError, one_line
from planner.base.records import record
from planner.base.units import gib
from planner.facts import calibration_files

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "scipy")
LEAST_DISK_BYTES = 200 * 2**20
INSTALL = "pip install 'loraplan[calibrate]'"
QUIET_SHARE = 0.2
"""Share of the processors that others may use before timing by the wall clock suffers."""


@record
class Finding:
    """One thing that was looked at."""

    what: str
    value: str
    ok: bool = True
    remedy: str = ""
    """What to do; empty when nothing is wrong. A finding with a remedy may still be ok (a hint)."""


def examine(device_name: str) -> list[Finding]:
    """Look at everything that bursts on the device need.

    Raises:
        InvalidInput: a device name that is none.
    """
    device = open_device(device_name)
    found = [Finding(what="python", value=sys.version.split()[0])]
    found += [_library(name) for name in LIBRARIES]
    found += list(_gpu(device) if isinstance(device, CudaDevice) else _cpu(device))
    found += [_disk(), *_calibrations()]
    return found


def ready(findings: list[Finding]) -> bool:
    """Whether bursts can run."""
    return all(item.ok for item in findings)


def _library(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:  # a folder on PYTHONPATH without metadata
        if importlib.util.find_spec(name) is None:
            return Finding(what=name, value="missing", ok=False, remedy=INSTALL)
        found = "present, release unknown"
    return Finding(what=name, value=found)


def _gpu(device: CudaDevice) -> Iterator[Finding]:
    nvml = device.nvml
    if nvml is None:
        yield Finding(
            what="NVML",
            value="; ".join(device.notes),
            remedy=f"without it clocks, power and neighbours are not seen; {INSTALL}",
        )
    yield _torch_cuda(device.index)
    try:
        identity, state, others = device.identity(), device.state(), device.others()
    except (PlannerError, ImportError, RuntimeError) as error:
        yield Finding(what=device.name, value=one_line(str(error), 200), ok=False, remedy="check nvidia-smi")
        return
    yield Finding(what="GPU", value=f"{identity['name']}, driver {identity.get('driver') or 'unknown'}")
    used, total = device.used_bytes(), identity.get("memory_bytes")
    if used is not None and total:
        free = total - used
        low = free < total / 2
        hint = "less than half is free: long bursts will not fit" if low else ""
        yield Finding(what="memory", value=f"{gib(free)} of {gib(total)} GiB free", remedy=hint)
    if others:
        pids = ", ".join(str(p["pid"]) for p in others[:5])
        yield Finding(
            what="other processes", value=f"pid {pids}", ok=False, remedy="wait for them, or run with --share"
        )
    if state:
        yield Finding(what="clocks", value=f"SM {state['sm_clock_mhz']} MHz, memory {state['memory_clock_mhz']} MHz")
        limit = identity.get("power_limit_w")
        yield Finding(what="power", value=f"{state['power_w']} W now, limit {limit} W")
        held = [reason for reason in state["throttle"] if reason != "idle"]
        if held:
            yield Finding(what="clocks held by", value=", ".join(held), remedy="times will hold for this state only")
    if identity.get("mig"):
        yield Finding(what="MIG", value="on", remedy="the data sheet's rates are those of the whole card")


def _torch_cuda(index: int) -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(what="CUDA", value="torch is missing", ok=False, remedy=INSTALL)
    import torch

    if not torch.version.cuda:
        remedy = "install a CUDA build of torch (pytorch.org/get-started)"
        return Finding(what="CUDA", value=f"torch {torch.__version__} is a CPU build", ok=False, remedy=remedy)
    count = torch.cuda.device_count()
    if index >= count:
        remedy = "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        return Finding(what="CUDA", value=f"torch sees {count} GPUs", ok=False, remedy=remedy)
    return Finding(what="CUDA", value=f"{torch.version.cuda}, {count} GPUs")


def _cpu(device: Device) -> Iterator[Finding]:
    identity = device.identity()
    yield Finding(what="CPU", value=f"{identity['name']}, {identity['cores']} cores, {identity['vector']}")
    yield Finding(what="memory", value=f"{gib(identity['memory_bytes'])} GiB")
    share = others_share(device)
    if share is not None:
        busy = share > QUIET_SHARE
        remedy = "keep --threads 1: its clock counts only the time that it runs" if busy else ""
        yield Finding(what="used by others", value=f"{100 * share:.0f} % of the processors", remedy=remedy)


def others_share(device: Device, over_s: float = 0.5) -> float | None:
    """Share of the processors that other processes use, watched for a moment."""
    before = device.state()
    time.sleep(over_s)
    after = device.state()
    if before.get("busy_s") is None:
        return None
    busy = (after["busy_s"] - before["busy_s"]) - (after["own_s"] - before["own_s"])
    return float(max(busy, 0.0) / (over_s * (os.cpu_count() or 1)))


def _disk() -> Finding:
    folder = calibration_files.user_folder()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    low = free < LEAST_DISK_BYTES
    return Finding(
        what="disk",
        value=f"{gib(free)} GiB free at {_home(place)}",
        ok=not low,
        remedy="free space, or set LORAPLAN_DATA" if low else "",
    )


def _home(path: Path) -> str:
    text, home = str(path), os.path.expanduser("~")
    return f"~{text[len(home) :]}" if home != "/" and text.startswith(home) else text


def _calibrations() -> list[Finding]:
    found, damaged = calibration_files.known()
    listed: list[Any] = [c.label for c in found] or ["none yet"]
    return [Finding(what="calibrations", value="; ".join(listed))] + [
        Finding(what="calibrations", value="one cannot be read", remedy=note) for note in damaged
    ]
