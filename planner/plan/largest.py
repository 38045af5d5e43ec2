"""The largest micro batch, row length or rank that fits a card, at a given probability, alone or two at a time.

Live memory is evaluated for many candidates at once (a sweep, a handful of program runs), smallest first, until of as
many as all before none fits. Among those whose live memory fits at the probability, the allocator is replayed: a
bisection finds the largest whose cache fits too, or can shrink enough. A frontier has too many corners for that: it
leaves room for the whole expected cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

from planner.base.errors import InvalidInput
from planner.device.hardware import Gpu
from planner.model.spec import ModelSpec
from planner.plan import sweep
from planner.plan.intervals import uncertainty
from planner.plan.predict import Prediction, predict_on
from planner.plan.verdict import CLOSE, FITS, VERDICTS, Verdict
from planner.timing.coefficients import Selection
from planner.training.spec import TrainingSpec

KEYS = ("micro_batch_size", "seq_len", "r")
NINETY_PERCENT = NormalDist().inv_cdf(0.95)
"""Standard deviations on either side that hold 90 %: how the intervals are read."""
PROBABILITY = 0.95


Limit = Literal["live memory", "allocator replay", "what was tried"]


class Largest(NamedTuple):
    """The answer for one number."""

    key: str
    value: int | None
    """None: not even the smallest candidate fits."""
    limit: int
    """The largest candidate that was tried: an answer equal to it may not be the end."""
    probability: float
    """That the live memory at `value` (at the smallest candidate, if there is none) and the context fit."""
    limited_by: Limit
    """Why it is not larger; a replay of the allocator has no probability."""
    prediction: Prediction | None
    evaluations: int
    """How often the model was asked, for however many cells at once."""


def fit_probability(allocated_bytes: Any, share: float, gpu: Gpu) -> Any:
    """Standard deviations of room: the probability is NormalDist().cdf of it. For a number or an array.

    The intervals of allocated memory (+- share) and of the CUDA context are read as 90 % intervals of independent
    normal distributions.
    """
    low, expected, high = gpu.context_bytes
    room = gpu.free_bytes - expected - allocated_bytes
    context = (high - low) / 2 / NINETY_PERCENT
    allocated = allocated_bytes * (share / NINETY_PERCENT)
    return room / (allocated**2 + context**2) ** 0.5


def largest(
    model: ModelSpec, training: TrainingSpec, gpu: Gpu, key: str, candidates: Sequence[int],
    probability: float = PROBABILITY, chosen: Selection | None = None,
) -> Largest:  # fmt: skip
    """Return the largest candidate whose live memory fits with this probability and whose replay ends well.

    `chosen`: the card's calibration; by default its priors.

    Raises:
        InvalidInput: no such number, or a probability that is none.
    """
    gpu = chosen.card(gpu) if chosen is not None else gpu
    values = tuple(sorted(set(candidates)))
    rooms, runs = _rooms(model, training, gpu, key, values, probability)
    needed = NormalDist().inv_cdf(probability)
    fitting = [number for number, room in enumerate(rooms) if room >= needed]
    if not fitting:
        return Largest(key, None, values[-1], NormalDist().cdf(rooms[0]), "live memory", None, runs)
    search = _Replays(model, training, gpu, key, values, probability, chosen)
    best = search.last(fitting)
    runs += len(search.known)
    sure = NormalDist().cdf(rooms[best or 0])
    if best is None:
        return Largest(key, None, values[-1], sure, "allocator replay", None, runs)
    limit: Limit = "live memory" if best == fitting[-1] else "allocator replay"
    if best == len(values) - 1:
        limit = "what was tried"
    return Largest(key, values[best], values[-1], sure, limit, search.known[best], runs)


FIRST_SWEEP = 64
"""Candidates of a search's first sweep; each that follows has as many as all before it."""


def _rooms(
    model: ModelSpec, training: TrainingSpec, gpu: Gpu, key: str, values: Sequence[int], probability: float
) -> tuple[list[float], int]:
    """Standard deviations of room of rising candidates, and the program runs that it took.

    Ends with the first sweep in which none fits: no candidate is tried that is more than twice as large as all that fit
    (a program of litgpt's has a structure of its own for every 128 positions).
    """
    rooms: list[float] = []
    runs = 0
    while len(rooms) < len(values):
        some = tuple(values[len(rooms) : max(2 * len(rooms), FIRST_SWEEP)])
        cells, room = _room(model, training, gpu, {key: some}, probability)
        rooms += room.ravel().tolist()
        runs += cells.runs
        if room.max() < NormalDist().inv_cdf(probability):
            break
    return rooms, runs


class _Replays:
    """Predictions of single candidates, each asked for once."""

    def __init__(
        self, model: ModelSpec, training: TrainingSpec, gpu: Gpu, key: str, values: Sequence[int], probability: float,
        chosen: Selection | None,
    ) -> None:  # fmt: skip
        self.model, self.training, self.gpu, self.key, self.values = model, training, gpu, key, values
        self.allowed = allowed_verdicts(probability)
        self.chosen = chosen
        self.known: dict[int, Prediction] = {}

    def holds(self, number: int) -> bool:
        """Whether the replay of a candidate ends well."""
        if number not in self.known:
            training = with_number(self.training, self.key, self.values[number])
            self.known[number] = predict_on(self.model, training, self.gpu, self.chosen)
        return self.known[number].verdict in self.allowed

    def last(self, fitting: Sequence[int]) -> int | None:
        """The last candidate that holds: by bisection, then a look at those just above, which may fragment less."""
        low, high = -1, len(fitting)
        if self.holds(fitting[-1]):
            return fitting[-1]
        high -= 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.holds(fitting[middle]):
                low = middle
            else:
                high = middle
        for above in range(min(low + LOOK_ABOVE, len(fitting) - 1), low, -1):
            if self.holds(fitting[above]):
                return fitting[above]
        return fitting[low] if low >= 0 else None


LOOK_ABOVE = 12
"""Candidates above the bisection's answer that are replayed too: fragmentation does not grow evenly."""


def allowed_verdicts(probability: float) -> tuple[Verdict, ...]:
    """Verdicts that a run may have to count as fitting: one that is not quite sure may be close."""
    return (FITS,) if probability >= 0.9 else (FITS, CLOSE)


class Corner(NamedTuple):
    """A point of a frontier: the largest second number at the first."""

    first: int
    second: int
    allocated_bytes: int
    tokens_per_s: float


def frontier(
    model: ModelSpec,
    training: TrainingSpec,
    gpu: Gpu,
    axes: Mapping[str, Sequence[int]],
    probability: float = PROBABILITY,
    chosen: Selection | None = None,
) -> tuple[Corner, ...]:
    """Return the pairs of two numbers that fit and that no other fitting pair exceeds in both.

    The allocator is replayed in one pair; the cache of the others is estimated from it.

    Raises:
        InvalidInput: not two numbers, or a probability that is none.
    """
    if len(axes) != 2:
        raise InvalidInput("a frontier is over two numbers")
    _check(training, axes, probability)
    wanted = {key: tuple(sorted(set(values))) for key, values in axes.items()}
    for key, other in (tuple(axes), tuple(reversed(tuple(axes)))):
        if len(wanted[key]) > FIRST_SWEEP:  # what does not fit with the least of the other does not fit at all
            least = with_number(training, other, wanted[other][0])
            wanted[key] = wanted[key][: len(_rooms(model, least, gpu, key, wanted[key], probability)[0])]
    cells, room = _room(model, training, gpu, wanted, probability, chosen)
    first, second = axes
    needed = NormalDist().inv_cdf(probability)
    order = [sweep.NUMBERS.index(key) for key in (first, second)]
    judged = sweep.judge(model, cells, sweep.replayed_surplus(model, cells))
    verdicts = [VERDICTS.index(verdict) for verdict in allowed_verdicts(probability)]
    fits = _plane((room >= needed) & (judged.verdict[0] <= max(verdicts)), order)
    bytes_, seconds = _plane(cells.allocated_bytes[0], order), _plane(cells.step_s[0], order)
    corners: list[Corner] = []
    for row in range(len(wanted[first]) - 1, -1, -1):
        columns = fits[row].nonzero()[0]
        if not len(columns) or (corners and wanted[second][columns[-1]] <= corners[-1].second):
            continue
        column = int(columns[-1])
        values = (wanted[first][row], wanted[second][column])
        changed = with_number(with_number(training, first, values[0]), second, values[1])
        tokens = changed.rows_tokens * changed.gradient_accumulation_steps
        corners.append(Corner(*values, int(bytes_[row, column]), tokens / float(seconds[row, column])))
    return tuple(reversed(corners))


def _plane(values: Any, order: Sequence[int]) -> Any:
    """A four-axis array of which only two axes are longer than 1, as [first, second]."""
    rest = [axis for axis in range(4) if axis not in order]
    return values.transpose([*order, *rest]).reshape(values.shape[order[0]], values.shape[order[1]])


def _check(training: TrainingSpec, keys: Iterable[str], probability: float) -> None:
    if not 0 < probability < 1:
        raise InvalidInput(f"probability is {probability:g}; must be between 0 and 1, for example 0.95")
    for key in keys:
        if key not in KEYS or (key == "r" and training.lora is None):
            raise InvalidInput(f"{key} is no number of this run; choose of {', '.join(KEYS)}")


def _room(
    model: ModelSpec, training: TrainingSpec, gpu: Gpu, wanted: dict[str, tuple[int, ...]], probability: float,
    chosen: Selection | None = None,
) -> tuple[sweep.Cells, Any]:  # fmt: skip
    _check(training, wanted, probability)
    axes = sweep.Axes(**{key: wanted.get(key) or (sweep.number_of(training, key),) for key in sweep.NUMBERS})
    own = {gpu.gpu_id: chosen.coefficients} if chosen is not None else None
    cells = sweep.Sweeper(model, axes, own).cells(training, [gpu])
    share = sum(part for _, part in uncertainty(model, training))
    return cells, fit_probability(cells.allocated_bytes[0].astype("float64"), share, gpu)


def with_number(training: TrainingSpec, key: str, value: int) -> TrainingSpec:
    """`training` with another micro batch, length or rank."""
    from planner.base.records import replace

    if key == "r":
        assert training.lora is not None
        return replace(training, lora=replace(training.lora, r=value))
    changes: dict[str, Any] = {key: value}
    return replace(training, **changes)
