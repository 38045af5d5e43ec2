"""What a burst runs on: identity, clocks, memory and neighbours of an NVIDIA GPU (NVML and torch), or of the CPU.

Both have one face (`Device`). Nothing here changes a setting: clocks, power limits and MIG are only read. NVML may be
missing or fail at any call: then its figures are absent and a note says so. Bytes, seconds, MHz, watts, degrees C.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from planner.base.errors import InvalidInput, MissingDependency, one_line
from planner.device import processor

SAMPLE_S = 0.02
"""Seconds between two readings of the memory sampler."""

THROTTLE_REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "thermal (software)", 0x40: "thermal (hardware)", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip
"""Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h nvmlClocksEventReason*)."""


class Device(Protocol):
    """The face that the worker and the harness use."""

    name: str
    """torch's name: cpu, cuda:0."""
    kind: str
    notes: list[str]

    def identity(self) -> dict[str, Any]:
        """Facts that do not change while bursts run."""

    def state(self) -> dict[str, Any]:
        """Clocks, temperature, power, load: what changes."""

    def others(self) -> list[dict[str, Any]]:
        """Processes other than this one on the device."""

    def synchronize(self) -> None:
        """Wait until the device has done everything it was given."""

    def reset_peak(self) -> None:
        """Begin a new peak of `peak`."""

    def peak(self) -> dict[str, int]:
        """Peaks in bytes since `reset_peak`, by counter."""

    def used_bytes(self) -> int | None:
        """Memory in use as the system counts it (NVML, resident memory); None when it cannot be read."""

    def capacity_bytes(self) -> int:
        """Memory of the device."""


def open_device(name: str, threads: int = 1) -> Device:
    """Return the device `cpu` (of which `threads` threads are used), `cuda` or `cuda:N`.

    Raises:
        InvalidInput: for another name, or a GPU that this machine does not have.
    """
    if name == "cpu":
        return CpuDevice(threads)
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise InvalidInput(f"--device is {one_line(name)!r}; write cpu, cuda or cuda:0")
    return CudaDevice(int(match[1] or 0))


def host_id(*facts: str) -> str:
    """A short name for one machine that does not reveal it."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


# --- CPU -----------------------------------------------------------------------------------------------------------


class CpuDevice:
    """The processor this process may run on; memory is the process's resident memory."""

    name = "cpu"
    kind = "cpu"

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.notes: list[str] = []

    def identity(self) -> dict[str, Any]:
        info = processor.facts(self.threads)
        with suppress(OSError):
            info["host"] = host_id(platform.node(), Path("/etc/machine-id").read_text(encoding="ascii"))
        info.setdefault("host", host_id(platform.node(), info["name"]))
        return {"kind": "cpu", **info}

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else []}
        found["busy_s"], found["own_s"] = _busy_seconds(), time.process_time()
        return found

    def others(self) -> list[dict[str, Any]]:
        """Nobody owns a CPU alone: other load is measured (`state`), not listed."""
        return []

    def synchronize(self) -> None:
        """CPU operations return when they are done."""

    def reset_peak(self) -> None:
        with suppress(OSError):  # Linux: 5 resets VmHWM (proc_pid_clear_refs(5))
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> dict[str, int]:
        found = _status_kib("VmHWM")
        return {"resident": found * 1024} if found else {}

    def used_bytes(self) -> int | None:
        found = _status_kib("VmRSS")
        return found * 1024 if found else None

    def capacity_bytes(self) -> int:
        return processor.memory_bytes()


def _status_kib(key: str) -> int:
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    return 0


def _busy_seconds() -> float | None:
    """Processor seconds that all processes of the machine have used (/proc/stat; stolen time counts as used)."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        ticks = [int(value) for value in fields]
        idle = ticks[3] + ticks[4]
        return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK")
    return None


# --- NVIDIA --------------------------------------------------------------------------------------------------------


class Nvml:
    """One GPU seen through NVML; a call that fails gives None and a note instead of an error."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library = library
        self.handle = handle
        self.failures: dict[str, str] = {}

    @classmethod
    def open(cls, index: int, uuid: str = "", library: Any = None) -> Nvml:
        """Find the GPU by its UUID, which CUDA_VISIBLE_DEVICES does not shift, else by number.

        Raises:
            MissingDependency: pynvml is not installed.
            InvalidInput: no driver answers, or there is no such GPU.
        """
        if library is None:
            try:
                import pynvml as library  # type: ignore[no-redef]
            except ImportError:
                raise MissingDependency(
                    "reading the GPU needs nvidia-ml-py (pip install 'loraplan[calibrate]')"
                ) from None
        try:
            library.nvmlInit()
            handle = library.nvmlDeviceGetHandleByUUID(uuid) if uuid else library.nvmlDeviceGetHandleByIndex(index)
        except library.NVMLError as error:
            raise InvalidInput(
                f"NVML does not answer for GPU {index} ({one_line(str(error))}); check the driver with nvidia-smi"
            ) from None
        return cls(library, handle)

    def ask(self, function: str, *arguments: Any) -> Any:
        """Call nvml<function>(handle, ...); None if it fails or does not exist."""
        call = getattr(self.library, f"nvml{function}", None)
        if call is None:
            self.failures[function] = "not in this NVML"
            return None
        try:
            return call(self.handle, *arguments)
        except self.library.NVMLError as error:
            self.failures[function] = one_line(str(error), 120)
            return None

    def text(self, function: str) -> str:
        """The same for names, which older releases return as bytes."""
        found = self.ask(function)
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found or "")

    def used_bytes(self) -> int | None:
        """Memory of the whole card that is not free."""
        memory = self.ask("DeviceGetMemoryInfo")
        return int(memory.total) - int(memory.free) if memory is not None else None

    def processes(self) -> list[dict[str, Any]] | None:
        """Compute processes; None when NVML does not say (some containers and MIG)."""
        found = self.ask("DeviceGetComputeRunningProcesses")
        if found is None:
            return None
        return [{"pid": int(p.pid), "bytes": int(p.usedGpuMemory or 0)} for p in found]

    def throttle(self) -> list[str]:
        """Why the clocks are lower than they could be."""
        bits = self.ask("DeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self.ask("DeviceGetCurrentClocksThrottleReasons")
        return [name for bit, name in THROTTLE_REASONS.items() if bits and int(bits) & bit]


class CudaDevice:
    """An NVIDIA GPU: torch's allocator counters and NVML's view of the card.

    torch is imported only by what needs it: the harness reads NVML alone and holds no CUDA context.
    """

    kind = "cuda"

    def __init__(self, index: int, nvml: Nvml | None = None) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        self.notes: list[str] = []
        self._nvml = nvml
        if nvml is None:
            try:
                self._nvml = Nvml.open(visible_index(index))
            except (MissingDependency, InvalidInput) as error:
                self.notes.append(str(error))

    @property
    def nvml(self) -> Nvml | None:
        """NVML's handle; None where it does not answer."""
        return self._nvml

    def _torch(self) -> Any:
        import torch

        return torch.cuda

    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": "cuda"}
        nvml = self._nvml
        if nvml is not None:
            memory = nvml.ask("DeviceGetMemoryInfo")
            capability = nvml.ask("DeviceGetCudaComputeCapability")
            power = nvml.ask("DeviceGetEnforcedPowerLimit")
            found |= {
                "name": nvml.text("DeviceGetName"),
                "host": host_id(nvml.text("DeviceGetUUID")),
                "memory_bytes": int(memory.total) if memory is not None else None,
                "compute_capability": list(capability) if capability is not None else None,
                "power_limit_w": power / 1000 if power is not None else None,
                "max_sm_clock_mhz": nvml.ask("DeviceGetMaxClockInfo", 1),
                "max_memory_clock_mhz": nvml.ask("DeviceGetMaxClockInfo", 2),
                "mig": bool(mode[0]) if (mode := nvml.ask("DeviceGetMigMode")) else False,
                "driver": self._driver(nvml),
            }
        found["host_cpu"] = processor.facts(1)["name"]  # launches are its work
        if not found.get("name"):
            found |= self._identity_from_torch()
        return found

    def _driver(self, nvml: Nvml) -> str:
        try:
            driver = nvml.library.nvmlSystemGetDriverVersion()
        except nvml.library.NVMLError:
            return ""
        return driver.decode() if isinstance(driver, bytes) else str(driver)

    def _identity_from_torch(self) -> dict[str, Any]:
        cuda = self._torch()
        if not cuda.is_available() or self.index >= cuda.device_count():
            raise InvalidInput(f"torch sees no {self.name}; see: loraplan calibrate doctor")
        facts = cuda.get_device_properties(self.index)
        return {
            "name": facts.name, "memory_bytes": int(facts.total_memory),
            "compute_capability": [facts.major, facts.minor], "host": host_id(platform.node(), facts.name),
            "sm_count": int(facts.multi_processor_count),
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        nvml = self._nvml
        if nvml is None:
            return {}
        power = nvml.ask("DeviceGetPowerUsage")
        return {
            "sm_clock_mhz": nvml.ask("DeviceGetClockInfo", 1),
            "memory_clock_mhz": nvml.ask("DeviceGetClockInfo", 2),
            "temperature_c": nvml.ask("DeviceGetTemperature", 0),
            "power_w": power / 1000 if power is not None else None,
            "throttle": nvml.throttle(),
        }

    def others(self) -> list[dict[str, Any]]:
        listed = self._nvml.processes() if self._nvml is not None else None
        return [p for p in listed or [] if p["pid"] != os.getpid()]

    def synchronize(self) -> None:
        self._torch().synchronize(self.index)

    def reset_peak(self) -> None:
        self._torch().reset_peak_memory_stats(self.index)

    def peak(self) -> dict[str, int]:
        cuda = self._torch()
        return {
            "allocated": int(cuda.max_memory_allocated(self.index)),
            "reserved": int(cuda.max_memory_reserved(self.index)),
        }

    def used_bytes(self) -> int | None:
        return self._nvml.used_bytes() if self._nvml is not None else None

    def capacity_bytes(self) -> int:
        memory = self._nvml.ask("DeviceGetMemoryInfo") if self._nvml is not None else None
        if memory is not None:
            return int(memory.total)
        return int(self._torch().get_device_properties(self.index).total_memory)


def visible_index(index: int, visible: str | None = None) -> int:
    """NVML's number of the GPU that CUDA calls `index`, where CUDA_VISIBLE_DEVICES lists plain numbers."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "") if visible is None else visible
    numbers = [part.strip() for part in listed.split(",")]
    if index < len(numbers) and numbers[index].isascii() and numbers[index].isdigit():
        return int(numbers[index])
    return index


# --- sampler -------------------------------------------------------------------------------------------------------


class MemorySampler:
    """Reads the device's memory in the background; what was in use before the burst is its idle baseline."""

    def __init__(self, read: Callable[[], int | None], period_s: float = SAMPLE_S) -> None:
        self.read = read
        self.period_s = period_s
        self.baseline = read()
        self.samples = 0
        self.failed = 0
        self.highest = self.baseline
        self._stop = threading.Event()
        self._paused = False

    @contextmanager
    def running(self) -> Iterator[MemorySampler]:
        """Sample until the block ends."""
        self._stop.clear()
        thread = threading.Thread(target=self._loop, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(timeout=5)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no readings in the background until the block ends: the thread would take the interpreter's lock."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _loop(self) -> None:
        while not self._stop.wait(self.period_s):
            if not self._paused:
                self.sample()

    def sample(self) -> None:
        """Take one reading."""
        value = self.read()
        if value is None:
            self.failed += 1
            return
        self.samples += 1
        self.highest = value if self.highest is None else max(self.highest, value)

    def result(self) -> dict[str, Any]:
        """Baseline, highest reading and how many readings there were."""
        return {
            "baseline_bytes": self.baseline, "peak_bytes": self.highest, "samples": self.samples,
            "failed_samples": self.failed,
        }  # fmt: skip
