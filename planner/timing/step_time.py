"""Seconds of a step: every kernel of the program priced on a card, the host that launches them, what bounds the step.

A kernel takes the longer of its arithmetic and its memory traffic. The host launches kernels ahead of the device, so a
micro batch takes the longer of the two. Inputs: the record of `planner.step.program` (FLOPs, bytes, launches, matrix
shapes), the card's data sheet, `planner.timing.coefficients`'s coefficients. Seconds are floats, or arrays in a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.base.records import NamedTuple, record
from planner.device.hardware import Gpu
from planner.step.engine import Record
from planner.step.kernels import LEDGER, LINK_CLASS, LINK_COEFFICIENT, Kernel
from planner.timing import lanes
from planner.timing.arrays import Number, is_more, maximum, mostly, some
from planner.timing.coefficients import Coefficients
from planner.timing.prices import PRICES, Shares
from planner.timing.rates import Priced, Rates
from planner.training.spec import TrainingSpec

PARTS = ("forward", "recomputation", "backward", "optimizer")
MICRO_BATCH = (("forward",), ("recomputation", "backward"))
"""The phases of a micro batch by their parts: the host is ahead of the device by phases."""
CLASSES = tuple(LEDGER)
"""Classes of kernels in the time ledger."""
SHORTEST_KERNEL_S = 1.6e-6
"""What a profiler shows of the shortest kernels (H200: 1.5 to 1.8 us); the rest of kernel_latency is the gap to the
next."""
NINETY_PERCENT = 1.645
"""Standard errors on either side of a 90 % interval."""
FORMULA_ERROR = 0.10
"""Relative standard error of what the formulas leave out (clocks, other kernels, data loading): assumed."""


@record
class Seconds:
    """An interval in seconds around an expected value."""

    low: Number
    expected: Number
    high: Number


@record
class LedgerLine:
    """One class of operations over one optimizer step."""

    name: str
    seconds: Number
    """That the step takes for it: none for copies that run beside the kernels."""
    flops: Number
    bytes: Number
    launches: Number
    bound: str
    """What most of its time waits for: compute or memory."""


@record
class StepTime:
    """Time of one optimizer step."""

    forward_s: Number
    recomputation_s: Number
    backward_s: Number
    """These three: per micro batch."""
    optimizer_s: Number
    overhead_s: Number
    """Per optimizer step: the training loop's own work."""
    gradient_accumulation_steps: Number
    step_s: Seconds
    """Of the whole optimizer step."""
    perfect_overlap_s: Number
    """Lower bound: arithmetic, memory traffic and launches all hide behind the longest of them."""
    no_overlap_s: Number
    """Upper bound: the three one after another."""
    bound: str
    """compute, memory bandwidth, host transfer or kernel launch."""
    ledger: tuple[LedgerLine, ...]
    launch_wait_s: Number
    """Device idle time, waiting for the host to launch."""
    tokens: Number
    """Positions computed in one optimizer step."""
    model_flops: Number
    hardware_flops: Number
    """Model FLOPs and what checkpointing computes again."""
    peak_flops_per_s: float
    coefficients: Coefficients
    uncertainty: tuple[tuple[str, Number], ...]
    """(coefficient, relative share) of the interval."""

    @property
    def tokens_per_s(self) -> Number:
        """Computed positions per second."""
        return self.tokens / self.step_s.expected

    @property
    def model_flops_utilization(self) -> Number:
        """MFU: the model's own FLOPs over what the card's data sheet offers in that time."""
        return self.model_flops / (self.step_s.expected * self.peak_flops_per_s)

    @property
    def hardware_flops_utilization(self) -> Number:
        """HFU: all FLOPs, recomputation included."""
        return self.hardware_flops / (self.step_s.expected * self.peak_flops_per_s)


class WholeStep(NamedTuple):
    """Seconds of one optimizer step."""

    device: Number
    host: Number
    wait: Number
    """Device idle time, waiting for the host to launch."""
    total: Number
    """Expected, with the training loop's own work."""
    spread: Number
    """Half of the 90 % interval over the expected value."""
    shares: tuple[tuple[str, Number], ...]
    """(coefficient, relative share) of the interval."""


def step_time(
    run: Record, training: TrainingSpec, gpu: Gpu, coefficients: Coefficients, room: Number | None = None
) -> StepTime:
    """Price the kernels of one recorded step (second step: optimizer state exists) on `gpu`.

    room: bytes that the card has left for managed memory beside the step's peak; None: enough.
    """
    rates = Rates(gpu, coefficients, training)
    sums = Sums(rates, training)
    sums.room = room
    for kernel in run.kernels:
        sums.add(kernel, run)
    return sums.result(coefficients)


def phase_seconds(
    run: Record, training: TrainingSpec, gpu: Gpu, coefficients: Coefficients
) -> tuple[dict[str, Number], Number, dict[str, Number]]:
    """Seconds of each of PARTS (of one micro batch, and of the optimizer), of the whole step, of each of CLASSES.

    What a fit asks for thousands of times: the same sums as `step_time`, without its ledger.
    """
    sums = Sums(Rates(gpu, coefficients, training), training, explained=False)
    for kernel in run.kernels:
        sums.add(kernel, run)
    whole = sums.whole_step(coefficients)
    return sums.parts(whole), whole.total, sums.class_s


class Sums:
    """Seconds, FLOPs, bytes and launches added up by part of the step and by class of operation."""

    def __init__(self, rates: Rates, training: TrainingSpec, explained: bool = True) -> None:
        """`explained`: keep what the ledger, the bounds and the interval need."""
        self.rates = rates
        self.training = training
        self.explained = explained
        self.device = dict.fromkeys(PARTS, 0.0)
        self.host = dict.fromkeys(PARTS, 0.0)
        self.flops = dict.fromkeys(PARTS, 0.0)
        self.compute: Number = 0.0
        self.memory: Number = 0.0
        self.latency: Number = 0.0
        self.transfers: Number = 0.0
        """Seconds of copies between card and host over one optimizer step, hidden or not."""
        self.in_layers = dict.fromkeys(PARTS, 0.0)
        """Device seconds of the kernels of decoder layers, of `device`."""
        self.aside = dict.fromkeys(PARTS, 0.0)
        """Seconds of copies in a stream of their own."""
        self.paged: tuple[Number, Number] = (0.0, 0.0)
        """(bytes, seconds) of copies of managed memory where there is no room for it."""
        self.room: Number | None = None
        """Bytes that the card has for it; None: enough."""
        self.classes = {name: [0.0, 0.0, 0.0, 0.0, 0.0] for name in CLASSES}
        """Per class: seconds, FLOPs, bytes, launches, seconds bound by arithmetic (all over one optimizer step)."""
        self.class_s: dict[str, Number] = dict.fromkeys(CLASSES, 0.0)
        """Seconds that kernels run over one optimizer step, by class: without the gaps between them."""
        self.by_coefficient: dict[str, Number] = {}
        self.known: dict[tuple[Any, ...], tuple[Priced, Number, Number, Shares]] = {}
        """Of equal kernels: the price, the longer of arithmetic and traffic, 1 where it is arithmetic, what follows
        which coefficient."""
        self.accumulation = training.gradient_accumulation_steps

    def add(self, kernel: Kernel, run: Record) -> None:
        """Count one recorded kernel as often as its segment of the step stands for layers."""
        segment = run.segments[kernel.segment]
        part = part_of(segment.phase, kernel.recomputed)
        if part is None:
            return
        times, kind = segment.repeat, kernel.kind
        price, longer, bound, shares = self._price(kernel)
        seconds = longer + price.latency
        if kind.only_without_room:
            self.paged = self.paged[0] + kernel.bytes * times, self.paged[1] + seconds * times
            return
        launches = kernel.count * self.rates.launched(kernel) * times
        self.host[part] += self.rates.host_s(kind, part, launches, times)
        steps = times if part == "optimizer" else times * self.accumulation
        over_link = PRICES[kind.price].over_link
        if over_link:
            self.transfers += seconds * steps
        if kind.lane == "copy":
            self.aside[part] += seconds * times
            self.classes[kind.ledger][2] += kernel.bytes * steps
            self.classes[kind.ledger][3] += launches * steps / times
            return
        self.device[part] += seconds * times
        if segment.layer >= 0:
            self.in_layers[part] += seconds * times
        name = kind.ledger_class(segment.layer)
        self.class_s[name] += (longer + kernel.count * SHORTEST_KERNEL_S) * steps
        if not self.explained:
            return
        self.flops[part] += kernel.flops * times
        if not over_link:
            self.compute += price.compute * steps
            self.memory += price.memory * steps
            self.latency += price.latency * steps
        line = self.classes[name]
        for place, amount in enumerate((seconds, kernel.flops, kernel.bytes, launches / times, seconds * bound)):
            line[place] += amount * steps
        for coefficient, share in shares:
            held = self.by_coefficient.get(coefficient, 0.0)
            self.by_coefficient[coefficient] = held + seconds * share * steps

    def _price(self, kernel: Kernel) -> tuple[Priced, Number, Number, Shares]:
        key = (
            kernel.op, kernel.dtype, kernel.shape, kernel.bytes, kernel.flops, kernel.count, kernel.layout,
            kernel.elements,
        )  # fmt: skip
        found = self.known.get(key)
        if found is None:
            price = self.rates.price(kernel, self.training.seq_len)
            bound = is_more(price.compute, price.memory)
            shares = shares_of(self.rates, kernel, bound) if self.explained else ()
            found = self.known[key] = price, maximum(price.compute, price.memory), bound, shares
        return found

    def whole_step(self, coefficients: Mapping[str, Any]) -> WholeStep:
        """One optimizer step: what the device and the host take, the wait between them, and how sure that is.

        `coefficients`: by name, what has a `relative_error`. To be called once.
        """
        self._add_transfers()
        steps = self.accumulation
        micro = ("forward", "recomputation", "backward")
        device = sum(self.device[p] for p in micro) * steps + self.device["optimizer"]
        host = sum(self.host[p] for p in micro) * steps + self.host["optimizer"]
        overhead = self.rates.c["framework_step"]
        # what a GPU waits for its host; a CPU does both in turn
        wait = host if self.rates.gpu.synchronous else maximum(self._queued() - device, 0.0 * device)
        total = device + wait + overhead
        shares = _uncertainty(self.by_coefficient, wait, overhead, total, coefficients)
        spread = NINETY_PERCENT * sum(share**2 for _, share in shares) ** 0.5
        return WholeStep(device, host, wait, total, spread, shares)

    def _add_transfers(self) -> None:
        """Add to the device's seconds what it waits for copies that are not in the kernels' order.

        Copies in a stream of their own run beside the decoder layers' kernels, which wait for them layer by layer: of
        equal layers the device waits for what the copies of all take longer than the kernels of all. Managed memory
        moves only where the card has less room than its bytes (each is counted twice, in and out).
        """
        for parts in MICRO_BATCH:
            aside = self.aside[parts[0]]
            if some(aside):
                layers = sum(self.in_layers[part] for part in parts)
                self._wait_for_host(parts[0], lanes.beside(layers, "copy", aside), self.accumulation)
        moved, seconds = self.paged
        if self.room is not None and some(moved):
            moves = (moved / 2 > self.room) * 1.0
            self.transfers = self.transfers + seconds * moves
            line = self.classes[LINK_CLASS]
            line[2] = line[2] + moved * moves
            self._wait_for_host("optimizer", seconds * moves, 1)

    def _wait_for_host(self, part: str, seconds: Number, steps: Number) -> None:
        """Count seconds of a part, which occurs `steps` times in an optimizer step, as the host's link's."""
        self.device[part] = self.device[part] + seconds
        whole = seconds * steps
        self.by_coefficient[LINK_COEFFICIENT] = self.by_coefficient.get(LINK_COEFFICIENT, 0.0) + whole
        self.class_s[LINK_CLASS] = self.class_s[LINK_CLASS] + whole
        line = self.classes[LINK_CLASS]
        line[0] = line[0] + whole  # out of place: in a sweep either may be the wider array

    def _queued(self) -> Number:
        """Seconds of a step whose host launches ahead."""
        micro = [(sum(self.host[p] for p in parts), sum(self.device[p] for p in parts)) for parts in MICRO_BATCH]
        last = self.host["optimizer"], self.device["optimizer"]
        return lanes.launched_ahead(micro, self.accumulation, last)

    def parts(self, whole: WholeStep) -> dict[str, Number]:
        """Seconds of each part: its kernels, and its share of the waiting for the host."""
        host = maximum(whole.host, 1e-12)
        return {p: self.device[p] + whole.wait * self.host[p] / host for p in PARTS}

    def result(self, coefficients: Coefficients) -> StepTime:
        """Put the sums together."""
        steps = self.accumulation
        micro = ("forward", "recomputation", "backward")
        whole = self.whole_step(coefficients)
        device, host, wait, total, spread, shares = whole
        overhead = self.rates.c["framework_step"]
        lower = maximum(maximum(self.compute, self.memory), maximum(self.transfers, host))
        parts = self.parts(whole)
        return StepTime(
            forward_s=parts["forward"],
            recomputation_s=parts["recomputation"],
            backward_s=parts["backward"],
            optimizer_s=parts["optimizer"],
            overhead_s=overhead,
            gradient_accumulation_steps=steps,
            step_s=Seconds(low=total / (1 + spread), expected=total, high=total * (1 + spread)),
            perfect_overlap_s=lower,
            no_overlap_s=self.compute + self.memory + self.latency + self.transfers + host + overhead,
            bound=self._bound(wait, device),
            ledger=tuple(self._line(name) for name in CLASSES if some(self.classes[name][0] + self.classes[name][2])),
            launch_wait_s=wait,
            tokens=self.training.rows_tokens * steps,
            model_flops=(self.flops["forward"] + self.flops["backward"]) * steps,
            hardware_flops=sum(self.flops[p] for p in micro) * steps,
            peak_flops_per_s=self.rates.peak(self._compute_dtype()),
            coefficients=coefficients,
            uncertainty=shares,
        )

    def _compute_dtype(self) -> str:
        """dtype of the products that dominate."""
        training = self.training
        if training.autocast != "none":
            return training.autocast
        return training.quantization.compute_dtype if training.method == "qlora" else training.base_dtype

    def _bound(self, wait: Number, device: Number) -> str:
        if mostly(wait / maximum(device + wait, 1e-12) * 2.0):  # a quarter of the step spent waiting
            return "kernel launch"
        if mostly(self.classes[LINK_CLASS][0] / maximum(device, 1e-12)):
            return "host transfer"
        arithmetic = sum(line[4] for line in self.classes.values())
        return "compute" if mostly(arithmetic / maximum(device, 1e-12)) else "memory bandwidth"

    def _line(self, name: str) -> LedgerLine:
        seconds, flops, moved, launches, arithmetic = self.classes[name]
        bound = "compute" if mostly(arithmetic / maximum(seconds, 1e-12)) else "memory"
        return LedgerLine(name=name, seconds=seconds, flops=flops, bytes=moved, launches=launches, bound=bound)


def shares_of(rates: Rates, kernel: Kernel, bound: Number) -> Shares:
    """The coefficients that a kernel's time is proportional to, with their shares; `bound`: 1 where by arithmetic."""
    return PRICES[kernel.kind.price].follows(rates, kernel, bound)


def part_of(phase: str, recomputed: bool) -> str | None:
    """The part of the step a kernel belongs to; None before the step begins."""
    if recomputed:
        return "recomputation"
    if phase in ("load", "state"):
        return None
    return phase if phase in ("backward", "optimizer") else "forward"


def _uncertainty(
    by_coefficient: dict[str, Number], wait: Number, overhead: Number, total: Number, coefficients: Mapping[str, Any]
) -> tuple[tuple[str, Number], ...]:
    """Relative standard error of the step that each coefficient's own error causes (its share of the time)."""
    amounts = {**by_coefficient, "launch_forward": wait, "framework_step": overhead}
    held_out = getattr(coefficients, "formula_error", None)
    shares: list[tuple[str, Number]] = [("formulas", FORMULA_ERROR if held_out is None else held_out)]
    for name, seconds in amounts.items():
        if held_out is not None and coefficients[name].origin == "fitted":
            continue  # the error on held-out runs contains its error
        share = seconds / total * coefficients[name].relative_error
        share = share * (share > 0.001)
        if some(share):
            shares.append((name, share))
    return tuple(shares)


SHARED_FORMULA = 0.5
"""Share of the formulas' variance that two runs on one card in one framework have in common: assumed."""
MEASUREMENT_ERROR = 0.05
"""Relative standard error of a published run's time: repeats differ by that much."""

Terms = tuple[tuple[str, float], ...]


def anchor_factor(anchor: Terms, target: Terms, ratio: float) -> float:
    """What one measured run says about another: the factor on the other's predicted seconds.

    The posterior mean of a Gaussian model. log(measured / predicted) of a run is a sum of independent errors, one per
    coefficient, each as large as that coefficient's share of the run's time times its relative error (the terms of
    `StepTime.uncertainty`). Runs that wait for the same things share those errors; the rest of the anchor's deviation
    is its own. `ratio` is the anchor's measured over predicted time.
    """
    mine = dict(anchor)
    shared = sum(
        mine.get(name, 0.0) * share * (SHARED_FORMULA if name == "formulas" else 1.0) for name, share in target
    )
    variance = sum(share**2 for share in mine.values()) + MEASUREMENT_ERROR**2
    return float(ratio ** (shared / variance))
