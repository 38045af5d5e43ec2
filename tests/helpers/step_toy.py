"""A toy model's step on the symbolic engine, small enough for its allocations and kernels to be worked by hand."""

from __future__ import annotations

from typing import Any

from planner.device import cuda_rules
from planner.model.families import build_spec
from planner.model.spec import ModelSpec
from planner.step import program
from planner.step.engine import Record
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec, Versions

TOYS: dict[str, dict[str, Any]] = {
    # 2 layers of 128, 4 heads of 32 (2 for keys), feed-forward 256, vocabulary 1000; rows 2 x 64 = 128 tokens
    kind: {
        "model_type": kind, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 32,
        "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    }
    for kind in ("llama", "mistral", "qwen2", "opt", "gemma", "phi3", "cohere", "mixtral", "olmo")
}  # fmt: skip
TOYS["gpt_bigcode"] = {
    "model_type": "gpt_bigcode", "n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 256, "vocab_size": 1000,
    "n_inner": 256, "multi_query": True,
}  # fmt: skip
TOYS["windowed"] = {**TOYS["mistral"], "sliding_window": 64}
TOYS["qwen"] = {
    "model_type": "qwen", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000,
    "num_attention_heads": 4, "kv_channels": 32, "seq_length": 256, "max_position_embeddings": 256,
}  # fmt: skip


def toy(model: str) -> ModelSpec:
    return build_spec(TOYS[model], model_id="toy")


def training(
    kind: str = "none", releases: dict[str, list[int]] | None = None, quant: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None, **settings: Any,
) -> TrainingSpec:  # fmt: skip
    """LoRA of rank 4 on q and v in bf16 without checkpointing, or what the row says otherwise."""
    full = settings.get("method") == "full"
    settings = {
        "method": "lora" if kind == "none" else "qlora", "micro_batch_size": 2, "seq_len": 64, "autocast": "none",
        "gradient_checkpointing": "none", "optimizer": "sgd", "max_grad_norm": 0.0,
        "lora": None if full else LoraSpec(**{"r": 4, "target_modules": ("q_proj", "v_proj"), "dtype": "bf16"} | {
            k: tuple(v) if isinstance(v, list) else v for k, v in (lora or {}).items()
        }),
        "quantization": QuantizationSpec(kind=kind, **(quant or {})),  # type: ignore[arg-type]
        "versions": Versions(**{k: (v[0], v[1]) for k, v in (releases or {}).items()}),
    } | settings  # fmt: skip
    return TrainingSpec(**settings)


def architecture(capability: list[int] | None = None, releases: dict[str, list[int]] | None = None) -> Any:
    torch = (releases or {}).get("torch", [2, 13])
    return cuda_rules.Architecture(
        capability=tuple(capability or (8, 0)),  # type: ignore[arg-type]
        torch=(torch[0], torch[1]),
        cudnn_attention=cuda_rules.prefers_cudnn_attention(tuple(capability or (8, 0)), (torch[0], torch[1])),  # type: ignore[arg-type]
    )


def recorded(model: str = "llama", capability: list[int] | None = None, **settings: Any) -> Record:
    arch = architecture(capability, settings.get("releases"))
    return program.run(toy(model), training(**settings), arch, full_depth=True).record
