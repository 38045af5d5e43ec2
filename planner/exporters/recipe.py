"""What an export writes down: the planned settings in the words that exporters translate."""

from __future__ import annotations

from typing import NamedTuple

from planner.base.errors import Contradiction, InvalidInput, one_line
from planner.base.records import record
from planner.model.lora import resolve_targets
from planner.model.spec import ModelSpec
from planner.runs.dataset.batches import Padding
from planner.runs.schedule import Shape
from planner.training import optimizers
from planner.training.losses import KERNEL_SETS, LOSSES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec

OPTIMIZERS = {name: row.transformers_name for name, row in optimizers.OPTIMIZERS.items()}
"""Optimizer -> its name in transformers (training_args.py OptimizerNames)."""
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash2": "flash_attention_2"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ON_THE_FLY = QUANTIZATIONS.where(lambda row: not row.grouped)
"""Quantizations that a trainer applies while it loads 16-bit weights."""


class Artifact(NamedTuple):
    """A file to write."""

    name: str
    text: str


@record
class Export:
    """The files of one target, and what its reader must know."""

    artifacts: tuple[Artifact, ...]
    """The main one first."""
    notes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    """What the target would refuse."""


@record
class Recipe:
    """A planned run with the names that no model or training setting holds."""

    model_id: str
    model: ModelSpec
    training: TrainingSpec
    limit: int
    """Rows are cut to this many tokens."""
    data: str = "train.jsonl"
    data_shape: str = "alpaca"
    template: str = "alpaca-seed"
    padding: Padding = "longest"
    output_dir: str = "output"
    learning_rate: float = 2e-4
    schedule: Shape = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    epochs: float = 3.0
    max_steps: int = 0
    """0: as many as the epochs take."""
    save_steps: int = 500
    seed: int = 42
    plan_words: str = ""
    """The plan in a line, for a comment."""

    def __post_init__(self) -> None:
        kind = self.training.quantization.kind
        if kind not in ON_THE_FLY:
            raise Contradiction(
                f"a {kind} base is a checkpoint of its own: exports load 16-bit weights and quantize them with "
                f"bitsandbytes; choose one of {', '.join(ON_THE_FLY)}"
            )
        for name in ("model_id", "data", "output_dir"):
            value = getattr(self, name)
            if not value or not value.isprintable():
                raise InvalidInput(f"{name} is {one_line(value)!r}; must be a name without control characters")

    @property
    def targets(self) -> list[str]:
        """The adapted modules by the last part of their names; empty for full fine-tuning."""
        if self.training.lora is None:
            return []
        adapted = resolve_targets(self.model, self.training.lora)
        if any(item.kind == "parameter" for item in adapted):
            raise Contradiction(
                f"the adapters of {one_line(self.model_id)} are on fused expert parameters, which exports do not write "
                "yet; target the attention modules: --targets attention"
            )
        return list(dict.fromkeys(item.name.rpartition(".")[2] for item in adapted))

    @property
    def adapter(self) -> str:
        """none, lora or qlora, as axolotl says it."""
        if self.training.lora is None:
            return "none"
        return "lora" if self.training.quantization.kind == "none" else "qlora"

    @property
    def four_bit(self) -> bool:
        """Whether the base is loaded in 4 bit."""
        return QUANTIZATIONS[self.training.quantization.kind].packed_4bit

    @property
    def eight_bit(self) -> bool:
        """Whether the base is loaded in 8 bit."""
        return QUANTIZATIONS[self.training.quantization.kind].by_rows

    @property
    def bnb_4bit_type(self) -> str | None:
        """The base's type in BitsAndBytesConfig; None: it is not loaded in 4 bit."""
        return QUANTIZATIONS[self.training.quantization.kind].bnb_4bit_type or None

    @property
    def optim(self) -> str:
        """The optimizer in transformers' words.

        Raises:
            Contradiction: transformers has no name for it.
        """
        name = self.training.optimizer
        if not OPTIMIZERS[name]:
            known = ", ".join(other for other, word in OPTIMIZERS.items() if word)
            raise Contradiction(f"transformers' trainers have no {name}: choose another optimizer ({known})")
        return OPTIMIZERS[name]

    @property
    def in_chunks(self) -> bool:
        """Whether the plan never holds fp32 logits of all tokens, without kernels that see to it."""
        return LOSSES[self.training.loss].logits != "whole" and self.training.kernels == "none"

    @property
    def packing(self) -> bool:
        """Whether rows are packed."""
        return self.padding == "packed"


def common_notes(recipe: Recipe) -> list[str]:
    """What the plan has and an export cannot say."""
    training, notes = recipe.training, []
    if training.kernels != "none" and not KERNEL_SETS[training.kernels].transformers_argument:
        notes.append(f"the plan uses {training.kernels} kernels, which only their own trainer has; they are left out")
    if training.lora is not None and training.lora.target_slices:
        notes.append("target_slices exist in litgpt only; whole modules are adapted instead")
    if training.quantization.quantized_modules == "adapted-only":
        notes.append("the plan quantizes adapted modules only; bitsandbytes quantizes every linear module")
    if recipe.padding == "max":
        notes.append("the plan pads every row to the limit; trainers pad to the longest of a batch")
    return notes
