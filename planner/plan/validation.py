"""Score predictions against a table of published measurements: one row in, option keys out; errors by source.

Errors are signed percents: 100 * (prediction - end) / end, where end is the nearer end of the published interval; zero
inside it, negative when the prediction is too low. Memory in bytes per GPU, time in seconds per optimizer step. Each
counter (allocated, reserved, device) is compared with the same predicted counter. A figure whose counter the source
does not name is compared with the expected reserved memory, the middle of the three, and counts as covered when it
overlaps [allocated low, device high].
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from planner.base.errors import PlannerError, one_line
from planner.base.records import record
from planner.facts.measurements import COUNTERS, Row
from planner.plan.published_rows import NotScored, _whole, published_step_s, row_flags, row_options, timed_length
from planner.plan.verdict import CLOSE, NO, Verdict
from planner.timing.step_time import Terms, anchor_factor

SCHEMA_VERSION = 1

VERDICT_COUNTS = tuple(f"{outcome}_{how}" for outcome in ("oom", "ok") for how in ("right", "wrong", "undecided"))
"""Runs by how they ended and whether the verdict said so; undecided: it was "too close to call"."""

QUANTITIES = ("allocated", "reserved", "device", "unspecified", "time")


class Range(Protocol):
    """A predicted quantity with its bounds."""

    @property
    def low(self) -> float: ...
    @property
    def expected(self) -> float: ...
    @property
    def high(self) -> float: ...


class Predicted(Protocol):
    """What a prediction must offer: bytes per counter, the verdict (None without a card) and warnings it shows.

    `step_s` (seconds, same shape) is read where it exists.
    """

    @property
    def allocated(self) -> Range: ...
    @property
    def reserved(self) -> Range: ...
    @property
    def device(self) -> Range: ...
    @property
    def verdict(self) -> Verdict | None: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...


Predict = Callable[[Mapping[str, object], str, "str | None"], Predicted]
"""predict(options, model_id, gpu_id): `options` as from `row_options`; gpu_id None where the row names no card."""


class Skipped(NamedTuple):
    """A row, or one quantity of it, that was left out."""

    id: str
    reason: str


class Comparison(NamedTuple):
    """One published figure beside its prediction."""

    id: str
    source: str
    quantity: str
    predicted: float
    low: float
    high: float
    error_pct: float
    covered: bool


@record
class Report:
    """Everything one validation run found."""

    comparisons: tuple[Comparison, ...]
    verdicts: Mapping[str, int]
    skipped: tuple[Skipped, ...]
    flagged: tuple[Skipped, ...]
    """Rows that were scored under an assumption, with the assumption."""

    def groups(self) -> list[dict[str, Any]]:
        """Return error statistics per source and quantity, then per quantity over sources (source "*")."""
        by_key: dict[tuple[str, str], list[Comparison]] = {}
        for item in self.comparisons:
            by_key.setdefault((item.source, item.quantity), []).append(item)
        own = [_statistics(source, quantity, items) for (source, quantity), items in sorted(by_key.items())]
        return own + [_over_sources(q, [g for g in own if g["quantity"] == q]) for q in _present(own)]

    def judged(self) -> dict[str, int]:
        """Runs whose verdict was right, wrong and undecided, over both outcomes."""
        return {
            how: sum(number for name, number in self.verdicts.items() if name.endswith(f"_{how}"))
            for how in ("right", "wrong", "undecided")
        }

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "groups": self.groups(),
            "verdicts": dict(self.verdicts),
            "skipped": [item._asdict() for item in self.skipped],
            "flagged": [item._asdict() for item in self.flagged],
        }


def score(
    rows: Iterable[Row],
    predict: Predict,
    *,
    include_loose: bool = False,
    anchor: bool = False,
) -> Report:
    """Predict every row and compare.

    Args:
        anchor: correct times by the first timed row of each card and framework, which is then not scored
            (`planner.timing.step_time.anchor_factor`).
        include_loose: also score figures of confidence C (they stay in the list of flagged rows).
    """
    run = _Run(predict, include_loose, anchor)
    for row in rows:
        run.add(row)
    return Report(
        comparisons=(*run.comparisons, *run.anchored()),
        verdicts=run.verdicts,
        skipped=tuple(run.skipped),
        flagged=tuple(run.flagged),
    )


class _Scaled(NamedTuple):
    """A range times a factor."""

    low: float
    expected: float
    high: float


class _Run:
    """Collects the results of one validation; equal configurations are predicted once."""

    def __init__(self, predict: Predict, include_loose: bool, anchor: bool) -> None:
        self.predict, self.include_loose, self.anchor = predict, include_loose, anchor
        self.timed: list[tuple[Row, Any, float]] = []
        self.known: dict[str, Predicted | str] = {}
        self.comparisons: list[Comparison] = []
        self.verdicts = dict.fromkeys(VERDICT_COUNTS, 0)
        self.skipped: list[Skipped] = []
        self.flagged: list[Skipped] = []

    def add(self, row: Row) -> None:
        """Score one row, or note why not."""
        try:
            predicted = self._predicted(row)
        except (NotScored, PlannerError) as reason:
            self.skipped.append(Skipped(row["id"], str(reason)))
            return
        self.flagged += [Skipped(row["id"], flag) for flag in (*row_flags(row), *predicted.warnings)]
        if self._confident(row, "memory"):
            self._verdict(row, predicted)
            if row["outcome"] == "ok":
                self.comparisons += _memory_comparisons(row, predicted)
        if row["outcome"] == "ok" and self._confident(row, "time"):
            self._time(row, predicted)

    def _predicted(self, row: Row, **changed: Any) -> Predicted:
        options = {**row_options(row), **changed}
        key = repr((sorted(options.items(), key=lambda item: item[0]), row["model"], row["gpu"]))
        if key not in self.known:
            try:
                self.known[key] = self.predict(options, row["model"], row["gpu"] or None)
            except PlannerError as error:
                self.known[key] = str(error)
        found = self.known[key]
        if isinstance(found, str):
            raise NotScored(found)
        return found

    def _confident(self, row: Row, what: str) -> bool:
        if row[f"confidence_{what}"] != "C":
            return True
        note = Skipped(row["id"], "confidence C" if what == "memory" else "confidence C (time)")
        (self.flagged if self.include_loose else self.skipped).append(note)
        return self.include_loose

    def _verdict(self, row: Row, predicted: Predicted) -> None:
        """Count whether the word that is printed was right, wrong, or left it open."""
        if predicted.verdict is None:
            if row["outcome"] == "oom":
                card = one_line(row["gpu"], 40) or "not named"
                self.skipped.append(Skipped(row["id"], f"out of memory on a card of unknown size ({card})"))
            return
        right = (predicted.verdict == NO) == (row["outcome"] == "oom")
        how = "undecided" if predicted.verdict == CLOSE else "right" if right else "wrong"
        self.verdicts[f"{row['outcome']}_{how}"] += 1

    def _time(self, row: Row, predicted: Predicted) -> None:
        try:
            seconds = published_step_s(row)
            length = timed_length(row)
            if length is not None:
                note = f"time scored at the mean of {length} tokens a row: their padding is not stated"
                self.flagged.append(Skipped(row["id"], note))
                predicted = self._predicted(row, seq_len=length, padded=False)
        except NotScored as reason:
            self.skipped.append(Skipped(row["id"], str(reason)))
            return
        if seconds is None:
            return
        step: Range | None = getattr(predicted, "step_s", None)
        if not row["gpu"]:
            self.skipped.append(Skipped(row["id"], "time without a named card"))
        elif step is None:
            self.skipped.append(
                Skipped(row["id"], f"no source states the rates of {one_line(row['gpu'], 40)}: no time")
            )
        else:
            self.timed.append((row, predicted, seconds))

    def anchored(self) -> list[Comparison]:
        """Times of every row; with an anchor, corrected by what the first row of each card and framework was off.

        The anchors themselves are not scored: they are listed with what they measured over what was predicted.
        """
        anchors: dict[tuple[str, str], tuple[Terms, float]] = {}
        found = []
        for row, predicted, seconds in self.timed:
            step: Range = predicted.step_s
            key = (row["gpu"], row["framework"])
            terms: Terms = predicted.time.uncertainty if self.anchor else ()
            if self.anchor and key not in anchors:
                ratio = seconds / step.expected
                anchors[key] = (terms, ratio)
                text = f"anchor of {' '.join(key)}: measured {ratio:.3f} times the prediction"
                self.flagged.append(Skipped(row["id"], text))
                continue
            scale = anchor_factor(anchors[key][0], terms, anchors[key][1]) if self.anchor else 1.0
            scaled = _Scaled(step.low * scale, step.expected * scale, step.high * scale)
            found.append(_comparison(row, "time", scaled, scaled.low, scaled.high, seconds, seconds))
        return found


def _memory_comparisons(row: Row, predicted: Predicted) -> Iterator[Comparison]:
    for counter in COUNTERS:
        low, high = _whole(row, f"{counter}_bytes_low"), _whole(row, f"{counter}_bytes_high")
        if low is None or high is None:
            continue
        if counter == "unspecified":
            lowest, highest = predicted.allocated.low, predicted.device.high
            yield _comparison(row, counter, predicted.reserved, lowest, highest, low, high)
        else:
            own: Range = getattr(predicted, counter)
            yield _comparison(row, counter, own, own.low, own.high, low, high)


def _comparison(
    row: Row, quantity: str, predicted: Range, lowest: float, highest: float, low: float, high: float
) -> Comparison:
    error = signed_error_pct(predicted.expected, low, high)
    covered = lowest <= high and low <= highest
    return Comparison(row["id"], row["source"], quantity, predicted.expected, low, high, error, covered)


def signed_error_pct(predicted: float, low: float, high: float) -> float:
    """Return 100 * (predicted - end) / end with the nearer end of [low, high]; 0 inside, negative when too low."""
    if low <= predicted <= high:
        return 0.0
    end = low if predicted < low else high
    return 100.0 * (predicted - end) / end


def _statistics(source: str, quantity: str, items: Sequence[Comparison]) -> dict[str, Any]:
    errors = [item.error_pct for item in items]
    sizes = [abs(error) for error in errors]
    return {
        "source": source,
        "quantity": quantity,
        "n": len(items),
        "mean_abs_pct": statistics.fmean(sizes),
        "median_abs_pct": statistics.median(sizes),
        "worst_under_pct": min(0.0, *errors),
        "worst_over_pct": max(0.0, *errors),
        "coverage": sum(item.covered for item in items) / len(items),
    }


def _over_sources(quantity: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sources, because their row counts are uneven; the worst figures are the worst of any source."""
    means = {key: statistics.fmean(g[key] for g in groups) for key in ("mean_abs_pct", "median_abs_pct", "coverage")}
    return {
        "source": "*",
        "quantity": quantity,
        "n": sum(g["n"] for g in groups),
        "mean_abs_pct": means["mean_abs_pct"],
        "median_abs_pct": means["median_abs_pct"],
        "worst_under_pct": min(g["worst_under_pct"] for g in groups),
        "worst_over_pct": max(g["worst_over_pct"] for g in groups),
        "coverage": means["coverage"],
    }


def _present(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    found = {group["quantity"] for group in groups}
    return [quantity for quantity in QUANTITIES if quantity in found]
