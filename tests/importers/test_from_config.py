"""`--from`, the gate over several configs, and `lint`: options that yield to typed ones, tables, annotations, traps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from planner.report.config_checks import command
from tests.helpers.training_configs import AXOLOTL, EXAMPLES, TRL

GPT2 = "model_name_or_path: openai-community/gpt2\nuse_peft: true\nlora_target_modules: [c_attn]\ndtype: bfloat16\n"


@pytest.fixture
def write(tmp_path: Path):
    """Write a file and return its path."""

    def call(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return call


def settings(result: Any) -> dict:
    return json.loads(result.out)["configuration"]


# --- --from -------------------------------------------------------------------------------------------------------


def test_a_config_answers_like_the_flags_it_stands_for(run, write) -> None:
    from_file = run("fits", "--from", write("a.yml", AXOLOTL), "--gpu", "rtx-4090", "--format", "json")
    flags = (
        "fits meta-llama/Llama-3.1-8B --gpu rtx-4090 --stack axolotl --method qlora --seq-len 1024 -r 32 --alpha 16 "
        "--batch 2 --grad-accum 4 --targets all-linear --optimizer adamw-8bit --checkpointing full --attention flash2 "
        "--loss fused --base-dtype bf16 --format json"
    )
    typed = run(*flags.split())
    assert from_file.code == typed.code == 0
    one, two = json.loads(from_file.out), json.loads(typed.out)
    assert one["device"] == two["device"] and one["components"] == two["components"]
    assert one["configuration"]["r"]["origin"] == "file a.yml:9 lora_r"
    assert one["configuration"]["stack"]["origin"] == "file a.yml: axolotl config"


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.model], ids=lambda e: e.name)
def test_every_format_gives_an_answer(run, write, example) -> None:
    result = run("fits", "--from", write(example.name, example.text), "--gpu", "h100", "--no-changes")
    assert result.code in (0, 1), result.err
    assert result.out.startswith(("YES", "NO", "MAYBE"))
    assert result.err.startswith("read ") and "keys used" in result.err


def test_what_is_typed_wins(run, write) -> None:
    path = write("a.yml", AXOLOTL)
    typed = ("-r", "8", "--seq-len", "512", "--optimizer", "sgd")
    found = settings(run("fits", "--from", path, "--gpu", "l4", *typed, "--format", "json"))
    assert (found["r"]["value"], found["r"]["origin"]) == (8, "given")
    assert found["seq_len"]["value"] == 512 and found["optimizer"]["value"] == "sgd"
    assert found["micro_batch_size"]["origin"].startswith("file a.yml:")


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
def test_another_method_drops_what_the_file_says_about_it(run, write, method) -> None:
    result = run("fits", "--from", write("a.yml", AXOLOTL), "--gpu", "h200", "--method", method, "--format", "json")
    found = settings(result)
    assert found["method"] == {"value": method, "origin": "given", "used": True}
    quantized = {"full": "none", "lora": "none", "qlora": "nf4", "dora": "none"}[method]
    assert found["quantization"]["value"] == quantized
    assert found["r"]["used"] is (method != "full")


def test_another_model_and_another_stack(run, write) -> None:
    path = write("a.yaml", GPT2)
    result = run("fits", "openai-community/gpt2-medium", "--from", path, "--stack", "hf-trainer", "--format", "json")
    whole = json.loads(result.out)
    assert whole["model"]["id"] == "openai-community/gpt2-medium"
    found = whole["configuration"]
    assert found["stack"] == {"value": "hf-trainer", "origin": "given", "used": True}
    assert found["r"]["value"] == 8  # TRL's own 16 belongs to TRL


def test_a_config_alone_in_place_of_a_model(run, write) -> None:
    result = run("fits", write("a.yaml", GPT2), "--gpu", "t4")
    assert result.code == 0 and result.out.startswith("YES")


def test_no_model_anywhere_is_one_line(run, write) -> None:
    path = write("a.json", json.dumps({"output_dir": "x", "per_device_train_batch_size": 1}))
    result = run("fits", "--from", path)
    assert result.code == 2 and "no config names it" in result.err and result.out == ""
    assert run("fits").code == 2


def test_gaps_are_warnings_of_the_answer(run, write) -> None:
    path = write("a.yaml", GPT2 + "neftune_noise_alpha: 5\n")
    whole = json.loads(run("fits", "--from", path, "--format", "json").out)
    assert "a.yaml:5: neftune_noise_alpha: the noise added to the embeddings (the run needs more)" in whole["warnings"]


def test_targets_that_the_model_lacks_are_passed_over_as_peft_does(run, write) -> None:
    text = TRL.replace("[q_proj, v_proj]", "[q_proj, Wqkv, v_proj]")
    found = settings(run("fits", "--from", write("a.yaml", text), "--format", "json"))
    assert found["target_modules"]["value"] == ["q_proj", "v_proj"]
    assert "PEFT passes over them: Wqkv" in found["target_modules"]["origin"]
    none = run("fits", "--from", write("b.yaml", TRL.replace("[q_proj, v_proj]", "[Wqkv]")))
    assert none.code == 2 and "Wqkv" in none.err


def test_targets_written_as_a_pattern(run, write) -> None:
    pattern = r"model.layers.[\d]+.(self_attn).(q|v)_proj"
    found = settings(
        run("fits", "--from", write("a.yaml", TRL.replace("[q_proj, v_proj]", pattern)), "--format", "json")
    )
    assert found["target_modules"]["value"] == ["self_attn.q_proj", "self_attn.v_proj"]
    for text, what in (
        (r"(a+)+$", "too wild"),
        (r".*.*.*.*x", "too wild"),
        (r"model\.layers\.0\.self_attn\.q_proj", "some layers only"),
        ("(", "no regular expression"),
        (r"nothing\.\d", "matches no module"),
    ):
        result = run("fits", "--from", write("b.yaml", TRL.replace("[q_proj, v_proj]", f"'{text}'")))
        assert result.code == 2 and what in result.err, (text, result.err)


@pytest.mark.parametrize("model", ["EleutherAI/pythia-1b", "microsoft/Phi-3-mini-4k-instruct", "tiiuae/falcon-7b"])
def test_litgpt_names_meet_fused_projections(run, write, model) -> None:
    litgpt = next(e.text for e in EXAMPLES if e.framework == "litgpt")
    text = litgpt.replace("meta-llama/Llama-3.1-8B", model).replace("lora_mlp: true", "lora_mlp: false")
    found = settings(run("fits", "--from", write("a.yaml", text), "--format", "json"))
    assert len(found["target_modules"]["value"]) == 1
    assert found["target_slices"]["value"] == [0, 2]


def test_a_copy_of_a_known_model_is_planned_with_a_warning(run, write) -> None:
    text = AXOLOTL.replace("meta-llama/Llama-3.1-8B", "NousResearch/Llama-3.2-1B")
    whole = json.loads(run("fits", "--from", write("a.yml", text), "--format", "json").out)
    assert whole["model"]["id"] == "meta-llama/Llama-3.2-1B"
    assert any("sizes of NousResearch/Llama-3.2-1B are taken from" in warning for warning in whole["warnings"])
    unknown = run("fits", "--from", write("b.yml", AXOLOTL.replace("Llama-3.1-8B", "Llama-99-8B")))
    assert unknown.code == 2 and "unknown model" in unknown.err


def test_a_card_without_bf16_gets_fp16_where_the_framework_looks(run, write) -> None:
    auto = settings(run("fits", "--from", write("a.yml", AXOLOTL), "--gpu", "t4", "--format", "json"))
    assert auto["autocast"]["value"] == auto["base_dtype"]["value"] == "fp16"
    stated = run(
        "fits", "--from", write("b.yml", AXOLOTL.replace("bf16: auto", "bf16: true")), "--gpu", "t4", "--format", "json"
    )
    assert settings(stated)["autocast"]["value"] == "bf16"
    assert any("no bf16 tensor cores" in warning for warning in json.loads(stated.out)["warnings"])


def test_show_keys(run, write) -> None:
    path = write("a.yml", AXOLOTL + "frobnicate: 1\nqat: null\n")
    table = run("fits", "--from", path, "--show-keys")
    assert table.code == 0
    rows = {line.split()[0]: line.split()[1] for line in table.out.splitlines()[2:]}
    assert rows["lora_r"] == "used" and rows["frobnicate"] == "unknown" and rows["lora_dropout"] == "default"
    whole = json.loads(run("fits", "--from", path, "--show-keys", "--format", "json").out)
    assert {"key": "lora_r", "use": "used", "value": "32", "where": "a.yml:9"} in whole["keys"]
    assert run("fits", "openai-community/gpt2", "--show-keys").code == 2


def test_jobs_for_several_gpus(run, write) -> None:
    path = write("a.yml", AXOLOTL + "fsdp_config:\n  offload_params: true\n")
    refused = run("fits", "--from", path, "--format", "json")
    assert refused.code == 2 and json.loads(refused.out)["error"]["type"] == "NotPlanned"
    taken = run("fits", "--from", path, "--gpu", "h100", "--one-gpu")
    assert taken.code == 0 and "planned unsharded on one" in " ".join(taken.out.split())


def test_plain_fits_loads_no_importer() -> None:
    import os
    import subprocess
    import sys

    code = (
        "from planner.cli.main import main\ntry:\n    main(['fits', 'openai-community/gpt2', '--gpu', 't4'])\n"
        "except SystemExit:\n    pass\nimport sys\nprint([m for m in sys.modules if 'importers' in m or m == 'yaml'])"
    )
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# --- several files ------------------------------------------------------------------------------------------------


def test_a_gate_over_several_files(run, write) -> None:
    small, large = write("small.yaml", GPT2), write("large.yml", AXOLOTL.replace("8B", "70B"))
    both = run("fits", small, large, "--gpu", "t4")
    assert both.code == 1
    rows = [line.split()[:2] for line in both.out.splitlines()[2:4]]
    assert rows == [[small, "YES"], [large, "NO"]]
    assert "2 files on Tesla T4 (15.00 GiB): 1 fit, 1 do not fit" in both.said
    assert "warning (1 of 2 files): FlashAttention-2 needs compute capability 8.0" in both.said
    assert run("fits", small, small, "--gpu", "t4").code == 0


def test_a_file_without_an_answer_fails_the_gate_too(run, write) -> None:
    small, broken = write("small.yaml", GPT2), write("rl.yml", AXOLOTL + "rl: grpo\n")
    result = run("fits", small, broken, "--gpu", "t4", "--format", "json")
    assert result.code == 2
    whole = json.loads(result.out)
    assert whole["fits"] is False
    assert [entry["verdict"] for entry in whole["files"]] == ["fits", None]
    assert "reinforcement learning is not planned" in whole["files"][1]["error"]


def test_files_of_from_belong_to_every_file(run, write) -> None:
    a, b = write("a.yaml", GPT2), write("b.yaml", GPT2)
    launch = write("acc.yaml", "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n")
    result = run("fits", a, b, "--from", launch, "--gpu", "t4", "--format", "csv")
    assert result.code == 2 and result.out.count("sharded by FSDP") == 2


def test_options_and_margin_hold_for_every_file(run, write) -> None:
    a, b = write("a.yaml", GPT2), write("b.yaml", GPT2)
    assert run("fits", a, b, "--vram", "6GiB", "--batch", "4").code == 0
    assert run("fits", a, b, "--vram", "6GiB", "--batch", "4", "--margin", "90").code == 1
    assert run("fits", a, b).code == 2  # no card
    assert run("fits", a, "openai-community/gpt2", "--gpu", "t4").code == 2


def test_github_annotations(run, write) -> None:
    small, broken = write("small.yaml", GPT2), write("rl,50%:x.yml", AXOLOTL + "rl: grpo\n")
    result = run("fits", small, broken, "--gpu", "t4", "--format", "github")
    lines = result.out.splitlines()
    assert lines[0].startswith(f"::notice file={small},line=1,title=loraplan%3A fits::gpt2 lora r=16 c_attn")
    name = broken.replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    assert lines[-2].startswith(f"::error file={name},line=1,title=loraplan%3A no answer::")
    assert run("fits", "openai-community/gpt2", "--format", "github").code == 2


def test_annotations_cannot_be_broken_out_of() -> None:
    text = command("error", "a\n::error::x,y:z%", 3, "t\r\n", "m\r\n::warning file=b::boo %0A")
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text == (
        "::error file=a%0A%3A%3Aerror%3A%3Ax%2Cy%3Az%25,line=3,title=t%0D%0A::m%0D%0A::warning file=b::boo %250A\n"
    )


# --- lint ---------------------------------------------------------------------------------------------------------


def traps(result: Any) -> dict[str, dict]:
    (entry,) = json.loads(result.out)["files"]
    return {trap["name"]: trap for trap in entry["traps"]}


def test_lint_prices_each_trap_and_names_the_line(run, write) -> None:
    path = write("sft.yaml", TRL + "gradient_checkpointing: false\n")
    result = run("lint", path, "--format", "json")
    found = traps(result)
    assert result.code == 1
    assert found["fp32-weights"]["serious"] and found["fp32-weights"]["change"] == "dtype: bfloat16"
    assert found["fp32-weights"]["where"].endswith("sft.yaml: not set")
    assert found["no-checkpointing"]["where"] == "sft.yaml:8 gradient_checkpointing"
    assert found["no-checkpointing"]["change"] == "gradient_checkpointing: true"
    assert found["no-double-quant"]["change"] == "use_bnb_nested_quant: true"
    assert found["idle-paging"]["bytes"] == 0 and "65,536 elements" in found["idle-paging"]["what"]
    assert found["default-length"]["change"] == "max_length: 2048"
    text = run("lint", path).said
    assert "!! fp32-weights: costs" in text and "sft.yaml:8 gradient_checkpointing" in text


def test_what_a_trap_costs_is_what_the_change_gives_back(run, write) -> None:
    text = TRL + "gradient_checkpointing: false\n"
    found = traps(run("lint", write("a.yaml", text), "--gpu", "l4", "--format", "json"))

    def device(more: str) -> int:
        answer = run("fits", "--from", write("b.yaml", more), "--gpu", "l4", "--no-changes", "--format", "json")
        return json.loads(answer.out)["device"]["expected"]

    plain = device(text)
    assert found["no-checkpointing"]["bytes"] == plain - device(TRL)
    assert found["no-double-quant"]["bytes"] == plain - device(text + "use_bnb_nested_quant: true\n")
    assert found["fp32-weights"]["bytes"] == plain - device(text + "dtype: bfloat16\n")


def test_traps_of_the_hardware(run, write) -> None:
    stated = AXOLOTL.replace("bf16: auto", "bf16: true")
    result = run("lint", write("a.yml", stated), "--gpu", "t4", "--format", "json")
    found = traps(result)
    assert result.code == 1
    assert not found["bf16"]["starts"] and found["bf16"]["change"] == "fp16: true" and found["bf16"]["seconds"] > 0
    assert not found["flash-attention"]["starts"]
    assert found["flash-attention"]["change"] == "attn_implementation: sdpa"
    auto = traps(run("lint", write("b.yml", AXOLOTL), "--gpu", "t4", "--format", "json"))
    assert "bf16" not in auto and "flash-attention" in auto  # bf16: auto takes fp16 there
    assert not traps(run("lint", write("c.yml", AXOLOTL), "--gpu", "a100-80gb", "--format", "json"))


def test_traps_of_a_script(run, write) -> None:
    script = next(e.text for e in EXAMPLES if e.framework == "script-peft")
    found = traps(run("lint", write("a.py", script), "--format", "json"))
    assert found["fp4"]["change"] == "BitsAndBytesConfig(bnb_4bit_quant_type='nf4')" and found["fp4"]["bytes"] == 0
    assert found["kbit-fp32-copies"]["bytes"] > 0
    assert "prepare_model_for_kbit_training" in found["kbit-fp32-copies"]["change"]


def test_experts_that_stay_in_16_bit(run, write) -> None:
    text = AXOLOTL.replace("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B").replace(
        "lora_target_linear: true", "lora_target_modules: [q_proj, v_proj]"
    )
    result = run("lint", write("a.yml", text), "--format", "json")
    trap = traps(result)["plain-experts"]
    experts = 48 * 128 * 3 * 2048 * 768  # layers, experts, gate up and down of the published config
    assert trap["bytes"] == int(experts * (16 - 4.5) / 8) and result.code == 1


def test_a_config_without_traps_passes(run, write) -> None:
    result = run("lint", write("a.yml", AXOLOTL), "--gpu", "rtx-4090")
    assert result.code == 0 and "no traps" in result.out


def test_lint_of_several_files_and_of_broken_ones(run, write) -> None:
    good, broken = write("a.yml", AXOLOTL), write("b.yml", "name: ci\n")
    result = run("lint", good, broken)
    assert result.code == 2 and "no answer" in result.said
    annotated = run("lint", good, broken, "--format", "github")
    assert annotated.out.startswith(f"::error file={broken},line=1,title=loraplan lint%3A no answer::")
    for style in ("csv", "markdown"):
        assert run("lint", good, broken, "--format", style).out.count("\n") >= 2


# --- the other commands -------------------------------------------------------------------------------------------


@pytest.mark.extra
def test_max_and_pick_take_a_config(run, write) -> None:
    path = write("a.yaml", GPT2)
    typed_options = {"stack": "trl", "method": "lora", "targets": "c_attn", "base-dtype": "bf16"}
    flags = ("openai-community/gpt2", *(f"--{name}={value}" for name, value in typed_options.items()))
    for words in (("max", "--gpu", "t4"), ("pick", "--gpu", "t4,l4")):
        read, typed = run(*words, "--from", path, "--format", "json"), run(*words, *flags, "--format", "json")
        assert read.code == typed.code == 0, read.err
        assert json.loads(read.out) == json.loads(typed.out)
    other = run("max", "openai-community/gpt2-medium", "--from", path, "--gpu", "t4", "--format", "csv")
    assert "gpt2-medium" in other.out and other.err.startswith("read TRL config")


@pytest.mark.extra
def test_compare_and_report_take_configs(run, write, tmp_path) -> None:
    one, two = write("one.yaml", GPT2), write("two.yml", AXOLOTL)
    result = run("compare", "--gpu", "h100", one, f"{two} batch=1", "--format", "json")
    assert result.code == 0 and "A: read TRL config" in result.err
    rows = {row["name"]: row for row in json.loads(result.out)["rows"]}
    assert (rows["stack"]["A"], rows["stack"]["B"]) == ("trl", "axolotl")
    assert (str(rows["micro_batch_size"]["A"]), str(rows["micro_batch_size"]["B"])) == ("8", "1")
    shared = run("compare", "--gpu", "h100", "--from", two, "seq-len=512", "seq-len=256 model=openai-community/gpt2")
    assert shared.code == 0, shared.err
    assert run("compare", "--from", one, "--show-keys").out.split()[0] == "key"
    broken = run("compare", "--gpu", "h100", one, write("rl.yml", AXOLOTL + "rl: grpo\n"))
    assert broken.code == 2 and "configuration B" in broken.err
    page = tmp_path / "report.html"
    assert run("report", "--from", one, "--gpu", "t4", "-o", str(page)).code == 0
    assert "gpt2" in page.read_text(encoding="utf-8")


@pytest.mark.extra
def test_a_table_takes_a_config(run, write) -> None:
    path = write("a.yml", AXOLOTL)
    result = run("table", "--from", path, "--gpu", "h100,l4", "--seq-len", "512,1024", "--format", "json")
    assert result.code == 0 and result.err.startswith("read axolotl config")
    rows = json.loads(result.out)["rows"]
    assert len(rows) == 4 and {row["model"] for row in rows} == {"meta-llama/Llama-3.1-8B"}
    answer = json.loads(run("fits", "--from", path, "--gpu", "l4", "--format", "json", "--no-changes").out)
    (same,) = [row for row in rows if (row["gpu"], row["seq_len"]) == ("l4", 1024)]
    assert (same["device_bytes"], same["r"]) == (answer["device"]["expected"], 32)
    typed = json.loads(run("table", "openai-community/gpt2", "--from", path, "--gpu", "l4", "-r", "4,8",
                           "--format", "json").out)["rows"]  # fmt: skip
    assert [(row["model"], row["r"]) for row in typed] == [("openai-community/gpt2", 4), ("openai-community/gpt2", 8)]
    swept = run("table", "--from", path, "--gpu", "l4", "--seq-len", "128..4096:128", "--format", "csv").out
    (cell,) = [row for row in csv.DictReader(swept.splitlines()) if row["seq_len"] == "1024"]
    components = {part["name"]: part["bytes"] for part in answer["components"]}
    unsplit = components.get("unsplit blocks", 0)  # a sweep has live memory, without them
    assert int(cell["allocated_bytes"]) == same["allocated_bytes"] - unsplit
    rows_file = write("rows.csv", "gpu,rank\nl4,4\nh100,8\n")
    both = json.loads(run("table", "--from", path, "--from", rows_file, "--format", "json").out)["rows"]
    assert [(row["gpu"], row["r"], row["seq_len"]) for row in both] == [("l4", 4, 1024), ("h100-pcie-80gb", 8, 1024)]
    assert run("table", "--from", rows_file, "--from", rows_file, "openai-community/gpt2").code == 2
    assert run("table", "--from", path, "--show-keys").out.split()[0] == "key"


# --- documentation ------------------------------------------------------------------------------------------------

DATA = Path(__file__).parent.parent.parent / "data"


def test_the_example_workflow_runs(run) -> None:
    import shlex

    import yaml

    workflow = yaml.safe_load((DATA / "examples" / "memory-gate.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["fits"]["steps"] if "loraplan " in step.get("run", "")]
    calls = [shlex.split(line) for line in commands if line.startswith("loraplan ")]
    assert [words[1] for words in calls] == ["fits", "lint"]
    for _, *words in calls:
        files = [str(DATA / "examples" / "qlora.yml") if "*" in word else word for word in words]
        result = run(*files)
        assert result.code in (0, 1), result.err


def test_the_guide_lists_every_format_and_every_part_of_a_table() -> None:
    from planner.facts import catalog
    from planner.importers import frameworks

    guide = (DATA / "configs.md").read_text(encoding="utf-8")
    for framework in frameworks.frameworks():
        assert f"`{framework.name}`" in guide or framework.name.startswith("script-"), framework.name
    parts = {part for name, table in catalog.framework_tables().items() if name != "words" for part in table}
    assert all(f"`{part}`" in guide for part in parts), parts
