"""How weights come onto the GPU: from_pretrained's first block, its order, its readers, and tokens that are added."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.device import cuda_rules
from planner.facts import catalog
from planner.memory import sequence
from planner.model.families import build_spec
from planner.model.spec import ModelSpec
from planner.plan.predict import predict
from planner.step import loading as loading_rules
from planner.step import program
from planner.step.architecture import architecture
from planner.step.engine import Record
from planner.step.loading import READERS, overlap
from planner.training import stacks
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec, Versions

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 4000,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
QLORA = TrainingSpec(
    method="qlora", lora=LoraSpec(r=3), quantization=QuantizationSpec(kind="nf4", compute_dtype="fp16"),
    base_dtype="fp16", autocast="none", device_map=True, seq_len=128,
)  # fmt: skip
MiB = 2**20


def reference(name: str) -> ModelSpec:
    """A model of the catalogue."""
    found = catalog.model_record(name)
    assert found is not None
    return build_spec(found.config, model_id=name)


def record(training: TrainingSpec, model: ModelSpec | None = None) -> Record:
    """The program of a step."""
    model = model or build_spec(CONFIG, model_id="test")
    return program.run(model, training, architecture(catalog.gpu("t4"), training)).record


def loading(training: TrainingSpec) -> list[tuple[int, int]]:
    """Events of loading, adapters included."""
    return sequence._Layout(record(training)).loading(0)[0]


# --- the block that comes first -----------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_the_first_block_is_what_transformers_counts(kind: str) -> None:
    """get_total_byte_count of the installed release, on the quantized skeleton of the model."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, modeling_utils
    from transformers.quantizers import AutoHfQuantizer

    config = LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    quantizer = None
    if kind != "none":
        asked = BitsAndBytesConfig(load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4")
        quantizer = AutoHfQuantizer.from_config(asked)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    devices = dict.fromkeys(model.state_dict(), torch.device("cuda:0"))
    counted = modeling_utils.get_total_byte_count(model, devices, quantizer)[torch.device("cuda:0")]
    spec = build_spec(CONFIG, model_id="test")
    quantized = sum(linear.weight_elements for layer in spec.layers for linear in layer.linears)
    ours = loading_rules.warmup_bytes(
        spec.num_parameters, quantized if kind != "none" else 0, kind, itemsize=2, transformers=(5, 24)
    )
    assert ours == counted


@pytest.mark.parametrize(
    ("release", "block"), [((4, 49), 0), ((4, 50), 200), ((4, 51), 100), ((4, 57), 100), ((5, 0), 65)]
)
def test_the_first_block_by_release(release: tuple[int, int], block: int) -> None:
    assert loading_rules.warmup_bytes(100, 90, "nf4", itemsize=2, transformers=release) == block


def test_the_first_block_leaves_some_of_the_card() -> None:
    assert loading_rules.warmup_limit(2**34, (4, 53)) == 2**34 - int(1.2 * 2**30)
    assert loading_rules.warmup_limit(2**34, (4, 50)) == 2**34 * 95 // 100
    assert loading_rules.warmup_limit(2**34, (4, 49)) == loading_rules.warmup_limit(2**34, (5, 24)) == 0


def test_only_where_from_pretrained_loads_onto_the_gpu() -> None:
    with_map, without = loading(QLORA), loading(replace(QLORA, device_map=False))
    assert with_map[0][1] == -with_map[1][1] > 0
    assert Counter(n for _, n in with_map[2:]) == Counter(n for _, n in without)
    for stack, method, expected in (
        ("trl", "qlora", True), ("trl", "lora", False), ("peft-loop", "qlora", True),
        ("torchtune", "qlora", False), ("litgpt", "qlora", False),
    ):  # fmt: skip
        assert stacks.to_training_spec(stacks.resolve(stack, method=method, given={})).device_map is expected


# --- the order ----------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.slow
def test_the_order_is_that_of_the_real_from_pretrained(tmp_path: Path) -> None:
    """Every weight as it is read, what quantization makes of it, and when the original goes; real CPU tensors."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from calibrate.oracle.tracker import Tracker

    config = LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    with Tracker() as tracker:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float16, device_map={"": "cpu"}, quantization_config=asked
        )
    made = {"aten._to_copy", "bitsandbytes.quantize_4bit"}
    blocks = {block.id: block for block in tracker.blocks}
    first = next(i for i, e in enumerate(tracker.events) if blocks[e.id].op == "aten._to_copy")
    assert model is not None  # alive until here: what dies with it is no part of loading
    real = [e for e in tracker.events[first:] if blocks[e.id].op in made and abs(e.nbytes) > 512]
    ours = record(replace(QLORA, versions=replace(QLORA.versions, transformers=(5, 24))))
    ours.readers = 0  # in sequence, as a CPU run is
    wanted = [event for event in sequence._Layout(ours).loading(512)[0][2:] if event[1] not in _lora_sizes()]
    assert [_sizes(real_group) for real_group in _groups([(e.id, e.nbytes) for e in real])] == [
        _sizes(group) for group in _groups(wanted)
    ]


def _lora_sizes() -> set[int]:
    spec = build_spec(CONFIG, model_id="test")
    widths = {w for layer in spec.layers for x in layer.linears for w in (x.in_features, x.out_features)}
    return {4 * 3 * width for width in widths}  # rank 3 in fp32


def _groups(events: list[tuple[int, int]]) -> list[list[int]]:
    """Events cut where a weight arrives: what is made after it until it goes belongs to it."""
    lives = {storage for storage, nbytes in events if nbytes < 0}
    groups: list[list[int]] = []
    alive: set[int] = set()
    for storage, nbytes in events:
        if not alive and nbytes > 0:
            groups.append([])
        groups[-1].append(nbytes)
        if storage in lives:
            (alive.add if nbytes > 0 else alive.discard)(storage)
    return groups


def _sizes(group: list[int]) -> tuple[int, list[int]]:
    return group[0], sorted(group[1:])


def test_readers_change_the_order_only() -> None:
    rng = random.Random(1)
    events: list[tuple[int, int]] = [(0, 5000), (0, -5000)]
    arrivals = []
    for number in range(1, 200, 3):
        size = rng.randrange(512, 4 * MiB)
        arrivals.append(number)
        events += [(number, size), (number + 1, size // 4), (number, -size)]
    made = overlap(events, arrivals, READERS)
    assert Counter(made) == Counter(events)
    assert [e for e in made if e[0] in set(arrivals) and e[1] > 0] == [
        e for e in events if e[0] in set(arrivals) and e[1] > 0
    ]
    level = peak = 0
    seen: set[int] = set()
    for storage, nbytes in made:
        assert nbytes > 0 or storage in seen
        seen.add(storage)
        level += nbytes
        peak = max(peak, level)
    assert peak > max(sum(n for _, n in events[: i + 1]) for i in range(len(events)))


def test_a_plain_weight_has_no_work_after_it() -> None:
    made = overlap([(1, 100), (2, 200), (3, 300)], [1, 2, 3], 4)
    assert [storage for storage, _ in made] == [1, 2, 3]


# --- measured runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch", "length", "allocated", "reserved"),
    [  # fitcheck-llm 0.3.1, runs of 2026-09-15 on one Tesla T4: NF4, sdpa
        ("HuggingFaceTB/SmolLM2-135M", 2, 512, 1_115_489_792, 1_251_999_744),
        ("HuggingFaceTB/SmolLM2-135M", 1, 4096, 3_750_495_744, 3_967_811_584),
        ("HuggingFaceTB/SmolLM2-1.7B", 4, 1024, 5_537_814_528, 6_228_541_440),
    ],
)
def test_reserved_memory_of_measured_t4_runs(name: str, batch: int, length: int, allocated: int, reserved: int) -> None:
    """Within 2 %, with nothing fitted; without the first block and the readers up to 6 % are missing."""
    training = replace(
        QLORA, lora=LoraSpec(r=32, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")), kbit_preparation=True,
        optimizer="adamw", keeps_outputs=True, micro_batch_size=batch, seq_len=length,
        versions=Versions(torch=(2, 14), transformers=(5, 17), peft=(0, 20)),
    )  # fmt: skip
    told = predict(reference(name), training, catalog.gpu("t4"))
    assert told.allocated.expected == pytest.approx(allocated, rel=0.002)
    assert told.reserved.expected == pytest.approx(reserved, rel=0.02)


FMS = {"transformers": "4.45.2", "torch": "2.4.1", "peft": "0.13.2"}


@pytest.mark.parametrize(
    ("batch", "loss", "device_mib"),
    [(4, "full-logits", 27_510), (8, "full-logits", 40_270), (4, "fused", 23_832), (8, "fused", 32_920)],
)
def test_device_memory_of_measured_fms_runs(batch: int, loss: str, device_mib: int) -> None:
    """Mistral-7B, LoRA (fms-acceleration a100_80gb_liger.csv). A padding token makes whole logits a little longer than

    shifted ones in steps of 2 MiB, and the last gradient finds no block: 2000 MiB more with 4 rows.
    """
    training = fms_run(batch, loss)
    assert training.added_tokens == 1
    model, card = reference("mistralai/Mistral-7B-v0.1"), catalog.gpu("a100-sxm-80gb")
    with_token = predict(model, training, card)
    assert with_token.device.expected / MiB == pytest.approx(device_mib, rel=0.015)
    without = predict(model, replace(training, added_tokens=0), card)
    more = (with_token.reserved.expected - without.reserved.expected) / MiB
    assert more == pytest.approx(500 * batch if loss == "full-logits" else 0, abs=16)


def fms_run(batch: int, loss: str) -> TrainingSpec:
    """A run of fms-acceleration's benchmark."""
    given = {
        "versions": FMS, "micro_batch_size": batch, "seq_len": 4096, "loss": loss, "kernels": "fms-fused", "r": 16,
        "target_modules": "q_proj,k_proj,v_proj,o_proj", "autocast": "bf16", "optimizer": "adamw", "lora_dropout": 0.1,
    }  # fmt: skip
    return stacks.to_training_spec(stacks.resolve("fms", method="lora", given=given))


# --- releases -----------------------------------------------------------------------------------------------------


@pytest.mark.oracle
def test_colons_are_slices_as_in_the_installed_torch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, 3, 4, requires_grad=True)
    nodes, node = 0, (x * 1)[..., :-1, :].grad_fn
    while node is not None and node.name() == "SliceBackward0":
        nodes, node = nodes + 1, node.next_functions[0][0]
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    assert nodes == 1 + cuda_rules.colons_are_slices(release)
    assert cuda_rules.colons_are_slices((2, 8)) and not cuda_rules.colons_are_slices((2, 9))


@pytest.mark.oracle
@pytest.mark.parametrize("batch", [1, 2])
def test_shifted_logits_of_one_row_are_no_copy(batch: int) -> None:
    torch = pytest.importorskip("torch")
    assert torch.zeros(batch, 3, 4)[..., :-1, :].is_contiguous() is (batch == 1)
    old = replace(QLORA, micro_batch_size=batch, versions=Versions(torch=(2, 4), transformers=(4, 45)))
    assert ("logits_shifted" in record(old).ops) is (batch > 1)


def test_every_layer_makes_rotary_tables_in_old_releases() -> None:
    def tables(model_type: str, release: tuple[int, int]) -> int:
        spec = build_spec({**CONFIG, "model_type": model_type}, model_id="test")
        old = replace(QLORA, versions=replace(QLORA.versions, transformers=release), gradient_checkpointing="none")
        return sum(op in ("rotary_tables", "layer_rotary_tables") for op in record(old, spec).ops)

    assert tables("mistral", (4, 47)) == 6 * 3  # angles, cat, cos, sin and two casts in each of three layers
    assert tables("mistral", (4, 48)) == tables("llama", (4, 45)) == 8


def test_added_tokens_lengthen_table_head_and_logits() -> None:
    spec = build_spec(CONFIG, model_id="test")
    more = spec.with_tokens(96)
    assert more.num_parameters == spec.num_parameters + 2 * 96 * 256
    assert spec.with_tokens(0) is spec
    told = [predict(model, training).breakdown.ledger for model, training in
            ((more, QLORA), (spec, replace(QLORA, added_tokens=96)))]  # fmt: skip
    assert told[0] == told[1]
