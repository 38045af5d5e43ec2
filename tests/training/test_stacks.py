"""Framework defaults: who wins, where a value came from, and the dtype habits that decide memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from planner.base.errors import Contradiction, InvalidInput, UnknownName
from planner.facts import catalog
from planner.training import settings, stacks
from planner.training.own_modules import OWN_MODULES, OwnModules
from planner.training.settings import SETTINGS
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec, Versions
from planner.training.stacks import STACKS, resolve, to_training_spec, torch_adamw
from planner.training.versions import parse_versions

METHODS = ("lora", "qlora", "dora", "full")
NAMES = (
    "hf-trainer", "trl", "peft-loop", "axolotl", "llama-factory", "unsloth", "torchtune", "litgpt", "fms", "ms-swift",
    "custom",
)  # fmt: skip


def spec(stack: str, method: str, /, **given: Any) -> TrainingSpec:
    return to_training_spec(resolve(stack, method=method, given=given))


def test_the_listed_frameworks_are_there() -> None:
    assert tuple(STACKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_framework_resolves_every_key_for_every_method(name: str, method: str) -> None:
    resolved = resolve(name, method=method, given={})
    assert tuple(resolved.settings) == tuple(SETTINGS)
    assert resolved.settings["method"].origin == "given"
    assert isinstance(to_training_spec(resolved), TrainingSpec)
    assert json.loads(json.dumps(resolved.describe())) == resolved.describe()


def test_keys_cover_the_training_types() -> None:
    filled = {(row.spec, row.field) for row in SETTINGS.values()}
    specs = {"training": TrainingSpec, "lora": LoraSpec, "quantization": QuantizationSpec}
    fields = {(spec, item.name) for spec, kind in specs.items() for item in dataclasses.fields(kind)}
    assert fields - filled == {("training", "lora"), ("training", "quantization")}


@pytest.mark.parametrize("stack", STACKS.values(), ids=list(STACKS))
def test_defaults_name_a_source_and_depend_on_earlier_keys_only(stack: stacks.Stack) -> None:
    keys = list(SETTINGS)
    for setting, entry in stack.defaults:
        assert entry.source, entry
        assert setting in keys
        assert all(keys.index(key) < keys.index(setting) for key, _ in entry.when), entry
        assert "@" in entry.source or any(ch.isdigit() for ch in entry.source) or "torch" in entry.source, entry


@pytest.mark.parametrize(("kind", "row"), [(stacks.Stack, STACKS["trl"]), (OwnModules, OWN_MODULES["litgpt"])])
def test_a_row_without_a_field_fails_and_names_it(kind: Any, row: Any) -> None:
    complete = {item.name: getattr(row, item.name) for item in dataclasses.fields(kind)}
    for left_out in complete:
        with pytest.raises(TypeError, match=rf"{kind.__name__} needs {left_out}$"):
            kind(**{name: value for name, value in complete.items() if name != left_out})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defaults": (("no_such", settings.Default(1)),)}, "a default of no_such, which is no setting"),
        ({"defaults": (("r", settings.Default(1, "", (("compile", (True,)),))),)}, "of r depends on compile: no set"),
        ({"torch_adamw": "sgd"}, "torch_adamw 'sgd' is not one of adamw"),
    ],
)
def test_a_framework_that_contradicts_the_tables_fails(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(STACKS["trl"], **changes)


def test_every_default_of_a_framework_is_a_value_that_its_setting_takes() -> None:
    for stack in STACKS.values():
        settings_given = [(key, entry.value) for key, entry in stack.defaults]
        for key, value in settings_given:
            assert settings.checked({key: value}) == {key: value}


def test_formats_of_configs_name_frameworks_of_the_table() -> None:
    named = {table.get("stack") for table in catalog.framework_tables().values()} - {None}
    assert named and named <= set(STACKS)


def test_given_wins_over_stack_over_neutral() -> None:
    resolved = resolve("trl", method="lora", given={"r": 64, "lora_alpha": None})
    assert resolved.settings["r"] == settings.Setting(64, "given")
    assert resolved["lora_alpha"] == 32.0
    assert resolved.settings["lora_alpha"].origin.startswith("stack trl: huggingface/trl@")
    assert resolved.settings["group_size"].origin == "loraplan default"


def test_defaults_used_leaves_out_what_does_not_apply() -> None:
    full = resolve("hf-trainer", method="full", given={}).defaults_used()
    assert not set(full) & settings.keys_of("adapter")
    assert not set(full) & settings.keys_of("quantization")
    assert "use_reentrant" not in full  # no checkpointing
    nf4 = resolve("trl", method="qlora", given={"r": 4}).defaults_used()
    assert "group_size" not in nf4
    assert "r" not in nf4
    assert {"double_quant", "adapter_dtype", "use_reentrant"} <= set(nf4)


@pytest.mark.parametrize(
    ("stack", "method", "expected"),
    [
        ("trl", "qlora", "bf16"),  # converted by the SFT trainer
        ("trl", "lora", "fp32"),
        ("torchtune", "qlora", "bf16"),
        ("litgpt", "qlora", "bf16"),  # true precision
        ("litgpt", "lora", "fp32"),  # bf16-mixed
        ("llama-factory", "qlora", "fp32"),
        ("fms", "qlora", "fp32"),
        ("peft-loop", "dora", "fp32"),
    ],
)
def test_adapter_dtype_depends_on_framework_and_method(stack: str, method: str, expected: str) -> None:
    training = spec(stack, method)
    assert training.lora is not None
    assert training.lora.dtype == expected


def test_kbit_preparation_is_the_habit_of_the_plain_peft_recipe_only() -> None:
    assert [name for name in NAMES if spec(name, "qlora").kbit_preparation] == ["peft-loop"]
    assert not spec("peft-loop", "qlora", quantization="gptq4").kbit_preparation  # PEFT skips the casts for GPTQ
    assert not spec("peft-loop", "lora").kbit_preparation


def test_double_quantization() -> None:
    on = [name for name in NAMES if spec(name, "qlora").quantization.double_quant]
    assert on == ["axolotl", "llama-factory", "unsloth", "torchtune", "fms", "ms-swift"]
    assert not spec("axolotl", "qlora", quantization="int8").quantization.double_quant


def test_outputs_copy_follows_mixed_precision() -> None:
    assert not spec("hf-trainer", "lora").outputs_to_fp32
    assert spec("hf-trainer", "lora", autocast="bf16").outputs_to_fp32
    assert not spec("peft-loop", "lora", autocast="bf16").outputs_to_fp32  # no accelerate


def test_releases_decide_trainer_defaults() -> None:
    old = {"versions": {"torch": "2.4.1", "transformers": "4.48.1"}}
    assert spec("hf-trainer", "lora", **old).optimizer == "adamw"
    assert spec("hf-trainer", "lora", gradient_checkpointing="full", **old).use_reentrant
    assert spec("hf-trainer", "lora").optimizer == "adamw-fused"
    assert not spec("hf-trainer", "lora").use_reentrant
    assert torch_adamw("hf-trainer", Versions(transformers=(4, 57))) == "adamw"
    assert torch_adamw("torchtune", Versions(transformers=(4, 57))) == "adamw-fused"
    with pytest.raises(UnknownName):
        torch_adamw("nobody", Versions())


def test_litgpt_habits() -> None:
    training = spec("litgpt", "qlora", target_modules="query_key_value")
    assert training.lora is not None
    assert training.lora.target_slices == (0, 2)
    assert training.quantization.skip_modules == ()
    assert (training.own_modules, training.keeps_outputs, training.optimizer) == ("litgpt", True, "paged-adamw")
    unfused = spec("litgpt", "lora", target_modules=["q_proj", "v_proj"], base_dtype="bf16")
    assert unfused.lora is not None
    assert (unfused.lora.target_slices, unfused.lora.dtype, unfused.autocast) == ((), "bf16", "none")


def test_fms_follows_the_quantization() -> None:
    assert (spec("fms", "lora").autocast, spec("fms", "qlora").autocast) == ("none", "bf16")
    gptq = spec("fms", "qlora", quantization="gptq4")
    assert (gptq.autocast, gptq.base_dtype, gptq.quantization.compute_dtype) == ("fp16", "fp16", "fp16")
    assert spec("fms", "lora", kernels="fms-fused").loss == "full-logits"


def test_torchtune_steps_in_backward_only_without_accumulation() -> None:
    assert spec("torchtune", "full").optimizer_in_backward
    assert not spec("torchtune", "full", gradient_accumulation_steps=8).optimizer_in_backward
    assert not spec("torchtune", "lora").optimizer_in_backward


def test_kernels_decide_the_loss() -> None:
    assert spec("axolotl", "lora", kernels="liger").loss == "fused"
    assert spec("unsloth", "lora").loss == "fused"
    assert spec("unsloth", "lora", kernels="none").loss == "full-logits-fp32"
    assert spec("trl", "lora", kernels="liger").loss == "fused"


def test_names_as_text_or_list() -> None:
    for value in ("q_proj,v_proj", "q_proj; v_proj", ["q_proj", "v_proj", "q_proj"], ("q_proj", "v_proj")):
        training = spec("custom", "lora", target_modules=value)
        assert training.lora is not None
        assert training.lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.extra
def test_arrays_pass_through() -> None:
    np = pytest.importorskip("numpy")
    batch = np.array([1, 2, 4])
    given = {"micro_batch_size": batch, "gradient_accumulation_steps": np.array([1, 8, 8])}
    resolved = resolve("torchtune", method="full", given=given)
    assert np.array_equal(resolved["micro_batch_size"], batch)
    assert not resolved["optimizer_in_backward"]  # an array decides no default
    resolved = resolve("custom", method="lora", given={"seq_len": np.array([512, 1024])})
    assert resolved.describe()["seq_len"]["value"] == [512, 1024]


def test_versions() -> None:
    assert parse_versions({"torch": "2.4.1+cu121", "peft": "0.13.2"}) == Versions(
        torch=(2, 4), transformers=(4, 47), peft=(0, 13), bitsandbytes=(0, 45)
    )  # before PEFT 0.14 of 2024-12-06
    # before torch 2.2 of 2024-01-30; peft 0.8 came on that very day
    assert parse_versions({"torch": "2.1.1"}) == Versions(
        torch=(2, 1), transformers=(4, 37), peft=(0, 7), bitsandbytes=(0, 42)
    )
    assert parse_versions({"torch": "2.1", "transformers": "4.44.2"}).peft == (0, 12)  # the later one dates the run
    assert parse_versions({"transformers": "4.57"}).torch == (2, 10)
    assert parse_versions({"peft": "0.99"}) == Versions(peft=(0, 99))  # newer than the table: the newest of the rest
    assert parse_versions({"torch": "0.4"}).transformers < (4, 25)
    assert parse_versions({"torch": "", "other": "1.2"}) == Versions()
    with pytest.raises(InvalidInput, match=r"torch version is 'nightly'"):
        parse_versions({"torch": "nightly"})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rank": 8}, UnknownName, "unknown option 'rank'"),
        ({"loss": "fuse"}, UnknownName, "unknown loss 'fuse'; did you mean fused"),
        ({"autocast": "fp8"}, UnknownName, "unknown autocast"),
        ({"quantized_modules": "most"}, UnknownName, "unknown quantized_modules"),
        ({"padded": "yes"}, InvalidInput, "padded is 'yes'"),
        ({"lora_alpha": "16"}, InvalidInput, "lora_alpha is"),
        ({"lora_dropout": float("nan")}, InvalidInput, "lora_dropout is"),
        ({"max_grad_norm": -1.0}, InvalidInput, "max_grad_norm is"),
        ({"target_modules": [1]}, InvalidInput, "target_modules is"),
        ({"target_modules": ""}, InvalidInput, "no target_modules"),
        ({"target_slices": [9]}, InvalidInput, "target_slices is"),
        ({"r": 0}, InvalidInput, "r is 0"),
        ({"method": "full"}, Contradiction, "method is lora and 'full' at once"),
        ({"quantization": "nf4"}, Contradiction, "use method qlora"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spec("custom", "lora", **given)


def test_unknown_stack_and_method() -> None:
    with pytest.raises(UnknownName, match="unknown stack 'axolot'; did you mean axolotl"):
        resolve("axolot", method="lora", given={})
    with pytest.raises(UnknownName, match="unknown method"):
        resolve("custom", method="prefix", given={})
    with pytest.raises(Contradiction, match="use_dora"):
        resolve("custom", method="dora", given={"use_dora": False})


def test_import_needs_no_numpy() -> None:
    code = (
        "import sys, planner.training.stacks; sys.exit(int(bool({'numpy', 'csv', 'json', 'yaml'} & set(sys.modules))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_trl_computes_its_loss_in_chunks_since_1_7() -> None:
    assert spec("trl", "lora").loss == "fused"
    assert spec("trl", "lora", versions={"transformers": "5.12"}).loss == "fused"
    assert spec("trl", "lora", versions={"transformers": "5.11"}).loss == "full-logits-fp32"
    assert spec("trl", "lora", versions={"transformers": "5.11"}, kernels="liger").loss == "fused"
