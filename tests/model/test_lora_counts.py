"""Published parameter counts: of every model in the catalogue, and of well-known LoRA configurations. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import Contradiction, InvalidInput, PlannerError, UnknownName
from planner.model.families import build_spec, known_families
from planner.model.lora import KEYWORDS, PEFT_DEFAULT_TARGETS, resolve_targets, trainable_lora_parameters
from planner.model.spec import ModelSpec
from planner.training.spec import LoraSpec

MODELS = Path(__file__).resolve().parent.parent.parent / "data" / "models"
ENCODER_DECODERS = {"t5", "mt5"}
ENTRIES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(MODELS.glob("*.json"))}
PLANNED = [
    name
    for name, entry in ENTRIES.items()
    if isinstance(entry.get("config"), dict) and entry["config"]["model_type"] not in ENCODER_DECODERS
]

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
PUBLISHED_LORA = [
    ("meta-llama--Llama-2-7b-hf", 8, QKVO, 8_388_608),
    ("meta-llama--Meta-Llama-3-8B", 8, ("all-linear",), 20_971_520),
    ("meta-llama--Meta-Llama-3-8B", 8, QKVO, 6_815_744),
    ("meta-llama--Llama-2-7b-hf", 16, ("all-linear",), 39_976_960),
    ("meta-llama--Llama-2-70b-hf", 8, QKVO, 32_768_000),
    ("meta-llama--Llama-2-70b-hf", 8, ("all-linear",), 103_546_880),
]


def spec_of(name: str) -> ModelSpec:
    return build_spec(ENTRIES[name]["config"], model_id=name)


@pytest.mark.parametrize("name", PLANNED)
def test_counted_parameters(name: str) -> None:
    """The count is the one the catalogue holds (instantiated on the meta device, or a published formula)."""
    assert spec_of(name).num_parameters == ENTRIES[name]["counted_parameters"]


def test_catalogue_is_not_empty() -> None:
    assert len(PLANNED) > 150


@pytest.mark.parametrize(("name", "r", "targets", "expected"), PUBLISHED_LORA)
def test_published_lora_counts(name: str, r: int, targets: tuple[str, ...], expected: int) -> None:
    assert trainable_lora_parameters(spec_of(name), LoraSpec(r=r, target_modules=targets)) == expected


@pytest.mark.parametrize("name", PLANNED)
def test_every_keyword_resolves(name: str) -> None:
    """attention and mlp together adapt what all-linear adapts, less routers and projections outside the layers."""
    spec = spec_of(name)
    whole = {a.name for a in resolve_targets(spec, LoraSpec())}
    parts: set[str] = set()
    for keyword in ("attention", "mlp"):
        try:
            parts |= {a.name for a in resolve_targets(spec, LoraSpec(target_modules=(keyword,)))}
        except UnknownName:
            assert spec.model_type == "gpt_oss"  # no linear module there, and PEFT has no old names for it
    assert parts <= whole
    assert all("project_" in left or left.endswith("gate.weight") for left in whole - parts)


def test_peft_defaults_exist() -> None:
    """Every default target names a module of its family."""
    for name in PLANNED:
        spec = spec_of(name)
        if spec.model_type in PEFT_DEFAULT_TARGETS:
            assert resolve_targets(spec, LoraSpec(target_modules=PEFT_DEFAULT_TARGETS[spec.model_type]))
    assert set(PEFT_DEFAULT_TARGETS) <= set(known_families())


def test_suffixes_match_whole_components() -> None:
    spec = spec_of("openai-community--gpt2")
    names = [a.name for a in resolve_targets(spec, LoraSpec(target_modules=("c_proj",)))]
    assert names == ["attn.c_proj", "mlp.c_proj"]
    assert [a.name for a in resolve_targets(spec, LoraSpec(target_modules=("attn.c_proj",)))] == ["attn.c_proj"]
    with pytest.raises(UnknownName, match="c_attn"):
        resolve_targets(spec, LoraSpec(target_modules=("proj",)))


@pytest.mark.parametrize(
    ("targets", "settings", "error", "says"),
    [
        (("q_proj", "w1"), {}, Contradiction, "w3"),
        (("all-linear",), {"lora_dropout": 0.1}, Contradiction, "lora_dropout"),
        (("all-linear",), {"use_dora": True}, Contradiction, "DoRA"),
        (("layers.3.self_attn.q_proj",), {}, InvalidInput, "by number"),
        (("qkv_proj",), {}, UnknownName, "q_proj"),
        (("q_proj",), {"modules_to_save": ("score",)}, UnknownName, "score"),
    ],
)
def test_what_peft_refuses(targets: tuple[str, ...], settings: Any, error: type[PlannerError], says: str) -> None:
    """Mixtral: its experts are one fused parameter."""
    lora = LoraSpec(target_modules=targets, **settings)
    with pytest.raises(error, match=says):
        trainable_lora_parameters(spec_of("mistralai--Mixtral-8x7B-v0.1"), lora)


def test_saved_modules_are_not_adapted() -> None:
    spec = spec_of("meta-llama--Llama-3.2-1B")
    lora = LoraSpec(target_modules=("q_proj", "gate_proj"), modules_to_save=("mlp",))
    assert [a.name for a in resolve_targets(spec, lora)] == ["self_attn.q_proj"]


def test_slices_of_a_fused_projection() -> None:
    """litgpt adapts the query and value slices of one projection: one A and one B for each."""
    spec = spec_of("EleutherAI--pythia-410m")
    lora = LoraSpec(r=8, target_modules=("query_key_value",), target_slices=(0, 2))
    assert trainable_lora_parameters(spec, lora) == 24 * (2 * 8 * 1024 + 8 * 2048)


def test_dora_adds_one_value_per_output() -> None:
    spec = spec_of("meta-llama--Meta-Llama-3-8B")
    plain = trainable_lora_parameters(spec, LoraSpec(r=8, target_modules=QKVO))
    dora = trainable_lora_parameters(spec, LoraSpec(r=8, target_modules=QKVO, use_dora=True))
    assert dora - plain == 32 * (4096 + 1024 + 1024 + 4096)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"model_type": "lama"}, UnknownName, "llama"),
        ({"model_type": "t5"}, UnknownName, "encoder-decoder"),
        ({"model_type": "qwen3_next"}, UnknownName, "Known families: apertus.*starcoder2"),
        ({}, InvalidInput, "model_type"),
        ({"model_type": "llama"}, InvalidInput, "hidden_size"),
        ({"model_type": "llama", "hidden_size": "4096"}, InvalidInput, "hidden_size"),
        ({"model_type": 7}, InvalidInput, "model_type"),
    ],
)
def test_bad_configs_name_the_key(config: dict[str, Any], error: type[PlannerError], says: str) -> None:
    with pytest.raises(error, match=says):
        build_spec(config, model_id="x")


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -1, True, 2**70, 1.5, [], {}, "x"])
def test_hostile_sizes_stop_at_the_reader(key: str, value: Any) -> None:
    config = {**ENTRIES["meta-llama--Llama-3.2-1B"]["config"], key: value}
    if key == "num_key_value_heads" and value == 0 and value is not False:
        return  # 0 is how "as many as heads" is spelt here
    with pytest.raises(InvalidInput, match=key):
        build_spec(config, model_id="x")


def test_text_part_of_a_multimodal_model() -> None:
    """The nested text_config decides; its own class defaults fill what Gemma 3 files leave out."""
    config = {
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
    }
    spec = build_spec(config, model_id="google/gemma-3-4b-it")
    assert spec.num_parameters == ENTRIES["google--gemma-3-4b-it"]["counted_parameters"]
    assert spec.stored_dtype == "bfloat16"
    assert any("vision" in note for note in spec.notes)


def test_keywords_are_documented_once() -> None:
    assert KEYWORDS == ("all-linear", "attention", "mlp")
