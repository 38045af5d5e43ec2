"""What other planners say for a request, by their published formulas: the course's demos and entrenar.

The formulas stand here as they are published, errors included, so that an answer can be put beside ours; nothing else
uses them. Sources: paiml/DB-mlops-genai at 66d55e53 (fine-tuning/src/main.rs, model_training.py, lab_finetuning.py) and
paiml/entrenar at 5d021a95 (crates/entrenar-lora, src/hf_pipeline/fine_tune). Their GB is 10**9 bytes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from planner.base.records import record
from planner.base.units import GB

Method = Literal["full", "lora", "qlora"]

# --- the course ---------------------------------------------------------------------------------------------------

COURSE_HIDDEN = 4096
"""Hidden size that the course's demo assumes for every model."""


def demo_lora_parameters(r: int, targets: int, model_parameters: int) -> int:
    """The Rust demo (main.rs trainable_params): r * 4096 * 2 * targets, at most 1 % of the model; no layers."""
    return min(r * COURSE_HIDDEN * 2 * targets, model_parameters // 100)


def lab_lora_parameters(r: int, hidden_size: int, targets: int, layers: int) -> int:
    """Lab 5.2 (lab_finetuning.py estimated_params): r * hidden * 2 * targets * layers; every module is square."""
    return r * hidden_size * 2 * targets * layers


def demo_memory_ratio(bits: int, double_quant: bool) -> float:
    """The Rust demo (memory_reduction): bits / 16, times 0.9 with double quantization; no block scales."""
    return bits / 16 * (0.9 if double_quant else 1.0)


def notebook_base_bytes(model_parameters: int) -> float:
    """The notebook: half a byte for each parameter, embeddings and head included (printed as GB, it is GiB)."""
    return model_parameters * 0.5


def demo_steps(rows: int, batch: int, accumulation: int, epochs: int) -> int:
    """The Rust demo (total_steps): whole effective batches only, 0 without a word for fewer rows than one."""
    return rows // (batch * accumulation) * epochs


# --- entrenar-lora plan -------------------------------------------------------------------------------------------

ENTRENAR_BATCH = 32
ENTRENAR_LENGTH = 512
ENTRENAR_MODULES = 4
"""Adapted modules per layer, whatever the user names."""
ENTRENAR_UTILIZATION = 0.85
ENTRENAR_SPEEDUP = {"full": 1.0, "lora": 2.5, "qlora": 1.8}
"""Constants (optimizer.rs): not computed from anything."""


@record
class EntrenarPlan:
    """What `entrenar-lora plan` prints for one method."""

    method: Method
    rank: int
    alpha: float
    trainable_parameters: int
    model_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    vram_bytes: int
    speedup: float
    hidden_size: int
    layers: int
    """Guessed from the parameter count."""

    @property
    def memory_bytes(self) -> int:
        """The sum it calls memory_gb."""
        return self.model_bytes + self.adapter_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def utilization(self) -> float:
        """Share of the card; above 1 it prints the number and no error."""
        return self.memory_bytes / self.vram_bytes

    @property
    def fits(self) -> bool:
        """As `entrenar-lora compare` says it."""
        return self.memory_bytes <= self.vram_bytes


class _Sizes(NamedTuple):
    model: int
    adapter: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def entrenar_architecture(parameters: int) -> tuple[int, int]:
    """Hidden size and layers guessed from the parameter count alone (memory.rs estimate_architecture)."""
    for above, hidden, layers in (
        (60_000_000_000, 8192, 80),
        (10_000_000_000, 5120, 40),
        (5_000_000_000, 4096, 32),
        (1_000_000_000, 2048, 22),
        (300_000_000, 1024, 12),
    ):
        if parameters > above:
            return hidden, layers
    return 768, 12


def entrenar_adapter_parameters(parameters: int, rank: int) -> int:
    """Four square modules in every guessed layer (memory.rs estimate_lora)."""
    hidden, layers = entrenar_architecture(parameters)
    return hidden * rank * 2 * ENTRENAR_MODULES * layers


def entrenar_plan(parameters: int, vram_bytes: int, method: Literal["full", "lora", "qlora", "auto"]) -> EntrenarPlan:
    """Reproduce `entrenar-lora plan` (memory.rs, optimizer.rs): the rank is what fills 85 % of the card.

    It knows neither batch nor length of the run: 32 rows of 512 tokens are built in. Where nothing fits it keeps its
    starting rank of 64 and reports a utilization above 100 %.
    """
    usable = int(vram_bytes * ENTRENAR_UTILIZATION)
    chosen: Method = _entrenar_method(parameters, usable) if method == "auto" else method
    rank = 0 if chosen == "full" else _entrenar_rank(parameters, usable, chosen)
    sizes = _entrenar_sizes(parameters, chosen, rank)
    hidden, layers = entrenar_architecture(parameters)
    return EntrenarPlan(
        method=chosen,
        rank=rank,
        alpha=rank / 4,
        trainable_parameters=parameters if chosen == "full" else _entrenar_trainable(parameters, rank),
        model_bytes=sizes.model,
        adapter_bytes=sizes.adapter,
        optimizer_bytes=sizes.optimizer,
        activation_bytes=sizes.activations,
        vram_bytes=vram_bytes,
        speedup=ENTRENAR_SPEEDUP[chosen],
        hidden_size=hidden,
        layers=layers,
    )


def _entrenar_sizes(parameters: int, method: Method, rank: int, bits: int = 4) -> _Sizes:
    hidden, layers = entrenar_architecture(parameters)
    activations = ENTRENAR_BATCH * ENTRENAR_LENGTH * hidden * 2 * 2 * layers
    if method == "full":
        return _Sizes(parameters * 2, 0, parameters * 8, activations)
    adapter = entrenar_adapter_parameters(parameters, rank)
    base = parameters * 2 if method == "lora" else parameters * bits // 8
    return _Sizes(base, adapter * 2, adapter * 8, activations)


def _entrenar_method(parameters: int, usable: int) -> Method:
    if _entrenar_sizes(parameters, "full", 0).total < usable:
        return "full"
    return "lora" if _entrenar_sizes(parameters, "lora", 64).total < usable else "qlora"


def _entrenar_rank(parameters: int, usable: int, method: Method) -> int:
    """Binary search from 8 to 256; 64 when no rank fits (optimizer.rs find_optimal_rank)."""
    low, high, best = 8, 256, 64
    while low <= high:
        middle = (low + high) // 2
        if _entrenar_sizes(parameters, method, middle).total <= usable:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def _entrenar_trainable(parameters: int, rank: int) -> int:
    """optimizer.rs has its own table: no tier below 1024 x 12."""
    hidden, layers = (1024, 12) if parameters <= 300_000_000 else entrenar_architecture(parameters)
    return hidden * rank * 2 * ENTRENAR_MODULES * layers


# --- entrenar FineTuneConfig --------------------------------------------------------------------------------------


def fine_tune_config_parameters(parameters: int, rank: int, targets: int) -> int:
    """FineTuneConfig.estimate_trainable_params: hidden from 12 * 32 * d**2, at least four modules."""
    hidden = max(int((parameters / 384) ** 0.5), 64)
    layers = min(max(parameters // (12 * hidden * hidden), 1), 128)
    return 2 * rank * hidden * max(targets, 4) * layers


def entrenar_differences(plan: EntrenarPlan, exact_trainable_at_rank: int, memory_bytes: int) -> list[str]:
    """Say why its figures differ from the exact ones for the same model and rank."""
    notes = [
        f"its memory assumes {ENTRENAR_BATCH} rows of {ENTRENAR_LENGTH} tokens, whatever is trained, and counts "
        f"{plan.activation_bytes / GB:.2f} GB of activations: 4 bytes an element, one tensor a layer; no logits, "
        "no gradients, no CUDA context",
        f"it guesses {plan.hidden_size} x {plan.layers} (hidden x layers) from the parameter count and adapts four "
        "square modules a layer",
    ]
    if plan.method != "full" and exact_trainable_at_rank not in (0, plan.trainable_parameters):
        ratio = plan.trainable_parameters / exact_trainable_at_rank
        notes.append(f"its trainable parameters are {ratio:.2f} times the exact ones at rank {plan.rank}")
    if plan.method == "qlora":
        notes.append("its 4-bit base has no scales (4.5 bits, 4.127 with double quantization) and a 4-bit embedding")
    if not plan.fits:
        notes.append(
            f"it recommends the configuration although it needs {plan.utilization * 100:.0f} % of the card: "
            "its check for too little memory cannot be reached"
        )
    notes.append(
        f"its {plan.memory_bytes / GB:.1f} GB are {plan.memory_bytes / memory_bytes:.2f} times the "
        f"{memory_bytes / GB:.1f} GB predicted here; its speed-up of {plan.speedup} is a constant"
    )
    return notes
