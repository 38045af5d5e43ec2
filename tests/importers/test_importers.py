"""Reading training configs: every format, origins, jobs of several files, what is refused and what is said."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from planner.base.errors import InvalidInput, NotPlanned
from planner.facts import catalog
from planner.importers import frameworks, read_job, rules, writing
from planner.importers.document import Document
from planner.importers.rules import Value
from planner.training import settings, stacks
from planner.training.spec import Versions
from tests.helpers.training_configs import AXOLOTL, EXAMPLES, SCRIPT_TRL, TRL, Example, notebook

AFTER = AXOLOTL.count("\n") + 1
"""The line of what is put behind the axolotl example."""


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_every_format_is_recognised_and_read(tmp_path: Path, example: Example) -> None:
    job = read_job([write(tmp_path, example.name, example.text)])
    assert [r.framework.name for r in job.readings] == [example.framework]
    assert (job.stack, job.model) == (example.stack, example.model)
    assert {key: job.values[key].value for key in example.options} == example.options


def test_every_format_has_an_example() -> None:
    assert {f.name for f in frameworks.frameworks()} <= {e.framework for e in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_origins_name_the_line_of_the_key(tmp_path: Path, example: Example) -> None:
    """Where a YAML, JSON or script value says it comes from, its key stands on that line."""
    job = read_job([write(tmp_path, example.name, example.text)])
    lines = example.text.splitlines()
    for option, value in job.given.items():
        place, _, key = value.origin.removeprefix("file ").partition(" ")
        assert place == f"{example.name}:{value.line}" and key == value.keys[0]
        if example.name.endswith((".yml", ".yaml", ".json", ".py")) and ".." not in key:
            word = key.rpartition(".")[2]
            assert word in lines[value.line - 1] or example.name.endswith(".py"), (option, key, lines[value.line - 1])
    for value in job.defaults.values():
        assert " default: " in value.origin and not value.given


def test_a_stated_value_beats_a_default_and_says_so(tmp_path: Path) -> None:
    job = read_job([write(tmp_path, "a.yml", AXOLOTL)])
    assert job.given["r"] == Value(32, "file a.yml:9 lora_r", True, ("lora_r",), 9)
    assert "src/axolotl/utils/schemas/peft.py" in job.defaults["lora_dropout"].origin
    assert job.defaults["autocast"].adapts  # bf16: auto looks at the card


def test_later_files_win_and_keep_their_own_lines(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", TRL)
    over = write(tmp_path, "over.yaml", "model_name_or_path: meta-llama/Llama-3.1-8B\n\nlora_r: 64\n")
    job = read_job([base, over])
    assert job.given["r"].value == 64 and job.given["r"].origin == "file over.yaml:3 lora_r"
    assert job.given["micro_batch_size"].origin == "file base.yaml:6 per_device_train_batch_size"


def test_accelerate_fills_what_the_trainer_leaves_open(tmp_path: Path) -> None:
    launch = write(tmp_path, "acc.yaml", "compute_environment: LOCAL_MACHINE\nmixed_precision: fp16\n")
    plain = read_job([write(tmp_path, "t.yaml", TRL), launch])
    assert plain.given["autocast"].value == "fp16" and plain.stack == "trl"
    stated = read_job([write(tmp_path, "t.yaml", TRL + "bf16: true\n"), launch])
    assert stated.given["autocast"].value == "bf16"  # transformers training_args.py: its own flag sets the variable


def test_a_file_that_a_config_names_is_read_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "ds/zero0.json", json.dumps({"zero_optimization": {"stage": 0}, "gradient_clipping": 0.5}))
    job = read_job([write(tmp_path, "a.yml", AXOLOTL + "deepspeed: ds/zero0.json\n")])
    assert job.given["max_grad_norm"].origin == "file zero0.json:1 gradient_clipping"
    write(tmp_path, "ds/zero3.json", json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(NotPlanned, match=r"zero3.json:1: the job is sharded by DeepSpeed ZeRO.*--one-gpu"):
        read_job([write(tmp_path, "b.yml", AXOLOTL + "deepspeed: ds/zero3.json\n")])


def test_an_inline_deepspeed_section_is_read_too(tmp_path: Path) -> None:
    text = AXOLOTL + "deepspeed:\n  zero_optimization:\n    stage: 2\n"
    with pytest.raises(NotPlanned, match="sharded by DeepSpeed"):
        read_job([write(tmp_path, "a.yml", text)])
    job = read_job([write(tmp_path, "a.yml", text)], one_gpu=True)
    assert any("planned unsharded on one GPU" in str(missing) for missing in job.missing)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.json", "a/../../secret.json", "~/secret.json"])
def test_named_files_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, "secret.json", json.dumps({"zero_optimization": {"stage": 0}}))
    config = write(tmp_path, "job/a.yml", f"{AXOLOTL}deepspeed: {name}\n")
    with pytest.raises(InvalidInput, match="outside its folder"):
        read_job([config])


def test_a_link_out_of_the_folder_is_refused_and_can_be_allowed(tmp_path: Path) -> None:
    secret = write(tmp_path, "secret.json", json.dumps({"zero_optimization": {"stage": 0}, "gradient_clipping": 0.5}))
    config = write(tmp_path, "job/a.yml", AXOLOTL + "deepspeed: link.json\n")
    (tmp_path / "job" / "link.json").symlink_to(secret)
    with pytest.raises(InvalidInput, match="outside its folder"):
        read_job([config])
    assert read_job([config], allow_outside=True).given["max_grad_norm"].value == 0.5


def test_a_named_file_that_is_missing_is_not_passed_over(tmp_path: Path) -> None:
    config = write(tmp_path, "a.yml", AXOLOTL + "deepspeed: deepspeed_configs/zero2.json\n")
    with pytest.raises(InvalidInput, match=r"a.yml:\d+: deepspeed names .* may shard the job"):
        read_job([config])
    assert read_job([config], one_gpu=True).given["r"].value == 32


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rl: grpo", "reinforcement learning is not planned"),
        ("rl: dpo", "preference training"),
        ("fsdp_config:\n  offload_params: true", "sharded by FSDP"),
        ("context_parallel_size: 4", "split over several GPUs"),
        ("qat:\n  weight_dtype: int4", "QAT"),
        ("reward_model: true", "reward models"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(NotPlanned, match=what) as refused:
        read_job([write(tmp_path, "a.yml", AXOLOTL + text + "\n")])
    assert str(refused.value).startswith(f"a.yml:{AFTER}: ")


def test_unknown_keys_never_fail_and_known_gaps_are_named(tmp_path: Path) -> None:
    text = AXOLOTL + "frobnicate: {a: [1, {b: 2}]}\nneftune_noise_alpha: 5\nunfrozen_parameters: []\noptimizer: muon\n"
    job = read_job([write(tmp_path, "a.yml", text)])
    uses = {key.key: key.use for key in job.keys}
    assert uses["frobnicate.a"] == "unknown"
    assert uses["neftune_noise_alpha"] == "unsupported"
    assert uses["wandb_project"] == uses["val_set_size"] == "ignored"
    assert uses["lora_r"] == "used" and uses["lora_dropout"] == "default"
    texts = [str(missing) for missing in job.missing]
    assert f"a.yml:{AFTER + 1}: neftune_noise_alpha: the noise added to the embeddings (the run needs more)" in texts
    assert any("optimizer 'muon' is not modelled" in text for text in texts)
    assert not any("unfrozen" in text for text in texts)  # an empty list asks for nothing
    assert "optimizer" not in job.values  # left to the framework's default


def test_wrong_values_name_file_line_and_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"a.yml:2 lora_r is 'many'; must be a whole number .*; correct it"):
        read_job([write(tmp_path, "a.yml", "base_model: x/y\nlora_r: many\n")])
    with pytest.raises(InvalidInput, match=r"micro_batch_size is 0; must be a whole number from 1"):
        read_job([write(tmp_path, "a.yml", "base_model: x/y\nmicro_batch_size: 0\n")])


def test_a_file_of_no_framework_says_which_are_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"has no keys of a training config; known formats: .*axolotl config"):
        read_job([write(tmp_path, "a.yml", "name: ci\non: push\n")])


def test_yaml_is_read_as_the_frameworks_read_it(tmp_path: Path) -> None:
    text = """\
        base_model: &m org/model
        adapter: lora
        lora_r: "16"
        lora_alpha: 1.6e1
        bf16: yes
        common: &c {micro_batch_size: 4}
        <<: *c
        sequence_len: 4_096
        tokenizer_config: *m
    """
    job = read_job([write(tmp_path, "a.yml", text)])
    values = {key: value.value for key, value in job.values.items()}
    assert values["r"] == 16 and values["lora_alpha"] == 16.0 and values["autocast"] == "bf16"
    assert values["micro_batch_size"] == 4 and values["seq_len"] == 4096


def test_older_releases_have_their_own_defaults(tmp_path: Path) -> None:
    text = "output_dir: x\nper_device_train_batch_size: 1\ngradient_checkpointing: true\n"
    path = write(tmp_path, "a.yaml", text)
    assert read_job([path]).values["optimizer"].value == "adamw-fused"
    old = read_job([path], Versions(transformers=(4, 45)))
    assert old.values["optimizer"].value == "adamw" and old.values["use_reentrant"].value is True


# --- scripts ------------------------------------------------------------------------------------------------------


def test_what_only_running_would_tell_is_named(tmp_path: Path) -> None:
    text = SCRIPT_TRL.replace("r=16", "r=compute()").replace("max_length=LENGTH", "max_length=args.length")
    job = read_job([write(tmp_path, "a.py", text)])
    texts = [str(missing) for missing in job.missing]
    assert any("LoraConfig.r is a Call, which only running the script would tell" in text for text in texts)
    assert any("SFTConfig.max_length is ….length" in text for text in texts)
    assert "r" not in job.values


def test_a_name_that_is_bound_twice_has_no_value(tmp_path: Path) -> None:
    for more in ("LENGTH = 4096\n", "def f(LENGTH): pass\n", "for LENGTH in (1, 2): pass\n", "import x as LENGTH\n"):
        job = read_job([write(tmp_path, "a.py", SCRIPT_TRL + more)])
        assert any("SFTConfig.max_length is LENGTH" in str(missing) for missing in job.missing), more


def test_notebooks_pass_over_magics_outputs_and_other_languages(tmp_path: Path) -> None:
    text = notebook("%%bash\nrm -rf /", "%pip install x\n" + SCRIPT_TRL, "this is not Python(", "SELECT 1")
    assert read_job([write(tmp_path, "a.ipynb", text)]).given["r"].value == 16


# --- the tables ---------------------------------------------------------------------------------------------------

# The stack's habit is what its examples write, where the framework itself has no such default; or the config format
# is one of two faces of a framework that differ.
DIFFERENT = {
    ("litgpt", "optimizer"): "an unquantized run; stacks.py knows that a quantized one pages",
    ("unsloth", "r"): "the command line starts at 64, the API at 16",
    ("llama-factory-v1", "micro_batch_size"): "v1 has its own arguments",
    ("llama-factory", "autocast"): "bf16 is off unless the file says so; its examples all do",
    ("script-unsloth", "micro_batch_size"): "a script's TrainingArguments, not the command line",
    ("script-unsloth", "gradient_accumulation_steps"): "a script's TrainingArguments, not the command line",
    ("script-trl", "r"): "a script's LoraConfig, not the command line's ModelConfig",
    ("script-trl", "lora_alpha"): "a script's LoraConfig, not the command line's ModelConfig",
    ("script-trl", "lora_dropout"): "a script's LoraConfig, not the command line's ModelConfig",
}


def test_tables_and_stacks_agree_on_every_default() -> None:
    found = set()
    for framework in frameworks.frameworks():
        reading = rules.apply(Document("x.yml", {}), framework, Versions())
        for method in ("full", "lora", "qlora"):
            resolved = stacks.resolve(framework.stack or "custom", method=method, given={})
            for option, value in reading.options.items():
                if option in ("method", "quantization") or not resolved.applies(option) or not framework.stack:
                    continue
                if resolved[option] != value.value:
                    found.add((framework.name, option))
    assert found == DIFFERENT.keys()


def test_tables_set_known_options_to_known_values() -> None:
    for framework in frameworks.frameworks():
        assert framework.options.keys() <= set(settings.SETTINGS), framework.name
        for option, rows in framework.options.items():
            for row in rows:
                if "value" in row:
                    value = tuple(row["value"]) if isinstance(row["value"], list) else row["value"]
                    settings.checked({option: value})
    for words in catalog.framework_tables()["words"]["maps"].values():
        for found in words.values():
            assert isinstance(found, str) or {"value", "note", "effect"} == found.keys()


def test_tables_state_their_source_and_the_releases_they_hold_for() -> None:
    for name, table in catalog.framework_tables().items():
        assert table["source"], name
        assert name == "words" or table["versions"], name


def test_torchtune_builders_are_models_of_the_catalogue() -> None:
    for model in catalog.framework_tables()["torchtune"]["models"].values():
        assert catalog.model_record(model) is not None, model


YAML_EXAMPLES = [e for e in EXAMPLES if e.name.endswith((".yml", ".yaml", ".json"))]


@pytest.mark.parametrize("example", YAML_EXAMPLES, ids=lambda e: e.name)
def test_rows_work_both_ways(tmp_path: Path, example: Example) -> None:
    """What a row writes for a value is read back as that value: the tables serve exporters too."""
    framework = frameworks.framework(example.framework)
    job = read_job([write(tmp_path, example.name, example.text)])
    written = {option: writing.key_values(framework, option, v.value, v.keys) for option, v in job.given.items()}
    identity = {key for condition in framework.recognise for key in condition}
    document = job.readings[0].document
    flat = {key: document.get(key) for key in document.entries if key in identity and document.get(key) != {}}
    flat |= {key: value for keys in written.values() for key, value in (keys or {}).items()}
    again = read_job([write(tmp_path, "again.json", json.dumps(nested(flat)))])
    readable = {option for option, keys in written.items() if keys}
    assert {o: again.values[o].value for o in readable} == {o: job.given[o].value for o in readable}
    assert len(readable) >= len(written) - 3  # compound options (collected targets, ratios) have no single key


def nested(flat: dict[str, object]) -> dict[str, object]:
    """Turn dotted keys into mappings; a key that stands for a whole section goes first."""
    whole: dict = {}
    for key, value in sorted(flat.items(), key=lambda item: item[0].count(".")):
        *parents, last = key.split(".")
        place = whole
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = dict(value) if isinstance(value, dict) else value
    return whole
