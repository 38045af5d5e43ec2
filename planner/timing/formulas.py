"""A fingerprint of the time model: it changes when `planner.timing.step_time` prices a kernel otherwise, and only then.

Coefficients belong to the formulas that they were fitted with. So the formulas price fixed kernels on fixed cards with
fixed coefficients, and the prices are hashed: the code's behaviour, not its text. What a step's program records
(`planner.step`), the values of priors and the widths of intervals are not part of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

from planner.base.records import replace
from planner.device.hardware import CPU, Gpu
from planner.step.engine import Record, Segment
from planner.step.kernels import KERNELS, Kernel, Layout, Shape
from planner.timing import rates as timing_rates
from planner.timing import step_time
from planner.timing.coefficients import Coefficient, Coefficients, priors
from planner.training.spec import LoraSpec, TrainingSpec, Versions

DIGITS = 9
"""Significant digits that are hashed: more than sums of floats differ by between machines."""

CARD = Gpu(
    gpu_id="toy", name="toy", memory_bytes=2**34, compute_capability=(8, 0), sm_count=3, bandwidth_bytes_per_s=1e9,
    fp32_flops_per_s=1e9, tf32_flops_per_s=4e9, fp16_flops_per_s=1e10, bf16_flops_per_s=8e9, bf16_native=True,
)  # fmt: skip
CARDS = (
    CARD,
    replace(CARD, compute_capability=(9, 0)),
    replace(CARD, compute_capability=(7, 5), bf16_native=False, tf32_flops_per_s=0.0, bf16_flops_per_s=0.0),
    replace(CARD, vendor=CPU, architecture="avx2", compute_capability=None, bf16_flops_per_s=1e9),
    replace(CARD, vendor=CPU, architecture="avx512f", compute_capability=None),
)
"""Cards on which arithmetic, memory traffic, launches and transfers of the kernels below take about as long."""

SETTINGS = TrainingSpec(method="lora", lora=LoraSpec(), micro_batch_size=2, seq_len=300)
TRAININGS = (
    SETTINGS,
    replace(SETTINGS, compile=True, tf32=True, gradient_accumulation_steps=3),
    replace(SETTINGS, versions=Versions(bitsandbytes=(0, 47))),
)
PRODUCTS: tuple[Shape, ...] = ((1, 700, 300, 400), (5, 40, 30, 20), (1, 64, 16, 5000))
LAYOUTS: tuple[Layout, ...] = ("nt", "nn", "tn")
SCALES = {"tile_reuse_half": 50.0, "matmul_k_half": 50.0, "flash_length_half": 500.0, "host_link": 1e9}
"""Coefficients that are of another size than one."""
PHASES = (("load", False), ("forward", False), ("loss", False), ("backward", True), ("backward", False),
          ("optimizer", False))  # fmt: skip
"""(phase, recomputed)"""


def toy_coefficients() -> Coefficients:
    """Every coefficient, with a value that its name alone decides: between 0.1 and 0.9 times its scale."""
    items = {}
    for name in sorted({*priors(CARD), *priors(CARDS[-1])}):
        value = SCALES.get(name, 1.0) * (0.1 + 0.8 * zlib.crc32(name.encode()) / 2**32)
        items[name] = Coefficient(
            name=name, value=value, standard_error=0.0, unit="", low=0.0, high=2 * value, origin="assumed", source=""
        )
    return Coefficients(items)


def toy_kernels(segment: int = 0, recomputed: bool = False) -> Iterator[Kernel]:
    """Kernels of every kind, of about a second each on the toy cards."""
    for number, (op, kind) in enumerate(KERNELS.items()):
        if kind.price == "product":
            if number:  # the first is among `toy_products`
                yield Kernel(op, "bf16", 1e8, 1e8, 2, segment, PRODUCTS[0], recomputed)
            continue
        moved = (0.5 + 0.01 * number) * 1e9
        fused = kind.attention is not None
        for dtype in ("bf16", "fp32") if fused else ("bf16",):
            yield Kernel(op, dtype, 1e9, moved, 1.5, segment, None, recomputed, elements=2e9 if fused else 3e8)


def toy_products() -> Iterator[Kernel]:
    """Matrix products of several shapes, dtypes and layouts."""
    for shape in PRODUCTS:
        yield Kernel("matmul", "fp32", 1e8, 1e8, 2, 0, shape, False)
    for dtype in ("fp16", "int8"):
        yield Kernel("matmul", dtype, 1e8, 1e8, 1, 0, PRODUCTS[0], False)
    for layout in LAYOUTS:
        yield Kernel("matmul", "bf16", 1e8, 1e8, 1, 0, PRODUCTS[1], False, layout)


def toy_step() -> Record:
    """A step with some of the kernels in each phase; segments stand for one and for four layers, or are outside."""
    run = Record()
    for number, (phase, recomputed) in enumerate(PHASES):
        run.segments.append(Segment(phase, -1 if phase == "loss" else number, 1 + 3 * (number % 2), 0))
        for place, kernel in enumerate(toy_kernels(number + 1, recomputed)):
            if place % len(PHASES) == number:
                run.kernels.append(kernel)
    return run


def _prices(
    kernels: tuple[Kernel, ...], run: Record, card: Gpu, training: TrainingSpec, coefficients: Coefficients
) -> Iterator[Any]:
    rates = timing_rates.Rates(card, coefficients, training)
    for kernel in kernels:
        price = rates.price(kernel, training.seq_len)
        yield kernel.op, *price, rates.latency_share(kernel), rates.launched(kernel)
    for part in step_time.PARTS:
        for op in ("elementwise", "optimizer", "dequantize", "int8_quantize"):
            yield rates.host_s(KERNELS[op], part, 2.0, 3.0)
    sums = step_time.Sums(rates, training)
    sums.room = 0.0
    for kernel in run.kernels:
        sums.add(kernel, run)
    whole = sums.whole_step(coefficients)
    yield whole.device, whole.host, whole.wait, whole.total
    yield tuple(sums.class_s.values())


def _queues(rates: timing_rates.Rates, training: TrainingSpec) -> tuple[float, ...]:
    """Steps in which host and device in turn take longest in each phase."""
    found = []
    errors = dict.fromkeys(rates.c, _NO_ERROR)
    for longest in range(2 ** len(step_time.PARTS)):
        sums = step_time.Sums(rates, training)
        for place, part in enumerate(step_time.PARTS):
            sums.device[part], sums.host[part] = (3.0 + place, 1.0) if longest >> place & 1 else (1.0, 2.0 + place)
        found.append(float(sums.whole_step(errors).total))
    return tuple(found)


_NO_ERROR = Coefficient(name="", value=1.0, standard_error=0.0, unit="", low=1.0, high=1.0, origin="assumed", source="")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_text(item) for item in value)
    return value if isinstance(value, str) else f"{float(value):.{DIGITS}g}"


@cache
def fingerprint() -> str:
    """Eight hexadecimal digits that stand for what the formulas say now."""
    coefficients = toy_coefficients()
    kernels, run = (*toy_kernels(), *toy_products()), toy_step()
    found: list[Any] = [kind.ledger_class(layer) for kind in KERNELS.values() for layer in (-1, 0)]
    for card in CARDS:
        for training in TRAININGS if card is CARD else TRAININGS[:1]:
            found += _prices(kernels, run, card, training, coefficients)
    for training in TRAININGS[:2]:
        found += _queues(timing_rates.Rates(CARD, coefficients, training), training)
    return f"{zlib.crc32(chr(10).join(_text(value) for value in found).encode()):08x}"
