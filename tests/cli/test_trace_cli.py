"""`loraplan trace` and `fits --via trace`: the process, its failures, the cache, the reports, unknown families."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import sys
from dataclasses import fields

import pytest

from planner.base.errors import InvalidInput
from planner.device import cuda_rules
from planner.device.cuda_rules import Architecture
from planner.model.families import known_families
from planner.plan import trace_cache, traced, tracing

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}  # fmt: skip
RUN = ("--batch", "2", "--seq-len", "64")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """A cache folder of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny model."""
    return write(tmp_path, TINY)


def write(folder, config) -> str:
    where = folder / str(config["model_type"])
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config))
    return str(where)


@pytest.fixture
def worker_here(monkeypatch):
    """Let the worker answer in this process: importing the libraries once is enough."""
    libraries()
    from calibrate.oracle import worker

    asked = []

    def answer(request, limit_s):
        asked.append(request)
        sent = json.loads(json.dumps(request))
        try:
            return json.loads(json.dumps(worker.answer(sent)))
        except Exception as error:  # noqa: BLE001 - as the worker's own main does
            line = json.dumps({"error": worker.failure(error)})
            return tracing._read(line, 2, tracing.deque())

    monkeypatch.setattr(worker, "_say", lambda text: None)
    monkeypatch.setattr(tracing, "_spawn", answer)
    return asked


def libraries() -> None:
    for library in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(library)


# --- the process ---------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.slow
def test_a_process_traces_and_its_answer_is_kept(run, model, monkeypatch):
    libraries()
    first = run("trace", model, *RUN, "--format", "json", "--time-limit", "300")
    assert first.code == 0, first.err
    assert first.err == ""
    found = first.document()
    assert found["via"] == "trace"
    assert found["versions"]["torch"]
    assert found["model"]["traced_layers"] == [2]
    assert sum(part["bytes"] for part in found["ledger"]) == found["peak_allocated_bytes"]
    assert sum(part["bytes"] for part in found["modules"]) == found["peak_allocated_bytes"]
    assert max(s["peak_bytes"] for s in found["timeline"]) == found["peak_allocated_bytes"]
    assert found["timeline"][0]["start_bytes"] == found["static_bytes"]
    assert {"forward", "recompute", "backward"} <= found["flops"].keys()
    monkeypatch.setattr(tracing, "_spawn", lambda *args: pytest.fail("asked again"))
    assert run("trace", model, *RUN, "--format", "json").document() == found


START = {
    "abort": ("import os; os.abort()", "ended by SIGABRT"),
    "hang": ("import time; time.sleep(600)", "did not finish within 1 s"),
    "silence": ("pass", "gave no answer (exit code 0, wrote nothing)"),
    "chatter": ("print('hello')", "wrote 'hello'"),
    "other json": ("print('[1]')", "wrote '[1]'"),
    "half an answer": ("print('{\"summary\": {}}')", "has no usable"),
    "import error": ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
    "refusal": ('print(\'{"error": {"type": "InvalidInput", "message": "no\\\\nsuch thing"}}\')', "no\\nsuch thing"),
}


@pytest.mark.parametrize("name", START)
def test_a_process_that_fails_is_one_line(run, model, monkeypatch, name):
    code, words = START[name]
    monkeypatch.setattr(tracing, "_START", code)
    monkeypatch.setattr(tracing, "LIBRARIES", ())
    result = run("trace", model, "--format", "json", "--time-limit", "1" if name == "hang" else "60")
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1
    assert words in result.document()["error"]["message"]


def test_missing_libraries_name_the_extra(run, model, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a))
    for command in (("trace", model), ("fits", model, "--via", "trace")):
        result = run(*command)
        assert result.code == 2
        assert "peft" in result.err
        assert "pip install 'loraplan[trace]'" in result.err
        assert result.err.count("\n") == 1


def test_the_process_does_not_import_from_the_current_folder(run, model, monkeypatch, tmp_path):
    trap = tmp_path / "calibrate"
    trap.mkdir()
    (trap / "__init__.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        tracing, "_START", tracing._START.replace("run_module('calibrate.oracle.worker'", "run_module('json'")
    )
    monkeypatch.setattr(tracing, "LIBRARIES", ())
    assert "current folder" not in run("trace", model).err
    code = tracing._START.replace("import runpy, sys;", "import sys;").partition("runpy")[0]
    assert "sys.path[0] =" in code


def test_a_terminal_sees_progress(model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with tracing._progress(["tracing a few layers"]):
        import time

        time.sleep(0.8)
    assert "trace: tracing a few layers, " in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")


# --- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_is_keyed_by_request_and_releases(monkeypatch):
    name = trace_cache.key({"a": 1}, ("torch",))
    assert name == trace_cache.key({"a": 1}, ("torch",))
    assert name != trace_cache.key({"a": 2}, ("torch",))
    monkeypatch.setattr(trace_cache.metadata, "version", lambda name: "0.0")
    assert name != trace_cache.key({"a": 1}, ("torch",))


def test_a_damaged_entry_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert trace_cache.read("x") is None
    trace_cache.write("x", {"summary": 1})
    assert trace_cache.read("x") == {"summary": 1}
    (file,) = trace_cache.folder().iterdir()  # nothing but the entry
    whole = file.read_bytes()
    for damaged in (b"", whole[:-9], whole[:20] + b"\0\0\0" + whole[23:], b"garbage"):
        file.write_bytes(damaged)
        assert trace_cache.read("x") is None
    file.rename(file.with_name("y.json.gz")).write_bytes(whole)
    assert trace_cache.read("y") is None  # the answer to another question


def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "loraplan").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trace_cache.write("x", {"summary": 1})
    assert trace_cache.read("x") is None


def test_the_cache_does_not_grow_without_end(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trace_cache, "KEPT", 2)
    for number in range(4):
        trace_cache.write(str(number), {})
        os.utime(trace_cache.folder() / f"{number}.json.gz", (number, number))
    trace_cache.write("last", {})
    assert trace_cache.read("last") == {}
    assert trace_cache.read("0") is None


# --- what is printed -----------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.slow
def test_every_format_tells_the_same(run, model, worker_here):
    document = run("trace", model, *RUN, "--gpu", "t4", "--compare", "--explain", "--format", "json").document()
    assert worker_here[0]["arch"]["capability"] == [7, 5]
    assert worker_here[0]["arch"]["num_sms"] == 40
    peak = document["peak_allocated_bytes"]
    text = run("trace", model, *RUN, "--gpu", "t4", "--compare", "--explain").out
    assert text.startswith("TRACED llama qlora")
    assert "compute capability 7.5" in text
    assert "memory through the step" in text
    assert "bitsandbytes.gemm_4bit" in text
    assert all(rule.name in text for rule in cuda_rules.rules(Architecture()))
    assert max(map(len, text.splitlines())) <= 90
    rows = list(csv.DictReader(io.StringIO(run("trace", model, *RUN, "--gpu", "t4", "--format", "csv").out)))
    assert {row["section"] for row in rows} == {"peak", "ledger", "module", "timeline", "flops"}
    assert sum(int(row["trace"]) for row in rows if row["section"] == "ledger") == peak
    page = run("trace", model, *RUN, "--gpu", "t4", "--format", "markdown", "--compare", "--explain").out
    assert "| CUDA rule |" in page
    assert len(worker_here) == 1  # the rest came from the cache


@pytest.mark.oracle
@pytest.mark.slow
def test_the_comparison_is_with_the_programs_ledger(run, model, worker_here):
    rows = run("trace", model, *RUN, "--compare", "--format", "json").document()["comparison"]
    by_name = {row["name"]: row for row in rows}
    parts = [row for row in rows if row["name"] not in ("peak", "static")]
    for side in ("trace_bytes", "program_bytes"):
        assert sum(row[side] for row in parts) == by_name["peak"][side]
    assert abs(by_name["peak"]["difference_bytes"]) <= 0.001 * by_name["peak"]["trace_bytes"]
    assert by_name["adapters"]["difference_bytes"] == by_name["optimizer state"]["difference_bytes"] == 0


@pytest.mark.oracle
@pytest.mark.slow
def test_fits_answers_the_same_both_ways(run, model, worker_here):
    ours = run("fits", model, *RUN, "--gpu", "t4", "--format", "json").document()
    theirs = run("fits", model, *RUN, "--gpu", "t4", "--via", "trace", "--format", "json")
    assert theirs.code == 0
    found = theirs.document()
    assert (ours["via"], found["via"]) == ("program", "trace")
    assert ours["versions"] == {}
    assert found["versions"].keys() >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert found["verdict"] == ours["verdict"] == "fits"
    for counter in ("allocated", "reserved", "device"):
        assert found[counter]["expected"] == pytest.approx(ours[counter]["expected"], rel=0.01)
    assert "via trace: the libraries themselves, all 2 layers" in run("fits", model, *RUN, "--via", "trace").out
    page = run("fits", model, *RUN, "--via", "trace", "--format", "markdown").out
    assert "Via trace" in page
    (row,) = csv.DictReader(io.StringIO(run("fits", model, *RUN, "--via", "trace", "--format", "csv").out))
    assert row["via"] == "trace"


@pytest.mark.oracle
@pytest.mark.slow
def test_a_traced_run_that_does_not_fit_names_where_changes_are_searched(run, model, worker_here):
    result = run("fits", model, *RUN, "--vram", "64MiB", "--via", "trace")
    assert result.code == 1
    assert result.out.startswith("NO")
    assert "leave out --via trace" in result.out


@pytest.mark.oracle
@pytest.mark.slow
def test_other_releases_than_the_installed_ones_are_said(run, model, worker_here):
    found = run("trace", model, *RUN, "--transformers", "4.40", "--layers", "1", "--format", "json").document()
    assert any("not 4.40" in text for text in found["warnings"])
    assert found["model"]["layers"] == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--layers", "some"), "write auto, full or a number"),
        (("--layers", "0"), "write auto, full or a number"),
        (("--layers", "3"), "the model has 2"),
        (("--plot", "picture.pdf"), "ends in .png or .svg"),
        (("--plot", "no/such/folder.png"), "no such folder"),
        (("--time-limit", "0"), "time-limit"),
    ],
)
def test_wrong_options_are_one_line(run, model, args, words):
    result = run("trace", model, *args)
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--kernels", "liger"), "--kernels none"),
        (("--loss", "chunked"), "--loss full-logits-fp32"),
        (("-q", "gptq4"), "gptq4"),
        (("--compile",), "torch.compile"),
        (("--targets", "q_proj", "--target-slices", "0"), "slices"),
    ],
)
def test_what_the_trace_cannot_run_is_refused(run, model, worker_here, args, words):
    result = run("fits", model, "--via", "trace", *args)
    assert result.code == 2
    assert words in result.err


@pytest.mark.parametrize("answer", [{}, {"summary": {}, "model": {}}, {"summary": {"segments": [1]}, "model": {}}])
def test_an_answer_of_another_shape_is_refused(answer):
    with pytest.raises(InvalidInput, match="no usable"):
        traced.read(answer, "m")


def test_every_switch_of_an_architecture_is_a_rule_with_a_source():
    switches = {f.name for f in fields(Architecture) if f.type == "bool"} - {"cudnn_attention"}
    found = cuda_rules.rules(Architecture())
    assert {rule.name.replace(" ", "_") for rule in found} == switches
    assert all(rule.applied and rule.source and rule.what for rule in found)
    assert not any(rule.applied for rule in cuda_rules.rules(Architecture.plain()))
    said = {rule.name: rule.what for rule in cuda_rules.rules(Architecture(capability=(9, 0)))}
    assert "33,554,432" in said["blas workspaces"]


# --- the picture ---------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.slow
def test_pictures_are_written_whole_or_not_at_all(run, model, worker_here, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from planner.report import trace_plot

    png, svg = tmp_path / "step.png", tmp_path / "step.svg"
    assert run("trace", model, *RUN, "--plot", str(png)).code == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert run("trace", model, *RUN, "--plot", str(svg)).code == 0
    assert "<svg" in svg.read_text(encoding="utf-8")
    assert "<pattern" in svg.read_text(encoding="utf-8")  # owners differ by hatching too
    before = png.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run("trace", model, *RUN, "--no-cache", "--plot", str(png)).code == 2
    assert png.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*.??g")) == ["step.png", "step.svg"]
    assert trace_plot._HATCHES[0] != trace_plot._HATCHES[1]


def test_a_missing_matplotlib_names_its_extra(run, model, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    result = run("trace", model, "--plot", str(tmp_path / "x.png"))
    assert result.code == 2
    assert "loraplan[plots]" in result.err


# --- families that the registry does not know ----------------------------------------------------------------------

UNKNOWN = {
    "jais2": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
    "diffllama": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "granitemoeshared": {
        "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
    },
}  # fmt: skip
"""Sizes given to the default config of three classes of transformers; no code here knows them."""


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_family_nobody_wrote_down_is_planned_from_its_own_class(run, worker_here, tmp_path, model_type):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert model_type not in known_families()
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, vocab_size=512, **UNKNOWN[model_type])
    folder = write(tmp_path, json.loads(config.to_json_string(use_diff=False)))
    result = run("fits", folder, "--vram", "8GiB", "--via", "trace", *RUN, "--format", "json")
    assert result.code == 0, result.err
    found = result.document()
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    assert found["model"]["parameters"] == sum(p.numel() for p in real.parameters())
    assert found["model"]["type"] == model_type
    assert found["model"]["trainable_parameters"] > 0
    assert found["allocated"]["expected"] == sum(c["bytes"] for c in found["components"] if c["counter"] == "allocated")
    assert found["allocated"]["expected"] <= found["reserved"]["expected"] < found["device"]["expected"]
    assert run("trace", folder, *RUN, "--compare").code == 2


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "words"), [("no-such-family", "is unknown to"), ("t5", "no decoder-only")])
def test_what_transformers_cannot_plan_is_one_line(run, worker_here, tmp_path, model_type, words):
    result = run("fits", write(tmp_path, {"model_type": model_type}), "--via", "trace")
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1
