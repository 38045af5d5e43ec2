"""litgpt's own modules: the program against peaks that a trace of the genuine litgpt recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import Contradiction
from planner.device.cuda_rules import Architecture
from planner.memory import walk
from planner.model.families import build_spec
from planner.plan.predict import predict
from planner.step import program
from planner.step.classes import litgpt
from planner.training import stacks, versions
from planner.training.spec import TrainingSpec

CASES = json.loads(Path(__file__).with_name("litgpt_trace.json").read_text())["cases"]
"""Written by benchmarks/litgpt_agreement.py, which runs litgpt itself."""


def name_of(case: dict[str, Any]) -> str:
    given = case["given"]
    return f"{case['model']} {case['targets']} {given.get('quantization', 'bf16')} {given['seq_len']}"


def training_of(case: dict[str, Any], bitsandbytes: str = "0.50.2") -> TrainingSpec:
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in case["given"].items()}
    given["versions"] = versions.parse_versions({"bitsandbytes": bitsandbytes})
    method = "full" if case["targets"] == "full" else "qlora" if "quantization" in given else "lora"
    return stacks.to_training_spec(stacks.resolve("litgpt", method=method, given=given))


def peak(case: dict[str, Any], training: TrainingSpec) -> int:
    spec = build_spec(case["config"], model_id=case["model"])
    run = program.run(spec, training, Architecture(), accumulates_in_place=False)
    return walk.peak_bytes(run.record, block=1)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_program_is_what_litgpt_does(case: dict[str, Any]) -> None:
    assert peak(case, training_of(case)) == pytest.approx(case["peak_bytes"], rel=1e-3)


def quantized() -> dict[str, Any]:
    return next(case for case in CASES if "quantization" in case["given"] and case["targets"] == "qv")


def test_a_quantized_run_holds_a_second_embedding_and_its_gradient() -> None:
    """finetune/lora.py since October 2024; the releases of bitsandbytes before 0.44 tell that litgpt is older."""
    case = quantized()
    table = case["config"]["vocab_size"] * case["config"]["hidden_size"] * 2
    now, then = (peak(case, training_of(case, release)) for release in ("0.49", "0.43.3"))
    assert now - then == pytest.approx(2 * table, rel=0.1)  # and what the first layer keeps now


def test_the_micro_batch_before_is_there_until_the_model_returns() -> None:
    """bitsandbytes 0.42 keeps the products' inputs with the graph, which the loop's logits hold; not in a first run."""
    case = next(c for c in CASES if name_of(c) == "gpt_neox qv nf4 2048")
    training = training_of(case, "0.42.0")
    assert not training.longest_first
    assert peak(case, training) >= peak(case, replace(training, longest_first=True))
    events = {
        first: sum(
            op == "earlier_micro_batch"
            for op in program.run(
                build_spec(case["config"], model_id="x"), replace(training, longest_first=first), Architecture()
            ).record.ops
        )
        for first in (False, True)
    }
    assert events[True] == 0 < events[False]


def test_parts_of_a_fused_projection_are_stacked_in_one_adapter() -> None:
    """LoRAQKVLinear: A of every adapted part in one tensor, B likewise (litgpt/lora.py)."""
    case = next(c for c in CASES if name_of(c) == "llama-gqa qv bf16 512")
    model, training = litgpt.own_modules(build_spec(case["config"], model_id="x"), training_of(case))
    (attention,) = model.attentions()
    assert [one.parts for one in attention.projections] == [(512, 128, 128)]
    assert training.lora is not None and training.lora.target_slices == (0, 2)
    run = program.run(build_spec(case["config"], model_id="x"), training_of(case), Architecture())
    assert run.trainable_parameters == 4 * (2 * 16 * 512 + 16 * (512 + 128))


def test_a_fused_gate_and_up_are_two_modules() -> None:
    config = {
        "model_type": "phi3", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 1000, "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    spec = build_spec(config, model_id="x")
    given = {"r": 8, "target_modules": ("qkv_proj", "gate_up_proj"), "seq_len": 128, "target_slices": ()}
    training = stacks.to_training_spec(stacks.resolve("litgpt", method="lora", given=given))
    model, own = litgpt.own_modules(spec, training)
    mlp = model.layers[0].mlp
    assert mlp is not None and mlp.gate is not None
    assert (mlp.gate.out_features, mlp.up.out_features) == (512, 512)
    assert own.lora is not None
    assert own.lora.target_modules == ("self_attn.qkv_proj", "mlp.gate_up_proj.gate", "mlp.gate_up_proj.up")
    assert model.num_parameters == spec.num_parameters


def test_what_litgpt_does_not_have_is_told() -> None:
    """DoRA is refused; kernels and eager attention are warned of, as the estimate is without them."""
    case = next(c for c in CASES if name_of(c) == "llama qv bf16 512")
    training = training_of(case)
    assert training.lora is not None
    with pytest.raises(Contradiction, match="DoRA"):
        peak(case, replace(training, lora=replace(training.lora, use_dora=True)))
    spec = build_spec(case["config"], model_id="x")
    for asked, changed in (("liger", {"kernels": "liger"}), ("eager", {"attention": "eager"})):
        found = predict(spec, replace(training, **changed)).warnings
        assert any(asked in warning and "litgpt" in warning for warning in found)


def test_a_row_of_one_token_has_an_estimate() -> None:
    case = next(c for c in CASES if name_of(c) == "llama full bf16 512")
    assert peak(case, replace(training_of(case), seq_len=1, micro_batch_size=1)) > 0
