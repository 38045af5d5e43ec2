"""The command line: exit codes, one document or one line whatever happens, help, terminals and pipes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest

from planner.cli import terminal
from planner.cli.main import cli, wants_json
from planner.cli.options import FORMATS
from planner.facts import catalog, local_gpu
from planner.training import settings as training_settings
from planner.training import stacks
from planner.training.choices import CHOICES
from planner.training.options import OPTIONS, flag_of

ROOT = Path(__file__).parent.parent.parent
SMALL = "openai-community/gpt2"
COMMAND = [sys.executable, "-m", "planner.cli.main"]


def spawn(*args: str, **extra) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **extra.pop("env", {})}
    return subprocess.run(
        [*COMMAND, *args], capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment, check=False, **extra
    )


# --- verdicts and exit codes --------------------------------------------------------------------------------------


def test_a_run_that_fits_exits_zero_and_says_yes_first(run):
    result = run("fits", "meta-llama/Llama-3.1-8B", "--gpu", "rtx-4090", "--method", "qlora")
    assert result.code == 0
    assert result.err == ""
    assert result.out.startswith("YES")
    assert "Llama-3.1-8B qlora r=8 all-linear, length 2048, batch 1, on GeForce RTX 4090" in result.said
    assert "peak at the start of the backward" in result.said


@pytest.mark.line_ends
def test_an_answer_is_80_columns_wide(run):
    result = run("fits", "meta-llama/Llama-3.1-8B", "--gpu", "rtx-4090", "--method", "qlora")
    assert max(map(len, result.out.splitlines())) <= 80


def test_a_run_that_does_not_fit_exits_one_and_says_what_would(run):
    result = run("fits", "meta-llama/Llama-3.1-70B", "--gpu", "rtx-4090")
    assert result.code == 1
    assert result.out.startswith("NO")
    assert "what would fit" in result.out
    assert "--gpu " in result.out.split("what would fit")[1]


def test_proposals_can_be_pasted_behind_the_command(run):
    base = [
        "fits",
        "meta-llama/Llama-3.1-8B",
        "--gpu",
        "t4",
        "--checkpointing",
        "none",
        "--batch",
        "4",
        "--stack",
        "trl",
    ]
    document = json.loads(run(*base, "--format", "json").out)
    assert document["verdict"] == "does not fit"
    assert document["changes"]
    for change in document["changes"]:
        assert run(*base, *change["option"].split()).code == 0, change["option"]


def test_too_close_to_call_exits_one(run):
    need = json.loads(run("fits", SMALL, "--format", "json").out)["allocated"]["high"]
    result = run("fits", SMALL, "--vram", str(need + 600 * 2**20), "--format", "json", "--no-changes")
    assert json.loads(result.out)["verdict"] == "too close to call"
    assert result.code == 1
    assert run("fits", SMALL, "--vram", str(need + 600 * 2**20)).out.startswith("MAYBE")


def test_without_a_card_only_the_need_is_printed(run):
    result = run("fits", SMALL)
    assert result.code == 0
    assert result.out.startswith("NEEDS")
    document = json.loads(run("fits", SMALL, "--format", "json").out)
    assert document["verdict"] is None
    assert document["gpu"] is None
    assert document["capacity_bytes"] is None


def test_margin_keeps_a_share_of_the_card_free(run):
    plain = json.loads(run("fits", SMALL, "--gpu", "t4", "--format", "json").out)
    kept = json.loads(run("fits", SMALL, "--gpu", "t4", "--format", "json", "--margin", "10%").out)
    tenth = plain["gpu"]["memory_bytes"] // 10
    assert plain["capacity_bytes"] - kept["capacity_bytes"] == kept["margin_bytes"] == tenth
    assert kept["gpu"]["used_by_others_bytes"] == 0
    assert run("fits", SMALL, "--gpu", "t4", "--margin", "95", "--no-changes").code == 1


@pytest.mark.parametrize("name", ["4090", "rtx-4090", "NVIDIA GeForce RTX 4090"])
def test_cards_answer_to_their_common_names(run, name):
    assert json.loads(run("fits", SMALL, "--gpu", name, "--format", "json").out)["gpu"]["id"] == "rtx-4090"


def test_a_card_of_ones_own_is_its_memory(run):
    document = json.loads(run("fits", SMALL, "--vram", "24GiB", "--format", "json").out)
    assert document["gpu"]["memory_bytes"] == 24 * 2**30
    assert document["verdict"] == "fits"


# --- options ------------------------------------------------------------------------------------------------------


def test_every_key_of_the_stacks_has_a_flag():
    assert set(training_settings.SETTINGS) - {"versions"} <= set(OPTIONS)
    assert flag_of("micro_batch_size") == "--micro-batch-size"
    command = cli.get_command(click.Context(cli), "fits")
    assert command is not None
    offered = {flag for param in command.params for flag in param.opts}
    assert {flag_of(key) for key in OPTIONS} <= offered


def test_the_help_lists_every_stack_and_every_choice(run):
    text = run("fits", "--help").out.replace("-\n", "-")
    text = "".join(text.split())
    for name in stacks.STACKS:
        assert name in text, name
    for what, words in CHOICES.items():
        if what != "dtype":
            assert f"[{'|'.join(words)}]" in text, what


def test_settings_reach_the_configuration_with_their_origin(run):
    args = ["--stack", "trl", "-r", "4", "--optimizer", "paged_adamw_8bit", "--attention", "flash_attention_2"]
    result = run("fits", "meta-llama/Llama-3.1-8B", *args, "--torch", "2.4", "--no-dora", "--format", "json")
    settings = json.loads(result.out)["configuration"]
    assert settings["r"] == {"value": 4, "origin": "given", "used": True}
    assert settings["optimizer"]["value"] == "paged-adamw-8bit"
    assert settings["attention"]["value"] == "flash2"
    assert settings["versions"]["value"]["torch"] == "2.4"
    assert settings["seq_len"]["origin"].startswith("stack trl: ")
    assert settings["max_grad_norm"]["origin"] == "loraplan default"
    assert settings["stack"] == {"value": "trl", "origin": "given", "used": True}
    assert settings["group_size"]["used"] is False


@pytest.mark.parametrize(
    ("args", "method", "origin"),
    [
        ((), "qlora", "loraplan default"),
        (("-q", "int8"), "qlora", "loraplan default"),
        (("-q", "none"), "lora", "implied by --quantization none"),
        (("--method", "full"), "full", "given"),
    ],
)
def test_the_method_follows_from_the_quantization(run, args, method, origin):
    settings = json.loads(run("fits", SMALL, *args, "--format", "json").out)["configuration"]
    assert settings["method"]["value"] == method
    assert settings["method"]["origin"] == origin


def test_default_targets_that_the_model_lacks_are_replaced_visibly(run):
    result = run("fits", SMALL, "--stack", "axolotl", "--format", "json")
    targets = json.loads(result.out)["configuration"]["target_modules"]
    assert targets["value"] == ["c_attn"]
    assert "PEFT's default for gpt2" in targets["origin"]
    assert "axolotl" in targets["origin"]
    asked = run("fits", SMALL, "--stack", "axolotl", "--targets", "q_proj")
    assert asked.code == 2
    assert "'q_proj' matches no module" in asked.err


def test_explain_prints_every_setting_with_its_origin(run):
    text = run("fits", "meta-llama/Llama-3.1-8B", "--gpu", "a100-80gb", "--stack", "axolotl", "--explain").said
    for key in training_settings.SETTINGS:
        assert f" {key} = " in text
    assert " r = 32 [stack axolotl" in text
    assert "highest level in each part of the step" in text
    assert "8,030,261,248 (computed from the config's shapes)" in text
    assert "+/- 1.0 %" in text


# --- formats ------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys(run):
    result = run("fits", "meta-llama/Llama-3.1-8B", "--gpu", "4090", "--batch", "64", "--format", "json")
    assert result.code == 1
    document = json.loads(result.out)
    assert {
        "schema_version", "verdict", "model", "gpu", "allocated", "reserved", "device", "capacity_bytes",
        "headroom_bytes", "peak", "components", "configuration", "uncertainty", "warnings", "changes",
    } <= set(document)  # fmt: skip
    assert document["schema_version"] == 1
    assert document["model"]["trainable_parameters"] == 20_971_520
    for counter in ("allocated", "reserved", "device"):
        assert document[counter]["low"] <= document[counter]["expected"] <= document[counter]["high"]
    assert document["allocated"]["expected"] <= document["reserved"]["expected"] < document["device"]["expected"]
    assert {c["origin"] for c in document["components"]} <= {"known", "computed", "assumed"}
    inside = [c["bytes"] for c in document["components"] if c["counter"] == "allocated"]
    assert sum(inside) == document["allocated"]["expected"]
    assert document["changes"][0]["settings"]


def test_components_sum_to_the_device_total_of_a_run_that_fits(run):
    document = json.loads(run("fits", "meta-llama/Llama-3.1-8B", "--gpu", "4090", "--format", "json").out)
    assert sum(c["bytes"] for c in document["components"]) == document["device"]["expected"]


def test_csv_columns_do_not_depend_on_the_run(run):
    rows = []
    for args in ((SMALL,), (SMALL, "--gpu", "t4", "--method", "lora", "--batch", "4")):
        rows += list(csv.reader(io.StringIO(run("fits", *args, "--format", "csv").out)))
    assert rows[0] == rows[2]
    assert len(rows) == 4
    record = dict(zip(rows[0], rows[3], strict=True))
    assert record["verdict"] == "fits"
    assert record["gpu"] == "t4"
    assert record["micro_batch_size"] == "4"
    assert record["versions.torch"] == "2.13"


def test_markdown_is_a_heading_and_tables(run):
    text = run("fits", SMALL, "--gpu", "t4", "--format", "markdown", "--explain").out
    assert text.startswith("## YES: gpt2 qlora")
    assert "| memory at the peak | GiB | low | high | origin |" in text
    assert "| setting | value | origin |" in text


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize(
    "args",
    [("models", "llama-3"), ("models", "show", SMALL), ("gpus", "ada"), ("gpus", "show", "4090")],
)
def test_the_catalogue_prints_in_every_format(run, args, style):
    result = run(*args, "--format", style)
    assert result.code == 0
    assert result.err == ""
    assert result.out.strip()
    if style == "json":
        assert json.loads(result.out)["schema_version"] == 1


def test_models_are_listed_filtered_and_shown(run):
    everything = json.loads(run("models", "--format", "json").out)["models"]
    assert [item["id"] for item in everything] == catalog.model_ids()
    llamas = json.loads(run("models", "LLAMA-3.1", "--format", "json").out)["models"]
    assert {"meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"} <= {item["id"] for item in llamas}
    assert len(llamas) < len(everything)
    assert all(
        m["model_type"] == "gpt2"
        for m in json.loads(run("models", "--family", "gpt2", "--format", "json").out)["models"]
    )
    shown = json.loads(run("models", "show", "llama-3.1-8b", "--format", "json").out)["model"]
    assert shown["parameters"] == 8_030_261_248
    assert shown["source"]
    assert "no models match" in run("models", "no-such-thing").out
    assert json.loads(run("models", "no-such-thing", "--format", "json").out)["models"] == []


def test_gpus_are_filtered_by_memory_and_vendor(run):
    cards = json.loads(run("gpus", "--min-memory", "40GiB", "--vendor", "nvidia", "--format", "json").out)["gpus"]
    assert cards
    assert all(card["memory_bytes"] >= 40 * 2**30 and card["vendor"] == "NVIDIA" for card in cards)
    assert run("gpus", "--vendor", "voodoo").code == 2
    assert run("gpus", "--min-memory", "much").code == 2
    assert json.loads(run("gpus", "show", "4090", "--format", "json").out)["gpu"]["sources"]


# --- errors -------------------------------------------------------------------------------------------------------

BAD_CALLS = [
    (("fits", "no-such/model"), "no-such/model"),
    (("fits", ""), "''"),
    (("fits", SMALL, "--gpu", "voodoo2"), "voodoo2"),
    (("fits", SMALL, "--vram", "lots"), "lots"),
    (("fits", SMALL, "--gpu", "t4", "--vram", "3GiB"), "--vram"),
    (("fits", SMALL, "--stack", "pytorch"), "pytorch"),
    (("fits", SMALL, "--method", "prefix"), "prefix"),
    (("fits", SMALL, "--quantization", "nf3"), "nf3"),
    (("fits", SMALL, "--optimizer", "adamx"), "adamx"),
    (("fits", SMALL, "--attention", "ring"), "ring"),
    (("fits", SMALL, "--loss", "mse"), "mse"),
    (("fits", SMALL, "--checkpointing", "some"), "some"),
    (("fits", SMALL, "--base-dtype", "fp8"), "fp8"),
    (("fits", SMALL, "--kernels", "magic"), "magic"),
    (("fits", SMALL, "--targets", "nothing"), "nothing"),
    (("fits", SMALL, "--targets", ""), "target_modules"),
    (("fits", SMALL, "--target-slices", "q"), "q"),
    (("fits", SMALL, "--modules-to-save", "nothing"), "nothing"),
    (("fits", SMALL, "--skip-modules", "nothing"), "nothing"),
    (("fits", SMALL, "--batch", "0"), "0"),
    (("fits", SMALL, "--batch", "-3"), "-3"),
    (("fits", SMALL, "--batch", "many"), "many"),
    (("fits", SMALL, "--seq-len", "99999999999999999999"), "99999999999999999999"),
    (("fits", SMALL, "--alpha", "nan"), "nan"),
    (("fits", SMALL, "--dropout", "1"), "1"),
    (("fits", SMALL, "--torch", "new"), "new"),
    (("fits", SMALL, "--margin", "100"), "100"),
    (("fits", SMALL, "--margin", "nan"), "nan"),
    (("fits", SMALL, "--method", "full", "-r", "8"), "--rank"),
    (("fits", SMALL, "--method", "full", "-q", "nf4"), "nf4"),
    (("fits", SMALL, "--method", "lora", "-q", "nf4"), "nf4"),
    (("fits", SMALL, "--method", "qlora", "-q", "none"), "qlora"),
    (("fits", SMALL, "--method", "lora", "--double-quant"), "--double-quant"),
    (("fits", SMALL, "--method", "lora", "--kbit-prep"), "--kbit-prep"),
    (("fits", SMALL, "-q", "int8", "--double-quant"), "int8"),
    (("fits", SMALL, "--group-size", "64"), "--group-size"),
    (("fits", SMALL, "-q", "gptq4", "--group-size", "0"), "0"),
    (("fits", SMALL, "--checkpointing", "none", "--reentrant"), "--reentrant"),
    (("fits", SMALL, "--format", "xml"), "xml"),
    (("fits", SMALL, "--no-such-option"), "--no-such-option"),
    (("fits",), "MODEL"),
    (("nonsense",), "nonsense"),
    (("models", "show", "no-such/model"), "no-such/model"),
    (("models", "--family", "nothing"), "nothing"),
    (("gpus", "show", "voodoo2"), "voodoo2"),
    (("validate", "no-such-file.csv"), "no-such-file.csv"),
    (("pick", SMALL, "--hours", "nan"), "nan"),
    (("pick", SMALL, "--budget", "-1"), "-1"),
    (("pick", SMALL, "--tokens", ""), "''"),
    (("fits", SMALL, "--gpu", "t4", "--price", "1"), "--price"),
    (("fits", SMALL, "--gpu", "t4", "--mean-tokens", "9"), "--mean-tokens"),
    (("table", SMALL, "--gpu", "t4", "--where", "peak<nan"), "nan"),
    (("simulate", SMALL, "--gpu", "t4", "--rows", "9", "--warmup-steps", "9" * 400), "--warmup-steps"),
]

BAD_EXPORTS = [
    (("export", "axolotl", SMALL, flag, value), flag)
    for flag, value in (("--epochs", "inf"), ("--epochs", "0"), ("--lr", "nan"), ("--weight-decay", "-1"),
                        ("--margin", "nan"), ("--num-accelerators", "0"), ("--warmup-steps", "9" * 400))
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "named"), BAD_CALLS + BAD_EXPORTS, ids=lambda value: " ".join(value)[:60] if value else ""
)
def test_bad_input_is_one_line_that_names_it(run, args, named):
    result = run(*args)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert named in result.err
    assert "internal error" not in result.err


@pytest.mark.parametrize("args", [args for args, _ in BAD_CALLS if "--format" not in args])
def test_a_failure_is_one_json_document_when_json_was_asked_for(run, args):
    result = run(*args, "--format", "json")
    assert result.code == 2
    document = json.loads(result.out)
    assert document["schema_version"] == 1
    assert document["error"]["type"]
    assert document["error"]["message"] in result.err


BAD_FILES = {
    "empty.gguf": b"",
    "short.gguf": b"GGUF\x03",
    "magic.gguf": b"GGML" + bytes(60),
    "absurd.gguf": b"GGUF\x03\0\0\0" + b"\xff" * 16,
    "notjson.json": b"{model_type: llama}",
    "binary.json": bytes(range(256)),
    "list.json": b"[]",
    "lacks.json": b'{"model_type": "llama"}',
    "strings.json": b'{"model_type": "llama", "hidden_size": "4096"}',
    "negative.json": b'{"model_type": "llama", "hidden_size": -1}',
    "nested.json": b"[" * 10_000 + b"]" * 10_000,
    "family.json": b'{"model_type": "perceptron"}',
    "empty.json": b"",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_model_files_are_one_line_errors(run, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    result = run("fits", str(path), "--gpu", "t4")
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "internal error" not in result.err


@pytest.mark.parametrize(
    ("args", "extra"),
    [
        (("report", "--model", SMALL, "--gpu", "t4"), "tables,plots"),
        (("max", SMALL, "--gpu", "t4"), "tables"),
        (("trace", SMALL), "trace"),
        (("calibrate", "run", "--device", "cpu"), "calibrate"),
    ],
)
def test_a_core_install_names_the_extra(tmp_path, args, extra):
    """As after `pip install .`: click is importable, and nothing else that is not Python's own."""
    (tmp_path / "click").symlink_to(Path(click.__file__).parent)
    code = "import sys; from planner.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-S", "-c", code, *args]
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"pip install 'loraplan[{extra}]'" in done.stderr


READ_FROM = {
    "calibration": ("fits", SMALL, "--gpu", "t4", "--calibration"),
    "grid": ("table", "--grid"),
    "rows": ("table", SMALL, "--gpu", "t4", "--from"),
    "dbu": ("fits", SMALL, "--gpu", "t4", "--rows", "9", "--dbu-rate", "1", "--dbu-table"),
    "call": ("export", "peft", SMALL, "--check-call"),
    "config": ("fits", "--gpu", "t4", "--from"),
    "data": ("data",),
    "measurements": ("validate",),
    "runs": ("calibrate", "fit"),
}


@pytest.mark.parametrize("args", READ_FROM.values(), ids=READ_FROM)
def test_what_never_ends_is_not_read(run, tmp_path, args):
    pipe, endless = tmp_path / "pipe.json", tmp_path / "endless.json"
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    for path in (pipe, endless):
        result = run(*args, str(path))
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert "internal error" not in result.err
        assert "not a file" in result.err or any(word in result.err for word in ("pipe", "endless", "device"))


@pytest.mark.parametrize("args", READ_FROM.values(), ids=READ_FROM)
@pytest.mark.parametrize("content", [b'{"a": NaN}', b'{"a": %s}' % (b"9" * 5000), b'a\rb\0\xff\n"', b'"open\n'])
def test_damaged_side_files_are_one_line_errors(run, tmp_path, args, content):
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    result = run(*args, str(path))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "internal error" not in result.err


@pytest.mark.parametrize("command", ["lint", "fits"])
def test_files_without_an_answer_are_told_on_stderr_too(run, command):
    files = ("no-such.yml", "nor-this.yml")
    result = run(command, *files, *(("--gpu", "t4") if command == "fits" else ()))
    assert result.code == 2
    assert all(name in result.out for name in files)
    assert result.err == "error: 2 of 2 files could not be answered; the output says why\n"


def test_a_huge_config_is_refused_unread(run, tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    result = run("fits", str(path))
    assert result.code == 2
    assert "1073741824" in result.err


def test_hostile_names_do_not_reach_the_terminal(run):
    for args in (("fits", "gp\x1b[31mt2\n"), ("fits", SMALL, "--gpu", "\x07t\x1b]0;x\x07"), ("gpus", "show", "\x9b0m")):
        result = run(*args)
        assert result.code == 2
        assert not set(result.err.rstrip("\n")) & set("\x1b\x07\x9b\n")


def test_an_error_of_our_own_is_reported_without_a_traceback(run, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("planner.plan.request.predict", broken)
    result = run("fits", SMALL)
    assert result.code == 2
    assert result.err.startswith("error: internal error (ZeroDivisionError: oops)")
    assert result.err.count("\n") == 1
    monkeypatch.setenv("LORAPLAN_DEBUG", "1")
    assert "Traceback" in run("fits", SMALL).err


@pytest.mark.parametrize(
    "error", [RecursionError("x"), MemoryError(), KeyboardInterrupt(), OSError(5, "Input/output error")]
)
def test_other_failures_are_one_line_too(run, monkeypatch, error):
    def broken(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("planner.plan.request.predict", broken)
    result = run("fits", SMALL)
    assert result.code == 2
    assert result.err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.err


def test_json_is_recognised_before_parsing():
    assert wants_json(["fits", "--nope", "--format", "json"])
    assert wants_json(["--format=JSON"])
    assert not wants_json(["--format", "json", "--format", "csv"])
    assert not wants_json(["fits", "--", "--format", "json"])
    assert not wants_json(["--format"])


# --- help ---------------------------------------------------------------------------------------------------------


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += _commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize("path", _commands(cli), ids=" ".join)
def test_every_help_has_an_example_that_parses(run, path):
    result = run(*path, "--help")
    assert result.code == 0
    examples = [line.strip() for line in result.out.splitlines() if line.strip().startswith("loraplan ")]
    assert examples, path
    assert "Example" in result.out
    for example in examples:
        words = example.split()[1:]
        command, rest = cli, words
        while isinstance(command, click.Group):
            context = click.Context(command)
            inner = command.get_command(context, rest[0]) if rest else None
            command, rest = (inner, rest[1:]) if inner else (command.get_command(context, "list"), rest)
        assert command is not None
        command.make_context("x", list(rest))  # raises on an unknown option


def test_no_command_prints_help_and_exits_two(run):
    result = run()
    assert result.code == 2
    assert result.out == ""
    assert "Example" in result.err


def test_version(run):
    result = run("--version")
    assert result.code == 0
    assert result.out.startswith("loraplan ")


# --- terminals and pipes ------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variable", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_that_want_it(monkeypatch, variable, colour):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    out = _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    terminal.echo_coloured("YES it fits\n", "YES", "green")
    assert ("\x1b[" in out.getvalue()) is colour
    assert click.unstyle(out.getvalue()) == "YES it fits\n"


def test_a_pipe_gets_no_colour_and_no_progress(run):
    result = spawn("fits", SMALL, "--gpu", "t4")
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_a_reader_that_leaves_ends_the_command_with_one_line():
    script = (
        "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE);"
    )
    script += "p.stdout.close(); e = p.stderr.read(); p.wait(); sys.stderr.buffer.write(e); sys.exit(p.returncode)"
    for args in (
        ("models",),
        ("fits", SMALL, "--format", "json"),
        ("--help",),
        ("fits", "no-such", "--format", "json"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *COMMAND, *args],
            capture_output=True,
            cwd=ROOT,
            timeout=60,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 2, args
        assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1, done.stderr


@pytest.mark.parametrize("args", [("gpus", "--format", "json"), ("fits", SMALL), ("fits", "no-such")])
def test_a_closed_stdout_is_one_line(args):
    """`>&-` leaves Python without a stream object."""
    script = 'exec "$@" >&-'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, *args],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed; redirect it to a file or to /dev/null\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "gpus"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_terminal_of_another_encoding_gets_escapes(tmp_path):
    folder = tmp_path / "模型"
    folder.mkdir()
    config = catalog.model_record(SMALL)
    assert config is not None
    (folder / "config.json").write_text(json.dumps(dict(config.config)))
    result = spawn("fits", str(folder), env={"PYTHONIOENCODING": "latin-1"})
    assert result.returncode == 0
    assert r"\u6a21\u578b" in result.stdout


def test_the_group_imports_nothing_but_click():
    code = (
        "import sys, planner.cli.main; bad = [m for m in sys.modules if m.startswith('planner.') "
        "and m not in ('planner.cli', 'planner.cli.main')]; print(bad); sys.exit(bool(bad or 'numpy' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


def test_fits_imports_nothing_heavy():
    code = (
        "import sys\nfrom planner.cli.main import cli\n"
        f"try: cli.main(['fits', {SMALL!r}, '--gpu', 't4'])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'transformers', 'difflib', 'statistics', 'csv', 'planner.plan.search', "
        "'planner.plan.validation', 'planner.report.fits_data', 'huggingface_hub'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


# --- the GPU of this machine --------------------------------------------------------------------------------------


def _fake_nvml(name: str = "NVIDIA GeForce RTX 4090", count: int = 2, failing: str = "") -> types.ModuleType:
    nvml = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def start() -> None:
        if failing:
            raise NVMLError(failing)

    nvml.NVMLError = NVMLError
    nvml.nvmlInit = start
    nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetCount = lambda: count
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetName = lambda handle: name
    nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (8, 9)
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(
        total=24564 * 2**20, free=(20000 + handle) * 2**20, used=4000 * 2**20
    )
    return nvml


def test_the_local_card_is_what_the_driver_says(run, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml())
    card = json.loads(run("fits", SMALL, "--gpu", "local", "--format", "json").out)["gpu"]
    assert card["id"] == "rtx-4090"
    assert card["memory_basis"] == "nvml"
    assert card["memory_bytes"] == 24564 * 2**20
    assert card["used_by_others_bytes"] == 4564 * 2**20
    assert local_gpu.local_gpu("1").used_by_others_bytes == 4563 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert local_gpu.local_gpu().used_by_others_bytes == 4563 * 2**20
    assert "used by others now" in run("fits", SMALL, "--gpu", "local").out


def test_a_local_card_that_the_catalogue_lacks_still_answers(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml("NVIDIA Voodoo 9"))
    card = local_gpu.local_gpu("0")
    assert card.gpu_id == "local"
    assert card.compute_capability == (8, 9)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (None, "loraplan[local]"),
        (_fake_nvml(failing="Driver Not Loaded"), "Driver Not Loaded"),
        (_fake_nvml(count=0), "no GPU"),
    ],
)
def test_no_driver_or_binding_is_one_line(run, monkeypatch, module, text):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    result = run("fits", SMALL, "--gpu", "local")
    assert result.code == 2
    assert text in result.err
    assert result.err.count("\n") == 1
    assert run("gpus", "show", "local:7").code == 2


# --- validate -----------------------------------------------------------------------------------------------------


def _table(tmp_path: Path, *rows: dict[str, str]) -> str:
    from planner.facts.measurements import COLUMNS

    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


ROW = {
    "id": "a-1", "source": "=cmd", "model": SMALL, "framework": "my-loop", "method": "lora", "quantization": "none",
    "compute_dtype": "bf16", "rank": "8", "seq_len": "512", "micro_batch": "2", "gpu": "t4", "outcome": "ok",
    "allocated_bytes_low": "1000000000", "allocated_bytes_high": "1100000000", "confidence_memory": "A",
    "optimizer_step_s": "1.5", "confidence_time": "A",
}  # fmt: skip


def test_validate_scores_skips_and_flags(run, tmp_path):
    path = _table(
        tmp_path,
        ROW,
        {**ROW, "id": "a-2", "model": "no-such/model"},
        {**ROW, "id": "a-3", "gpu": ""},
        {**ROW, "id": "a-4", "num_gpus": "4"},
        {**ROW, "id": "a-5", "gpu": "voodoo", "outcome": "oom"},
    )
    result = run("validate", path, "--format", "json")
    assert result.code == 0
    assert result.err == ""
    document = json.loads(result.out)
    assert {(g["source"], g["quantity"], g["n"]) for g in document["groups"]} == {
        ("=cmd", "allocated", 2), ("*", "allocated", 2), ("=cmd", "time", 1), ("*", "time", 1)
    }  # fmt: skip
    reasons = {item["id"]: item["reason"] for item in document["skipped"]}
    assert set(reasons) == {"a-2", "a-3", "a-4", "a-5"}
    assert "time without a named card" in reasons["a-3"]
    assert "no-such/model" in reasons["a-2"]
    assert {item["id"] for item in document["flagged"]} >= {"a-1", "a-3"}
    assert document["verdicts"]["ok_right"] == 1
    assert "rows" not in document
    rows = json.loads(run("validate", path, "--format", "json", "--rows").out)["rows"]
    assert [(row["id"], row["quantity"]) for row in rows] == [
        ("a-1", "allocated"), ("a-3", "allocated"), ("a-1", "time")
    ]  # fmt: skip


def test_validate_filters_and_formats(run, tmp_path):
    path = _table(tmp_path, ROW, {**ROW, "id": "b-1", "source": "other", "micro_batch": "1"})
    chosen = run("validate", path, "--source", "other", "--format", "csv")
    assert chosen.out.splitlines()[1].startswith("other,allocated,1,")
    assert "'=cmd" in run("validate", path, "--format", "csv", "--rows").out
    assert run("validate", path, "--where", "micro_batch=1", "--format", "csv").out.count("\n") == 5
    assert run("validate", path, "--where", "micro_batch=7").code == 1
    assert run("validate", path, "--source", "nobody").code == 2
    assert run("validate", path, "--where", "batch=7").code == 2
    assert "Errors by source" in run("validate", path, "--rows").out
    anchored = json.loads(run("validate", path, "--anchor", "first", "--format", "json").out)
    assert [g["n"] for g in anchored["groups"] if g["quantity"] == "time"] == [1, 1]  # the anchor is not scored
    assert any("anchor of" in item["reason"] for item in anchored["flagged"])
    assert run("validate", path, "--format", "markdown").out.startswith("## Errors by source")


def test_validate_without_a_table_is_one_line(run, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_bytes(b"")
    result = run("validate", str(empty))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert run("validate", str(tmp_path)).code == 2
