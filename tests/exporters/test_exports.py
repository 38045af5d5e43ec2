"""Exports: what users write stays data, files say what was planned, and their consumers accept them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.export_cases import FULL, LORA, NAME, QLORA, TRAININGS, recipe
from planner.base.errors import Contradiction, InvalidInput, PlannerError, UnknownName
from planner.exporters import databricks_air, databricks_cluster, databricks_fm, frameworks, script
from planner.exporters.recipe import Export, Recipe
from planner.exporters.text import comment, scalar, yaml
from planner.facts import catalog
from planner.model import families
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

ROOT = Path(__file__).resolve().parent.parent.parent


@cache
def placed(training: TrainingSpec) -> tuple[databricks_air.Choice, databricks_cluster.Choice]:
    """Predictions do not depend on names: made once."""
    made = recipe(training)
    return databricks_air.choose(made, "GPU_1xH100", None), databricks_cluster.choose(made, "aws", "g6e.xlarge")


def exports(made: Recipe) -> dict[str, Export]:
    """Every file a recipe becomes, without a network."""
    air, cluster = placed(made.training)
    return {
        "peft": script.export(made),
        "trl": frameworks.trl(made),
        "axolotl": frameworks.axolotl(made),
        "llama-factory": frameworks.llama_factory(made),
        "entrenar": frameworks.entrenar(made),
        "databricks-air": databricks_air.export(made, air),
        "databricks-cluster": databricks_cluster.export(made, cluster),
        "databricks-fm": databricks_fm.export(databricks_fm.call_of(made, {})),
    }


def main_values(made: Export) -> dict[str, Any]:
    return pyyaml.safe_load(made.artifacts[0].text)


# --- user text stays text ------------------------------------------------------------------------------------------

HOSTILE = (
    "a'b\"c", "x: y", "- z", "#no", "${HOME}", "`id`",
    "'); import os; os.system('id') #", '"""', "\\", "a\\n b", "é雪😀",
    "yes", "1e3", "0x10", "null", "{{ jinja }}", "%TAG", "*alias", "&anchor", "!tag", "@at", " lead", "trail ",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_data(text: str) -> None:
    made = exports(recipe(QLORA, model_id=text, data=text, output_dir=text, plan_words=f"x\n{text}\nimport os"))
    assert constants(made["peft"].artifacts[0].text) == {"MODEL": text, "DATA": text, "OUTPUT": text}
    assert main_values(made["trl"])["model_name_or_path"] == text
    assert main_values(made["trl"])["datasets"] == [{"path": "json", "data_files": text}]
    assert main_values(made["axolotl"])["base_model"] == text
    assert main_values(made["llama-factory"])["output_dir"] == text
    assert main_values(made["entrenar"])["model"]["path"] == text
    assert json.loads(made["databricks-fm"].artifacts[0].text)["model"] == text
    for export in made.values():
        for artifact in export.artifacts:
            if artifact.name.endswith(".py"):
                assert imported(artifact.text) <= {"torch", "datasets", "peft", "transformers", "trl", "databricks"}


def constants(source: str) -> dict[str, str]:
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found[node.targets[0].id] = node.value.value  # type: ignore[attr-defined]
    return found


def imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=30))
def test_any_text_survives_yaml(text: str) -> None:
    assert pyyaml.safe_load(yaml({"a": text, "b": [text, {"c": text}]})) == {"a": text, "b": [text, {"c": text}]}
    assert "\n" not in comment(text)


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**18), 10**18) | st.booleans())
def test_any_number_survives_yaml(value: Any) -> None:
    found = pyyaml.safe_load(scalar(value))
    assert found == value
    assert type(found) is type(value)


def test_control_characters_are_refused() -> None:
    for field in ("model_id", "data", "output_dir"):
        with pytest.raises(InvalidInput, match="control characters"):
            recipe(**{field: "a\nb"})


# --- what was planned is what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_every_target_writes_every_method(name: str) -> None:
    for target, made in exports(recipe(TRAININGS[name])).items():
        for artifact in made.artifacts:
            assert artifact.text.endswith("\n"), target
            if artifact.name.endswith(".py"):
                compile(artifact.text, artifact.name, "exec")
            elif artifact.name.endswith(".json"):
                json.loads(artifact.text)
            elif artifact.name.endswith(".yaml"):
                assert isinstance(pyyaml.safe_load(artifact.text), dict)


def test_qlora_settings_arrive() -> None:
    made = exports(recipe(QLORA, padding="packed", learning_rate=2e-5, warmup_steps=7))
    trl = main_values(made["trl"])
    assert (trl["lora_r"], trl["lora_alpha"], trl["lora_dropout"]) == (16, 32, 0.05)
    assert (trl["load_in_4bit"], trl["use_bnb_nested_quant"], trl["packing"]) == (True, True, True)
    assert (trl["learning_rate"], trl["warmup_steps"], trl["max_length"]) == (2e-5, 7, 512)
    assert (trl["optim"], trl["gradient_accumulation_steps"]) == ("paged_adamw_8bit", 4)
    axolotl = main_values(made["axolotl"])
    assert (axolotl["adapter"], axolotl["sample_packing"], axolotl["micro_batch_size"]) == ("qlora", True, 1)
    assert len(axolotl["lora_target_modules"]) == 7
    factory = main_values(made["llama-factory"])
    assert (factory["quantization_bit"], factory["double_quantization"], factory["template"]) == (4, True, "qwen")
    info = json.loads(made["llama-factory"].artifacts[1].text)
    assert info[factory["dataset"]]["file_name"] == "train.jsonl"
    entrenar = main_values(made["entrenar"])
    assert entrenar["lora"]["quantize_base"] is True
    assert entrenar["quantize"]["bits"] == 4
    assert "ignores the lora section" in made["entrenar"].notes[0]


def test_full_fine_tuning_has_no_adapter() -> None:
    made = exports(recipe(FULL))
    assert "LoraConfig" not in made["peft"].artifacts[0].text
    assert "adapter" not in main_values(made["axolotl"])
    assert main_values(made["llama-factory"])["finetuning_type"] == "full"


def test_the_script_renders_the_templates_of_the_planner() -> None:
    """to_text of the script against planner.runs.dataset.templates, for every template and shape that fits."""
    from planner.runs.dataset.rows import parse
    from planner.runs.dataset.templates import BUILT_IN

    rows = [
        {"instruction": "Do", "input": "this", "output": "done"},
        {"instruction": "Do", "input": "", "output": "done"},
        {"prompt": "Say", "response": "hi"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"text": "plain"},
    ]
    compared = 0
    for name, template in BUILT_IN.items():
        source = script.export(recipe(template=name)).artifacts[0].text
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        space: dict[str, Any] = {}
        exec(compile(ast.Module(functions, []), "script", "exec"), space)  # what the export wrote
        for row in rows:
            own = {"alpaca": ("instruction",), "chat": ("instruction",), "plain": ("text", "prompt")}
            wanted = own.get(name.split("-")[0], ("instruction", "prompt", "messages", "conversations"))
            if any(key in row for key in wanted):
                assert space["to_text"](row)["text"] == template.render(parse(row)), (name, row)
                compared += 1
    assert compared >= 12


def test_checkpoints_of_their_own_cannot_be_exported() -> None:
    gptq = TrainingSpec(method="qlora", lora=LoraSpec(), quantization=QuantizationSpec(kind="gptq4"))
    with pytest.raises(Contradiction, match="checkpoint of its own"):
        recipe(gptq)


# --- consumers ------------------------------------------------------------------------------------------------------

PLANNED = {
    "lora": {
        "r": 8, "lora_alpha": 16, "target_modules": ("q_proj", "v_proj"), "micro_batch_size": 2, "quantization": "none",
    },
    "qlora": {
        "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "micro_batch_size": 1, "gradient_accumulation_steps": 4,
        "quantization": "nf4", "double_quant": True, "optimizer": "paged-adamw-8bit",
    },
    "full": {"method": "full", "micro_batch_size": 1},
    "int8": {"r": 8, "quantization": "int8"},
}  # fmt: skip
COMMON = {"seq_len": 512, "gradient_checkpointing": "full", "attention": "sdpa", "autocast": "bf16"}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("target", ["peft", "trl", "axolotl", "llama-factory"])
def test_what_is_exported_is_read_back(name: str, target: str, tmp_path: Path) -> None:
    """The importer of the same framework finds the planned settings in the export."""
    from planner.importers import read_job

    artifact = exports(recipe(TRAININGS[name]))[target].artifacts[0]
    path = tmp_path / artifact.name
    path.write_text(artifact.text, encoding="utf-8")
    job = read_job([str(path)])
    found = {key: value.value for key, value in job.values.items()}
    wanted = {**COMMON, **PLANNED[name]}
    assert job.model == NAME
    # a script without a quantization states none
    assert {key: found.get(key, "none") for key in wanted} == wanted


FIELDS = json.loads((ROOT / "tests" / "exporters" / "framework_fields.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("target", ["axolotl", "llama-factory", "trl"])
@pytest.mark.parametrize("padding", ["longest", "grouped", "packed", "max"])
def test_keys_are_fields_of_the_framework(name: str, target: str, padding: str) -> None:
    """The recorded fields of the framework's own classes; .ci/check_exports.py validates values with the classes."""
    made = exports(recipe(TRAININGS[name], padding=padding))[target]
    unknown = set(main_values(made)) - set(FIELDS[target]["fields"])
    assert not unknown


@pytest.mark.extra
@pytest.mark.parametrize("name", TRAININGS)
def test_databricks_json_is_what_the_sdk_reads(name: str) -> None:
    jobs = pytest.importorskip("databricks.sdk.service.jobs")
    compute = pytest.importorskip("databricks.sdk.service.compute")
    made = exports(recipe(TRAININGS[name]))
    files = {a.name: a.text for a in made["databricks-air"].artifacts}
    job = json.loads(files["job.json"])
    task = jobs.Task.from_dict(job["tasks"][0])
    assert task.as_dict() == job["tasks"][0]
    assert task.ai_runtime_task.deployments[0].compute.accelerator_type.value == "GPU_1xH100"
    cluster = json.loads(made["databricks-cluster"].artifacts[0].text)
    spec = compute.ClusterSpec.from_dict(cluster)
    assert spec.as_dict() == cluster
    assert spec.data_security_mode == compute.DataSecurityMode.SINGLE_USER


def tiny_model(folder: Path) -> None:
    """A two-layer Llama with a byte-level tokenizer, trained on nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {ch: i for i, ch in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab = {**letters, "<s>": len(letters), "</s>": len(letters) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(vocab), max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_the_script_trains_one_step_on_a_cpu(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    tiny_model(tmp_path / "model")
    rows = [{"instruction": f"Count to {i}", "input": "", "output": "1 2 3"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    spec = families.build_spec(config, model_id="tiny")
    from dataclasses import replace

    training = replace(TRAININGS[name], optimizer="adamw", gradient_accumulation_steps=1, micro_batch_size=2)
    made = Recipe(
        model_id=str(tmp_path / "model"), model=spec, training=training, limit=64, max_steps=1,
        data=str(tmp_path / "train.jsonl"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    (tmp_path / "train.py").write_text(script.export(made).artifacts[0].text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    saved = tmp_path / "out" / "adapter_config.json"
    adapter = json.loads(saved.read_text())
    assert adapter["r"] == training.lora.r  # type: ignore[union-attr]
    assert adapter["lora_dropout"] == training.lora.lora_dropout  # type: ignore[union-attr]


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_trl_reads_its_config(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    path = tmp_path / "sft.yaml"
    made = recipe(TRAININGS[name], output_dir=str(tmp_path / "out"))
    path.write_text(frameworks.trl(made).artifacts[0].text + "use_cpu: true\n")
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
    _, training, model, mixture = parser.parse_args_and_config(["--config", str(path)])
    assert model.model_name_or_path == NAME
    assert model.use_peft == (TRAININGS[name].lora is not None)
    assert training.max_length == 512
    assert training.per_device_train_batch_size == TRAININGS[name].micro_batch_size
    assert (mixture.datasets[0].path, mixture.datasets[0].data_files) == ("json", "train.jsonl")


# --- Databricks -----------------------------------------------------------------------------------------------------


def test_fixture_17_eight_h100_come_in_nodes_of_eight() -> None:
    with pytest.raises(InvalidInput, match="multiple of 8"):
        databricks_air.choose(recipe(), "GPU_8xH100", 4)
    assert databricks_air.choose(recipe(), "GPU_8xH100", 16).number == 16


def test_fixture_19_a_fraction_of_an_a10() -> None:
    half = databricks_cluster.node("Standard_NV18ads_A10_v5")
    whole = databricks_cluster.node("Standard_NV36ads_A10_v5")
    assert half.gpus == 0.5
    assert half.gpu.memory_bytes <= 12 * 2**30
    assert half.gpu.memory_bytes == pytest.approx(whole.gpu.memory_bytes / 2, rel=0.01)
    assert databricks_cluster.node("Standard_NV6ads_A10_v5").gpu.memory_bytes <= 4 * 2**30
    made = databricks_cluster.export(recipe(), databricks_cluster.choose(recipe(), "azure", half.name))
    assert any("1/2 of a card" in note for note in made.notes)


def test_the_smallest_accelerator_that_fits() -> None:
    assert databricks_air.choose(recipe(), None, None).accelerator.name == "GPU_1xA10"
    big = catalog.model_record("meta-llama/Llama-3.1-70B")
    assert big is not None
    spec = families.build_spec(big.config, model_id="70b")
    assert databricks_air.choose(recipe(QLORA, model=spec), None, None).accelerator.name == "GPU_1xH100"
    with pytest.raises(PlannerError, match="fits no accelerator"):
        databricks_air.choose(recipe(FULL, model=spec), None, None)
    with pytest.raises(UnknownName, match="upper and lower case"):
        databricks_air.choose(recipe(), "gpu_1xa10", None)


def test_the_cheapest_node_and_reasons_when_none_fits() -> None:
    chosen = databricks_cluster.choose(recipe(), "aws", None).node
    assert chosen.gpu.bf16_native is not False
    cheaper = [n for n in databricks_cluster.nodes("aws") if n.usd_per_hour < chosen.usd_per_hour]
    assert all(n.gpu.bf16_native is False for n in cheaper)
    record = catalog.model_record("meta-llama/Llama-3.1-70B")
    assert record is not None
    spec = families.build_spec(record.config, model_id="70b")
    with pytest.raises(PlannerError, match=r"Tesla T4 has no bf16.*NVIDIA L4 needs .* of 22\.5 GiB"):
        databricks_cluster.choose(recipe(LORA, model=spec), "aws", None)


SEED_CALL = {
    "model": "databricks/dolly-v2-7b",
    "train_data_path": "dbfs:/datasets/training/train.jsonl",
    "eval_data_path": "dbfs:/datasets/training/eval.jsonl",
    "register_to": "main.models.my_finetuned_model",
    "training_duration": "3ep",
    "learning_rate": "2e-4",
    "context_length": 512,
    "task_type": "INSTRUCTION_FINETUNE",
}
"""DB-mlops-genai demos/course4/week5/databricks/model_training.py."""


def test_fixture_15_the_notebooks_own_call() -> None:
    made = databricks_fm.export(SEED_CALL)
    assert made.notes[0].startswith("end of life")
    assert "rank, alpha, targets, quantization" in made.notes[1]
    assert any("400 times the API's default" in note for note in made.notes)
    assert [e.split(" ")[0] for e in made.errors] == ["train_data_path", "eval_data_path"]
    assert all("dbfs:/Volumes/<catalog>/<schema>/<volume>" in error for error in made.errors)


def test_a_written_call_is_checked_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from planner.cli.main import cli

    path = tmp_path / "call.json"
    path.write_text(json.dumps(SEED_CALL))
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "databricks-fm", "--check-call", str(path)])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert printed.err.startswith("note: end of life")
    assert printed.err.count("problem: ") == 2
    assert json.loads(printed.out) == SEED_CALL


def test_a_config_of_one_framework_becomes_that_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from planner.cli.main import cli

    path = tmp_path / "axolotl.yaml"
    path.write_text(frameworks.axolotl(recipe(QLORA)).artifacts[0].text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "trl", "--from", str(path)])
    assert stop.value.code == 0
    values = pyyaml.safe_load(capsys.readouterr().out)
    assert (values["model_name_or_path"], values["lora_r"], values["lora_alpha"]) == (NAME, 16, 32)
    assert (values["max_length"], values["optim"], values["use_bnb_nested_quant"]) == (512, "paged_adamw_8bit", True)


def test_fixture_16_a_delta_table_needs_a_cluster() -> None:
    call = {"model": "m", "train_data_path": "main.default.train", "register_to": "main.default"}
    assert [f.text for f in databricks_fm.check(call) if f.level == "error"] == [
        "train_data_path 'main.default.train' is a Delta table: it needs data_prep_cluster_id"
    ]
    assert not [f for f in databricks_fm.check({**call, "data_prep_cluster_id": "0101-x"}) if f.level == "error"]
    refused = databricks_fm.check({**call, "data_prep_cluster_id": "serverless"})
    assert [f.level for f in refused].count("error") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training_duration": "3 epochs"}, "ba, ep or tok"),
        ({"training_duration": "0ep"}, "ba, ep or tok"),
        ({"register_to": "main"}, "catalog.schema"),
        ({"register_to": "main..x"}, "catalog.schema"),
        ({"task_type": "DPO"}, "known: INSTRUCTION_FINETUNE"),
        ({"context_length": "512"}, "whole number"),
        ({"learning_rate": "fast"}, "above 0"),
        ({"train_data_path": "/Volumes/a/b/c/train.csv"}, "must be a .jsonl file"),
        ({"train_data_path": "a/b"}, "<entity>/<dataset>/<split>"),
        ({"custom_weights_path": "dbfs:/x"}, "mlflow-tracking"),
        ({"r": 8}, "no argument 'r'"),
        ({"model": ""}, "model is missing"),
    ],
)
def test_the_call_is_checked(change: dict[str, Any], words: str) -> None:
    good = {"model": "m", "train_data_path": "/Volumes/a/b/c/train.jsonl", "register_to": "main.default"}
    assert not [f for f in databricks_fm.check(good) if f.level == "error"]
    errors = [f.text for f in databricks_fm.check({**good, **change}) if f.level == "error"]
    assert len(errors) == 1
    assert words in errors[0]
