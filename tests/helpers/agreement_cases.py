"""Small models whose peak lies where the program once disagreed with the trace, one per cause.

Vocabularies are small, so that the loss does not hide what happens in the layers.
"""

from __future__ import annotations

from typing import Any

from calibrate.oracle.cases import Case, shrunk
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 1024, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": 1024}
GPT: dict[str, Any] = TOKENS | {"n_embd": 512, "n_layer": 2, "n_head": 8, "n_positions": 1024}
FALCON: dict[str, Any] = TOKENS | {
    "model_type": "falcon", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "alibi": False,
    "new_decoder_architecture": False, "parallel_attn": True, "multi_query": True, "bias": False,
}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
WINDOWS = {"sliding_window": 128, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}

NF4 = QuantizationSpec(kind="nf4")
INT8 = QuantizationSpec(kind="int8")


def case(
    name: str, config: dict[str, Any], *, targets: tuple[str, ...] = ("attention",), dropout: float = 0.0, **rest: Any
) -> Any:
    """A case named for its cause; `rest` are TrainingSpec fields over LoRA of r=4 on 1 x 512 tokens, no autocast."""
    settings: dict[str, Any] = {
        "method": "lora", "micro_batch_size": 1, "seq_len": 512, "gradient_checkpointing": "none",
        "attention": "sdpa", "autocast": "none", "loss": "full-logits", "optimizer": "sgd",
    } | rest  # fmt: skip
    if settings["method"] != "full":
        dora = settings["method"] == "dora"
        settings["lora"] = LoraSpec(
            r=4, lora_dropout=dropout, target_modules=targets, dtype=rest.pop("lora_dtype", "bf16"), use_dora=dora
        )
    settings.pop("lora_dtype", None)
    return name, Case(model_id=config["model_type"], config=config, training=TrainingSpec(**settings))


BLOOM = TOKENS | {"model_type": "bloom", "hidden_size": 512, "n_layer": 2, "n_head": 8}
MPT = {"model_type": "mpt", "d_model": 512, "n_layers": 2, "n_heads": 8, "max_seq_len": 512, "vocab_size": 1024}
LLAMA = SIZES | {"model_type": "llama"}
OPT = TOKENS | {
    "model_type": "opt", "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip
KBIT: dict[str, Any] = {"method": "qlora", "quantization": NF4, "kbit_preparation": True}

OFFLOADED = Case(
    model_id="meta-llama/Llama-3.1-8B", config=shrunk("meta-llama/Llama-3.1-8B", 3, 32000),
    training=TrainingSpec(
        method="full", micro_batch_size=1, seq_len=2048, gradient_checkpointing="offload", use_reentrant=False,
        attention="sdpa", padded=True, loss="full-logits", optimizer="adamw-8bit", autocast="none",
    ),
)  # fmt: skip
INT8_MISTRAL = Case(
    model_id="mistralai/Mistral-7B-v0.1", config=shrunk("mistralai/Mistral-7B-v0.1", 3, 0),
    training=TrainingSpec(
        method="qlora", quantization=INT8, kbit_preparation=True, micro_batch_size=1, seq_len=4096,
        lora=LoraSpec(r=64, lora_alpha=16.0, lora_dropout=0.0, target_modules=("q_proj", "v_proj"), dtype="bf16"),
        gradient_checkpointing="full", use_reentrant=False, attention="sdpa", padded=True, loss="full-logits",
        optimizer="lion", autocast="none",
    ),
)  # fmt: skip
"""These two causes show at real widths only: the catalogue's configs with 3 layers."""

DIRECTED = (
    ("masks and tables die with the last checkpoint", OFFLOADED),
    ("int8's fp16 product is a workspace", INT8_MISTRAL),
    case("bloom: the GELU's written-out backward", BLOOM, attention="eager", padded=True, autocast="bf16",
         gradient_checkpointing="full", seq_len=128, micro_batch_size=2, **KBIT),
    case("bloom: scores by baddbmm, names of the frame", BLOOM, attention="eager", gradient_checkpointing="full",
         micro_batch_size=2, autocast="bf16"),
    case("mpt: casts before copies", MPT, attention="eager", micro_batch_size=4, autocast="bf16", seq_len=128,
         gradient_checkpointing="full", **KBIT),
    case("mpt: residual added inside the feed-forward", MPT, micro_batch_size=8, seq_len=64, **KBIT),
    case("mpt: clipped q, k, v", MPT | {"attn_config": {"clip_qkv": 6.0}}, seq_len=128),
    case("falcon: one key head is a view for one row", FALCON, attention="eager", gradient_checkpointing="full"),
    case("falcon: heads copied before anything else", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
         attention="eager", micro_batch_size=2, padded=True, autocast="bf16", gradient_checkpointing="full"),
    case("falcon: ALiBi in the mask", FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False,
         "bias": True}, micro_batch_size=2, padded=True),
    case("falcon: eager ALiBi", FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
         attention="eager", autocast="bf16"),
    case("gpt2: softmax in the scores' dtype", GPT | {"model_type": "gpt2"}, attention="eager", micro_batch_size=2),
    case("gpt2: pow's temporaries", GPT | {"model_type": "gpt2"}, autocast="bf16", gradient_checkpointing="full",
         seq_len=128),
    case("gpt_bigcode: gradient of the position table", GPT | {"model_type": "gpt_bigcode", "n_positions": 4096},
         method="full", seq_len=64, gradient_checkpointing="full", use_reentrant=True),
    case("gpt_neo: a buffer in every layer", TOKENS | {"model_type": "gpt_neo", "hidden_size": 512, "num_layers": 2,
         "num_heads": 8, "max_position_embeddings": 1024, "window_size": 128, "intermediate_size": None,
         "attention_types": [[["global", "local"], 1]]}),
    case("codegen: fp32 rotary tables, copied splits", GPT | {"model_type": "codegen", "rotary_dim": 32,
         "n_ctx": 1024}, attention="eager", autocast="bf16", gradient_checkpointing="full", seq_len=256),
    case("opt: fc1's input loses its name", OPT, method="dora", targets=("mlp",), lora_dtype="fp32", dropout=0.05,
         autocast="bf16", micro_batch_size=2, gradient_checkpointing="full", use_reentrant=True),
    case("llama: GELU in Python", LLAMA | {"hidden_act": "gelu_python"}),
    case("llama: fast GELU", LLAMA | {"hidden_act": "gelu_fast"}),
    case("llama: quick GELU", LLAMA | {"hidden_act": "quick_gelu"}),
    case("olmo: q, k, v clipped in place", SIZES | {"model_type": "olmo", "clip_qkv": 8.0}, attention="eager"),
    case("olmo2: rotary products in fp32", SIZES | {"model_type": "olmo2"}, seq_len=256),
    case("ernie4_5: rotary tables copied in every layer", SIZES | {"model_type": "ernie4_5", "head_dim": 64}),
    case("glm: rotary tables copied in every layer", SIZES | {"model_type": "glm", "head_dim": 64,
         "partial_rotary_factor": 0.5}, **KBIT),
    case("gemma3: two sets of rotary tables", SIZES | WINDOWS | {"model_type": "gemma3_text", "head_dim": 256},
         seq_len=1024, **KBIT),
    case("gpt_oss: rotary in halves, the maximum's gradient", SIZES | WINDOWS | MIXTURE | {"model_type": "gpt_oss",
         "head_dim": 64, "num_local_experts": 4, "intermediate_size": 256}, micro_batch_size=2, autocast="bf16"),
    case("qwen2_moe: the shared expert runs first", SIZES | MIXTURE | {"model_type": "qwen2_moe", "num_experts": 4,
         "shared_expert_intermediate_size": 1024}, gradient_checkpointing="full", micro_batch_size=2),
    case("phimoe: routing weights keep 16 bits", SIZES | {"model_type": "phimoe", "num_local_experts": 4,
         "num_experts_per_tok": 2, "intermediate_size": 512}, gradient_checkpointing="full", micro_batch_size=2),
    case("glm4_moe: a checkpoint's tensors die with the call", SIZES | MIXTURE | {"model_type": "glm4_moe",
         "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 64, "first_k_dense_replace": 1, "n_group": 1,
         "topk_group": 1}, gradient_checkpointing="full", micro_batch_size=2, padded=True),
)  # fmt: skip
