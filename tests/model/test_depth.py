"""The first layers of a model: one function for every config, equal to the whole model's first layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from planner.facts import catalog
from planner.model.depth import DEPTH_KEYS, first_layers
from planner.model.families import build_spec, known_families
from planner.model.spec import ModelSpec

CONFIGS = {
    name: dict(record.config)
    for name in catalog.model_ids()
    if (record := catalog.model_record(name)) is not None
    and record.config.get("model_type") not in ("t5", "mt5")  # refused: not decoder-only
}


def described(spec: ModelSpec) -> list[dict[str, Any]]:
    return [dataclasses.asdict(layer) for layer in spec.layers]


def check(config: dict[str, Any]) -> None:
    whole = build_spec(config, model_id="toy")
    for number in (1, 2, 3, 6):
        if number <= whole.num_layers:
            cut = build_spec(first_layers(config, number), model_id="toy")
            assert cut.num_layers == number
            assert described(cut) == described(whole.first_layers(number))
    assert first_layers(config, None) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_first_layers_of_every_model_of_the_catalogue(name: str) -> None:
    check(CONFIGS[name])


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", known_families())
def test_first_layers_of_the_full_config_of_every_class(model_type: str) -> None:
    """A config as transformers writes it names every field, each layer's among them (smollm3, gpt_neo, llama4)."""
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        assert build_spec({"model_type": model_type, **SIZES}, model_id="toy").remote_code
        return
    config = CONFIG_MAPPING[model_type]().to_dict()
    check(config)
    again = CONFIG_MAPPING[model_type](**{k: v for k, v in first_layers(config, 2).items() if k != "model_type"})
    assert again.get_text_config().num_hidden_layers == 2


SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 1000, "num_layers": 4, "ffn_hidden_size": 512, "padded_vocab_size": 1000,
    "kv_channels": 64, "seq_length": 128,
}  # fmt: skip


def test_a_nested_language_model_is_cut_and_a_config_without_depth_gets_one() -> None:
    nested = {"model_type": "x", "text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}}
    assert first_layers(nested, 2)["text_config"] == {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    assert first_layers({}, 2) == {DEPTH_KEYS[0]: 2}


def test_patterns_and_indices_are_cut() -> None:
    assert first_layers({"attention_types": [[["global", "local"], 12]]}, 3)["attention_types"] == [
        [["global"], 1], [["local"], 1], [["global"], 1]
    ]  # fmt: skip
    assert first_layers({"moe_layers": [1, 3, 5], "mlp_only_layers": [0, 7]}, 4) == {
        "num_hidden_layers": 4, "moe_layers": [1, 3], "mlp_only_layers": [0]
    }  # fmt: skip
