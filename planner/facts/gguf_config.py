"""A Hugging Face style config derived from a GGUF header: the sizes that decide memory, from its keys and tensors."""

from __future__ import annotations

from typing import Any, Final

from planner.base.errors import InvalidInput, one_line, unknown
from planner.facts.headers import GgufHeader

MODEL_TYPES: Final[dict[str, str]] = {
    "llama": "llama",  # mistral and mixtral files say llama too
    "mistral3": "ministral3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
    "command-r": "cohere",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
    "arcee": "arcee",
    "seed_oss": "seed_oss",
    "gpt-oss": "gpt_oss",
}
"""general.architecture -> model_type, where the header's keys are enough for the family's config."""

_SIZES: Final[dict[str, str]] = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Key behind the architecture's name -> config key."""

_REQUIRED: Final = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

_NOT_PARAMETERS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold rotary constants; transformers computes them."""


def config_from_gguf(header: GgufHeader, path: str) -> dict[str, Any]:
    """Return a config.json equivalent of a GGUF header.

    Raises:
        UnknownName: an architecture whose config cannot be derived from the header.
        InvalidInput: a size is missing, or differs between layers.
    """
    where = repr(one_line(path, 160))
    arch = header.architecture
    if arch not in MODEL_TYPES:
        raise unknown("GGUF architecture", arch, MODEL_TYPES, "(or pass the model's hub id or config.json)")
    config: dict[str, Any] = {"model_type": MODEL_TYPES[arch]}
    for suffix, key in _SIZES.items():
        value = header.metadata.get(f"{arch}.{suffix}")
        if value is not None:
            config[key] = _same_in_all_layers(value, f"{arch}.{suffix}", where)
    config["vocab_size"] = _vocabulary(header, arch)
    _experts(config, header, arch)
    names = header.tensors
    if names:  # without tensor shapes the family's defaults decide
        config["tie_word_embeddings"] = "output.weight" not in names
        config["attention_bias"] = "blk.0.attn_q.bias" in names
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    missing = [key for key in _REQUIRED if not config.get(key)]
    if missing:
        raise InvalidInput(f"{where} does not state {', '.join(missing)}; pass the model's config.json instead")
    return config


def gguf_parameters(header: GgufHeader) -> int:
    """Return the parameter total of the tensors; 0 for one part of a split file."""
    if _integer(header.metadata.get("split.count")) > 1:
        return 0
    return sum(info.elements for name, info in header.tensors.items() if name not in _NOT_PARAMETERS)


def _experts(config: dict[str, Any], header: GgufHeader, arch: str) -> None:
    """Add the expert keys in the spelling of the model_type."""
    experts = _integer(header.metadata.get(f"{arch}.expert_count"))
    if not experts:
        config.pop("num_experts_per_tok", None)
        return
    if arch == "llama":
        config["model_type"] = "mixtral"
    if config["model_type"] in ("mixtral", "gpt_oss"):
        config["num_local_experts"] = experts
        config["intermediate_size"] = config.pop("moe_intermediate_size", config.get("intermediate_size"))
    else:
        config["num_experts"] = experts


def _vocabulary(header: GgufHeader, arch: str) -> int:
    """Return the rows of the embedding (padding included), else the stated or listed vocabulary."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[0]
    stated = _integer(header.metadata.get(f"{arch}.vocab_size"))
    return stated or header.array_lengths.get("tokenizer.ggml.tokens", 0)


def _same_in_all_layers(value: Any, key: str, where: str) -> Any:
    if isinstance(value, tuple):
        if len(set(value)) != 1:
            raise InvalidInput(f"{where} has layers that differ in {key}; pass the model's config.json instead")
        return value[0]
    return value


def _integer(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
