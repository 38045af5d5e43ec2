"""The device's face against a simulated NVML and torch.cuda, and against this machine's CPU."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from calibrate.measure import device
from calibrate.measure.device import CudaDevice, MemorySampler, Nvml, open_device, visible_index
from planner.base.errors import InvalidInput
from planner.device import processor

GIB = 2**30


class FakeNvml:
    """An NVML that answers for one H100 until `breaks_after` calls, then fails; it records every function's name."""

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, breaks_after: int | None = None, missing: tuple[str, ...] = ()) -> None:
        self.breaks_after = breaks_after
        self.missing = missing
        self.asked: list[str] = []
        self.used = 2 * GIB
        self.pids: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or name in self.missing:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.asked.append(name)
            if self.breaks_after is not None and len(self.asked) > self.breaks_after:
                raise self.NVMLError("GPU is lost")
            return self.answer(name)

        return call

    def answer(self, name: str) -> Any:
        memory = SimpleNamespace(total=80 * GIB, free=80 * GIB - self.used, used=self.used)
        return {
            "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3", "nvmlDeviceGetUUID": "GPU-1234",
            "nvmlDeviceGetMemoryInfo": memory, "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetEnforcedPowerLimit": 700_000, "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetMigMode": [0, 0], "nvmlSystemGetDriverVersion": "570.1", "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetTemperature": 41, "nvmlDeviceGetPowerUsage": 120_500,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x1,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=p, usedGpuMemory=None) for p in self.pids],
        }.get(name)  # fmt: skip


def gpu(library: FakeNvml) -> CudaDevice:
    return CudaDevice(0, Nvml(library, object()))


def test_identity_and_state() -> None:
    found = gpu(FakeNvml())
    identity = found.identity()
    assert identity["name"] == "NVIDIA H100 80GB HBM3"
    assert identity["power_limit_w"] == 700
    assert identity["compute_capability"] == [9, 0]
    assert identity["mig"] is False
    assert "GPU-1234" not in str(identity)  # a host is named, not revealed
    assert found.state() == {
        "sm_clock_mhz": 1755, "memory_clock_mhz": 1755, "temperature_c": 41, "power_w": 120.5,
        "throttle": ["idle", "power cap"],
    }  # fmt: skip
    assert found.capacity_bytes() == 80 * GIB
    assert found.used_bytes() == 2 * GIB


def test_older_nvml_names_the_reasons_otherwise() -> None:
    assert gpu(FakeNvml(missing=("nvmlDeviceGetCurrentClocksEventReasons",))).state()["throttle"] == [
        "thermal (hardware)"
    ]


def test_nothing_is_ever_set() -> None:
    library = FakeNvml()
    found = gpu(library)
    found.identity(), found.state(), found.others(), found.used_bytes(), found.capacity_bytes()
    assert library.asked
    assert all(name.startswith(("nvmlDeviceGet", "nvmlSystemGet")) for name in library.asked)


def test_nvml_failing_midway_leaves_notes_not_errors() -> None:
    library = FakeNvml(breaks_after=9)
    found = gpu(library)
    assert found.identity()["name"] == "NVIDIA H100 80GB HBM3"
    assert found.state()["power_w"] is None
    assert found.others() == []
    assert found.used_bytes() is None
    assert found.nvml is not None
    assert found.nvml.failures["DeviceGetPowerUsage"] == "GPU is lost"


def test_neighbours_do_not_include_this_process() -> None:
    library = FakeNvml()
    library.pids = [os.getpid(), 77]
    assert gpu(library).others() == [{"pid": 77, "bytes": 0}]


def test_a_missing_driver_is_a_note_and_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver(FakeNvml):
        def answer(self, name: str) -> Any:
            raise self.NVMLError("NVML Shared Library Not Found")

    with pytest.raises(InvalidInput, match="Shared Library"):
        Nvml.open(0, library=NoDriver())
    monkeypatch.setattr(Nvml, "open", classmethod(lambda cls, index: Nvml_open_fails()))
    found = CudaDevice(0)
    assert "no driver" in found.notes[0]
    facts = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85, major=9, minor=0, multi_processor_count=132)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda i: facts,
        synchronize=lambda i: None, reset_peak_memory_stats=lambda i: None, max_memory_allocated=lambda i: 5,
        max_memory_reserved=lambda i: 7,
    )  # fmt: skip
    monkeypatch.setattr(CudaDevice, "_torch", lambda self: cuda)
    identity = found.identity()
    assert (identity["name"], identity["memory_bytes"], identity["sm_count"]) == ("NVIDIA H100 80GB HBM3", 85, 132)
    assert found.state() == {}
    assert found.used_bytes() is None
    assert found.capacity_bytes() == 85
    found.reset_peak()
    found.synchronize()
    assert found.peak() == {"allocated": 5, "reserved": 7}


def Nvml_open_fails() -> Nvml:
    raise InvalidInput("no driver answers")


def test_a_gpu_that_torch_does_not_see_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nvml, "open", classmethod(lambda cls, index: Nvml_open_fails()))
    cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
    monkeypatch.setattr(CudaDevice, "_torch", lambda self: cuda)
    with pytest.raises(InvalidInput, match="doctor"):
        CudaDevice(3).identity()


def test_visible_devices_are_followed() -> None:
    assert visible_index(0, "2,3") == 2
    assert visible_index(1, "2,3") == 3
    assert visible_index(0, "GPU-abc") == 0
    assert visible_index(0, "") == 0


def test_the_sampler_keeps_baseline_and_peak_and_survives_failures() -> None:
    values = iter([100, 150, None, 400, 200])
    sampler = MemorySampler(lambda: next(values, 200), period_s=0.001)
    with sampler.running():
        until = time.monotonic() + 5
        while sampler.samples < 4 and time.monotonic() < until:
            time.sleep(0.002)
    found = sampler.result()
    assert found["baseline_bytes"] == 100
    assert found["peak_bytes"] == 400
    assert found["failed_samples"] == 1
    assert found["samples"] >= 4


def test_the_sampler_without_a_meter() -> None:
    sampler = MemorySampler(lambda: None, period_s=0.001)
    with sampler.running():
        time.sleep(0.01)
    assert sampler.result()["peak_bytes"] is None


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "cpu:0", "cuda:1234"])
def test_other_device_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="--device"):
        open_device(name)


def test_this_cpu() -> None:
    found = open_device("cpu", 2)
    identity = found.identity()
    assert identity["kind"] == "cpu"
    assert identity["threads"] == 2
    assert len(identity["host"]) == 12
    assert identity["fp32_flops_per_s"] == 2 * open_device("cpu", 1).identity()["fp32_flops_per_s"]
    assert found.others() == []
    assert found.capacity_bytes() > 2**28
    state = found.state()
    assert state["own_s"] > 0
    known = processor.as_gpu(identity)
    assert known.synchronous
    assert known.sm_count == 2


@pytest.mark.oracle
def test_kernels_are_counted_by_class() -> None:
    pytest.importorskip("torch")
    from calibrate.measure.burst import _cuda_classes, class_of

    def event(name: str, us: float, device: str = "CUDA", annotation: bool = False) -> Any:
        return SimpleNamespace(
            name=lambda: name, duration_ns=lambda: int(us * 1000), device_type=lambda: f"DeviceType.{device}",
            is_user_annotation=lambda: annotation,
        )  # fmt: skip

    events = [
        event("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_cublas", 1000.0),
        event("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", 250.0),
        event("kDequantizeBlockwise<bf16>", 50.0),
        event("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", 25.0),
        event("aten::add", 80.0, device="CPU"),
        event("Optimizer.step#AdamW.step", 80.0, annotation=True),
        event("void at::native::multi_tensor_apply_kernel<FusedAdam>", 10.0),
    ]
    found = _cuda_classes(events)
    assert found["kernels"] == 5
    assert found["seconds_by_class"] == pytest.approx(
        {
            "matrix products": 1e-3,
            "attention": 2.5e-4,
            "dequantization": 5e-5,
            "element-wise": 2.5e-5,
            "optimizer": 1e-5,
        }
    )
    assert found["longest"][1] == ["void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", 1, pytest.approx(2.5e-4)]
    assert class_of("aten::_log_softmax") == "loss"
    assert class_of("bitsandbytes::gemm_4bit") == "matrix products"


@pytest.mark.oracle
def test_phases_on_a_gpu_are_events_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from calibrate.measure.burst import _PhaseClock

    class Event:
        """A recorded event: what it says is the milliseconds since the first."""

        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.now += 10.0
            self.at = Event.now

        def elapsed_time(self, other: Any) -> float:
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    step = SimpleNamespace()
    clock = _PhaseClock(step, gpu(FakeNvml()), time.perf_counter)
    for phase in ("forward", "loss", "backward", "end", "optimizer", "end"):
        step._enter(phase, "")
    assert clock.seconds() == pytest.approx([0.01, 0.01, 0.01])


CPUINFO = """processor : 0
model name : Some CPU @ 3.10GHz
cpu MHz : 1200.0
flags : fpu avx avx2 {more}
"""


@pytest.mark.parametrize(
    ("text", "vector", "hertz", "native", "flops"),
    [
        (CPUINFO.format(more="avx512f avx512_bf16"), "avx512f", 3.1e9, True, 64 * 3.1e9),
        (CPUINFO.format(more=""), "avx2", 3.1e9, False, 32 * 3.1e9),
        ("model name : X\ncpu MHz : 2399.9\nflags : sse2\n", "unknown", 2.4e9, False, 8 * 2.4e9),
        ("Features : fp asimd bf16\n", "asimd", processor.ASSUMED_HZ, True, 16 * processor.ASSUMED_HZ),
    ],
)
def test_nominal_rates_come_from_cpuinfo(
    text: str, vector: str, hertz: float, native: bool, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.Path, "read_text", lambda self, **_: text)
    found = processor.facts(1)
    assert (found["vector"], found["clock_hz"], found["bf16_native"]) == (vector, hertz, native)
    assert found["fp32_flops_per_s"] == pytest.approx(flops)
    assert found["bf16_flops_per_s"] == pytest.approx(flops * (2 if native else 1))


def test_a_host_is_not_revealed() -> None:
    assert device.host_id("name") == device.host_id("name") != device.host_id("other")
    assert "name" not in device.host_id("name")
