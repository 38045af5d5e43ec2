"""Options that commands share: the output format, and every training setting as a flag."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.base.errors import unknown
from planner.base.records import NamedTuple
from planner.plan.words import LIBRARIES
from planner.training import optimizers, quantizations
from planner.training.choices import CHOICES
from planner.training.settings import _ATTENTION, _CHECKPOINTING, _DTYPES

FORMATS = ("table", "json", "csv", "markdown")

_Command = TypeVar("_Command", bound=Callable[..., Any])


if TYPE_CHECKING:  # before click 8.2 Choice takes no type
    _Choice = click.Choice[str]
else:
    _Choice = click.Choice


class Word(_Choice):
    """One of a few words, with the names other tools give them; an unknown one names close matches."""

    def __init__(self, what: str, words: tuple[str, ...], aliases: Mapping[str, str] | None = None) -> None:
        super().__init__(words)
        self.what, self.words, self.aliases = what, words, dict(aliases or {})

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the known word.

        Raises:
            UnknownName: naming the value and what is allowed.
        """
        word = str(value).strip().lower()
        word = self.aliases.get(word, word)
        if word not in self.words:
            raise unknown(self.what, value, self.words)
        return word


class Number(click.FloatRange):
    """A finite number within bounds; click lets nan pass every bound, and inf every open one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail naming the value and the bounds."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


MOST_STEPS = 2**40
"""Above every number of optimizer steps, and exact as a float."""


def format_option_of(formats: tuple[str, ...]) -> Callable[[_Command], _Command]:
    """Return the decorator that adds `--format` with these words (parameter `style`)."""
    return click.option(
        "--format", "style", type=Word("format", formats), default="table", show_default=True, help="How to print."
    )


def format_option(command: _Command) -> _Command:
    """Add `--format` to a command (parameter `style`)."""
    return format_option_of(FORMATS)(command)


def calibration_option(command: _Command) -> _Command:
    """Add `--calibration` (parameter `calibration`)."""
    return click.option(
        "--calibration", metavar="FILE|none",
        help="Coefficients of the times: a calibration (file or id), or none; by default the newest of the card.",
    )(command)  # fmt: skip


def cost_options(command: _Command) -> _Command:
    """Add what a whole run is: how much is trained, and what an hour costs."""
    for flag, kind, metavar, text in reversed((
        ("--tokens", str, "N", "Train on this many tokens, for example 10M: hours and USD."),
        ("--rows", int, "N", "Train on this many rows."),
        ("--epochs", float, "N", "Passes over the rows (default 1)."),
        ("--mean-tokens", float, "N", "Useful tokens per row, where rows are padded to the length."),
        ("--price", float, "USD", "USD per hour; otherwise the cheapest machine of the instance table."),
        ("--dbu-table", str, "FILE", "Databricks units per hour of each node type (JSON), added to machine prices."),
        ("--dbu-rate", float, "USD", "USD per Databricks unit."),
    )):  # fmt: skip
        command = click.option(flag, type=kind, metavar=metavar, default=None, help=text)(command)
    return command


def trace_options(command: _Command) -> _Command:
    """Add the options of commands that may run a trace (parameters `time_limit` and `use_cache`)."""
    limit = click.option(
        "--time-limit", type=click.FloatRange(1, 86400), default=600.0, show_default=True, metavar="SECONDS",
        help="Give up a trace after this long.",
    )  # fmt: skip
    cache = click.option(
        "--cache/--no-cache", "use_cache", default=True, help="Reuse a trace of the same run and library releases."
    )
    return limit(cache(command))


_FLAG = object()
"""Marks a yes/no option (--x/--no-x)."""


class Option(NamedTuple):
    """A training setting on the command line: flags, the key of `training.stacks` it sets, its type and its help."""

    flags: tuple[str, ...]
    key: str
    kind: Any
    help: str


def _dtype(what: str, words: tuple[str, ...] = CHOICES["dtype"]) -> Word:
    return Word(what, words, _DTYPES)


TRAINING: dict[str, tuple[Option, ...]] = {
    "Method and adapter": (
        Option(("--method",), "method", Word("method", CHOICES["method"]), "Default qlora."),
        Option(("-r", "--rank"), "r", int, "LoRA rank."),
        Option(("--alpha",), "lora_alpha", float, "LoRA alpha."),
        Option(("--dropout",), "lora_dropout", float, "LoRA dropout."),
        Option(("--targets", "--target-modules"), "target_modules", str, "all-linear, attention, mlp or module names."),
        Option(("--target-slices",), "target_slices", str, "Adapt only these parts of a fused projection, as 0,2."),
        Option(("--modules-to-save",), "modules_to_save", str, "Modules trained in full beside the adapters."),
        Option(("--dora/--no-dora",), "use_dora", _FLAG, "DoRA."),
        Option(("--rslora/--no-rslora",), "use_rslora", _FLAG, "rsLoRA."),
        Option(("--adapter-dtype",), "adapter_dtype", _dtype("adapter dtype"), "dtype of the adapter weights."),
    ),
    "Base weights": (
        Option(
            ("-q", "--quantization"),
            "quantization",
            Word("quantization", CHOICES["quantization"], quantizations.words()),
            "How the frozen base is stored.",
        ),
        Option(("--double-quant/--no-double-quant",), "double_quant", _FLAG, "Quantize the 4-bit scales too."),
        Option(
            ("--quantized-modules",),
            "quantized_modules",
            Word("quantized modules", ("linears", "adapted-only", "none")),
            "Which linear modules are quantized.",
        ),
        Option(("--skip-modules",), "skip_modules", str, "Modules left unquantized, or none."),
        Option(("--group-size",), "group_size", int, "GPTQ and AWQ: weights that share one scale."),
        Option(("--base-dtype",), "base_dtype", _dtype("base dtype"), "dtype of unquantized base weights."),
        Option(("--compute-dtype",), "compute_dtype", _dtype("compute dtype"), "dtype of dequantized weights."),
        Option(
            ("--kbit-prep/--no-kbit-prep",),
            "kbit_preparation",
            _FLAG,
            "PEFT's prepare_model_for_kbit_training (fp32 norms, embeddings and head).",
        ),
        Option(("--fp32-norms/--no-fp32-norms",), "fp32_norms_only", _FLAG, "Only the norms are fp32."),
        Option(("--untied-head/--no-untied-head",), "untied_head", _FLAG, "litgpt's own modules, its head untied."),
        Option(("--added-tokens",), "added_tokens", int, "Tokens added to the vocabulary: table and head grow."),
        Option(
            ("--device-map/--no-device-map",),
            "device_map",
            _FLAG,
            "from_pretrained puts the weights on the GPU itself (it does where it quantizes).",
        ),
    ),
    "Batch, checkpointing, kernels": (
        Option(("--batch", "--micro-batch-size"), "micro_batch_size", int, "Rows per micro batch."),
        Option(("--seq-len", "--length"), "seq_len", int, "Tokens per row."),
        Option(("--grad-accum",), "gradient_accumulation_steps", int, "Micro batches per optimizer step."),
        Option(
            ("--checkpointing",),
            "gradient_checkpointing",
            Word("checkpointing", CHOICES["checkpointing"], _CHECKPOINTING),
            "Gradient checkpointing.",
        ),
        Option(("--reentrant/--no-reentrant",), "use_reentrant", _FLAG, "Reentrant checkpointing."),
        Option(
            ("--attention",),
            "attention",
            Word("attention", CHOICES["attention"], _ATTENTION),
            "Attention implementation.",
        ),
        Option(("--padded/--no-padded",), "padded", _FLAG, "Rows carry a padding mask."),
        Option(("--kernels",), "kernels", Word("kernels", CHOICES["kernels"]), "Fused kernels."),
        Option(("--compile/--no-compile",), "compile", _FLAG, "torch.compile."),
        Option(("--tf32/--no-tf32",), "tf32", _FLAG, "fp32 products on TF32 tensor cores."),
        Option(("--autocast",), "autocast", _dtype("autocast", ("none", "bf16", "fp16")), "Mixed precision."),
    ),
    "Loss and optimizer": (
        Option(("--loss",), "loss", Word("loss", CHOICES["loss"]), "How logits become a loss."),
        Option(
            ("--optimizer",),
            "optimizer",
            Word("optimizer", CHOICES["optimizer"], optimizers.words()),
            "Optimizer and states.",
        ),
        Option(
            ("--optimizer-in-backward/--no-optimizer-in-backward",),
            "optimizer_in_backward",
            _FLAG,
            "The optimizer steps during the backward.",
        ),
        Option(("--max-grad-norm",), "max_grad_norm", float, "Gradient clipping; 0 switches it off."),
        Option(("--longest-first/--any-order",), "longest_first", _FLAG, "The longest micro batch is the run's first."),
        Option(("--keeps-outputs/--no-keeps-outputs",), "keeps_outputs", _FLAG, "The loop holds the logits meanwhile."),
        Option(("--outputs-to-fp32/--no-outputs-to-fp32",), "outputs_to_fp32", _FLAG, "accelerate's fp32 logits copy."),
    ),
    "Framework and releases": (
        Option(
            ("--stack",),
            "stack",
            str,
            "The framework whose unasked defaults apply: hf-trainer, trl, peft-loop, axolotl, llama-factory, unsloth, "
            "torchtune, litgpt, fms, ms-swift or custom (the default).",
        ),
        Option(("--torch",), "torch", str, "PyTorch release, for example 2.4."),
        Option(("--transformers",), "transformers", str, "transformers release."),
        Option(("--peft",), "peft", str, "PEFT release."),
        Option(("--bitsandbytes",), "bitsandbytes", str, "bitsandbytes release."),
    ),
}
"""Sections of the help and their options, in the order of the help."""


def training_options(command: _Command) -> _Command:
    """Add every training setting to a command; a parameter is None where the user did not give it."""
    for options in reversed(list(TRAINING.values())):
        for option in reversed(options):
            extra: dict[str, Any] = {} if option.kind is _FLAG else {"type": option.kind}
            if option.key in LIBRARIES:
                extra["metavar"] = "VERSION"
            command = click.option(*option.flags, option.key, default=None, help=option.help, **extra)(command)
    return command


def help_option(command: click.Command, ctx: click.Context) -> click.Option:
    """`-h`, as click makes it but for the translation of its help: gettext reads the locale's files to find none."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    return click.Option(
        command.get_help_option_names(ctx), is_flag=True, is_eager=True, expose_value=False, callback=show,
        help="Show this message and exit.",
    )  # fmt: skip


class Sectioned(click.Command):
    """A command whose help lists its options in the sections of `TRAINING`, the rest first."""

    _own_help: click.Option | None = None

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option that prints the help, the same one every time."""
        if self._own_help is None:
            self._own_help = help_option(self, ctx)
        return self._own_help

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section."""
        place = {option.key: title for title, options in TRAINING.items() for option in options}
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], **{title: [] for title in TRAINING}}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections[place.get(param.name or "", "Options")].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
