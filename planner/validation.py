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

from planner import stacks
from planner.base import config_values
from planner.base.errors import PlannerError, one_line
from planner.base.records import record
from planner.facts.measurements import COUNTERS, ENUMERATIONS, Row
from planner.optimizers import OPTIMIZERS
from planner.plan.verdict import CLOSE, NO, Verdict
from planner.quantizations import BNB
from planner.timing import Terms, anchor_factor
from planner.training import Versions

SCHEMA_VERSION = 1

VERDICT_COUNTS = tuple(f"{outcome}_{how}" for outcome in ("oom", "ok") for how in ("right", "wrong", "undecided"))
"""Runs by how they ended and whether the verdict said so; undecided: it was "too close to call"."""

QUANTITIES = ("allocated", "reserved", "device", "unspecified", "time")

_NOT_MODELLED = {
    "quantization": ("other",), "checkpointing": ("selective",), "attention": ("other",), "optimizer": ("other",),
    "kernels": ("other",),
}  # fmt: skip
_ATTENTION = {"flex": "sdpa", "xformers": "sdpa"}  # memory as SDPA's flash kernel: no score matrix, one logsumexp

_LISTED = frozenset(stacks.STACKS) - {"custom"}

# Settings that have no column: the table's fixed wording for them in `notes`, and the option they set.
_NOTED: tuple[tuple[str, str], ...] = (
    ("optimizer step fused into backward", "optimizer_in_backward"),
    ("rsLoRA scaling", "use_rslora"),
    ("peak set by the first iteration", "longest_first"),
)
# Releases that a source fixes without stating them: what the project asked for when it published the figures.
_RELEASES: dict[str, tuple[dict[str, str], str]] = {
    "litgpt-hub": ({"bitsandbytes": "0.42.0"}, "Lightning-AI/litgpt pyproject.toml, March to September 2024"),
}
# Name of the fms configuration in which TRL prepares the model: on one GPU its norms stay fp32 and nothing else does
# (trl 0.13.0 trainer/utils.py peft_module_casting_to_bf16; sharded weights are left alone).
_FMS_PLAIN_PREPARATION = "baseline-peft-bnb"


class RowLengths(NamedTuple):
    """What a source says about the lengths of its rows, in tokens."""

    mean: float
    deviation: float
    shortest: int
    source: str


# Where rows are neither packed nor padded to one length, reserved memory depends on the order in which they come.
_ROW_LENGTHS: dict[str, RowLengths] = {
    "ms-swift-2023": RowLengths(3234.4, 2547.5, 91, "modelscope/ms-swift@97e4d198b:docs/source/LLM/Benchmark.md"),
}  # fmt: skip

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


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


Predict = Callable[[dict[str, Any], str, "str | None"], Predicted]
"""predict(options, model_id, gpu_id): `options` as from `row_options`; gpu_id None where the row names no card."""


class NotScored(Exception):
    """A row that cannot be compared; the message is the reason."""


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


def row_options(row: Row) -> dict[str, Any]:
    """Map a table row to the option keys of `planner.stacks`, plus "stack" and "row_lengths".

    A filled cell is a given value and wins; an empty one is left to the framework's defaults.

    Raises:
        NotScored: for an unknown value, or a run that is not modelled; the message names it.
    """
    _check_modelled(row)
    stack = row["framework"] if row["framework"] in _LISTED else "custom"
    versions = stacks.parse_versions(_stated(row))
    options: dict[str, Any] = {
        "stack": stack,
        "method": row["method"],
        "versions": versions,
        "seq_len": _length(row),
        "micro_batch_size": _whole(row, "micro_batch"),
        "gradient_accumulation_steps": _whole(row, "grad_accum"),
        "gradient_checkpointing": row["checkpointing"],
        "attention": _ATTENTION.get(row["attention"], row["attention"]),
        "autocast": row["autocast"],
        "base_dtype": row["base_dtype"],
        "kernels": row["kernels"],
        "loss": _loss(row),
        "optimizer": _optimizer(row, stack, versions),
        "compile": _flag(row, "compile"),
        "padded": _padded(row, stack),
        "row_lengths": _row_lengths(row),
        **_quantization_options(row, stack),
        **_adapter_options(row),
    }
    if row["optimizer"]:  # the row says how the optimizer ran: a framework's default of stepping in backward is off
        options["optimizer_in_backward"] = False
    options.update({key: True for wording, key in _NOTED if wording in row["notes"]})
    return {key: value for key, value in options.items() if value not in ("", None)}


def row_flags(row: Row) -> tuple[str, ...]:
    """Return the assumptions under which the row is scored."""
    flags = []
    if row["framework"] not in _LISTED:
        named = one_line(row["framework"], 40) or "not named"
        flags.append(f"framework {named}: scored with the habits of a transformers training loop")
    lengths = _row_lengths(row)
    if lengths is not None:
        flags.append(f"rows come in a typical order of unknown lengths of this mean and deviation: {lengths.source}")
    if not row["seq_len"] and row["seq_len_max"]:
        flags.append(f"padded length unknown: scored at its upper bound {row['seq_len_max']}")
    return (*flags, *_assumed_releases(row))


def _assumed_releases(row: Row) -> Iterator[str]:
    """The library releases that matter to the row and that it leaves out."""
    if row["source"] in _RELEASES:
        yield f"library releases as required at the time: {_RELEASES[row['source']][1]}"
        return
    used = [name for name in _LIBRARIES if row["method"] != "full" or name != "peft"]
    if row["quantization"] not in BNB and row["optimizer"] not in OPTIMIZERS.where(lambda kind: kind.is_8bit):
        used = [name for name in used if name != "bitsandbytes"]
    left_out = [name for name in used if not row[name]]
    if not left_out:
        return
    if len(left_out) == len(used):
        yield "no library release given: the newest are assumed"
        return
    versions = stacks.parse_versions({name: row[name] for name in _LIBRARIES})
    assumed = ", ".join(f"{name} {'.'.join(map(str, getattr(versions, name)))}" for name in left_out)
    yield f"library releases of the time of those given: {assumed}"


def _stated(row: Row) -> dict[str, str]:
    """Library -> the release that the row states, or that its source implies."""
    known = _RELEASES.get(row["source"], ({}, ""))[0]
    return {name: row[name] or known.get(name, "") for name in _LIBRARIES}


def _check_modelled(row: Row) -> None:
    for column, allowed in ENUMERATIONS.items():
        value = row[column]
        if value and value not in allowed:
            raise NotScored(f"unknown {column} {one_line(value, 60)!r}")
        if value in _NOT_MODELLED.get(column, ()):
            raise NotScored(f"{column} {value} is not modelled")
    for column in ("method", "outcome"):
        if not row[column]:
            raise NotScored(f"no {column} given")
    if row["num_gpus"] not in ("", "1"):
        raise NotScored(f"{row['num_gpus']} GPUs: only runs on one GPU are modelled")
    if row["parallel"] not in ("", "single"):
        raise NotScored(f"parallel {row['parallel']}: only runs on one GPU are modelled")
    if row["cpu_offload"] == "true":
        raise NotScored("parameters on the CPU are not modelled")


def _quantization_options(row: Row, stack: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "quantization": row["quantization"],
        "double_quant": _flag(row, "double_quant"),
        "compute_dtype": row["compute_dtype"],
    }
    if row["quantization"] not in ("", "none"):
        options["quantized_modules"] = row["quantized_modules"]
        if row["base_dtype"] == "fp32" and row["quantization"] in BNB and row["compute_dtype"] in ("bf16", "fp16"):
            # a 4-bit base computed in 16 bit beside fp32 weights is what PEFT's preparation leaves of a 16-bit model
            options.update(base_dtype=row["compute_dtype"], kbit_preparation=True)
        elif row["base_dtype"]:  # the column says how the unquantized weights lie: nothing is left to a preparation
            options["kbit_preparation"] = False
        if stack == "fms" and _FMS_PLAIN_PREPARATION in row["notes"]:
            options["fp32_norms_only"] = True
    return options


def _adapter_options(row: Row) -> dict[str, Any]:
    if row["method"] == "full":
        return {}
    return {
        "r": _whole(row, "rank"),
        "lora_alpha": _decimal(row, "alpha"),
        "lora_dropout": _decimal(row, "dropout"),
        "target_modules": config_values.names("target_modules", row["target_modules"]) or None,
        "adapter_dtype": row["adapter_dtype"],
    }


def _length(row: Row) -> int:
    length = _whole(row, "seq_len") or _whole(row, "seq_len_max")
    if length is None:
        raise NotScored("no sequence length given")
    return length


def _row_lengths(row: Row) -> RowLengths | None:
    known = _ROW_LENGTHS.get(row["source"])
    return known if row["packing"] == "false" and row["seq_len"] else None


def _loss(row: Row) -> str:
    """Where no fused kernel reads 16-bit logits, "full-logits" says "upcast not stated", and every stack here upcasts.

    transformers, torchtune and litgpt all compute the whole-logits loss in fp32 (loss_utils.py, transformer.py
    `output(h).float()`, Fabric's convert_output).
    """
    if row["loss"] == "full-logits" and row["kernels"] in ("", "none"):
        return "full-logits-fp32"
    return row["loss"]


def _optimizer(row: Row, stack: str, versions: Versions) -> str:
    """Keep the framework's implementation of torch AdamW: the column tells its state dtype, not foreach from fused."""
    if row["optimizer"] in stacks.TORCH_ADAMW:
        return stacks.torch_adamw(stack, versions)
    return row["optimizer"]


def _padded(row: Row, stack: str) -> bool | None:
    """Rows padded to a common length carry a mask in transformers; litgpt and torchtune pass none in training."""
    if row["packing"] != "false" or stack not in stacks.TRANSFORMERS_STACKS:
        return None
    useful = _decimal(row, "mean_tokens_per_row")
    return True if useful is not None and useful < _length(row) and row["micro_batch"] != "1" else None


def _whole(row: Row, column: str) -> int | None:
    return int(row[column]) if row[column] else None


def _decimal(row: Row, column: str) -> float | None:
    return float(row[column]) if row[column] else None


def _flag(row: Row, column: str) -> bool | None:
    return row[column] == "true" if row[column] else None


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
            (`planner.timing.anchor_factor`).
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


def published_step_s(row: Row) -> float | None:
    """Return seconds per optimizer step from a row; None where it has no time.

    tokens_per_s_per_gpu is preferred: step = micro_batch * grad_accum * tokens per row / rate, with the tokens that
    the rate counts (`token_convention`).

    Raises:
        NotScored: if the clock did not cover an optimizer step.
    """
    rate, step, micro = (_decimal(row, c) for c in ("tokens_per_s_per_gpu", "optimizer_step_s", "micro_step_s"))
    if not rate and not step and not micro:
        return None
    if row["time_scope"] == "fwd-bwd":
        raise NotScored("time without the optimizer step (fwd-bwd)")
    rows = (_whole(row, "micro_batch") or 0) * (_whole(row, "grad_accum") or 1)
    tokens = _tokens_per_row(row)
    if rate and rows and tokens:
        return rows * tokens / rate
    if step:
        return step
    if micro:
        return micro * (_whole(row, "grad_accum") or 1)
    raise NotScored("speed in tokens of unknown number per step")


def timed_length(row: Row) -> int | None:
    """Tokens per row that the time was spent on where they differ from the memory peak's; None where they do not.

    Only the longest batch decides memory; an average step is as long as the average row.
    """
    mean = _decimal(row, "mean_tokens_per_row")
    return round(mean) if mean and not row["seq_len"] else None


def _tokens_per_row(row: Row) -> float | None:
    """Return the tokens of a row that its published rate counts; None where that is not known."""
    if row["token_convention"] == "useful":
        return _decimal(row, "mean_tokens_per_row")
    # Packed rows hold no padding, so both conventions count the same.
    known = row["token_convention"] == "computed" or row["packing"] == "true"
    return _decimal(row, "seq_len") if known else None


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
