"""sweep(model, training, cards, axes): memory and time of many configurations at once.

Live memory (what is allocated, without what unsplit blocks have beyond their requests) and time are in every cell those
of `predict`: bytes to the byte, seconds to 1e-9 (tests/sweep/test_sweep_equals_predict.py). What only a replay of the
allocator shows is estimated from one replay or assumed (`judge`): unsplit blocks (on an H200 nothing for large jobs,
2.8 % for a small one), reserved and device memory, and a verdict that hangs on them. Few cells are replayed one by one
(`replayed`) and are `predict`'s in everything.

Numbers (micro batch, length, rank, accumulation) are axes of one evaluation; each choice (quantization,
checkpointing, ...) is an evaluation of its own. The program runs once per structure that occurs: see
`planner.base.polynomials` for how cells part ways, `planner.sweep.memory` and `planner.sweep.time` for the arrays.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput, MissingDependency, unknown
from planner.base.polynomials import Grid, Mixed
from planner.base.records import fields, record, replace
from planner.device import cuda_rules
from planner.device.hardware import Gpu
from planner.model.spec import ModelSpec
from planner.plan import verdict
from planner.plan.intervals import FRAGMENTATION, uncertainty
from planner.plan.predict import predict
from planner.step import program
from planner.step.architecture import architecture
from planner.step.engine import Record
from planner.sweep.memory import Levels
from planner.sweep.time import CardRates, Clock, kernel_groups, signature
from planner.timing.coefficients import Coefficients, priors
from planner.timing.rates import predictable
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec

MOST_CELLS = 5_000_000
"""Cells of one evaluation; larger grids are evaluated piece by piece."""
REPLAYED_CELLS = 24
"""Cells of a result of `sweep` up to which the allocator is replayed in each (about 50 ms a cell)."""


@record
class Axes:
    """The numbers of a sweep; every combination is a cell, in this order."""

    micro_batch_size: tuple[int, ...] = (1,)
    seq_len: tuple[int, ...] = (2048,)
    r: tuple[int, ...] = (8,)
    gradient_accumulation_steps: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            values = getattr(self, name)
            if not values or not all(type(value) is int and value > 0 for value in values):
                raise InvalidInput(f"axis {name} needs whole numbers above 0")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Cells along each axis."""
        return len(self.micro_batch_size), len(self.seq_len), len(self.r), len(self.gradient_accumulation_steps)

    @property
    def size(self) -> int:
        """Number of cells."""
        batches, lengths, ranks, steps = self.shape
        return batches * lengths * ranks * steps


NUMBERS = ("micro_batch_size", "seq_len", "r", "gradient_accumulation_steps")


def number_of(training: TrainingSpec, key: str) -> int:
    """The value that a number has in `training` (rank 1 where there is no adapter)."""
    if key == "r":
        return training.lora.r if training.lora is not None else 1
    value: int = getattr(training, key)
    return value


class Cells(NamedTuple):
    """One choice of settings over all cells: arrays [cards, micro batch, length, rank, accumulation]."""

    training: TrainingSpec
    cards: tuple[Gpu, ...]
    axes: Axes
    allocated_bytes: Any
    """Peak of max_memory_allocated, int64: `predict`'s less its unsplit blocks, which only `replayed` adds."""
    static_bytes: Any
    """Alive before the forward."""
    step_s: Any
    """Seconds of an optimizer step; nan where the card's rates are not known."""
    step_spread: Any
    """Half of the 90 % interval over step_s: low = step_s / (1 + spread), high = step_s * (1 + spread)."""
    runs: int = 0
    """Program runs it took."""


class Surplus(NamedTuple):
    """What is reserved beyond live memory, as a share of what of that lies above the static bytes.

    nan where each cell has its own replay.
    """

    expected: float
    high: float
    basis: str


ASSUMED_SURPLUS = {"none": Surplus(0.07, 0.25, "assumed"), "": Surplus(0.30, 1.0, "assumed")}
"""Without a replay, by checkpointing. Set by eye from about 240 replays of drawn cells of five models by this planner's
own allocator (0.01 to 0.17 without checkpointing, 0.09 to 1.05 with it, the largest for steps of few tokens): neither
fitted nor measured on a card."""
ANCHOR_SPREAD = 2.0
"""Upper end of the surplus over that of the replayed cell: set by eye from the same replays; tests/sweep/test_sweep.py
counts how often a replay lies above it."""


class LiveBytes(NamedTuple):
    """What tensors take at the peak, in every cell."""

    low: Any
    expected: Any
    high: Any


class Judged(NamedTuple):
    """Memory on the device and verdict in every cell: arrays like those of `Cells`."""

    reserved_bytes: Any
    device_low_bytes: Any
    device_bytes: Any
    device_high_bytes: Any
    headroom_bytes: Any
    verdict: Any
    """Numbers of `planner.plan.verdict.VERDICTS`."""
    surplus: Surplus


def replayed_surplus(model: ModelSpec, cells: Cells) -> Surplus:
    """Replay the allocator in one cell, of those that fit the largest card the one that takes most."""
    import numpy as np

    roomiest = max(range(len(cells.cards)), key=lambda number: cells.cards[number].free_bytes)
    peaks = cells.allocated_bytes[roomiest]
    room = cells.cards[roomiest].rooms[1]
    fitting = np.where(peaks <= room, peaks, -1)
    place = np.unravel_index(fitting.argmax() if fitting.max() > 0 else peaks.argmin(), peaks.shape)
    training = at(cells, tuple(int(index) for index in place))
    found = predict(model, training, replace(cells.cards[roomiest], memory_bytes=2**60, used_by_others_bytes=0))
    live = int(peaks[place])
    share = (found.reserved.expected - live) / max(live - found.breakdown.static_bytes, 1)
    return Surplus(share, ANCHOR_SPREAD * share, "replayed in one cell")


def assumed_surplus(training: TrainingSpec) -> Surplus:
    """The surplus where no cell is replayed."""
    return ASSUMED_SURPLUS["none" if training.gradient_checkpointing == "none" else ""]


def at(cells: Cells, place: Sequence[int]) -> TrainingSpec:
    """The settings of one cell: positions of micro batch, length, rank and accumulation."""
    return at_place(cells.training, cells.axes, place)


def at_place(training: TrainingSpec, axes: Axes, place: Sequence[int]) -> TrainingSpec:
    """`training` with the numbers at one place of the axes."""
    batch, length, rank, steps = (getattr(axes, name)[i] for name, i in zip(NUMBERS, place, strict=True))
    return replace(
        training,
        micro_batch_size=batch,
        seq_len=length,
        lora=replace(training.lora, r=rank) if training.lora is not None else None,
        gradient_accumulation_steps=steps,
    )


def judge(model: ModelSpec, cells: Cells, surplus: Surplus) -> Judged:
    """Estimate reserved and device memory from the surplus, and say what fits.

    The allocator is not replayed in every cell. Live memory is exact, so "does not fit" is `predict`'s verdict too
    (which may also say so where only unsplit blocks are too much). "fits" also wants room for the whole expected cache,
    which `predict` lets shrink: where only that is missing, this says "too close to call" and `predict` may say "fits".
    """
    import numpy as np

    share = sum(part for _, part in uncertainty(model, cells.training))
    peak = cells.allocated_bytes
    low, most = (peak * (1 - share)).astype(np.int64), (peak * (1 + share)).astype(np.int64)
    above = peak - cells.static_bytes
    expected = peak + (surplus.expected * above).astype(np.int64)
    high = np.maximum(((peak + surplus.high * above) * (1 + share + FRAGMENTATION)).astype(np.int64), most)
    free = np.array([card.free_bytes for card in cells.cards], dtype=np.int64).reshape(-1, 1, 1, 1, 1)
    beyond = [np.array([card.context_bytes[i] for card in cells.cards]).reshape(free.shape) for i in range(3)]
    rooms = [free - context for context in beyond]
    live = LiveBytes(low, peak, most)
    number = verdict.judge(live, (rooms[0], rooms[1], rooms[2]), expected > rooms[1]).astype(np.int8)
    reserved = np.where(peak <= rooms[1], np.minimum(expected, rooms[1]), expected)  # the cache cannot outgrow it
    high = np.where(most <= rooms[1], np.maximum(reserved, np.minimum(high, rooms[2])), high)
    device = reserved + beyond[1]
    return Judged(reserved, low + beyond[0], device, high + beyond[2], free - device, number, surplus)


def replayed(model: ModelSpec, cells: Cells, coefficients: Mapping[str, Coefficients]) -> tuple[Cells, Judged]:
    """Ask `predict` for every cell: allocated memory with unsplit blocks, reserved and device memory, the verdict.

    `coefficients`: by GPU id; the card's priors where it has none.
    """
    np = require_numpy()
    shape = cells.allocated_bytes.shape
    allocated, reserved, low, expected, high, headroom, number = (np.zeros(shape, dtype=np.int64) for _ in range(7))
    for place in np.ndindex(shape):
        card = cells.cards[place[0]]
        found = predict(model, at(cells, place[1:]), card, coefficients=coefficients.get(card.gpu_id))
        assert found.verdict is not None
        allocated[place], reserved[place] = found.allocated.expected, found.reserved.expected
        low[place], expected[place], high[place] = found.device.low, found.device.expected, found.device.high
        headroom[place], number[place] = found.headroom_bytes, verdict.VERDICTS.index(found.verdict)
    nowhere = Surplus(float("nan"), float("nan"), "replayed in every cell")
    judged = Judged(reserved, low, expected, high, headroom, number, nowhere)
    return cells._replace(allocated_bytes=allocated), judged


def require_numpy() -> Any:
    """Return numpy.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise MissingDependency("sweeps need numpy; pip install 'loraplan[tables]'") from error
    return np


class Sweeper:
    """Evaluates choices of settings of one model on the same axes: they share what they have in common."""

    def __init__(self, model: ModelSpec, axes: Axes, coefficients: Mapping[str, Coefficients] | None = None) -> None:
        np = require_numpy()
        if axes.size > MOST_CELLS:
            raise InvalidInput(f"{axes.size:,} cells at once; at most {MOST_CELLS:,}: split an axis")
        self.np, self.model, self.axes = np, model, axes
        self.coefficients = dict(coefficients or {})
        """By GPU id; the card's priors where it has none."""
        batch, length = np.meshgrid(axes.micro_batch_size, axes.seq_len, indexing="ij")
        self.grid = Grid(batch.ravel(), length.ravel(), axes.r)
        self.clocks: dict[Any, Clock] = {}

    def cells(self, training: TrainingSpec, cards: Sequence[Gpu]) -> Cells:
        """Evaluate one choice of settings on every card.

        Raises:
            PlannerError: settings that exclude each other or that the model does not have.
        """
        np, axes = self.np, self.axes
        shape = (len(cards), self.grid.pairs, self.grid.ranks, axes.shape[3])
        made = Cells(
            training,
            tuple(cards),
            axes,
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape, dtype=np.int64),
            np.full(shape, np.nan),
            np.full(shape, np.nan),
        )
        classes: dict[Any, list[int]] = {}
        four_bit = QUANTIZATIONS[training.quantization.kind].packed_4bit
        for number, card in enumerate(cards):
            arch = architecture(card, training)
            classes.setdefault(cuda_rules.program_class(arch, four_bit=four_bit), []).append(number)
        runs = sum(self._fill(made, numbers) for numbers in classes.values())
        full = (len(cards), *axes.shape)
        return made._replace(
            allocated_bytes=made.allocated_bytes.reshape(full),
            static_bytes=made.static_bytes.reshape(full),
            step_s=made.step_s.reshape(full),
            step_spread=made.step_spread.reshape(full),
            runs=runs,
        )

    def _fill(self, made: Cells, numbers: Sequence[int]) -> int:
        """Evaluate cards that run the same program; return how often it ran.

        Accumulating keeps gradients, so it is another program.
        """
        runs = 0
        np, grid = self.np, self.grid
        steps = np.array(self.axes.gradient_accumulation_steps)
        for some in (np.flatnonzero(steps == 1), np.flatnonzero(steps > 1)):
            if not len(some):
                continue
            training = self._symbolic(made.training, int(steps[some[0]]))
            archs = [architecture(made.cards[number], made.training) for number in numbers]
            arch = archs[0]
            blas = np.array([cuda_rules.blas_bytes(other) for other in archs]).reshape(-1, 1, 1, 1)
            more = blas - cuda_rules.blas_bytes(arch)
            for run in self._structures(training, arch):
                levels = Levels(run, grid)
                where = np.ix_(numbers, grid.active_pairs, grid.active_ranks, some)
                made.allocated_bytes[where] = levels.peak()[None, :, :, None] + more
                made.static_bytes[where] = levels.static_bytes()[None, :, :, None] + more
                self._fill_times(made, numbers, run, training, some)
                runs += 1
        return runs

    def _symbolic(self, training: TrainingSpec, steps: int) -> TrainingSpec:
        grid: Any = self.grid
        lora = replace(training.lora, r=grid.rank) if training.lora is not None else None
        return replace(
            training, micro_batch_size=grid.batch, seq_len=grid.length, lora=lora, gradient_accumulation_steps=steps
        )

    def _structures(self, training: TrainingSpec, arch: cuda_rules.Architecture) -> Iterator[Record]:
        """Run the program for every group of cells in which the step has one structure; the group is active then."""
        np, grid = self.np, self.grid
        groups = [(np.arange(grid.pairs), np.arange(grid.ranks))]
        while groups:
            pairs, ranks = groups.pop()
            grid.activate(pairs, ranks)
            try:
                run = program.run(self.model, training, arch)
            except Mixed as mixed:
                groups += _parted(mixed.holds, pairs, ranks)
                continue
            yield run.record

    def _fill_times(self, made: Cells, numbers: Sequence[int], run: Record, training: TrainingSpec, some: Any) -> None:
        np, grid = self.np, self.grid
        kinds: dict[Any, list[int]] = {}
        for number in numbers:
            card = made.cards[number]
            if predictable(card):
                kinds.setdefault(signature(card, self._coefficients(card), training), []).append(number)
        steps = np.array(self.axes.gradient_accumulation_steps)[some]
        groups = kernel_groups(run) if kinds else []
        for members in kinds.values():
            where = np.ix_(members, grid.active_pairs, grid.active_ranks, some)
            rooms = np.array([made.cards[number].rooms[1] for number in members]).reshape(-1, 1, 1, 1)
            room = rooms - made.allocated_bytes[where]
            whole = self._clock(made, members, training).step(groups, training, steps, room)
            made.step_s[where] = whole.total
            made.step_spread[where] = whole.spread

    def _clock(self, made: Cells, members: Sequence[int], training: TrainingSpec) -> Clock:
        """The clock of these cards; its prices serve every choice with the same rates."""
        cards = [made.cards[number] for number in members]
        key = (tuple(card.gpu_id for card in cards), training.compile, training.tf32, training.versions.bitsandbytes)
        if key not in self.clocks:
            rates = CardRates([(card, self._coefficients(card)) for card in cards], training)
            self.clocks[key] = Clock(self.grid, rates)
        return self.clocks[key]

    def _coefficients(self, card: Gpu) -> Coefficients:
        if card.gpu_id not in self.coefficients:
            self.coefficients[card.gpu_id] = priors(card)
        return self.coefficients[card.gpu_id]


def _parted(holds: Any, pairs: Any, ranks: Any) -> list[tuple[Any, Any]]:
    """Split the active cells by what came out in them (bools or counts, `Mixed.holds`) into blocks that agree.

    Ranks with the same column of outcomes stay together; within them the pairs are split.
    """
    import numpy as np

    found = holds[pairs if holds.shape[0] > 1 else np.zeros(len(pairs), dtype=int)]
    found = found[:, ranks if holds.shape[1] > 1 else np.zeros(len(ranks), dtype=int)]
    columns, column_of = np.unique(found, axis=1, return_inverse=True)
    blocks = []
    for number, column in enumerate(columns.T):
        some = ranks[column_of.ravel() == number]
        outcomes, outcome_of = np.unique(column, return_inverse=True)
        blocks += [(pairs[outcome_of.ravel() == place], some) for place in range(len(outcomes))]
    return blocks


class SweepResult(NamedTuple):
    """Every combination of a sweep: one `Cells` and its `Judged` per choice of settings."""

    choices: tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]
    """Names of the settings that were chosen, and the values of each evaluation."""
    cells: tuple[Cells, ...]
    judged: tuple[Judged, ...]

    def columns(self) -> dict[str, Any]:
        """One flat array per column: cards, settings, numbers, verdict, bytes, seconds."""
        np = require_numpy()
        names, values = self.choices
        parts: dict[str, list[Any]] = {}
        for chosen, cells, judged in zip(values, self.cells, self.judged, strict=True):
            shape = cells.allocated_bytes.shape
            gpus = np.array([card.gpu_id for card in cells.cards], dtype=object).reshape(-1, 1, 1, 1, 1)
            columns = {"gpu": gpus, **{n: np.array(v, dtype=object) for n, v in zip(names, chosen, strict=True)}}
            for place, key in enumerate(NUMBERS, start=1):
                columns[key] = np.array(getattr(cells.axes, key)).reshape([-1 if p == place else 1 for p in range(5)])
            tokens = columns["micro_batch_size"] * columns["seq_len"] * columns["gradient_accumulation_steps"]
            columns |= {
                "verdict": np.array(verdict.VERDICTS, dtype=object)[judged.verdict],
                "allocated_bytes": cells.allocated_bytes,
                "device_low_bytes": judged.device_low_bytes,
                "device_bytes": judged.device_bytes,
                "device_high_bytes": judged.device_high_bytes,
                "step_s": cells.step_s,
                "tokens_per_s": tokens / cells.step_s,
            }
            for name, array in columns.items():
                parts.setdefault(name, []).append(np.broadcast_to(array, shape).ravel())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def to_frame(self) -> Any:
        """Return a pandas DataFrame.

        Raises:
            MissingDependency: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingDependency("to_frame needs pandas; pip install pandas") from error
        return pd.DataFrame(self.columns())

    def _repr_html_(self) -> str:
        """The first rows, for a notebook."""
        columns = self.columns()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        size = len(columns["verdict"])
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_shown(name, a[n]))}</td>" for name, a in columns.items()) + "</tr>"
            for n in range(min(size, SHOWN_ROWS))
        )
        more = f"<p>{size - SHOWN_ROWS:,} more rows</p>" if size > SHOWN_ROWS else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"


SHOWN_ROWS = 20


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:,.2f} GiB"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def sweep(
    model: ModelSpec,
    training: TrainingSpec,
    gpus: Gpu | Sequence[Gpu],
    axes: Mapping[str, Sequence[Any]],
    coefficients: Mapping[str, Coefficients] | None = None,
) -> SweepResult:
    """Evaluate every combination of `axes`: numbers (NUMBERS) and any other field of TrainingSpec.

    A result of at most REPLAYED_CELLS cells is `predict`'s in every figure and verdict; in a larger one live memory and
    time are, and the allocator is replayed in one cell of each choice (`judge`).

    Raises:
        PlannerError: an unknown field, or settings that exclude each other.
    """
    cards = (gpus,) if isinstance(gpus, Gpu) else tuple(gpus)
    numbers = {key: tuple(axes[key]) if key in axes else (number_of(training, key),) for key in NUMBERS}
    names = tuple(key for key in axes if key not in NUMBERS)
    known = [item.name for item in fields(TrainingSpec)]
    for name in names:
        if name not in known:
            raise unknown("setting", name, [*NUMBERS, *known])
    sweeper = Sweeper(model, Axes(**numbers), coefficients)
    values = tuple(itertools.product(*(axes[name] for name in names)))
    cells = []
    for chosen in values:
        changes: dict[str, Any] = dict(zip(names, chosen, strict=True))
        cells.append(sweeper.cells(replace(training, **changes), cards))
    if sum(each.allocated_bytes.size for each in cells) <= REPLAYED_CELLS:
        both = [replayed(model, each, sweeper.coefficients) for each in cells]
        cells, judged = [each for each, _ in both], [each for _, each in both]
    else:
        judged = [judge(model, each, replayed_surplus(model, each)) for each in cells]
    return SweepResult((names, values), tuple(cells), tuple(judged))
