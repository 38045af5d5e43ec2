"""Published measurements as options of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from planner.base import config_values
from planner.base.errors import one_line
from planner.facts.measurements import ENUMERATIONS, SETTING_COLUMNS, Row
from planner.training import stacks
from planner.training import versions as training_versions
from planner.training.kinds import Names, Number, Whole, YesNo
from planner.training.losses import LOSSES, UPCAST
from planner.training.optimizers import OPTIMIZERS
from planner.training.quantizations import BNB
from planner.training.settings import LIBRARIES, SETTINGS
from planner.training.spec import Versions

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


class NotScored(Exception):
    """A row that cannot be compared; the message is the reason."""


def row_options(row: Row) -> dict[str, Any]:
    """Map a table row to the keys of `planner.training.settings`, plus "stack" and "row_lengths".

    A filled cell is a given value and wins; an empty one is left to the framework's defaults.

    Raises:
        NotScored: for an unknown value, or a run that is not modelled; the message names it.
    """
    _check_modelled(row)
    stack = row["framework"] if row["framework"] in stacks.LISTED else stacks.CUSTOM
    versions = training_versions.parse_versions(_stated(row))
    options: dict[str, Any] = {
        "stack": stack,
        **{key: _cell(row, key) for key in SETTING_COLUMNS.values() if _applies(row, key)},
        "versions": versions,
        "seq_len": _length(row),
        "loss": _loss(row),
        "optimizer": _optimizer(row, stack, versions),
        "padded": _padded(row, stack),
        "row_lengths": _row_lengths(row),
        **_quantization_options(row),
    }
    if row["optimizer"]:  # the row says how the optimizer ran: a framework's default of stepping in backward is off
        options["optimizer_in_backward"] = False
    options.update({key: True for wording, key in _NOTED if wording in row["notes"]})
    return {key: value for key, value in options.items() if value not in ("", None)}


def row_flags(row: Row) -> tuple[str, ...]:
    """Return the assumptions under which the row is scored."""
    flags = []
    if row["framework"] not in stacks.LISTED:
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
    used = [name for name in LIBRARIES if row["method"] != "full" or name != "peft"]
    if row["quantization"] not in BNB and row["optimizer"] not in OPTIMIZERS.where(lambda kind: kind.is_8bit):
        used = [name for name in used if name != "bitsandbytes"]
    left_out = [name for name in used if not row[name]]
    if not left_out:
        return
    if len(left_out) == len(used):
        yield "no library release given: the newest are assumed"
        return
    versions = training_versions.parse_versions({name: row[name] for name in LIBRARIES})
    assumed = ", ".join(f"{name} {'.'.join(map(str, getattr(versions, name)))}" for name in left_out)
    yield f"library releases of the time of those given: {assumed}"


def _stated(row: Row) -> dict[str, str]:
    """Library -> the release that the row states, or that its source implies."""
    known = _RELEASES.get(row["source"], ({}, ""))[0]
    return {name: row[name] or known.get(name, "") for name in LIBRARIES}


def _check_modelled(row: Row) -> None:
    for column, allowed in ENUMERATIONS.items():
        value = row[column]
        if value and value not in allowed:
            raise NotScored(f"unknown {column} {one_line(value, 60)!r}")
        if column in SETTING_COLUMNS and SETTINGS[SETTING_COLUMNS[column]].column_words.get(value) == "":
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


def _applies(row: Row, key: str) -> bool:
    """Whether a column counts: a full fine-tuning has no adapter, an unquantized base no quantized modules."""
    if SETTINGS[key].belongs_to == "adapter":
        return row["method"] != "full"
    return key != "quantized_modules" or row["quantization"] not in ("", "none")


def _cell(row: Row, key: str) -> Any:
    """The value of a setting in its column; None: the column is empty."""
    setting, text = SETTINGS[key], row[SETTINGS[key].column]
    if isinstance(setting.kind, Whole):
        return _whole(row, setting.column)
    if isinstance(setting.kind, Number):
        return _decimal(row, setting.column)
    if isinstance(setting.kind, YesNo):
        return _flag(row, setting.column)
    if isinstance(setting.kind, Names):
        return config_values.names(key, text) or None
    return setting.column_words.get(text, text)


def _quantization_options(row: Row) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if row["quantization"] not in ("", "none"):
        if row["base_dtype"] == "fp32" and row["quantization"] in BNB and row["compute_dtype"] in ("bf16", "fp16"):
            # a 4-bit base computed in 16 bit beside fp32 weights is what PEFT's preparation leaves of a 16-bit model
            options.update(base_dtype=row["compute_dtype"], kbit_preparation=True)
        elif row["base_dtype"]:  # the column says how the unquantized weights lie: nothing is left to a preparation
            options["kbit_preparation"] = False
        if _FMS_PLAIN_PREPARATION in row["notes"]:
            options["fp32_norms_only"] = True
    return options


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
    if row["loss"] and LOSSES[row["loss"]].logits == "whole" and row["kernels"] in ("", "none"):
        return UPCAST
    return row["loss"]


def _optimizer(row: Row, stack: str, versions: Versions) -> str:
    """Keep the framework's implementation of torch AdamW: the column tells its state dtype, not foreach from fused."""
    if row["optimizer"] in stacks.TORCH_ADAMW:
        return stacks.torch_adamw(stack, versions)
    return row["optimizer"]


def _padded(row: Row, stack: str) -> bool | None:
    """Rows padded to a common length carry a mask in transformers; litgpt and torchtune pass none in training."""
    if row["packing"] != "false" or not stacks.STACKS[stack].transformers_code:
        return None
    useful = _decimal(row, "mean_tokens_per_row")
    return True if useful is not None and useful < _length(row) and row["micro_batch"] != "1" else None


def _whole(row: Row, column: str) -> int | None:
    return int(row[column]) if row[column] else None


def _decimal(row: Row, column: str) -> float | None:
    return float(row[column]) if row[column] else None


def _flag(row: Row, column: str) -> bool | None:
    return row[column] == "true" if row[column] else None


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
