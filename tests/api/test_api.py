"""The public package: the same answers as the command, settings under all their names, what results look like."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loraplan
from planner.base.errors import PlannerError

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = "openai-community/gpt2"
LLAMA = "meta-llama/Llama-3.1-8B"
CONFIG = f"""base_model: {LLAMA}
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_target_linear: true
micro_batch_size: 2
sequence_len: 1024
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "qlora.yml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --- equal to the command -----------------------------------------------------------------------------------------

SAME: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((SMALL,), {"model": SMALL}),
    ((LLAMA, "--gpu", "rtx-4090"), {"model": LLAMA, "gpu": "rtx-4090"}),
    ((LLAMA, "--gpu", "rtx-4090", "--batch", "64"), {"model": LLAMA, "gpu": "rtx-4090", "batch": 64}),
    (
        (LLAMA, "--gpu", "l4", "--batch", "2", "--seq-len", "1024", "--grad-accum", "4"),
        {
            "model": LLAMA, "gpu": "l4", "per_device_train_batch_size": 2, "max_length": 1024,
            "gradient_accumulation_steps": 4,
        },
    ),
    (
        (SMALL, "--vram", "24GiB", "--margin", "10", "--stack", "trl", "-r", "4", "--alpha", "8"),
        {"model": SMALL, "vram": "24GiB", "margin": 10, "stack": "trl", "r": 4, "lora_alpha": 8},
    ),
    (
        (LLAMA, "--gpu", "a10g", "--optimizer", "paged-adamw-8bit", "--attention", "flash2", "--checkpointing", "none"),
        {
            "model": LLAMA, "gpu": "a10g", "optim": "paged_adamw_8bit", "attn_implementation": "flash_attention_2",
            "gradient_checkpointing": False,
        },
    ),
    (
        (LLAMA, "--gpu", "a10g", "--checkpointing", "offload", "--autocast", "bf16", "--max-grad-norm", "0.3"),
        {"model": LLAMA, "gpu": "a10g", "gradient_checkpointing": "offload", "bf16": True, "max_grad_norm": 0.3},
    ),
    (
        (LLAMA, "--gpu", "a10g", "--method", "qlora", "-q", "nf4", "--double-quant", "--compute-dtype", "bf16"),
        {
            "model": LLAMA, "gpu": "a10g", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
    (
        (LLAMA, "--targets", "q_proj,v_proj", "--dora", "--torch", "2.4", "--no-changes", "--gpu", "t4"),
        {
            "model": LLAMA, "target_modules": ["q_proj", "v_proj"], "use_dora": True, "torch": "2.4", "gpu": "t4",
            "changes": False,
        },
    ),
    (
        (LLAMA, "--gpu", "a100-80gb", "--method", "full", "--base-dtype", "bf16", "--tokens", "10M", "--price", "2"),
        {
            "model": LLAMA, "gpu": "a100-80gb", "method": "full", "base_dtype": "bfloat16", "tokens": "10M",
            "price": 2.0,
        },
    ),
    ((LLAMA, "--gpu", "a10g", "--calibration", "none"), {"model": LLAMA, "gpu": "a10g", "calibration": "none"}),
    (("--from", "CONFIG", "--gpu", "a10g"), {"config": "CONFIG", "gpu": "a10g"}),
    (
        ("--from", "CONFIG", "--gpu", "a10g", "--batch", "1", "-r", "4"),
        {"config": ["CONFIG"], "gpu": "a10g", "batch": 1, "rank": 4},
    ),
)  # fmt: skip


def with_config(value: Any, config: str) -> Any:
    if isinstance(value, list):
        return [with_config(item, config) for item in value]
    return config if isinstance(value, str) and value == "CONFIG" else value


@pytest.mark.parametrize(("words", "said"), SAME, ids=[" ".join(words) for words, _ in SAME])
def test_an_answer_is_that_of_the_command(
    run: Callable[..., Any], config: str, words: tuple[str, ...], said: dict[str, Any]
) -> None:
    typed = run("fits", *(with_config(word, config) for word in words), "--format", "json").document()
    answer = loraplan.fits(**{name: with_config(value, config) for name, value in said.items()})
    assert answer.to_dict() == typed


def test_the_options_of_data_and_cost_are_the_commands(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "say it " * n, "input": "", "output": "it " * n} for n in range(1, 40)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    options = ("--data", str(path), "--padding", "grouped", "--epochs", "2", "--price", "3", "--batch", "4")
    typed = run("fits", SMALL, "--gpu", "t4", *options, "--format", "json").document()
    answer = loraplan.fits(SMALL, "t4", data=path, padding="grouped", epochs=2, price=3.0, batch=4)
    assert answer.to_dict() == typed
    assert answer.hours is not None and answer.usd == pytest.approx(3 * answer.hours)
    with pytest.raises(loraplan.Contradiction, match="give data too"):
        loraplan.fits(SMALL, padding="grouped")


@pytest.mark.extra
def test_tables_are_those_of_the_commands(run: Callable[..., Any], config: str) -> None:
    typed = run("table", SMALL, "--gpu", "t4,l4", "--batch", "1,2", "--sort", "-peak", "--format", "json").document()
    made = loraplan.table(SMALL, ["t4", "l4"], per_device_train_batch_size=[1, 2], sort="-peak")
    assert made.to_dict() == typed and len(made) == 4
    typed = run("max", "--from", config, "--gpu", "a10g", "--of", "length", "--up-to", "4096", "--format", "json")
    assert loraplan.largest(config=config, gpu="a10g", of="length", up_to=4096).to_dict() == typed.document()
    typed = run("max", SMALL, "--gpu", "t4", "--of", "batch", "--of", "rank", "--up-to", "8", "--format", "json")
    assert loraplan.largest(SMALL, "t4", ["batch", "rank"], up_to=8).to_dict() == typed.document()
    typed = run("pick", SMALL, "--gpu", "t4,l4", "--tokens", "1M", "--goal", "time", "--format", "json").document()
    assert loraplan.pick(SMALL, ["t4", "l4"], tokens="1M", goal="time").to_dict() == typed


def test_comparisons_and_traps_are_those_of_the_commands(run: Callable[..., Any], config: str) -> None:
    typed = run("compare", "--model", SMALL, "--gpu", "t4", "r=4", "batch=2", config, "--format", "json").document()
    both = loraplan.compare("r=4", {"per_device_train_batch_size": 2}, config, model=SMALL, gpu="t4")
    assert both.to_dict() == typed
    assert "B needs" in both.differences[0]
    typed = run("lint", config, "--gpu", "t4", "--format", "json").document()
    found = loraplan.lint(config, gpu="t4")
    assert found.to_dict() == typed and found.traps


# --- how results look ---------------------------------------------------------------------------------------------


def test_an_answer_is_short_to_print_and_rich_in_a_notebook() -> None:
    answer = loraplan.fits(LLAMA, "rtx-4090", r=16)
    assert answer.fits is True and answer.verdict == "fits"
    low, high = answer.interval_gib
    assert low < answer.peak_gib < high < (answer.capacity_gib or 0)
    line = repr(answer)
    assert "\n" not in line and line.startswith("<YES: ") and "Llama-3.1-8B" in line and len(line) < 200
    page = answer._repr_html_()
    assert "<table>" in page and "base weights" in page and "<script" not in page
    assert str(answer).startswith("YES")
    no = loraplan.fits("meta-llama/Llama-3.1-70B", "t4")
    assert no.fits is False and no.changes and "what would fit" in no._repr_html_()
    assert loraplan.fits(SMALL).fits is None


def test_hostile_names_are_escaped() -> None:
    config = {**loraplan.fits(SMALL)._answered.loaded.config, "_name_or_path": "<script>x</script>\n\x1b[31m"}
    answer = loraplan.fits(config, "t4")
    assert "<script" not in answer._repr_html_() and "\n" not in repr(answer) and "\x1b" not in repr(answer)


@pytest.mark.extra
def test_results_become_frames() -> None:
    pandas = pytest.importorskip("pandas")
    answer = loraplan.fits(SMALL, "t4")
    frame = answer.to_frame()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 1
    assert frame["device_expected_bytes"][0] == answer.to_dict()["device"]["expected"]
    table = loraplan.table(SMALL, "t4", batch="1..3")
    assert list(table.to_frame()["micro_batch_size"]) == [1, 2, 3]
    assert "<table>" in table._repr_html_() and "3 rows" in repr(table) and "\n" not in repr(table)
    both = loraplan.compare("r=4", "r=8", model=SMALL)
    assert list(both.to_frame().columns) == ["section", "name", "A", "B", "differs"]
    assert "<table>" in both._repr_html_() and "\n" not in repr(both)
    traps = loraplan.lint(model=SMALL)
    assert len(traps.to_frame()) >= len(traps.traps) and "<table>" in traps._repr_html_()


def test_without_pandas_a_frame_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(loraplan.MissingDependency, match="pip install pandas"):
        loraplan.fits(SMALL).to_frame()


@pytest.mark.extra
def test_a_report_is_a_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = loraplan.report("r=4", {"r": 8}, model=SMALL, gpu="t4", title="a <plan>")
    page.save(str(tmp_path / "plan.html"))
    text = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert text == page._repr_html_() and "a &lt;plan&gt;" in text and "\n" not in repr(page)


# --- names and values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"per_device_batch": 3}, "UnknownName", "did you mean .*per_device_train_batch_size"),
        ({"optim": "adamw_torch_fusedd"}, "UnknownName", "optim is 'adamw_torch_fusedd', which is not modelled"),
        ({"optim": "sgd", "stack": "nope"}, "UnknownName", "unknown stack 'nope'"),
        ({"bnb_4bit_quant_type": "nf4"}, "Contradiction", "bnb_4bit_quant_type has no effect"),
        ({"max_length": -1}, "InvalidInput", "max_length is -1; must be a whole number"),
        ({"r": "x"}, "InvalidInput", "--rank is 'x'"),
        ({"micro_batch_size": 2, "per_device_train_batch_size": 3}, "Contradiction", "micro_batch_size once more"),
        ({"gradient_checkpointing": "maybe"}, "UnknownName", "known: none, full, offload"),
        ({"gpu": "t4", "vram": "16GiB"}, "Contradiction", "two cards at once"),
        ({"config": "x.yml", "peft_config": object()}, "Contradiction", "give one"),
        ({"peft_config": object()}, "InvalidInput", "object is no config that is known"),
        ({"margin": 100}, "InvalidInput", "a percentage from 0 to below 100"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(said: dict[str, Any], error: str, words: str) -> None:
    with pytest.raises(loraplan.LoraPlanError, match=words) as raised:
        loraplan.fits(SMALL, **said)
    assert type(raised.value).__name__ == error and "\n" not in str(raised.value)
    assert loraplan.LoraPlanError is PlannerError


def test_what_is_known_and_not_planned_is_a_warning() -> None:
    answer = loraplan.fits(SMALL, "t4", neftune_noise_alpha=5, learning_rate=1e-4)
    assert any("noise" in warning and "needs more" in warning for warning in answer.warnings)
    assert not any("learning_rate" in warning for warning in answer.warnings)


def test_a_model_may_be_a_config() -> None:
    named = loraplan.fits(SMALL, "t4")

    class Config:
        name_or_path = SMALL

        def to_dict(self) -> dict[str, Any]:
            return dict(named._answered.loaded.config)

    for model in (Config(), Config().to_dict()):
        assert loraplan.fits(model, "t4").peak_gib == named.peak_gib
    with pytest.raises(loraplan.InvalidInput, match="int is no model"):
        loraplan.fits(3)
    with pytest.raises(loraplan.InvalidInput, match="no model_type"):
        loraplan.fits({"hidden_size": 3})


@pytest.mark.extra
def test_a_table_says_what_it_leaves_out() -> None:
    table = loraplan.table([SMALL, LLAMA], "t4", target_modules=["c_attn"])
    assert [row[0] for row in table.rows] == [SMALL]
    assert any(line.startswith("left out 1: ") and "c_attn" in line for line in table.notes)
    with pytest.raises(loraplan.InvalidInput, match="write ids or paths"):
        loraplan.table({"model_type": "gpt2"}, "t4")  # type: ignore[arg-type]
    with pytest.raises(loraplan.UnknownName, match="did you mean"):
        loraplan.table(SMALL, "t4", micro_bach_size=[1, 2])


@pytest.mark.oracle
@pytest.mark.parametrize("trainer", ["SFTConfig", "TrainingArguments"])
def test_objects_say_what_a_script_would_say(tmp_path: Path, trainer: str) -> None:
    import torch
    import transformers
    import trl
    from peft import LoraConfig

    script = f"""
config = LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"], use_rslora=True)
quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
args = {trainer}(output_dir="x", per_device_train_batch_size=4, gradient_accumulation_steps=2, bf16=False,
                 optim="paged_adamw_8bit", gradient_checkpointing=True)
"""
    names: dict[str, Any] = {
        "torch": torch, "LoraConfig": LoraConfig, "BitsAndBytesConfig": transformers.BitsAndBytesConfig,
        "SFTConfig": trl.SFTConfig, "TrainingArguments": transformers.TrainingArguments,
    }  # fmt: skip
    exec(script, names)  # the same text is run here and read there
    path = tmp_path / "train.py"
    path.write_text(script, encoding="utf-8")
    held = {"args": names["args"], "peft_config": names["config"], "quantization_config": names["quant"]}
    answer, written = loraplan.fits(LLAMA, "a10g", **held), loraplan.fits(LLAMA, "a10g", config=path)
    assert answer.prediction.training == written.prediction.training
    settings = answer.to_dict()["configuration"]
    assert settings["r"] == {"value": 32, "origin": "given", "used": True}
    assert settings["quantization"]["value"] == "nf4"
    assert settings["micro_batch_size"]["value"] == 4
    assert settings["optimizer"]["value"] == "paged-adamw-8bit"
    assert settings["stack"]["value"] == ("trl" if trainer == "SFTConfig" else "hf-trainer")
    assert loraplan.fits(LLAMA, "a10g", **held, r=8).prediction.training.lora.r == 8  # type: ignore[union-attr]


@pytest.mark.oracle
def test_a_config_of_transformers_is_a_model() -> None:
    from transformers import GPT2Config, LlamaConfig

    assert loraplan.fits(GPT2Config(), "t4").prediction.model.num_parameters == 124_439_808
    small = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=99)
    assert loraplan.fits(small).prediction.model.num_layers == 2


@pytest.mark.oracle
def test_objects_of_other_jobs_are_refused() -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir="x", use_cpu=True)
    with pytest.raises(loraplan.NotPlanned, match="trains on the CPU"):
        loraplan.fits(SMALL, args=arguments)
    with pytest.raises(loraplan.LoraPlanError, match="full has no adapter"):
        loraplan.fits(SMALL, args=TrainingArguments(output_dir="x"), r=8)
    biased = loraplan.fits(SMALL, peft_config=LoraConfig(bias="all"))
    assert any("trained biases" in warning for warning in biased.warnings)


# --- the package --------------------------------------------------------------------------------------------------


def python(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False, timeout=60)


def test_the_package_is_a_command() -> None:
    done = python("-m", "loraplan", "fits", LLAMA, "--gpu", "rtx-4090")
    assert done.returncode == 0 and done.stdout.startswith("YES"), done.stderr
    assert python("-m", "loraplan", "fits", "nothing/like-it").returncode == 2


def test_importing_loads_nothing() -> None:
    done = python("-c", "import sys, loraplan; print([n for n in sys.modules if n.startswith(('planner', 'click'))])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_answering_loads_no_command_line_and_no_library() -> None:
    code = f"import sys, loraplan; loraplan.fits({SMALL!r}, 't4', r=4)\nprint(*sys.modules)"
    loaded = set(python("-c", code).stdout.split())
    assert "planner.plan.answering" in loaded
    assert not loaded & {"click", "planner.cli", "numpy", "pandas", "torch", "transformers", "peft", "yaml"}
    assert not loaded & {"planner.importers", "planner.report.pages", "planner.plan.sweep"}


def test_names_are_all_there() -> None:
    assert set(loraplan.__all__) <= set(dir(loraplan))
    for name in loraplan.__all__:
        assert getattr(loraplan, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = loraplan.nope
    for name in ("fits", "table", "largest", "pick", "compare", "lint", "report"):
        text = getattr(loraplan, name).__doc__
        assert "Args:" in text and "Raises:" in text and ">>> " in text
