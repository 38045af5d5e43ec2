"""The course's three labs answered for any model: data (5.1), LoRA parameters (5.2), the four-section config (5.3).

Names and shapes are those of DB-mlops-genai labs/course4/week3/lab_finetuning.py at 66d55e53.
"""

from __future__ import annotations

from typing import Any

from planner.base.records import record
from planner.base.units import GB
from planner.course import rivals
from planner.model.adapter import AdapterFacts, base_weights
from planner.model.lora import resolve_targets
from planner.model.spec import ModelSpec
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec


@record
class Comparison:
    """One figure: what the formula of the course (or of a tool) says, and the exact one."""

    what: str
    theirs: float
    exact: float
    unit: str
    why: str
    """Why they differ; empty where they agree."""

    @property
    def ratio(self) -> float:
        """Theirs over exact."""
        return self.theirs / self.exact if self.exact else 0.0


def compare(model: ModelSpec, training: TrainingSpec, facts: AdapterFacts) -> tuple[Comparison, ...]:
    """Put the course's formulas beside the exact figures of the same configuration."""
    lora = training.lora
    assert lora is not None
    targets = len({row.name for row in facts.modules})
    exact = facts.adapter_parameters
    lab = rivals.lab_lora_parameters(lora.r, model.hidden_size, targets, model.num_layers)
    demo = rivals.demo_lora_parameters(lora.r, targets, model.num_parameters)
    tool = rivals.fine_tune_config_parameters(model.num_parameters, lora.r, targets)
    rows = [
        _row("lab 5.2 and notebook: r h 2 targets layers", lab, exact, "parameters", _square_words(model, facts)),
        _row("Rust demo: r 4096 2 targets", demo, exact, "parameters",
             "it has no layers, a hidden size of 4096 for every model, and a cap of 1 % of the model"),
        _row("entrenar FineTuneConfig", tool, exact, "parameters",
             "it guesses the hidden size from the parameter count and counts at least four square modules"),
    ]  # fmt: skip
    quant = training.quantization
    if QUANTIZATIONS[quant.kind].packed_4bit:
        base = facts.base.total_bytes / GB
        half = model.num_parameters * 2
        ratio = rivals.demo_memory_ratio(4, quant.double_quant)
        rows += [
            _row("notebook: half a byte a parameter", rivals.notebook_base_bytes(model.num_parameters) / GB, base,
                 "GB", _base_words(facts)),
            _row(f"Rust demo: 16-bit bytes x {ratio:g}", half * ratio / GB, base, "GB",
                 "it takes double quantization for a saving below 4 bits; it saves scales only: "
                 f"{facts.base.bits_per_weight:.4g} bits a weight"),
        ]  # fmt: skip
    return tuple(rows)


def _row(what: str, theirs: float, exact: float, unit: str, why: str) -> Comparison:
    return Comparison(what=what, theirs=theirs, exact=exact, unit=unit, why=why if theirs != exact else "")


def _square_words(model: ModelSpec, facts: AdapterFacts) -> str:
    """Which modules are not hidden x hidden."""
    h = model.hidden_size
    odd = [
        f"{row.name.rpartition('.')[2]} {row.in_features} x {row.out_features}"
        for row in facts.modules
        if (row.in_features, row.out_features) != (h, h)
    ]
    if odd:
        return f"it takes every module for {h} x {h}: {', '.join(dict.fromkeys(odd))}"
    return "the modules do not occur once in every layer"


def _base_words(facts: AdapterFacts) -> str:
    base = facts.base
    return (
        f"{base.other_elements:,} parameters (embeddings, head, norms) are not quantized, and the scales make "
        f"{base.bits_per_weight:.4g} bits of 4"
    )


def lab_5_2(model: ModelSpec, training: TrainingSpec, facts: AdapterFacts) -> dict[str, Any]:
    """What the learner's LoRAConfig returns, beside the exact count."""
    lora = training.lora
    assert lora is not None
    targets = list(dict.fromkeys(row.name.rpartition(".")[2] for row in facts.modules))
    estimate = rivals.lab_lora_parameters(lora.r, model.hidden_size, len(targets), model.num_layers)
    return {
        "r": lora.r,
        "alpha": lora.lora_alpha,
        "dropout": lora.lora_dropout,
        "target_modules": targets,
        "scaling_factor": lora.lora_alpha / lora.r,
        "hidden_dim": model.hidden_size,
        "num_layers": model.num_layers,
        "estimated_params": estimate,
        "exact_params": facts.adapter_parameters,
        "share_of_model": facts.adapter_parameters / model.num_parameters,
        "why_they_differ": _square_words(model, facts) if estimate != facts.adapter_parameters else None,
    }


@record
class Job:
    """The names and numbers of lab 5.3 that no model or training setting holds."""

    model_name: str
    dataset_path: str = "train.jsonl"
    output_dir: str = "output"
    learning_rate: float = 2e-4
    epochs: float = 3
    warmup_steps: int = 100
    weight_decay: float = 0.01


def lab_5_3(model: ModelSpec, training: TrainingSpec, job: Job) -> dict[str, Any]:
    """create_finetune_config: exactly the sections model, lora, training and data."""
    lora = training.lora
    assert lora is not None
    adapted = resolve_targets(model, lora)
    base = base_weights(model, training, adapted)
    quant = training.quantization
    return {
        "model": {
            "name": job.model_name,
            "parameters": model.num_parameters,
            "load_in_4bit": QUANTIZATIONS[quant.kind].packed_4bit,
            "base_bytes": base.total_bytes,
        },
        "lora": {
            "r": lora.r,
            "alpha": lora.lora_alpha,
            "dropout": lora.lora_dropout,
            "target_modules": list(dict.fromkeys(a.name.rpartition(".")[2] for a in adapted)),
        },
        "training": {
            "learning_rate": job.learning_rate,
            "batch_size": training.micro_batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "effective_batch_size": training.micro_batch_size * training.gradient_accumulation_steps,
            "num_epochs": job.epochs,
            "warmup_steps": job.warmup_steps,
            "max_seq_length": training.seq_len,
            "weight_decay": job.weight_decay,
            "bf16": training.autocast == "bf16",
            "output_dir": job.output_dir,
        },
        "data": {"dataset_path": job.dataset_path, "format": "alpaca", "max_length": training.seq_len},
    }


def lab_5_1(rows: int, share: float = 0.9) -> dict[str, int]:
    """DatasetPreparer.split: the first floor(n * share) rows train, the rest validate; no shuffle."""
    train = int(rows * share + 1e-9)
    return {"samples": rows, "train": train, "validation": rows - train}
