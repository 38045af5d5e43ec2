"""Every family against the real thing: transformers' class on the meta device, and PEFT's adapters on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.model.families import build_spec
from planner.model.lora import resolve_targets, trainable_lora_parameters
from planner.training.spec import LoraSpec
from tests.helpers.real_models import planned_linears, planned_norms, real_linears, real_model

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
MODELS = Path(__file__).resolve().parent.parent.parent / "data" / "models"

# at least one catalogue model of every model_type that transformers has a class for
CATALOGUE = [
    "01-ai--Yi-6B",
    "ByteDance-Seed--Seed-OSS-36B-Instruct",
    "CohereLabs--c4ai-command-r-v01",
    "EleutherAI--gpt-j-6b",
    "EleutherAI--gpt-neox-20b",
    "EleutherAI--pythia-410m",
    "HuggingFaceTB--SmolLM2-135M",
    "HuggingFaceTB--SmolLM3-3B",
    "Qwen--Qwen1.5-0.5B",
    "Qwen--Qwen2.5-7B",
    "Qwen--Qwen3-0.6B",
    "Qwen--Qwen3-8B",
    "Qwen--Qwen3-30B-A3B",
    "THUDM--glm-4-9b-chat-hf",
    "allenai--OLMo-2-1124-7B",
    "allenai--Olmo-3-1025-7B",
    "arcee-ai--AFM-4.5B",
    "bigcode--gpt_bigcode-santacoder",
    "bigcode--starcoder2-3b",
    "bigcode--starcoder2-15b",
    "bigscience--bloom-7b1",
    "deepseek-ai--DeepSeek-V2-Lite",
    "deepseek-ai--DeepSeek-V3",
    "facebook--opt-1.3b",
    "facebook--opt-350m",
    "google--gemma-2-2b",
    "google--gemma-2b",
    "google--gemma-3-1b-it",
    "google--gemma-3-27b-it",
    "ibm-granite--granite-3.3-8b-instruct",
    "ibm-research--PowerLM-3b",
    "meta-llama--Llama-3.2-1B",
    "microsoft--Phi-3-mini-4k-instruct",
    "microsoft--phi-2",
    "mistralai--Ministral-3-3B-Reasoning-2512",
    "mistralai--Mixtral-8x7B-v0.1",
    "mosaicml--mpt-7b",
    "openai--gpt-oss-20b",
    "openai-community--gpt2",
    "stabilityai--stablelm-2-12b",
    "stabilityai--stablelm-2-1_6b",
    "swiss-ai--Apertus-8B-Instruct-2509",
    "tiiuae--falcon-7b",
    "tiiuae--falcon-40b",
]

# families without a catalogue model, and switches that no catalogue model sets; what is not said is the class default
SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
}
GPT: dict[str, Any] = {"vocab_size": 1000, "n_embd": 256, "n_layer": 3, "n_head": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4}
KINDS = ["sliding_attention"] * 2 + ["full_attention"] * 7
FULL = ["full_attention"] * 9
OTHERS: dict[str, dict[str, Any]] = {
    "llama-biased": {**SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 48},
    "mistral-defaults": {**SMALL, "model_type": "mistral"},
    "mistral-null": {**SMALL, "model_type": "mistral", "sliding_window": None},
    "qwen2-windows": {**SMALL, "model_type": "qwen2", **WINDOW, "num_key_value_heads": 2},
    "qwen3-windows": {**SMALL, "model_type": "qwen3", **WINDOW, "num_key_value_heads": 2, "head_dim": 64},
    "qwen3-listed": {**SMALL, "model_type": "qwen3", **WINDOW, "num_key_value_heads": 2, "layer_types": KINDS},
    "qwen2_moe": {**SMALL, "model_type": "qwen2_moe", "num_key_value_heads": 4, **WINDOW},
    "qwen2_moe-mixed": {
        **SMALL,
        "num_attention_heads": 16,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "qkv_bias": False,
    },
    "qwen3_moe-mixed": {**SMALL, "model_type": "qwen3_moe", "mlp_only_layers": [0, 5], "moe_intermediate_size": 96},
    "olmo": {**SMALL, "model_type": "olmo"},
    "olmoe": {**SMALL, "model_type": "olmoe", "num_key_value_heads": 4},
    "olmo3-listed": {**SMALL, "model_type": "olmo3", "layer_types": KINDS, "attention_bias": True},
    "exaone4": {**SMALL, "model_type": "exaone4", "num_key_value_heads": 2},
    "exaone4-full": {
        **SMALL,
        "model_type": "exaone4",
        "num_key_value_heads": 2,
        "sliding_window": None,
        "layer_types": FULL,
    },
    "helium": {**SMALL, "model_type": "helium", "num_key_value_heads": 4, "head_dim": 32},
    "ernie4_5": {**SMALL, "model_type": "ernie4_5", "use_bias": True},
    "smollm3-windows": {
        **SMALL,
        "pad_token_id": 0,
        "model_type": "smollm3",
        "use_sliding_window": True,
        "sliding_window": 64,
    },
    "granitemoe": {**SMALL, "model_type": "granitemoe", "num_local_experts": 6},
    "phimoe": {**SMALL, "model_type": "phimoe", "attention_bias": True, "lm_head_bias": True},
    "phi-normed": {**SMALL, "model_type": "phi", "qk_layernorm": True},
    "glm4": {**SMALL, "pad_token_id": 0, "model_type": "glm4", "head_dim": 32},
    "glm4_moe": {**SMALL, "model_type": "glm4_moe", "use_qk_norm": True, "n_shared_experts": 2, "head_dim": 48},
    "cohere-normed": {**SMALL, "model_type": "cohere", "use_qk_norm": True},
    "cohere2": {**SMALL, "model_type": "cohere2", "num_key_value_heads": 2},
    "nemotron": {**SMALL, "model_type": "nemotron", "num_key_value_heads": 2, "head_dim": 32},
    "llama4_text": {
        **SMALL,
        "num_hidden_layers": 8,
        "model_type": "llama4_text",
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 900,
        "head_dim": 32,
    },
    "gemma2-uncapped": {
        **SMALL,
        "model_type": "gemma2",
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "deepseek_v3-biased": {
        **SMALL,
        "model_type": "deepseek_v3",
        "attention_bias": True,
        "q_lora_rank": 64,
        "num_key_value_heads": 8,
    },
    "falcon-sequential": {
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
        "model_type": "falcon",
        "alibi": True,
        "parallel_attn": False,
        "multi_query": False,
        "bias": True,
    },
    "gpt_neox-sequential": {**SMALL, "model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": False},
    "gpt_bigcode-heads": {**GPT, "model_type": "gpt_bigcode", "multi_query": False},
    "codegen": {**GPT, "model_type": "codegen", "rotary_dim": 16},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "vocab_size": 1000,
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 8,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 64,
    },
}

# read as explicit names of the attention's linear modules
PEFT_CASES = [
    "HuggingFaceTB--SmolLM2-135M",
    "EleutherAI--pythia-410m",
    "Qwen--Qwen3-0.6B",
    "openai-community--gpt2",
    "facebook--opt-350m",
    "tiiuae--falcon-7b",
    "microsoft--phi-2",
    "microsoft--Phi-3-mini-4k-instruct",
    "google--gemma-3-1b-it",
    "mosaicml--mpt-7b",
    "mistralai--Mixtral-8x7B-v0.1",
    "openai--gpt-oss-20b",
    "deepseek-ai--DeepSeek-V2-Lite",
    "olmoe",
    "qwen3_moe-mixed",
    "qwen2_moe-mixed",
    "glm4_moe",
    "granitemoe",
    "phimoe",
    "llama4_text",
    "codegen",
]


def config_of(name: str) -> dict[str, Any]:
    """Return the config.json of a case: of the catalogue or of this file."""
    if name in OTHERS:
        return dict(OTHERS[name])
    config: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))["config"]
    return config


@pytest.mark.parametrize("name", [*CATALOGUE, *OTHERS])
def test_spec_is_the_real_model(name: str) -> None:
    """Parameters, linear modules, norms, windows and kernel support are those of the class."""
    config = config_of(name)
    spec, model = build_spec(config, model_id=name), real_model(config)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert planned_linears(spec) == real_linears(model)
    modules = dict(model.named_modules())
    for path, elements in planned_norms(spec):
        assert sum(p.numel() for p in modules[path].parameters()) == elements, path
    assert spec.num_layers == len(modules[spec.layer_prefix])
    assert spec.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert modules[spec.token_embedding.name] is model.get_input_embeddings()
    for index, layer in enumerate(spec.layers):
        assert layer.attention is not None
        assert layer.attention.has_sdpa(RELEASE) == model._supports_sdpa
        real = modules[f"{spec.layer_prefix}.{index}"]
        for part in real.modules():
            if hasattr(part, "sliding_window") and getattr(part, "is_sliding", True):
                assert layer.attention.sliding_window == (part.sliding_window or 0), index


def test_equal_layers_are_one_object() -> None:
    """A stack of two kinds has two distinct layers, in the class's order."""
    spec = build_spec(config_of("google--gemma-3-1b-it"), model_id="gemma")
    kinds = [(layer.attention and layer.attention.sliding_window, count) for layer, count in spec.distinct_layers()]
    assert kinds == [(512, 22), (0, 4)]
    assert spec.layers[5].attention is spec.attentions()[1]


def peft_parameters(config: dict[str, Any], **settings: Any) -> int:
    """Return the trainable parameters PEFT reports."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(real_model(config), lora, low_cpu_mem_usage=True)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PEFT_CASES)
def test_lora_counts_are_pefts(name: str) -> None:
    """all-linear, and the attention modules by name."""
    config = config_of(name)
    spec = build_spec(config, model_id=name)
    everything = LoraSpec(r=4, target_modules=("all-linear",))
    assert trainable_lora_parameters(spec, everything) == peft_parameters(config, r=4, target_modules="all-linear")
    names = {x.name.rpartition(".")[2] for layer, _ in spec.distinct_layers() for x in layer.mixer.linears}
    # c_proj is also the name of a feed-forward module: suffixes decide, there as here
    by_name = LoraSpec(r=8, target_modules=tuple(sorted(names)))
    assert trainable_lora_parameters(spec, by_name) == peft_parameters(config, r=8, target_modules=sorted(names))


@pytest.mark.parametrize("name", ["HuggingFaceTB--SmolLM2-135M", "openai-community--gpt2", "qwen2_moe-mixed"])
def test_dora_counts_are_pefts(name: str) -> None:
    config = config_of(name)
    lora = LoraSpec(r=4, target_modules=("all-linear",), use_dora=True)
    planned = trainable_lora_parameters(build_spec(config, model_id=name), lora)
    assert planned == peft_parameters(config, r=4, target_modules="all-linear", use_dora=True)


@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        (["q_proj", "v_proj"], ["lm_head"]),
        (["q_proj", "v_proj"], ["embed_tokens", "lm_head"]),
        (["q_proj", "gate_proj"], ["mlp"]),
        (["q_proj"], ["norm"]),
        (["q_proj", "lm_head"], []),
        (["q_proj", "embed_tokens"], []),
        (["self_attn.q_proj"], ["input_layernorm"]),
    ],
)
@pytest.mark.parametrize("name", ["HuggingFaceTB--SmolLM2-135M", "01-ai--Yi-6B", "Qwen--Qwen3-0.6B"])
def test_saved_and_outer_modules_are_pefts(name: str, targets: list[str], saved: list[str]) -> None:
    """modules_to_save copies, and adapters outside the layers; tied and untied."""
    config = config_of(name)
    lora = LoraSpec(r=4, target_modules=tuple(targets), modules_to_save=tuple(saved))
    planned = trainable_lora_parameters(build_spec(config, model_id=name), lora)
    assert planned == peft_parameters(config, r=4, target_modules=targets, modules_to_save=saved or None)


@pytest.mark.parametrize("name", ["mistralai--Mixtral-8x7B-v0.1", "qwen3_moe-mixed", "glm4_moe", "qwen2_moe-mixed"])
def test_old_expert_names_are_pefts(name: str) -> None:
    """The expert modules of transformers 4 become adapters on fused parameters, with the router or without."""
    config = config_of(name)
    old = ["w1", "w2", "w3"] if "Mixtral" in name else ["gate_proj", "up_proj", "down_proj"]
    spec = build_spec(config, model_id=name)
    for targets in (["q_proj", *old], ["q_proj", old[1] if "Mixtral" in name else "down_proj"]):
        lora = LoraSpec(r=4, target_modules=tuple(targets))
        assert trainable_lora_parameters(spec, lora) == peft_parameters(config, r=4, target_modules=targets)


def test_adapters_have_pefts_shapes() -> None:
    """Rank doubles on the fused gate and up of every expert."""
    spec = build_spec(config_of("mistralai--Mixtral-8x7B-v0.1"), model_id="mixtral")
    shapes = {a.name: (a.in_features, a.out_features, a.rank, a.experts) for a in resolve_targets(spec, LoraSpec(r=8))}
    assert shapes["mlp.experts.gate_up_proj"] == (4096, 28672, 16, 8)
    assert shapes["mlp.experts.down_proj"] == (14336, 4096, 8, 8)
    assert shapes["mlp.gate.weight"] == (4096, 8, 8, 1)
