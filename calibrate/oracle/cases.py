"""Cases of the agreement suite: configurations drawn from the product of model families, methods and settings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planner.facts import catalog
from planner.model.depth import first_layers
from planner.model.lora import PEFT_DEFAULT_TARGETS
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

MODELS = (
    "HuggingFaceTB/SmolLM2-360M", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-0.6B", "mistralai/Mistral-7B-v0.1",
    "meta-llama/Llama-3.1-8B", "EleutherAI/pythia-410m", "facebook/opt-1.3b", "openai-community/gpt2-medium",
    "ibm-granite/granite-3.1-2b-instruct", "google/gemma-2b", "google/gemma-2-2b", "google/gemma-3-1b-it",
    "microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-1_5", "bigcode/starcoder2-3b", "tiiuae/falcon-7b",
    "stabilityai/stablelm-2-1_6b", "allenai/OLMo-2-1124-7B", "allenai/Olmo-3-1025-7B", "THUDM/glm-4-9b-chat-hf",
    "arcee-ai/AFM-4.5B", "ByteDance-Seed/Seed-OSS-36B-Instruct", "CohereLabs/c4ai-command-r-v01",
    "HuggingFaceTB/SmolLM3-3B", "swiss-ai/Apertus-8B-Instruct-2509", "bigscience/bloom-7b1", "EleutherAI/gpt-j-6b",
    "mosaicml/mpt-7b", "bigcode/gpt_bigcode-santacoder", "Qwen/Qwen3-30B-A3B", "mistralai/Mixtral-8x7B-v0.1",
    "deepseek-ai/DeepSeek-V2-Lite", "openai/gpt-oss-20b",
)  # fmt: skip
"""One catalogue model of each of 33 model types or variants."""

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
TOKEN_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id")
VOCABULARIES = (0, 32000, 65536, 131072, 262144)
"""0 keeps the model's own."""
LORA_OPTIMIZERS = (
    "adamw", "adamw-fused", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "lion", "lion-8bit", "adafactor", "sgd",
)  # fmt: skip
FULL_OPTIMIZERS = ("adamw-bf16-states", "adamw-fused", "adamw-8bit", "lion", "adafactor", "sgd")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration: a shrunk config of a catalogue model and the training settings."""

    model_id: str
    config: dict[str, Any]
    training: TrainingSpec

    def label(self) -> str:
        """The settings in one line."""
        t = self.training
        lora = (
            f" r{t.lora.r} p{t.lora.lora_dropout:g} {','.join(t.lora.target_modules)} {t.lora.dtype}" if t.lora else ""
        )
        return (
            f"{self.model_id} V{self.config.get('vocab_size')} {t.method} {t.quantization.kind}"
            f"{'-dq' if t.quantization.double_quant else ''}{lora} {t.micro_batch_size}x{t.seq_len}"
            f" {'kbit ' if t.kbit_preparation else ''}autocast-{t.autocast}"
            f" {t.attention}{' padded' if t.padded else ''}"
            f" ckpt-{t.gradient_checkpointing}{'-re' if t.use_reentrant else ''} {t.optimizer} {t.loss}"
        )


def shrunk(model_id: str, layers: int, vocabulary: int) -> dict[str, Any]:
    """The catalogue's config with few layers and experts, at its real widths."""
    record = catalog.model_record(model_id)
    assert record is not None, model_id
    config = first_layers(record.config, layers)
    for key in EXPERT_KEYS:
        if key in config:
            config[key] = min(config[key], 16)
    if vocabulary:
        config["vocab_size"] = vocabulary
        config |= dict.fromkeys(TOKEN_KEYS, 0)  # torch refuses a padding token outside the table
    return config


def draw(rng: random.Random, model_id: str) -> Case:
    """Draw one case for a model from the product of the settings."""
    config = shrunk(model_id, rng.choice([2, 3]), rng.choice(VOCABULARIES))
    method: Any = rng.choice(["qlora", "qlora", "qlora", "lora", "lora", "dora", "full"])
    length = rng.choice([64, 512, 1024, 2048, 4096])
    attention: Any = "eager" if length <= 1024 and rng.random() < 0.25 else "sdpa"
    checkpointing: Any = rng.choice(["none", "full", "full", "offload"])
    optimizer: Any = rng.choice(FULL_OPTIMIZERS if method == "full" else LORA_OPTIMIZERS)
    loss: Any = rng.choice(["full-logits-fp32", "full-logits-fp32", "full-logits"])
    length = min(length, _positions(config))
    training = TrainingSpec(
        method=method,
        lora=_draw_lora(rng, method, config) if method != "full" else None,
        quantization=_draw_quantization(rng) if method == "qlora" else QuantizationSpec(),
        kbit_preparation=method == "qlora" and rng.random() < 0.4,
        micro_batch_size=rng.choice([1, 2, 8]) if length < 4096 else rng.choice([1, 8]),
        seq_len=length,
        gradient_checkpointing=checkpointing,
        use_reentrant=checkpointing == "full" and rng.random() < 0.5,
        attention=attention,
        padded=rng.random() < 0.2,
        autocast="none" if method == "full" else rng.choice(["none", "bf16", "bf16"]),
        loss=loss,
        optimizer=optimizer,
    )
    return Case(model_id=model_id, config=config, training=training)


TABLES = {
    "gpt2": "n_positions", "gpt_bigcode": "n_positions", "gptj": "n_positions", "opt": "max_position_embeddings",
    "mpt": "max_seq_len",
}  # fmt: skip
"""model_type -> config key of the length of its table of positions: no run can be longer."""


def _positions(config: dict[str, Any]) -> int:
    return int(config.get(TABLES.get(str(config["model_type"]), ""), 2**20))


def _draw_quantization(rng: random.Random) -> QuantizationSpec:
    kind: Any = rng.choice(["nf4", "nf4", "nf4", "int8"])
    return QuantizationSpec(kind=kind, double_quant=kind == "nf4" and rng.random() < 0.5)


def _draw_lora(rng: random.Random, method: str, config: dict[str, Any]) -> LoraSpec:
    targets: tuple[str, ...] = rng.choice([("all-linear",), ("attention",), ("mlp",), ("default",)])
    if targets == ("default",):
        targets = PEFT_DEFAULT_TARGETS.get(str(config["model_type"]), ("attention",))
    experts = any(key in config for key in EXPERT_KEYS)
    if experts and targets == ("mlp",):
        targets = ("attention",)
    return LoraSpec(
        r=rng.choice([4, 16, 64, 256]),
        # PEFT refuses dropout on fused experts, which all-linear adapts
        lora_dropout=0.0 if experts and targets == ("all-linear",) else rng.choice([0.0, 0.05]),
        target_modules=targets,
        dtype=rng.choice(["fp32", "bf16"]),
        use_dora=method == "dora",
    )


def cases(number: int, seed: int = 1) -> Iterator[Case]:
    """Yield `number` cases, cycling through the models."""
    rng = random.Random(seed)
    for made in range(number):
        yield draw(rng, MODELS[made % len(MODELS)])


__all__ = ["MODELS", "Case", "cases", "draw", "shrunk"]
