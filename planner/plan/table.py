"""From lists of option values to the rows of a table: the product of choices, each evaluated over all its numbers.

Up to EXACT_ROWS rows are predicted one by one, as `fits` does; larger grids are swept (`planner.plan.sweep`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.base.errors import InvalidInput, PlannerError, one_line
from planner.base.records import replace
from planner.device.hardware import Gpu
from planner.model.spec import ModelSpec
from planner.plan import notes as plan_notes
from planner.plan import predict, sweep
from planner.plan.cards import card_with, cards_of, percent_of, with_margin
from planner.plan.given import Settings
from planner.plan.request import Data, Known, Plan, Request, resolve
from planner.plan.rows import Block
from planner.plan.values import parse_values
from planner.plan.verdict import VERDICTS
from planner.runs import cost
from planner.timing.coefficients import Coefficients, Selection
from planner.training.settings import Resolved
from planner.training.spec import TrainingSpec

if TYPE_CHECKING:
    from planner.importers import Job
    from planner.plan.datarun import DataRun

EXACT_ROWS = 24
DATA_ROWS = 500
"""Rows of a table on training data: each is predicted at several lengths."""
MOST_ROWS = 100_000_000
MOST_VALUES = 1_000_000
REPLAYED_CHOICES = 24
"""Up to this many combinations of choices the allocator is replayed once for each."""
BLOCK_ROWS = 200_000
"""Rows evaluated and written at a time."""

Numbers = dict[str, tuple[int, ...]]
"""The values of each axis of a sweep; none: the framework's own."""


class Wanted(NamedTuple):
    """What is to be tabulated: every combination of a model, a card and one value of each setting."""

    models: tuple[str, ...]
    cards: tuple[Gpu, ...]
    values: Mapping[str, tuple[Any, ...]]
    """Key of planner.training.stacks -> its values."""
    job: Job | None = None
    """What a training config says about everything else."""

    @property
    def rows(self) -> int:
        """Number of rows, combinations that exclude each other included."""
        count = len(self.models) * len(self.cards)
        for values in self.values.values():
            count *= len(values)
        return count


class Run(NamedTuple):
    """How much is trained and what an hour costs on each card (None: not known)."""

    amount: cost.Amount
    prices: Mapping[str, cost.Price | None]
    chosen: Mapping[str, Selection]
    """The calibration of each card, or its priors."""
    margin: float = 0.0
    """Percent of every card that is kept free."""
    data: Data | None = None
    """Training data, where it decides lengths and hours."""

    @property
    def budget(self) -> bool:
        """Whether an amount of training is known, so that rows have hours and USD."""
        return self.amount.given or self.data is not None

    @property
    def coefficients(self) -> dict[str, Coefficients]:
        """Of the time model, by GPU id."""
        return {name: item.coefficients for name, item in self.chosen.items()}


class Problems:
    """Combinations that were left out, by reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def add(self, error: PlannerError, rows: int) -> None:
        """Count rows that have no answer."""
        text = one_line(str(error), 300)
        self.reasons[text] = self.reasons.get(text, 0) + rows


# --- rows ---------------------------------------------------------------------------------------------------------


class Combination(NamedTuple):
    """One model with one value of every choice, on the cards that take the same settings."""

    model: ModelSpec
    choices: dict[str, Any]
    training: TrainingSpec
    resolved: Resolved
    plans: tuple[Plan, ...]
    """One for each card."""

    @property
    def cards(self) -> tuple[Gpu, ...]:
        """The cards."""
        return tuple(plan.card for plan in self.plans if plan.card is not None)

    @property
    def data(self) -> DataRun | None:
        """What the training data make of these settings."""
        return self.plans[0].data


class Tabulator:
    """Evaluates a product block by block."""

    def __init__(self, wanted: Wanted, run: Run, known: Known | None = None) -> None:
        if wanted.rows > MOST_ROWS:
            raise InvalidInput(f"{wanted.rows:,} rows; at most {MOST_ROWS:,} in one table")
        self.wanted, self.run = wanted, run
        self.problems = Problems()
        self.known = known or Known()
        self.notes: dict[str, int] = {}
        """Notes of the plans so far, with the number of rows that each concerns."""
        self.evaluated = 0
        """Rows that were looked at."""
        self.shared: dict[str, Any] = {}
        """Settings that every row so far has, with their values; None where rows differ."""
        if run.data is not None and wanted.rows > DATA_ROWS:
            raise InvalidInput(f"{wanted.rows:,} rows on --data, each predicted by itself; at most {DATA_ROWS:,}")
        self.exact = wanted.rows <= EXACT_ROWS or run.data is not None
        self.choices = [key for key in wanted.values if key not in sweep.NUMBERS or run.data is not None]
        combinations = len(wanted.models)
        for key in self.choices:
            combinations *= len(wanted.values[key])
        self.surpluses: dict[tuple[str, str], sweep.Surplus] = {}
        self.replays = combinations <= REPLAYED_CHOICES

    @property
    def basis(self) -> str:
        """How memory on the device was found, in words."""
        if self.run.data is not None:
            return "every row predicted by itself; its length is that of the data's longest batch"
        if self.exact:
            return "every row predicted by itself, as loraplan fits does"
        cache = "replayed in one row per combination" if self.replays else "assumed"
        return f"live memory (without unsplit blocks) and time exact; the allocator's cache {cache}, its interval wider"

    def blocks(self) -> Iterator[Block]:
        """Evaluate all rows; combinations without an answer are counted in `problems`."""
        for name in self.wanted.models:
            try:
                model = self.known.model(name).spec
            except PlannerError as error:
                self.problems.add(error, self.wanted.rows // len(self.wanted.models))
                continue
            for numbers in self._pieces():
                sweepers: dict[sweep.Axes, sweep.Sweeper] = {}
                for combination in self._combinations(name, model):
                    axes = _axes(numbers, combination.training)
                    if not self.exact and axes not in sweepers:
                        sweepers[axes] = sweep.Sweeper(model, axes, self.run.coefficients)
                    try:
                        yield from self._rows(name, combination, axes, sweepers.get(axes))
                    except PlannerError as error:
                        self.problems.add(error, axes.size * len(combination.cards))

    def _pieces(self) -> Iterator[Numbers]:
        """The numbers, in pieces of at most BLOCK_ROWS cells: cut along the axis whose cells just exceed that."""
        values = {key: tuple(self.wanted.values.get(key, ())) for key in sweep.NUMBERS if key not in self.choices}
        values = dict.fromkeys(sweep.NUMBERS, ()) | values
        each = 1
        for place, key in reversed(list(enumerate(sweep.NUMBERS))):
            if each * len(values[key]) > BLOCK_ROWS:
                yield from self._cut(values, place, BLOCK_ROWS // each)
                return
            each *= max(len(values[key]), 1)
        yield values

    def _cut(self, values: Numbers, place: int, length: int) -> Iterator[Numbers]:
        before, key = sweep.NUMBERS[:place], sweep.NUMBERS[place]
        for outer in itertools.product(*(values[name] or (None,) for name in before)):
            for start in range(0, len(values[key]), length):
                fixed = {name: () if value is None else (value,) for name, value in zip(before, outer, strict=True)}
                yield {**values, **fixed, key: values[key][start : start + length]}

    def _combinations(self, name: str, model: ModelSpec) -> Iterator[Combination]:
        for values in itertools.product(*(self.wanted.values[key] for key in self.choices)):
            choices = dict(zip(self.choices, values, strict=True))
            groups: dict[bool, list[Gpu]] = {}
            for card in self.wanted.cards:
                groups.setdefault(plan_notes.lacks_bf16(card), []).append(card)
            for cards in groups.values():
                try:
                    first = self._plan_of(name, choices, cards[0])
                    plans = (first, *(first.on(card, self.run.chosen[card.gpu_id]) for card in cards[1:]))
                except PlannerError as error:
                    inner = [len(self.wanted.values.get(key, (1,))) for key in sweep.NUMBERS if key not in self.choices]
                    self.problems.add(error, len(cards) * _product(inner))
                    continue
                self._remember(plans[0].resolved)
                yield Combination(model, choices, plans[0].training, plans[0].resolved, plans)

    def _plan_of(self, name: str, choices: Mapping[str, object], card: Gpu) -> Plan:
        """The plan of one combination on one card."""
        request = Request(
            model=name, settings=Settings(choices), job=self.wanted.job, gpu=card, data=self.run.data, lenient=True,
            calibration=self.run.chosen[card.gpu_id],
        )  # fmt: skip
        return resolve(request, self.known)

    def _note(self, notes: Iterable[str], rows: int) -> None:
        """Keep notes of rows; `calibration.time_words` says of all cards together which borrow a calibration."""
        self.evaluated += rows
        for note in notes:
            self.notes[note] = self.notes.get(note, 0) + rows

    def _remember(self, resolved: Resolved) -> None:
        """Keep the settings that are the same in every row, for the caption."""
        settings = {k: resolved[k] for k in resolved.settings if resolved.applies(k) and k not in self.wanted.values}
        settings["stack"] = resolved.stack
        if not self.shared:
            self.shared = settings
        else:
            self.shared = {k: v for k, v in self.shared.items() if settings.get(k, _UNSET) == v}

    # --- one combination ----------------------------------------------------------------------------------------

    def _rows(self, name: str, some: Combination, axes: sweep.Axes, sweeper: sweep.Sweeper | None) -> Iterator[Block]:
        if sweeper is None:
            yield self._predicted(name, some, axes)
            return
        each = max(BLOCK_ROWS // axes.size, 1)
        for start in range(0, len(some.cards), each):
            cells = sweeper.cells(some.training, some.cards[start : start + each])
            for plan in some.plans[start : start + each]:
                self._note(plan.common_warnings, axes.size)
            surplus = self._surplus(some, cells)
            yield self._swept(name, some, cells, sweep.judge(some.model, cells, surplus))

    def _surplus(self, some: Combination, cells: sweep.Cells) -> sweep.Surplus:
        """The allocator's cache: one replay for a model and its choices, whatever the card; assumed in large grids."""
        if not self.replays:
            return sweep.assumed_surplus(some.training)
        key = (some.model.model_id, repr(sorted(some.choices.items())))
        if key not in self.surpluses:
            self.surpluses[key] = sweep.replayed_surplus(some.model, cells)
        return self.surpluses[key]

    def _constant(self, name: str, some: Combination) -> dict[str, Any]:
        choices = {key: _plain(value) for key, value in some.choices.items() if key not in sweep.NUMBERS}
        return {"model": name, **choices}

    def _swept(self, name: str, some: Combination, cells: sweep.Cells, judged: sweep.Judged) -> Block:
        np = sweep.require_numpy()
        axes, shape = cells.axes, cells.allocated_bytes.shape
        arrays: dict[str, Any] = {}
        for place, key in enumerate(sweep.NUMBERS, start=1):
            values = np.array(getattr(axes, key), dtype=np.int64)
            arrays[key] = np.broadcast_to(values.reshape([-1 if p == place else 1 for p in range(5)]), shape)
        low, high = cells.step_s / (1 + cells.step_spread), cells.step_s * (1 + cells.step_spread)
        tokens = arrays["micro_batch_size"] * arrays["seq_len"] * arrays["gradient_accumulation_steps"]
        gpus = np.array([card.gpu_id for card in cells.cards], dtype=object).reshape(-1, 1, 1, 1, 1)
        verdicts = np.array(VERDICTS, dtype=object)
        arrays = {
            "gpu": np.broadcast_to(gpus, shape),
            **arrays,
            "verdict": verdicts[judged.verdict],
            "allocated_bytes": cells.allocated_bytes,
            "device_low_bytes": judged.device_low_bytes,
            "device_bytes": judged.device_bytes,
            "device_high_bytes": judged.device_high_bytes,
            "headroom_bytes": judged.headroom_bytes,
            "step_s": cells.step_s,
            "step_low_s": low,
            "step_high_s": high,
            "tokens_per_s": tokens / cells.step_s,
        }
        if self.run.budget:
            useful = tokens
            if self.run.amount.mean_tokens:
                useful = tokens * (np.minimum(self.run.amount.mean_tokens, arrays["seq_len"]) / arrays["seq_len"])
            steps = cost.optimizer_steps(
                self.run.amount, arrays["micro_batch_size"] * arrays["gradient_accumulation_steps"], useful
            )
            arrays["hours"] = steps * cells.step_s / 3600
            rate = [self._usd_per_hour(card) for card in cells.cards]
            arrays["usd"] = arrays["hours"] * np.array(rate, dtype=np.float64).reshape(-1, 1, 1, 1, 1)
        constant = self._constant(name, some)
        if some.training.lora is None:
            del arrays["r"]
        return Block(constant, {key: np.ascontiguousarray(a).ravel() for key, a in arrays.items()}, int(np.prod(shape)))

    def _usd_per_hour(self, card: Gpu) -> float:
        price = self.run.prices.get(card.gpu_id)
        return price.usd_per_hour if price else float("nan")

    def _predicted(self, name: str, some: Combination, axes: sweep.Axes) -> Block:
        """Every cell by `predict`, as `fits` answers."""
        rows: list[dict[str, Any]] = []
        for plan in some.plans:
            for place in itertools.product(*(range(size) for size in axes.shape)):
                row = replace(plan, training=sweep.at_place(plan.training, axes, place))
                found = row.predict()
                self._note(dict.fromkeys((*row.common_warnings, *found.warnings[len(plan.notes) :])), 1)
                rows.append(self.predicted_row(found, plan.data))
        columns: dict[str, list[Any]] = {key: [row.get(key) for row in rows] for key in rows[0]}
        return Block(self._constant(name, some), columns, len(rows))

    def predicted_row(self, found: predict.Prediction, data: DataRun | None = None) -> dict[str, Any]:
        """The columns of one configuration on a card."""
        card, training, time = found.gpu, found.training, found.time
        assert card is not None
        row: dict[str, Any] = {
            "gpu": card.gpu_id,
            **{key: getattr(training, key) for key in sweep.NUMBERS if key != "r"},
            "verdict": found.verdict,
            "allocated_bytes": found.allocated.expected,
            "device_low_bytes": found.device.low,
            "device_bytes": found.device.expected,
            "device_high_bytes": found.device.high,
            "headroom_bytes": found.headroom_bytes,
            "step_s": time.step_s.expected if time else None,
            "step_low_s": time.step_s.low if time else None,
            "step_high_s": time.step_s.high if time else None,
            "tokens_per_s": time.tokens_per_s if time else None,
        }
        if training.lora is not None:
            row["r"] = training.lora.r
        if self.run.budget:
            made = self._plan(found, card, data) if time else None
            row["hours"] = made.hours.expected if made else None
            row["usd"] = made.usd.expected if made and made.usd else None
        return row

    def _plan(self, found: predict.Prediction, card: Gpu, data: DataRun | None) -> cost.RunPlan:
        """Hours and USD of the whole run: on data by its lengths, else by the amount."""
        price, training, amount = self.run.prices.get(card.gpu_id), found.training, self.run.amount
        if data is not None:
            from planner.plan.datarun import planned

            return planned(data, found, epochs=amount.epochs, price=price)[1]
        assert found.time is not None
        return cost.plan(
            found.time, card, amount, price=price, micro_batch_size=training.micro_batch_size, seq_len=training.seq_len
        )


_UNSET = object()


def _axes(numbers: Numbers, training: TrainingSpec) -> sweep.Axes:
    """The axes of a combination: what was not given is what its framework does."""
    own = {key: sweep.number_of(training, key) for key in sweep.NUMBERS}
    without = ("r",) if training.lora is None else ()
    return sweep.Axes(
        **{key: (own[key],) if key in without or not values else tuple(values) for key, values in numbers.items()}
    )


def _product(numbers: Sequence[int]) -> int:
    count = 1
    for number in numbers:
        count *= number
    return count


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def card_prices(cards: Sequence[Gpu], price_of: Callable[[Gpu], cost.Price | None]) -> dict[str, cost.Price | None]:
    """The price of each card, by its id."""
    return {card.gpu_id: price_of(card) for card in cards}


Lists = Mapping[str, Sequence[object]]
"""Words by the name of a setting, of `model`, `gpu` or `vram`: alternatives, and lists of them with commas."""


def tabulator(lists: Lists, base: Request, shared: Known | None = None) -> Tabulator:
    """Turn lists of words into what is to be tabulated; settings without a list are the job's, where there is one.

    Args:
        lists: what is combined.
        base: what holds for every row: job, data, cost, calibration, margin.
        shared: what tables of one call have read already.

    Raises:
        PlannerError: unknown names or values.
    """
    from planner.facts import calibration_files
    from planner.plan.money import amount_of, amount_on_data, price_of

    shared = shared or Known()
    job = shared.job(base.job, base.settings)
    models = _names(lists.get("model") or ([job.model] if job is not None and job.model else ()))
    if not models:
        raise InvalidInput("no model; name at least one, for example meta-llama/Llama-3.1-8B")
    names, sizes = _names(lists.get("gpu", ())), _names(lists.get("vram", ()))
    cards = (*(cards_of(names) if names or not sizes else ()), *map(card_with, sizes))
    margin = percent_of(base.margin)
    cards = tuple(with_margin(card, margin)[0] or card for card in cards)
    values = {k: parse_values(k, v) for k, v in lists.items() if k not in ("model", "gpu", "vram")}
    if base.calibration is not None and not isinstance(base.calibration, str):
        raise InvalidInput("a table chooses the calibration of every card: name it")
    chosen = calibration_files.select_each(cards, base.calibration)
    cards = tuple(chosen[card.gpu_id].card(card) for card in cards)
    prices = card_prices(cards, lambda card: price_of(card, base.cost))
    amount = amount_on_data(base.cost) if base.data else amount_of(base.cost)
    run = Run(amount, prices, chosen, margin, base.data)
    return Tabulator(Wanted(models, cards, values, job), run, shared)


def _names(texts: Sequence[object]) -> tuple[str, ...]:
    parts = [part.strip() for text in texts for part in str(text).split(",")]
    return tuple(dict.fromkeys(part for part in parts if part))
