"""Coefficients of the time model: what each is, its value for a card, its uncertainty, bounds and origin.

All but the host's costs are dimensionless, so that they carry over between cards. Priors come from data sheets and
public microbenchmarks and are wide; a calibration on the hardware replaces them. Fitting is `calibrate`'s work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from planner.base.errors import InvalidInput
from planner.base.records import NamedTuple, record, replace
from planner.device.hardware import CPU, Gpu
from planner.training.spec import Versions

Origin = Literal["microbenchmark", "library source", "assumed", "fitted", "borrowed"]


@record
class Coefficient:
    """One number of the time model."""

    name: str
    value: float
    standard_error: float
    unit: str
    low: float
    high: float
    """Physical bounds: a fit stays inside them."""
    origin: Origin
    source: str

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise InvalidInput(f"coefficient {self.name} is {self.value}; must be between {self.low} and {self.high}")

    @property
    def relative_error(self) -> float:
        """Standard error as a share of the value."""
        return self.standard_error / self.value if self.value else 0.0


class Coefficients(Mapping[str, Coefficient]):
    """The coefficients that one prediction used, by name."""

    def __init__(
        self, items: Mapping[str, Coefficient], formula_error: float | None = None, label: str = "not calibrated"
    ) -> None:
        self._items = dict(items)
        self.label = label
        """Where they come from, for a report."""
        self.formula_error = formula_error
        """Relative standard error of predictions with these coefficients for models that the fit had not seen; it
        contains the errors of the fitted ones. None: not calibrated."""

    def __getitem__(self, name: str) -> Coefficient:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def value(self, name: str) -> float:
        """The number alone."""
        return self._items[name].value


@record
class Calibration:
    """Coefficients fitted to bursts on one device with one software stack, and how well they predict."""

    gpu_id: str
    device: Mapping[str, Any]
    """Identity of the device as the runs recorded it."""
    formula_version: str
    """`planner.timing.formulas.fingerprint` of the formulas that it was fitted with."""
    created: str
    versions: Mapping[str, str]
    coefficients: Coefficients
    """All of the device's: fitted ones, and priors that the bursts do not reach."""
    repeatability: float
    """Ratio - 1 within which two runs of one burst lie in 9 of 10 cases; 0: no burst was repeated."""
    context_bytes: tuple[int, int, int] | None
    """Device memory beyond reserved: least, median, most of the bursts; None on a CPU or without NVML."""
    bursts: int
    report: Mapping[str, Any]
    """Residuals, correlations, held-out errors: what `calibrate show` prints."""
    path: str = ""

    @property
    def label(self) -> str:
        """A few words for a report."""
        return describe(self.gpu_id, self.device, self.bursts, self.created)


def describe(gpu_id: str, device: Mapping[str, Any], bursts: int, created: str) -> str:
    """A few words that name a calibration in reports."""
    threads = device.get("threads")
    on = f" ({threads} thread{'s' if threads != 1 else ''})" if threads else ""
    return f"{device.get('name', gpu_id)}{on}, {bursts} bursts, {created[:10]}"


class Selection(NamedTuple):
    """The coefficients for a card, the calibration they come from (None: priors), and what to tell the user."""

    coefficients: Coefficients
    calibration: Calibration | None
    notes: tuple[str, ...]
    borrowed: bool = False

    @property
    def context_bytes(self) -> tuple[int, int, int] | None:
        """Measured device memory beyond reserved, where this very card was measured."""
        return self.calibration.context_bytes if self.calibration is not None and not self.borrowed else None

    def card(self, gpu: Gpu) -> Gpu:
        """The card with its measured context, where there is one."""
        return gpu if self.context_bytes is None else replace(gpu, context_bytes=self.context_bytes)

    def planned_with(self, versions: Versions) -> Selection:
        """The same, with a note where the bursts ran other releases."""
        notes = _stack_notes(self.calibration, versions) if self.calibration is not None else ()
        return self._replace(notes=tuple(dict.fromkeys((*self.notes, *notes))))


BORROWED_ERROR = 0.10
"""Relative standard error added to a dimensionless coefficient that was measured on another card: assumed."""
BORROWED_FORMULA = 1.5
"""Factor on the other card's held-out error: assumed."""
STACK = ("torch", "transformers", "peft", "bitsandbytes")


def select(gpu: Gpu, candidates: Iterable[Calibration], versions: Versions | None = None) -> Selection:
    """The newest calibration of this card; else dimensionless coefficients of the nearest card akin; else priors.

    Candidates belong to the present formulas (`planner.facts.calibration_files` sees to it); `versions` that differ
    from the fitted stack are told.
    """
    usable = sorted(candidates, key=lambda c: c.created)
    own = [c for c in usable if matches(c, gpu)]
    if own:
        newest = own[-1].coefficients
        # a coefficient that came with a later release is at its prior
        filled = Coefficients({**priors(gpu), **newest}, newest.formula_error, newest.label)
        return Selection(filled, own[-1], _stack_notes(own[-1], versions))
    others = [c for c in usable if _akin(c, gpu)]
    if not others:
        return Selection(priors(gpu), None, ())
    nearest = min(others, key=lambda c: _distance(c, gpu))
    note = f"{gpu.name} is not calibrated: {borrowed_words(nearest.label)}"
    return Selection(_borrow(gpu, nearest), nearest, (note, *_stack_notes(nearest, versions)), True)


def borrowed_words(label: str) -> str:
    """What it means that a card uses another's calibration."""
    return f"dimensionless coefficients borrowed from {label}, intervals wider"


def time_words(chosen: Mapping[str, Selection]) -> str:
    """Say what the times of several cards, by id, rest on: a calibration of their own, a borrowed one, data sheets."""
    own, others, borrowed = [], [], dict[str, list[str]]()
    for name, item in sorted(chosen.items()):
        if item.calibration is None:
            others.append(name)
        elif item.borrowed:
            borrowed.setdefault(item.calibration.label, []).append(name)
        else:
            own.append(name)
    parts = [f"time calibrated on {', '.join(own)}"] if own else []
    parts += [f"{', '.join(names)} not calibrated: {borrowed_words(label)}" for label, names in borrowed.items()]
    if not parts:
        return "time from data sheets, not calibrated on these cards"
    return "; ".join(parts) + (", elsewhere from data sheets" if others else "")


def matches(calibration: Calibration, gpu: Gpu) -> bool:
    """Whether a calibration was made on such a card (of a CPU: the same name, vector unit and number of threads)."""
    if gpu.vendor == CPU:
        mine = (gpu.name, gpu.architecture, gpu.sm_count)  # virtual machines name whole families alike
        device = calibration.device
        theirs = (device.get("name"), device.get("vector", gpu.architecture), device.get("threads"))
        return calibration.gpu_id == "cpu" and theirs == mine
    return calibration.gpu_id == gpu.gpu_id


def concerns(calibration: Calibration, gpu: Gpu) -> bool:
    """Whether a card could use coefficients of this calibration, as its own or borrowed."""
    return matches(calibration, gpu) or _akin(calibration, gpu)


def _akin(calibration: Calibration, gpu: Gpu) -> bool:
    """Whether a card may borrow from another: CPUs from CPUs, GPUs from their own generation's matrix units."""
    on_cpu = calibration.device.get("kind") == "cpu"
    if on_cpu or gpu.vendor == CPU:
        return on_cpu and gpu.vendor == CPU
    major = (calibration.device.get("compute_capability") or (0,))[0]
    return gpu.compute_capability is not None and bool(major == gpu.compute_capability[0])


def _distance(calibration: Calibration, gpu: Gpu) -> tuple[float, str]:
    """Difference of the compute capabilities and of the bandwidths' logarithms: generation and class of a card."""
    major, minor = calibration.device.get("compute_capability") or (0, 0)
    mine = gpu.compute_capability or (0, 0)
    generations = abs(major + minor / 10 - mine[0] - mine[1] / 10)
    theirs = calibration.device.get("bandwidth_bytes_per_s") or 1.0
    return generations + abs(math.log(theirs / (gpu.bandwidth_bytes_per_s or 1.0))), calibration.gpu_id


def _borrow(gpu: Gpu, other: Calibration) -> Coefficients:
    """The other card's dimensionless coefficients; what was published of the card itself stays."""
    items = dict(priors(gpu))
    own = {"matmul": gpu.measured_matmul_flops_per_s, "bandwidth": gpu.measured_bandwidth_bytes_per_s}
    for name, found in other.coefficients.items():
        if found.origin != "fitted" or found.unit in ("s", "bytes/s") or own.get(name):
            continue
        error = math.hypot(found.standard_error, BORROWED_ERROR * found.value)
        items[name] = replace(found, standard_error=error, origin="borrowed", source=f"fitted on {other.label}")
    wider = other.coefficients.formula_error
    return Coefficients(items, wider * BORROWED_FORMULA if wider else None, f"borrowed from {other.label}")


def _stack_notes(calibration: Calibration, versions: Versions | None) -> tuple[str, ...]:
    """Say which libraries differ in (major, minor) from those that the bursts ran."""
    differing = []
    for name in STACK if versions is not None else ():
        fitted, planned = calibration.versions.get(name, ""), getattr(versions, name)
        if fitted and tuple(int(part) for part in re.findall(r"\d+", fitted)[:2]) != tuple(planned):
            differing.append(f"{name} {fitted.partition('+')[0]} (planned {planned[0]}.{planned[1]})")
    if not differing:
        return ()
    return (f"the calibration was fitted with {', '.join(differing)}: step times may differ",)


_FRACTION = ("share of the data sheet's rate", 0.01, 1.0)
_MATMUL = ("share of the reached matrix-product rate", 0.01, 1.0)
_SECONDS = ("s", 0.0, 1e-2)
_PORTABLE = ("ratio to the rate of x @ weight.T", 0.02, 20.0)
_BYTES = "share of the reached bandwidth"

# name, value, standard error, (unit, low, high), origin, source
_PRIORS: tuple[tuple[str, float, float, tuple[str, float, float], Origin, str], ...] = (
    ("matmul", 0.82, 0.08, _FRACTION, "microbenchmark",
     "stas00/ml-engineering MAMF tables: best shapes reach 0.80 to 0.87 on A100 and H100"),
    ("matmul_fp32", 0.88, 0.08, _FRACTION, "microbenchmark",
     "Jia et al. 2019 (arXiv 1903.07486): cuBLAS single precision 7.2 of 8.1 TFLOPS on a T4"),
    ("matmul_int8", 0.65, 0.20, _FRACTION, "assumed",
     "cublasLt's igemm with Ampere's instructions (cutlass_80_tensorop_i16832gemm_s8)"),
    ("indexed", 1.25, 0.25, ("elements per clock and multiprocessor", 0.05, 32.0), "microbenchmark",
     "own profiles of an H200 (data/measurements/h200.json): conversions, broadcasts and strided passes of 16- and "
     "32-bit elements all run at 0.32e12 elements a second"),
    ("tile_reuse_half", 40.0, 20.0, ("elements", 1.0, 200.0), "assumed",
     "operand reuse at which a tile reaches half its rate: 64 x 64 tiles then run at 0.65 of 256 x 128"),
    ("matmul_k_half", 96.0, 48.0, ("elements", 1.0, 1000.0), "assumed",
     "inner dimension that a tile's prologue and epilogue cost"),
    ("bandwidth", 0.85, 0.05, _FRACTION, "microbenchmark",
     "BabelStream triad: 0.83 to 0.90 of the data sheet on V100, A100 and H100"),
    ("dequantize", 0.80, 0.15, (_BYTES, 0.05, 1.0), "assumed",
     "4-bit look-up kernel since bitsandbytes 0.48: near the memory's rate (bitsandbytes PR 1747)"),
    ("flash_forward", 0.76, 0.10, _MATMUL, "microbenchmark",
     "Dao 2023 (FlashAttention-2) figure 5: 0.66 of an A100's data sheet, long causal sequences, head size 128"),
    ("flash_backward", 0.65, 0.10, _MATMUL, "microbenchmark", "Dao 2023 figure 6: 0.56 of an A100's data sheet"),
    ("flash_hopper", 0.55, 0.10, ("share of the Ampere rate", 0.1, 1.0), "microbenchmark",
     "Dao 2023 figure 7: FlashAttention-2 reaches 335 of 989 TFLOPS on an H100, it uses no Hopper instructions"),
    ("flash_length_half", 600.0, 200.0, ("tokens", 0.0, 4000.0), "microbenchmark",
     "Dao 2023 figure 5: half the long-sequence rate at about 600 causal tokens"),
    ("cudnn_forward", 0.68, 0.12, _MATMUL, "assumed", "above FlashAttention-2 on Hopper"),
    ("cudnn_backward", 0.56, 0.12, _MATMUL, "assumed", "as the forward, less the recomputed scores"),
    ("efficient_forward", 0.40, 0.12, _MATMUL, "microbenchmark",
     "Dao 2023 figure 5: xFormers' CUTLASS kernel, about 100 TFLOPS on an A100"),
    ("efficient_backward", 0.25, 0.08, _MATMUL, "microbenchmark", "Dao 2023 figure 6: about 70 TFLOPS on an A100"),
    ("efficient_fp32", 0.50, 0.15, _MATMUL, "assumed", "SIMT variant of the CUTLASS kernel, on fp32 inputs"),
    ("kernel_latency", 2.5e-6, 1e-6, ("s", 0.0, 5e-6), "microbenchmark",
     "an empty kernel occupies the device 2 to 3 us"),
    ("launch_forward", 11e-6, 4e-6, _SECONDS, "assumed",
     "Python, dispatcher and autograd record per kernel of transformers and PEFT modules in eager mode"),
    ("launch_recomputation", 15e-6, 6e-6, _SECONDS, "assumed",
     "as forward, with a Python hook for every tensor that checkpointing would save"),
    ("launch_backward", 7e-6, 3e-6, _SECONDS, "assumed", "autograd's C++ engine and dispatcher per kernel"),
    ("launch_quantized", 40e-6, 20e-6, _SECONDS, "assumed",
     "a bitsandbytes operation: a Python custom operator and a ctypes call, instead of a dispatcher call"),
    ("launch_optimizer", 15e-6, 8e-6, _SECONDS, "assumed", "Python of the optimizer per tensor and per kernel"),
    ("framework_step", 6e-3, 4e-3, ("s", 0.0, 1.0), "assumed",
     "data collation, logging and callbacks per optimizer step of a training loop"),
    ("portable_nn", 0.3, 0.2, _PORTABLE, "assumed",
     "grad @ weight in 16 bits on a CPU without AVX-512: BlasKernel.cpp gemm_notrans_"),
    ("portable_tn", 2.0, 1.0, _PORTABLE, "assumed",
     "grad.T @ x in 16 bits on a CPU without AVX-512: BlasKernel.cpp gemm_transb_"),
    ("compiled_traffic", 0.45, 0.15, ("share of eager element-wise traffic", 0.05, 1.0), "assumed",
     "torch.compile fuses element-wise chains: what is left is the chains' ends"),
    ("host_link", 22e9, 5e9, ("bytes/s", 1e9, 5e11), "assumed", "pinned copies over PCIe 4.0 x16"),
)  # fmt: skip

NAMES = frozenset(name for name, *_ in _PRIORS)
"""Every coefficient that a card may have."""

# name, value, standard error; one thread of an AVX-512 Xeon with MKL and oneDNN products was looked at for the scale
_CPU_PRIORS: tuple[tuple[str, float, float, str], ...] = (
    ("matmul", 0.3, 0.15, "oneDNN bf16 products, converted where the CPU has no bf16 instructions"),
    ("matmul_fp32", 0.7, 0.2, "MKL sgemm; the nominal rate supposes two multiply-add units and no lower AVX clock"),
    ("tile_reuse_half", 12.0, 6.0, "rows and columns that a product's edges cost"),
    ("matmul_k_half", 10.0, 5.0, "short inner products of adapters"),
    ("bandwidth", 0.1, 0.05, "share of 32 bytes per cycle, from cache or memory"),
    ("dequantize", 0.4, 0.2, "bitsandbytes' CPU kernels"),
    ("flash_forward", 0.5, 0.25, "aten/src/ATen/native/cpu/FlashAttentionKernel.cpp on 16-bit inputs"),
    ("flash_backward", 0.25, 0.15, "the same kernel's backward"),
    ("efficient_fp32", 0.15, 0.08, "the same kernel on fp32 inputs"),
    ("flash_length_half", 0.0, 0.0, "blocks are short: no start-up to amortise"),
    ("kernel_latency", 0.0, 0.0, "an operation costs its dispatch only"),
    ("launch_forward", 10e-6, 6e-6, "Python, dispatcher and autograd record per operation"),
    ("launch_backward", 8e-6, 5e-6, "autograd's engine and dispatcher per operation"),
    ("launch_quantized", 30e-6, 20e-6, "a Python custom operator and a ctypes call"),
    ("launch_optimizer", 20e-6, 15e-6, "per operation over a list of tensors"),
)  # fmt: skip
"""Where a CPU's coefficients differ: all assumed. An error of 0: not a coefficient of a CPU."""
CPU_ATTENTION_HIGH = 4.0
"""Upper bound of a CPU's attention rate over its product rate."""

CPU_BOOST = 2.0
"""Upper bound of a CPU's rates over the nominal ones: cores run above the clock that the system states."""

MICROBENCHMARK_ERROR = 0.05
"""Relative standard error of a rate that was published for the card itself: assumed."""

_OLD_DEQUANTIZE = {(6, 0): 1.7, (7, 5): 1.5, (8, 0): 1.7, (9, 0): 1.7}
"""Compute capability -> how much slower 4-bit dequantization was before bitsandbytes 0.48 (PR 1747: 1.36 to 2.07
times on P100, A100, H100; 1.25 to 1.8 on T4; elsewhere 1.3 to 1.6 for small sizes only)."""


GPU_ONLY = ("indexed", "launch_recomputation", "matmul_int8")
"""Coefficients that a CPU does not have."""
HOPPER_INT8 = 0.4
"""Share of a Hopper data sheet's int8 rate that kernels made for Ampere can reach: its other half needs wgmma."""


def priors(gpu: Gpu) -> Coefficients:
    """Coefficients of an uncalibrated card: its own published microbenchmarks where there are any, else the class's."""
    items = {
        name: Coefficient(
            name=name, value=value, standard_error=error, unit=unit, low=low, high=high, origin=origin, source=source
        )
        for name, value, error, (unit, low, high), origin, source in _PRIORS
    }
    if gpu.vendor == CPU:
        items = {name: item for name, item in items.items() if name not in GPU_ONLY}
        for name, value, error, source in _CPU_PRIORS:
            base = items[name]
            # a CPU's attention kernel does not use the products' library: its rate is not bounded by theirs
            high = CPU_ATTENTION_HIGH if name.startswith(("flash_f", "flash_b", "efficient")) else base.high
            high = CPU_BOOST if base.unit == _FRACTION[0] else high
            items[name] = replace(base, value=value, standard_error=error, high=high, origin="assumed", source=source)
        return Coefficients(items)
    items = {name: item for name, item in items.items() if not name.startswith("portable")}
    if (gpu.compute_capability or (0, 0)) >= (9, 0):
        items["matmul_int8"] = replace(items["matmul_int8"], value=HOPPER_INT8, standard_error=HOPPER_INT8 / 5)
    for name, measured, nominal in (
        ("matmul", gpu.measured_matmul_flops_per_s, max(gpu.bf16_flops_per_s, gpu.fp16_flops_per_s)),
        ("bandwidth", gpu.measured_bandwidth_bytes_per_s, gpu.bandwidth_bytes_per_s),
    ):
        if measured and nominal:
            base = items[name]
            share = min(measured / nominal, 1.0)
            items[name] = Coefficient(
                name=name, value=share, standard_error=MICROBENCHMARK_ERROR * share, unit=base.unit, low=base.low,
                high=base.high, origin="microbenchmark", source=f"measured on {gpu.name} (data/gpus.json)",
            )  # fmt: skip
    return Coefficients(items)


def old_dequantize_factor(capability: tuple[int, int]) -> float:
    """How many times longer a 4-bit dequantization took before bitsandbytes 0.48."""
    return _OLD_DEQUANTIZE.get(capability, 1.1)
