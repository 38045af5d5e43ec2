"""The acceptance fixtures of the fine-tuning course (finetuning_course.md, section 5), each named by its number."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.base.errors import InvalidInput
from planner.course import rivals
from planner.facts import catalog
from planner.facts.headers import read_gguf
from planner.model import adapter, families
from planner.model.spec import ModelSpec
from planner.plan.predict import predict
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA2_7B = "meta-llama/Llama-2-7b-hf"
LLAMA2_70B = "meta-llama/Llama-2-70b-hf"
LLAMA3_8B = "meta-llama/Meta-Llama-3-8B"


def model(name: str) -> ModelSpec:
    record = catalog.model_record(name)
    assert record is not None
    return families.build_spec(record.config, model_id=name)


def qlora(r: int = 8, targets: tuple[str, ...] = QKVO, **extra) -> TrainingSpec:
    base = QuantizationSpec(kind="nf4", double_quant=extra.pop("double_quant", True))
    return TrainingSpec(method="qlora", lora=LoraSpec(r=r, target_modules=targets), quantization=base, **extra)


def facts(name: str, **extra) -> adapter.AdapterFacts:
    return adapter.facts(model(name), qlora(**extra))


def test_fixture_01_llama2_7b_attention() -> None:
    found = facts(LLAMA2_7B)
    assert found.trainable_parameters == 8_388_608
    assert found.scaling == 2.0


@pytest.mark.parametrize(("targets", "expected"), [(QKVO, 6_815_744), (("all-linear",), 20_971_520)])
def test_fixture_02_llama3_8b(targets: tuple[str, ...], expected: int) -> None:
    assert facts(LLAMA3_8B, targets=targets).trainable_parameters == expected


def test_fixture_03_llama2_7b_rank_16() -> None:
    assert facts(LLAMA2_7B, r=16, targets=("all-linear",)).trainable_parameters == 39_976_960


@pytest.mark.parametrize(("targets", "expected"), [(QKVO, 32_768_000), (("all-linear",), 103_546_880)])
def test_fixture_04_llama2_70b(targets: tuple[str, ...], expected: int) -> None:
    assert facts(LLAMA2_70B, targets=targets).trainable_parameters == expected


def test_fixture_05_nf4_bits() -> None:
    assert facts(LLAMA2_7B, double_quant=False).base.bits_per_weight == 4.5
    assert facts(LLAMA2_7B).base.bits_per_weight == 4.126953125


def test_fixture_06_llama2_7b_elements() -> None:
    spec = model(LLAMA2_7B)
    assert spec.num_parameters == 6_738_415_616
    assert facts(LLAMA2_7B).base.quantized_elements == 6_476_005_376
    assert spec.token_embedding.num_parameters + spec.head.num_parameters == 262_144_000


@pytest.mark.parametrize(("fp32", "expected"), [(False, 3_865_591_808), (True, 4_390_412_288)])
def test_fixture_07_llama2_7b_base_bytes(fp32: bool, expected: int) -> None:
    assert facts(LLAMA2_7B, kbit_preparation=fp32).base.total_bytes == expected


@pytest.mark.parametrize(("fp32", "expected"), [(False, 3_865_591_808), (True, 4_390_412_288)])
def test_fixture_07_is_what_the_step_program_allocates(fp32: bool, expected: int) -> None:
    """The memory ledger counts whole blocks and the code tables of 224 modules: 0.1 % more."""
    ledger = dict(predict(model(LLAMA2_7B), qlora(kbit_preparation=fp32)).breakdown.ledger)
    assert ledger["base weights"] == pytest.approx(expected, rel=1e-3)
    assert ledger["base weights"] > expected


def test_fixture_08_llama3_8b_elements() -> None:
    spec = model(LLAMA3_8B)
    assert spec.num_parameters == 8_030_261_248
    assert facts(LLAMA3_8B).base.quantized_elements == 6_979_321_856
    assert spec.token_embedding.num_parameters + spec.head.num_parameters == 1_050_673_152


# --- what the course's own formulas say (sections 2.1 and 2.3) ------------------------------------------------------

ALL7 = 7


@pytest.mark.parametrize(
    ("name", "targets", "exact", "demo", "square"),
    [
        (LLAMA2_7B, ("q_proj", "v_proj"), 4_194_304, 131_072, 4_194_304),
        (LLAMA2_7B, QKVO, 8_388_608, 262_144, 8_388_608),
        (LLAMA2_7B, ("all-linear",), 19_988_480, 458_752, 14_680_064),
        (LLAMA3_8B, QKVO, 6_815_744, 262_144, 8_388_608),
        (LLAMA3_8B, ("all-linear",), 20_971_520, 458_752, 14_680_064),
        ("Qwen/Qwen2.5-7B", ("all-linear",), 20_185_088, 458_752, 11_239_424),
        ("Qwen/Qwen2-0.5B", ("q_proj", "v_proj"), 540_672, 131_072, 688_128),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", ("all-linear",), 6_307_840, 458_752, 5_046_272),
    ],
)
def test_section_2_1_parameter_counts(name: str, targets: tuple[str, ...], exact: int, demo: int, square: int) -> None:
    spec = model(name)
    count = ALL7 if targets == ("all-linear",) else len(targets)
    assert facts(name, targets=targets).trainable_parameters == exact
    assert rivals.demo_lora_parameters(8, count, spec.num_parameters) == demo
    assert rivals.lab_lora_parameters(8, spec.hidden_size, count, spec.num_layers) == square


@pytest.mark.parametrize(
    ("parameters", "targets", "expected"),
    [
        (6_738_000_000, 2, 8_577_024),
        (6_738_000_000, 7, 15_009_792),
        (8_030_261_248, 4, 9_363_456),
        (8_030_261_248, 7, 16_386_048),
        (494_032_768, 2, 2_322_432),
    ],
)
def test_section_2_1_entrenar_fine_tune_config(parameters: int, targets: int, expected: int) -> None:
    assert rivals.fine_tune_config_parameters(parameters, 8, targets) == expected


@pytest.mark.parametrize(
    ("billions", "vram_gb", "method", "rank", "gb", "percent"),
    [
        (7, 24, "lora", 64, 23.3, 97),
        (7, 24, "qlora", 256, 14.8, 62),
        (7, 8, "qlora", 64, 12.8, 160),
        (13, 24, "qlora", 29, 20.4, 85),
        (70, 24, "qlora", 64, 81.3, 339),
        (7, 24, "full", 0, 78.6, 327),
    ],
)
def test_section_2_3_entrenar_plans(
    billions: int, vram_gb: int, method: str, rank: int, gb: float, percent: int
) -> None:
    plan = rivals.entrenar_plan(billions * 10**9, vram_gb * 10**9, method)  # type: ignore[arg-type]
    assert plan.rank == rank
    assert plan.alpha == rank / 4
    assert round(plan.memory_bytes / 1e9, 1) == gb
    assert round(plan.utilization * 100) == percent


def test_demo_memory_ratio() -> None:
    assert rivals.demo_memory_ratio(4, True) == pytest.approx(0.225)


# --- the adapter file ----------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"target_modules": ("all-linear",), "r": 3}])
def test_the_adapter_file_has_the_size_that_peft_writes(extra: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 11,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    lora = LoraSpec(**{"r": 8, "target_modules": QKVO, **extra})
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    targets = "all-linear" if lora.target_modules == ("all-linear",) else list(lora.target_modules)
    adapted = peft.get_peft_model(
        network, peft.LoraConfig(r=lora.r, target_modules=targets, use_dora=lora.use_dora, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert adapter.adapter_file_bytes(families.build_spec(config, model_id="tiny"), lora) == written


def test_scaling_of_rslora() -> None:
    assert adapter.scaling(LoraSpec(r=16, lora_alpha=32)) == 2.0
    assert adapter.scaling(LoraSpec(r=16, lora_alpha=32, use_rslora=True)) == 8.0


def test_adapters_larger_than_what_they_adapt_are_warned_about() -> None:
    assert not facts("openai-community/gpt2", r=8, targets=("c_attn",)).warnings
    (note,) = facts("openai-community/gpt2", r=1024, targets=("c_attn",)).warnings
    assert "rank 1024 is too high for 768 x 2304" in note
    assert json.dumps(note)


# --- the rest of the fixtures: 9, 10, 11, 12, 18 and 21 are in test_simulate.py, 14 in test_dataset.py, 15, 16, 17 and
# 19 in test_exports.py


def test_fixture_13_broken_gguf_files(tmp_path: Path) -> None:
    damaged = {
        "empty": b"",
        "magic": b"PK\x03\x04" + bytes(60),
        "version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(60),
        "string": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 900) + b"general.arch",
    }
    messages = set()
    for name, data in damaged.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(InvalidInput) as found:
            read_gguf(str(path))
        messages.add(str(found.value).replace(str(path), "FILE"))
        assert "\n" not in str(found.value)
    assert len(messages) == 4


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-7B", LLAMA2_7B, "mistralai/Mistral-7B-v0.1", LLAMA2_70B]
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_fixture_22_qlora_needs_less_than_lora_less_than_full(name: str, double_quant: bool) -> None:
    """Same batch and length, models of 1B and more."""
    spec, lora = model(name), LoraSpec(r=8, target_modules=QKVO)
    quantized = QuantizationSpec(kind="nf4", double_quant=double_quant)
    shape = {"micro_batch_size": 1, "seq_len": 512}
    peaks = [
        predict(spec, training).allocated.expected
        for training in (
            TrainingSpec(method="qlora", lora=lora, quantization=quantized, **shape),
            TrainingSpec(method="lora", lora=lora, **shape),
            TrainingSpec(method="full", **shape),
        )
    ]
    assert peaks[0] < peaks[1] < peaks[2]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["micro_batch_size", "seq_len", "r", "vocab_size"]),
    st.integers(1, 4),
    st.integers(16, 600),
    st.integers(1, 64),
    st.sampled_from(["lora", "qlora"]),
)
def test_fixture_24_memory_never_falls_with_size(what: str, batch: int, length: int, rank: int, method: str) -> None:
    """Live memory against batch, length, rank and vocabulary, each doubled alone."""
    record = catalog.model_record("Qwen/Qwen2.5-0.5B")
    assert record is not None
    sizes = {"micro_batch_size": batch, "seq_len": length, "r": rank, "vocab_size": 32_000}
    peaks = []
    for changed in (sizes, {**sizes, what: 2 * sizes[what]}):
        spec = families.build_spec({**record.config, "vocab_size": changed["vocab_size"]}, model_id="sized")
        base = QuantizationSpec(kind="nf4") if method == "qlora" else QuantizationSpec()
        training = TrainingSpec(
            method=method,  # type: ignore[arg-type]
            lora=LoraSpec(r=changed["r"]),
            quantization=base,
            micro_batch_size=changed["micro_batch_size"],
            seq_len=changed["seq_len"],
        )
        peaks.append(predict(spec, training).allocated.expected)
    assert peaks[0] <= peaks[1]
