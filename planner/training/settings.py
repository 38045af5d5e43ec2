"""SETTINGS: all that is known of each setting of a training run, one row each. Every consumer reads its field.

The command line (`planner.training.options`), `--explain` and JSON, the importers, the table of published measurements
and `planner.training.stacks` derive what they offer, accept and fill from these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from planner.base.errors import unknown
from planner.base.records import NamedTuple, Rows, fields, record
from planner.training import optimizers, quantizations
from planner.training.choices import CHOICES
from planner.training.kinds import (
    Choice,
    Kind,
    Names,
    Number,
    Parts,
    Releases,
    Whole,
    YesNo,
)
from planner.training.losses import KERNEL_SETS
from planner.training.quantizations import BNB, QUANTIZATIONS
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec, Versions


class Setting(NamedTuple):
    """A resolved value and where it came from: "given", "file NAME:LINE KEY", "stack NAME: SOURCE", ... ."""

    value: object
    origin: str

    @property
    def is_given(self) -> bool:
        """Whether the user stated it, typed or in a config file."""
        return self.origin == "given" or self.origin.startswith("file ")


# Default and Setting are named tuples: a dataclass costs a millisecond of start-up each, and `fits` starts often.
class Default(NamedTuple):
    """One default: the value where all conditions hold. The first that holds wins."""

    value: object
    source: str = ""
    """Where a framework says so; empty: loraplan's own, neutral one."""
    when: tuple[tuple[str, tuple[object, ...]], ...] = ()
    """Pairs of an earlier key and the values it must have."""
    before: tuple[str, tuple[int, int]] | None = None
    """A library and a release: holds for releases before it."""

    def holds(self, known: Mapping[str, Setting]) -> bool:
        """Whether this default applies, given the settings resolved so far."""
        if self.before is not None and getattr(known["versions"].value, self.before[0]) >= self.before[1]:
            return False
        return all(_is_one_of(known[key].value, allowed) for key, allowed in self.when)


def _is_one_of(value: object, allowed: Sequence[object]) -> bool:
    # An array (a sweep) never decides a default: one run of the table serves all its cells.
    return not hasattr(value, "shape") and value in allowed


def conditions(when: Mapping[str, Any]) -> tuple[tuple[str, tuple[object, ...]], ...]:
    """Write the conditions of a default: `{earlier_key: value_or_tuple}`."""
    return tuple((key, value if isinstance(value, tuple) else (value,)) for key, value in when.items())


def _if(value: object, **when: Any) -> Default:
    return Default(value, "", conditions(when))


class Idle(NamedTuple):
    """When a setting has no effect, and what to tell who gave it."""

    holds: Callable[[Resolved], bool]
    why: str
    """With {kind} for the quantization."""


Group = Literal["adapter", "quantization", "run"]
"""What a setting belongs to: it has no effect in a run without it."""

_WITHOUT: dict[Group, tuple[Idle, ...]] = {
    "adapter": (
        Idle(
            lambda run: run["method"] == "full",
            "method full has no adapter; drop it, or choose --method lora or qlora",
        ),
    ),
    "quantization": (
        Idle(
            lambda run: run["quantization"] == "none", "the base is not quantized; drop it, or choose --method qlora"
        ),
    ),
    "run": (),
}  # fmt: skip


@record
class SettingRow:
    """One setting. All fields are required: what is forgotten fails at import, by name."""

    spec: Literal["training", "lora", "quantization"]
    """Which of TrainingSpec, LoraSpec and QuantizationSpec it fills."""
    field: str
    """The field there."""
    kind: Kind
    """What its value may be."""
    defaults: tuple[Default, ...]
    """The neutral ones, where neither the user nor the framework says anything; the last holds always."""
    belongs_to: Group
    idle: tuple[Idle, ...]
    """When else it has no effect."""
    section: str
    """Of the help; empty: it has no option of its own."""
    place: int
    """In that section."""
    flags: tuple[str, ...]
    """Of the command line; the last one names it in messages."""
    help: str
    column: str
    """In the table of published measurements; empty: it has none."""
    column_words: Mapping[str, str]
    """Further words that the column may hold -> the value that is planned for them; empty: such a run is not."""

    def why_idle(self, run: Resolved) -> str | None:
        """Why it has no effect in a run, with a remedy; None: it has one."""
        for reason in (*_WITHOUT[self.belongs_to], *self.idle):
            if reason.holds(run):
                return reason.why.format(kind=run["quantization"])
        return None


@record
class Resolved:
    """Every option of one run with its origin."""

    stack: str
    settings: Mapping[str, Setting]
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.settings[key].value

    def applies(self, key: str) -> bool:
        """Whether the run uses `key` at all (a full fine-tuning has no rank, an unquantized base no group size)."""
        return SETTINGS[key].why_idle(self) is None

    def defaults_used(self) -> dict[str, Setting]:
        """The settings that apply and that the user did not give, in a fixed order."""
        return {k: s for k, s in self.settings.items() if not s.is_given and self.applies(k)}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return value and origin of every setting as plain JSON values."""
        return {key: {"value": _plain(s.value), "origin": s.origin} for key, s in self.settings.items()}


def _plain(value: object) -> Any:
    if isinstance(value, Versions):
        return {f.name: ".".join(map(str, getattr(value, f.name))) for f in fields(Versions)}
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def checked(given: Mapping[str, object]) -> dict[str, object]:
    """Drop what is not given and bring each value into its one form.

    Raises:
        UnknownName: for an unknown setting or word.
        InvalidInput: for a value that the setting does not take.
    """
    chosen: dict[str, object] = {}
    for key, value in given.items():
        if key not in SETTINGS:
            raise unknown("option", key, SETTINGS)
        if value is not None:
            chosen[key] = SETTINGS[key].kind.checked(key, value)
    return chosen


def neutral(key: str, known: Mapping[str, Setting]) -> object:
    """The value of a setting about which nobody says anything."""
    return next(entry.value for entry in SETTINGS[key].defaults if entry.holds(known))


# --- the rows -----------------------------------------------------------------------------------------------------

_DTYPES = {
    "float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "no": "none",
}  # fmt: skip
_ATTENTION = {"flash_attention_2": "flash2", "flash-attention-2": "flash2", "flash": "flash2", "fa2": "flash2"}
_CHECKPOINTING = {"true": "full", "on": "full", "false": "none", "off": "none", "unsloth": "offload"}

_DTYPE = Choice(words=CHOICES["dtype"], aliases=_DTYPES)
_YES_NO = YesNo()
_COUNT = Whole(low=1, high=2**20)
_NAMES = Names()
_OFF = Default(False)
_NO_COLUMN: dict[str, Any] = {"column": "", "column_words": {}}
_NO_CHECKPOINTING = Idle(
    lambda run: run["gradient_checkpointing"] == "none",
    "there is no checkpointing; drop it, or add --checkpointing full",
)
_NO_GROUPS = Idle(
    lambda run: not QUANTIZATIONS[run["quantization"]].grouped,
    "group sizes belong to gptq and awq bases, not to {kind}; drop it",
)
_ADAPTER: dict[str, Any] = {"spec": "lora", "belongs_to": "adapter", "idle": (), "section": "Method and adapter"}
_BASE: dict[str, Any] = {"spec": "training", "belongs_to": "run", "idle": (), "section": "Base weights"}
_QUANTIZED: dict[str, Any] = {**_BASE, "spec": "quantization", "belongs_to": "quantization"}
_BATCH: dict[str, Any] = {**_BASE, "section": "Batch, checkpointing, kernels"}
_LOSS: dict[str, Any] = {**_BASE, "section": "Loss and optimizer"}

_ROWS: dict[str, dict[str, Any]] = {
    "method": {
        **_ADAPTER, "spec": "training", "field": "method", "belongs_to": "run", "place": 1, "flags": ("--method",),
        "kind": Choice(words=CHOICES["method"], aliases={}), "defaults": (Default("qlora"),), "help": "Default qlora.",
        "column": "method", "column_words": {},
    },
    "versions": {
        **_BASE, "field": "versions", "section": "", "place": 0, "flags": (), "kind": Releases(),
        "defaults": (Default(Versions()),), "help": "", **_NO_COLUMN,
    },
    "quantization": {
        **_BASE, "spec": "quantization", "field": "kind", "place": 1, "flags": ("-q", "--quantization"),
        "kind": Choice(words=CHOICES["quantization"], aliases=quantizations.words()),
        "defaults": (_if("nf4", method="qlora"), Default("none")), "help": "How the frozen base is stored.",
        "column": "quantization", "column_words": {"other": ""},
    },
    "double_quant": {
        **_QUANTIZED, "field": "double_quant", "place": 2, "flags": ("--double-quant/--no-double-quant",),
        "kind": _YES_NO, "defaults": (_OFF,), "help": "Quantize the 4-bit scales too.",
        "column": "double_quant", "column_words": {},
    },
    "base_dtype": {
        **_BASE, "field": "base_dtype", "place": 6, "flags": ("--base-dtype",), "kind": _DTYPE,
        "defaults": (Default("bf16"),), "help": "dtype of unquantized base weights.",
        "column": "base_dtype", "column_words": {},
    },
    "autocast": {
        **_BATCH, "field": "autocast", "place": 11, "flags": ("--autocast",),
        "kind": Choice(words=("none", "bf16", "fp16"), aliases=_DTYPES),
        "defaults": (_if("fp16", base_dtype="fp16"), Default("bf16")), "help": "Mixed precision.",
        "column": "autocast", "column_words": {},
    },
    "compute_dtype": {
        **_QUANTIZED, "field": "compute_dtype", "place": 7, "flags": ("--compute-dtype",), "kind": _DTYPE,
        "defaults": (
            _if("fp16", autocast="fp16"), _if("bf16", autocast="bf16"), _if("fp16", base_dtype="fp16"),
            _if("fp32", base_dtype="fp32"), Default("bf16"),
        ),
        "help": "dtype of dequantized weights.", "column": "compute_dtype", "column_words": {},
    },
    "adapter_dtype": {
        **_ADAPTER, "field": "dtype", "place": 10, "flags": ("--adapter-dtype",), "kind": _DTYPE,
        "defaults": (Default("fp32"),), "help": "dtype of the adapter weights.",
        "column": "adapter_dtype", "column_words": {},
    },
    "kbit_preparation": {
        **_QUANTIZED, "spec": "training", "field": "kbit_preparation", "place": 8,
        "flags": ("--kbit-prep/--no-kbit-prep",), "kind": _YES_NO, "defaults": (_OFF,),
        "help": "PEFT's prepare_model_for_kbit_training (fp32 norms, embeddings and head).", **_NO_COLUMN,
    },
    "fp32_norms_only": {
        **_QUANTIZED, "spec": "training", "field": "fp32_norms_only", "place": 9,
        "flags": ("--fp32-norms/--no-fp32-norms",), "kind": _YES_NO, "defaults": (_OFF,),
        "help": "Only the norms are fp32.", **_NO_COLUMN,
    },
    "quantized_modules": {
        **_QUANTIZED, "field": "quantized_modules", "place": 3, "flags": ("--quantized-modules",),
        "kind": Choice(words=("linears", "adapted-only", "none"), aliases={}), "defaults": (Default("linears"),),
        "help": "Which linear modules are quantized.", "column": "quantized_modules", "column_words": {},
    },
    "skip_modules": {
        **_QUANTIZED, "field": "skip_modules", "place": 4, "flags": ("--skip-modules",), "kind": _NAMES,
        "defaults": (Default(("lm_head",)),), "help": "Modules left unquantized, or none.", **_NO_COLUMN,
    },
    "group_size": {
        **_QUANTIZED, "field": "group_size", "idle": (_NO_GROUPS,), "place": 5, "flags": ("--group-size",),
        "kind": _COUNT, "defaults": (Default(128),), "help": "GPTQ and AWQ: weights that share one scale.",
        **_NO_COLUMN,
    },
    "r": {
        **_ADAPTER, "field": "r", "place": 2, "flags": ("-r", "--rank"), "kind": _COUNT, "defaults": (Default(8),),
        "help": "LoRA rank.", "column": "rank", "column_words": {},
    },
    "lora_alpha": {
        **_ADAPTER, "field": "lora_alpha", "place": 3, "flags": ("--alpha",), "kind": Number(low=0.0, high=1e9),
        "defaults": (Default(16.0),), "help": "LoRA alpha.", "column": "alpha", "column_words": {},
    },
    "lora_dropout": {
        **_ADAPTER, "field": "lora_dropout", "place": 4, "flags": ("--dropout",),
        "kind": Number(low=0.0, high=1.0, below=True), "defaults": (Default(0.0),), "help": "LoRA dropout.",
        "column": "dropout", "column_words": {},
    },
    "target_modules": {
        **_ADAPTER, "field": "target_modules", "place": 5, "flags": ("--targets", "--target-modules"), "kind": _NAMES,
        "defaults": (Default(("all-linear",)),), "help": "all-linear, attention, mlp or module names.",
        "column": "target_modules", "column_words": {},
    },
    "target_slices": {
        **_ADAPTER, "field": "target_slices", "place": 6, "flags": ("--target-slices",), "kind": Parts(),
        "defaults": (Default(()),), "help": "Adapt only these parts of a fused projection, as 0,2.", **_NO_COLUMN,
    },
    "modules_to_save": {
        **_ADAPTER, "field": "modules_to_save", "place": 7, "flags": ("--modules-to-save",), "kind": _NAMES,
        "defaults": (Default(()),), "help": "Modules trained in full beside the adapters.", **_NO_COLUMN,
    },
    "use_dora": {
        **_ADAPTER, "field": "use_dora", "place": 8, "flags": ("--dora/--no-dora",), "kind": _YES_NO,
        "defaults": (_if(True, method="dora"), _OFF), "help": "DoRA.", **_NO_COLUMN,
    },
    "use_rslora": {
        **_ADAPTER, "field": "use_rslora", "place": 9, "flags": ("--rslora/--no-rslora",), "kind": _YES_NO,
        "defaults": (_OFF,), "help": "rsLoRA.", **_NO_COLUMN,
    },
    "micro_batch_size": {
        **_BATCH, "field": "micro_batch_size", "place": 1, "flags": ("--batch", "--micro-batch-size"), "kind": _COUNT,
        "defaults": (Default(1),), "help": "Rows per micro batch.", "column": "micro_batch", "column_words": {},
    },
    "seq_len": {
        **_BATCH, "field": "seq_len", "place": 2, "flags": ("--seq-len", "--length"),
        "kind": Whole(low=1, high=2**27), "defaults": (Default(2048),), "help": "Tokens per row.",
        "column": "seq_len", "column_words": {},
    },
    "gradient_accumulation_steps": {
        **_BATCH, "field": "gradient_accumulation_steps", "place": 3, "flags": ("--grad-accum",), "kind": _COUNT,
        "defaults": (Default(1),), "help": "Micro batches per optimizer step.",
        "column": "grad_accum", "column_words": {},
    },
    "gradient_checkpointing": {
        **_BATCH, "field": "gradient_checkpointing", "place": 4, "flags": ("--checkpointing",),
        "kind": Choice(words=CHOICES["checkpointing"], aliases=_CHECKPOINTING), "defaults": (Default("full"),),
        "help": "Gradient checkpointing.", "column": "checkpointing", "column_words": {"selective": ""},
    },
    "use_reentrant": {
        **_BATCH, "field": "use_reentrant", "idle": (_NO_CHECKPOINTING,), "place": 5,
        "flags": ("--reentrant/--no-reentrant",), "kind": _YES_NO, "defaults": (_OFF,),
        "help": "Reentrant checkpointing.", **_NO_COLUMN,
    },
    "attention": {
        **_BATCH, "field": "attention", "place": 6, "flags": ("--attention",),
        "kind": Choice(words=CHOICES["attention"], aliases=_ATTENTION), "defaults": (Default("sdpa"),),
        "help": "Attention implementation.", "column": "attention",
        # memory as SDPA's flash kernel: no score matrix, one logsumexp
        "column_words": {"flex": "sdpa", "xformers": "sdpa", "other": ""},
    },
    "padded": {
        **_BATCH, "field": "padded", "place": 7, "flags": ("--padded/--no-padded",), "kind": _YES_NO,
        "defaults": (_OFF,), "help": "Rows carry a padding mask.", **_NO_COLUMN,
    },
    "kernels": {
        **_BATCH, "field": "kernels", "place": 8, "flags": ("--kernels",),
        "kind": Choice(words=CHOICES["kernels"], aliases={}), "defaults": (Default("none"),), "help": "Fused kernels.",
        "column": "kernels", "column_words": {"other": ""},
    },
    "loss": {
        **_LOSS, "field": "loss", "place": 1, "flags": ("--loss",),
        "kind": Choice(words=CHOICES["loss"], aliases={}),
        "defaults": (
            *(_if(row.default_loss, kernels=name) for name, row in KERNEL_SETS.items() if row.default_loss),
            Default("full-logits-fp32"),
        ),
        "help": "How logits become a loss.", "column": "loss", "column_words": {},
    },
    "optimizer": {
        **_LOSS, "field": "optimizer", "place": 2, "flags": ("--optimizer",),
        "kind": Choice(words=CHOICES["optimizer"], aliases=optimizers.words()), "defaults": (Default("adamw"),),
        "help": "Optimizer and states.", "column": "optimizer", "column_words": {"other": ""},
    },
    "optimizer_in_backward": {
        **_LOSS, "field": "optimizer_in_backward", "place": 3,
        "flags": ("--optimizer-in-backward/--no-optimizer-in-backward",), "kind": _YES_NO, "defaults": (_OFF,),
        "help": "The optimizer steps during the backward.", **_NO_COLUMN,
    },
    "max_grad_norm": {
        **_LOSS, "field": "max_grad_norm", "place": 4, "flags": ("--max-grad-norm",),
        "kind": Number(low=0.0, high=1e9), "defaults": (Default(1.0),),
        "help": "Gradient clipping; 0 switches it off.", **_NO_COLUMN,
    },
    "keeps_outputs": {
        **_LOSS, "field": "keeps_outputs", "place": 6, "flags": ("--keeps-outputs/--no-keeps-outputs",),
        "kind": _YES_NO, "defaults": (_OFF,), "help": "The loop holds the logits meanwhile.", **_NO_COLUMN,
    },
    "outputs_to_fp32": {
        **_LOSS, "field": "outputs_to_fp32", "place": 7, "flags": ("--outputs-to-fp32/--no-outputs-to-fp32",),
        "kind": _YES_NO, "defaults": (_OFF,), "help": "accelerate's fp32 logits copy.", **_NO_COLUMN,
    },
    "compile": {
        **_BATCH, "field": "compile", "place": 9, "flags": ("--compile/--no-compile",), "kind": _YES_NO,
        "defaults": (_OFF,), "help": "torch.compile.", "column": "compile", "column_words": {},
    },
    "tf32": {
        **_BATCH, "field": "tf32", "place": 10, "flags": ("--tf32/--no-tf32",), "kind": _YES_NO, "defaults": (_OFF,),
        "help": "fp32 products on TF32 tensor cores.", **_NO_COLUMN,
    },
    "own_modules": {
        **_BASE, "field": "own_modules", "place": 10, "flags": ("--own-modules",),
        "kind": Choice(words=CHOICES["own modules"], aliases={}), "defaults": (Default("none"),),
        "help": "The framework whose own modules are trained in the place of transformers'.", **_NO_COLUMN,
    },
    "longest_first": {
        **_LOSS, "field": "longest_first", "place": 5, "flags": ("--longest-first/--any-order",), "kind": _YES_NO,
        "defaults": (_OFF,), "help": "The longest micro batch is the run's first.", **_NO_COLUMN,
    },
    "added_tokens": {
        **_BASE, "field": "added_tokens", "place": 11, "flags": ("--added-tokens",), "kind": Whole(low=0, high=2**20),
        "defaults": (Default(0),), "help": "Tokens added to the vocabulary: table and head grow.", **_NO_COLUMN,
    },
    "device_map": {
        **_BASE, "field": "device_map", "place": 12, "flags": ("--device-map/--no-device-map",), "kind": _YES_NO,
        "defaults": (_if(True, quantization=BNB), _OFF),
        "help": "from_pretrained puts the weights on the GPU itself (it does where it quantizes).", **_NO_COLUMN,
    },
}  # fmt: skip
"""In the order in which they are resolved: a default may depend on settings above it only."""

SETTINGS = Rows("option", _ROWS, ((key, SettingRow(**row)) for key, row in _ROWS.items()))

SECTIONS = ("Method and adapter", "Base weights", "Batch, checkpointing, kernels", "Loss and optimizer")
"""Of the help, in its order."""

LIBRARIES = Rows(
    "library",
    (item.name for item in fields(Versions)),
    (
        ("torch", "PyTorch release, for example 2.4."),
        ("transformers", "transformers release."),
        ("peft", "PEFT release."),
        ("bitsandbytes", "bitsandbytes release."),
    ),
)
"""Libraries whose release changes the answer -> the help of the option that names one; together they are `versions`."""


def keys_of(group: Group) -> frozenset[str]:
    """The settings that belong to the adapter, to the quantization, or to the run."""
    return frozenset(SETTINGS.where(lambda row: row.belongs_to == group))


def values_of(spec: str, value: Callable[[str], Any]) -> dict[str, Any]:
    """The fields that the settings fill of TrainingSpec ("training"), LoraSpec or QuantizationSpec.

    Args:
        value: of a setting, by its key.
    """
    return {row.field: value(key) for key, row in SETTINGS.items() if row.spec == spec}


_NESTED = {"lora", "quantization"}
"""Fields of TrainingSpec that hold the other specs."""


def check_complete(settings: Mapping[str, SettingRow]) -> None:
    """Every field of the specs has its setting and every setting its field, its place in the help and a last default.

    Raises:
        TypeError: naming what is missing.
    """
    for spec, kind in (("training", TrainingSpec), ("lora", LoraSpec), ("quantization", QuantizationSpec)):
        filled = {row.field: key for key, row in settings.items() if row.spec == spec}
        names = {item.name for item in fields(kind)} - (_NESTED if kind is TrainingSpec else set())
        for name in sorted(names - set(filled)):
            raise TypeError(f"option: no row for the field {name} of {kind.__name__}")
        for name in sorted(set(filled) - names):
            raise TypeError(f"option {filled[name]}: {kind.__name__} has no field {name}")
    above: set[str] = set()
    for key, row in settings.items():
        late = {name for entry in row.defaults for name, _ in entry.when} - above
        if late:
            raise TypeError(f"option {key}: a default depends on {', '.join(sorted(late))}, which comes later")
        if not row.defaults or row.defaults[-1].when:
            raise TypeError(f"option {key}: no default without a condition at the end")
        if row.section and (row.section not in SECTIONS or not row.flags or not row.help):
            raise TypeError(f"option {key}: an option of the command line needs a known section, flags and help")
        above.add(key)


check_complete(SETTINGS)
