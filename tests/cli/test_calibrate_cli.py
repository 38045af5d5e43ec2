"""The calibrate commands: one line per failure, exit codes, files; a real burst on the CPU; the Trainer's callback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibrate.fit import fit as fitting
from calibrate.fit import measurements
from calibrate.fit import points as fit_points
from calibrate.measure.workers import Forking, result_of
from planner.base.errors import InvalidInput
from planner.cli.calibrate import parse_duration
from planner.cli.main import main
from planner.facts import calibration_files
from planner.training.spec import training_from_dict
from tests.helpers.calibration_samples import CPU_FACTS, CPU_TRUTH, cpu_bursts, synthetic


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLAN_DATA", str(tmp_path / "data"))


def loraplan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as end:
        main(words)
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return int(end.value.code or 0), out.out, out.err


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement file of synthetic bursts, with repeats."""
    path = tmp_path_factory.mktemp("runs") / "cpu.json"
    bursts = [*cpu_bursts(40), *cpu_bursts(5)]
    measurements.write_json(path, measurements.to_document([synthetic(bursts, CPU_FACTS, CPU_TRUTH)]))
    return path


@pytest.fixture(scope="module")
def fitted(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file that `calibrate fit --rows` wrote of these bursts, and what it printed: one fit for all tests."""
    target = tmp_path_factory.mktemp("fit") / "a.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        main(("calibrate", "fit", str(run_file), "--rows", "--out", str(target)))
    assert not end.value.code
    return target, printed.getvalue()


@pytest.mark.extra
def test_fit_says_what_it_found(fitted: tuple[Path, str], flat: Callable[[str], str]) -> None:
    target, out = fitted
    assert "matmul_fp32" in out
    assert "left out by model" in out
    assert "repeats: 9 of 10 differ by less than" in flat(out)
    assert calibration_files.read(target).bursts == 45


@pytest.mark.extra
def test_fit_overwrites_nothing(
    fitted: tuple[Path, str], run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = fitted
    before = target.read_bytes()
    fits: list[int] = []
    monkeypatch.setattr(fitting, "fit", lambda *args, **more: fits.append(1))
    code, _, err = loraplan(capsys, "calibrate", "fit", str(run_file), "--out", str(target))
    assert code == 2
    assert "is not overwritten" in err
    assert target.read_bytes() == before
    assert not fits, "refused only after the fit"


@pytest.mark.extra
def test_show_list_validate_compare(
    fitted: tuple[Path, str], run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, long = fitted
    monkeypatch.setattr(fitting, "fit", lambda *args, **more: calibration_files.read(target))
    code, short, _ = loraplan(capsys, "calibrate", "fit", str(run_file))
    assert code == 0
    assert len(short.splitlines()) + 40 <= len(long.splitlines())  # a row for each burst and its repeats
    code, out, _ = loraplan(capsys, "calibrate", "list")
    assert code == 0
    assert "Sample CPU" in out
    code, out, _ = loraplan(capsys, "calibrate", "show", str(target), "--format", "json")
    document = json.loads(out)
    assert document["bursts"] == 45
    assert {c["name"] for c in document["coefficients"] if c["origin"] == "fitted"} >= {"matmul", "bandwidth"}
    code, out, _ = loraplan(capsys, "calibrate", "validate", str(run_file))
    assert code == 0
    assert "step time: mean error" in out
    (own,) = calibration_files.user_folder().glob("*.json")
    code, out, _ = loraplan(capsys, "calibrate", "compare", str(target), own.stem)
    assert code == 0
    assert "1.00" in out


@pytest.mark.extra
def test_a_plot_is_a_picture(fitted: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    target, _ = fitted
    code, _, _ = loraplan(capsys, "calibrate", "show", str(target), "--plot", str(tmp_path / "p.svg"))
    assert code == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()
    code, _, err = loraplan(capsys, "calibrate", "show", str(target), "--plot", str(tmp_path / "p.pdf"))
    assert code == 2
    assert ".png or .svg" in err


def test_export_and_merge(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = tmp_path / "both.json"
    code, out, _ = loraplan(capsys, "calibrate", "merge", str(run_file), str(run_file), "-o", str(both))
    assert code == 0
    assert out.startswith("90 bursts of 2 runs")
    assert loraplan(capsys, "calibrate", "export", str(both), "-o", str(both))[0] == 2


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--device", "gpu"), ("run", "--device", "cpu", "--budget", "soon"), ("fit", "./nowhere"),
        ("show", "./nowhere"), ("validate", "./nowhere"), ("nothing",), ("doctor", "--device", "tpu"),
        ("compare", "./a", "./b"), ("export", "./nowhere", "-o", "./x"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = loraplan(capsys, "calibrate", *words)
    assert code == 2
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(("text", "expected"), [("8m", 480), ("90s", 90), ("1h", 3600), ("45", 45), ("1.5m", 90)])
def test_durations(text: str, expected: float) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1m", "8 minutes", "1e3", "25h", "nan"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(InvalidInput, match="--budget"):
        parse_duration(text)


@pytest.mark.oracle
def test_doctor_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch", "transformers", "peft", "bitsandbytes", "scipy"):
        pytest.importorskip(name)
    code, out, _ = loraplan(capsys, "calibrate", "doctor", "--device", "cpu", "--format", "json")
    assert code == 0
    found = {item["what"]: item for item in json.loads(out)["findings"]}
    assert {"python", "torch", "CPU", "memory", "disk", "calibrations"} <= found.keys()


@pytest.mark.oracle
def test_doctor_names_the_remedy_without_a_gpu(capsys: pytest.CaptureFixture[str], flat: Callable[[str], str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, out, _ = loraplan(capsys, "calibrate", "doctor", "--device", "cuda:0")
    assert code == 1
    said = flat(out)
    assert "CPU build" in said or "sees 0 GPUs" in said


# --- real bursts ---------------------------------------------------------------------------------------------------


def tiny(**changes: Any) -> dict[str, Any]:
    """A request of a fraction of a second."""
    request = cpu_bursts(8)[7].request("cpu", 1, 3, 1)
    config = {**request["config"], "num_hidden_layers": 2, "vocab_size": 256}
    return {**request, "config": config, "training": {**request["training"], "seq_len": 16}, **changes}


@pytest.mark.oracle
@pytest.mark.slow
def test_real_bursts_in_forked_workers() -> None:
    """One good burst, one that is killed, one that hangs, then a good one again: none touches the next."""
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(name)
    workers = Forking()
    try:
        first = result_of(workers.run(tiny(), 300.0))
        assert first["status"] == "ok", first
        _check_raw_values(first)
        killer = threading.Thread(target=_kill_child, args=(workers,))
        killer.start()
        killed = result_of(workers.run(tiny(steps=100_000), 300.0))
        killer.join()
        assert (killed["status"], killed["message"]) == ("killed", "SIGKILL")
        hung = result_of(workers.run(tiny(steps=100_000), 3.0))
        assert hung["status"] == "timeout"
        wrong = result_of(workers.run(tiny(training={**tiny()["training"], "attention": "flash2"}), 300.0))
        assert wrong["status"] == "error"
        assert "flash2" in wrong["message"]
        again = result_of(workers.run(tiny(), 300.0))
        assert again["status"] == "ok"
        server = workers._server
        assert server is not None
    finally:
        workers.close()
    assert server.poll() is not None


def _kill_child(workers: Forking) -> None:
    until = time.monotonic() + 60
    while not workers._child and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(workers._child, signal.SIGKILL)


def _check_raw_values(result: dict[str, Any]) -> None:
    assert len(result["steps_s"]) == len(result["steps_ran_s"]) == len(result["phases_s"]) == 3
    assert len(result["warmup_s"]) == 1
    for wall, ran, phases in zip(result["steps_s"], result["steps_ran_s"], result["phases_s"], strict=True):
        assert 0 < sum(phases) <= ran * 1.001 <= wall * 1.05
    expected = {"idle", "load and adapters", "forward", "backward", "optimizer", "steady step"}
    assert expected <= result["memory"].keys()
    assert result["memory"]["steady step"]["resident"] > 2**26
    assert result["device_memory"]["samples"] > 0
    assert result["profile"]["kernels"] > 500
    assert result["profile"]["seconds_by_class"].keys() >= {"matrix products", "element-wise", "attention"}
    assert result["profile"]["peak_over_base_bytes"] > 0
    assert result["versions"].keys() >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert result["trainable_parameters"] > 0


@pytest.mark.oracle
@pytest.mark.slow
def test_run_on_a_cpu_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch", "transformers", "peft", "bitsandbytes", "scipy"):
        pytest.importorskip(name)
    out = tmp_path / "run"
    words = ("calibrate", "run", "--device", "cpu", "--budget", "10m", "--bursts", "2", "--out", str(out))
    code, text, err = loraplan(capsys, *words)
    assert code == 0, err
    assert text.startswith("2 bursts in")
    assert loraplan(capsys, *words)[1].startswith("4 bursts in")
    assert not [p for p in tmp_path.rglob("*") if p.suffix not in (".json", "") and p.is_file()]
    code, _, err = loraplan(capsys, "calibrate", "fit", str(out))
    assert code == 2
    assert "does not determine" in err
    (run,) = measurements.read_runs([out])
    assert run.device["kind"] == "cpu"
    points, _ = fit_points.usable([run], run.gpu)
    assert len(points) == 4


# --- the callback --------------------------------------------------------------------------------------------------


def arguments(**changes: Any) -> Any:
    """What the callback reads of TrainingArguments."""
    values = {
        "world_size": 1, "optim": "adamw_torch", "bf16": False, "fp16": False, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "max_grad_norm": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def small_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.oracle
@pytest.mark.slow
def test_the_callback_reads_what_peft_writes_out_for_all_linear() -> None:
    pytest.importorskip("transformers")
    from calibrate.measure.callback import _targets

    full = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert _targets(full, 3) == ("mlp.up_proj", "self_attn.q_proj")
    assert _targets(["k_proj", "q_proj"], 3) == ("k_proj", "q_proj")
    with pytest.raises(ValueError, match="differ between layers"):
        _targets(full[:-1], 3)
    with pytest.raises(ValueError, match="differ between layers"):
        _targets(full, 4)


@pytest.mark.oracle
def test_the_callback_records_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    import calibrate

    callback, model = calibrate.PlannerCallback(tmp_path / "m.json"), small_model()
    state = SimpleNamespace(is_world_process_zero=True)
    callback.on_train_begin(arguments(), state, None, model=model)
    for _ in range(8):
        callback.on_step_begin(arguments(), state, None)
        ids = torch.randint(0, 128, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
    callback.on_train_end(arguments(), state, None)
    assert not callback.broken
    assert callback.hook is None
    shown = capsys.readouterr().err
    assert "measured" in shown
    assert "predicted" in shown
    (run,) = measurements.read_runs([tmp_path / "m.json"])
    (item,) = run.measurements
    assert item.ok
    assert (item.training.micro_batch_size, item.training.seq_len) == (2, 16)
    assert item.training.lora is not None
    assert item.training.lora.target_modules == ("q_proj", "v_proj")
    assert item.request["source"] == "trainer"
    point = fit_points.point(item, run.gpu)
    assert point.overhead_s(fitting.priors(run.gpu)) == 0.0


@pytest.mark.oracle
@pytest.mark.slow
def test_the_callback_never_disturbs_training(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import calibrate

    state = SimpleNamespace(is_world_process_zero=True)
    for bad_arguments, model in ((arguments(optim="apollo_adamw"), small_model()), (arguments(), None)):
        callback = calibrate.PlannerCallback(tmp_path / "m.json")
        with pytest.warns(UserWarning, match="loraplan's callback stops"):
            callback.on_train_begin(bad_arguments, state, None, model=model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            callback.on_step_begin(bad_arguments, state, None)
            callback.on_train_end(bad_arguments, state, None)
    folder = tmp_path / "file"
    folder.write_text("")
    callback = calibrate.PlannerCallback(folder / "below-a-file.json")
    model = small_model()
    callback.on_train_begin(arguments(), state, None, model=model)
    for _ in range(6):
        callback.on_step_begin(arguments(), state, None)
    callback.longest = (1, 8)
    with pytest.warns(UserWarning, match="callback stops"):
        callback.on_train_end(arguments(), state, None)
    assert not model._forward_pre_hooks


@pytest.mark.oracle
@pytest.mark.slow
def test_the_callback_in_a_real_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    import calibrate

    rows = [{"input_ids": torch.randint(0, 128, (16,)), "labels": torch.randint(0, 128, (16,))} for _ in range(16)]
    settings = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=7, report_to=[], save_strategy="no",
        use_cpu=True, optim="adamw_torch",
    )  # fmt: skip
    callback = calibrate.PlannerCallback(tmp_path / "m.json")
    trainer = Trainer(model=small_model(), args=settings, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert "measured" in capsys.readouterr().err
    (run,) = measurements.read_runs([tmp_path / "m.json"])
    assert run.measurements[0].training.micro_batch_size == 2
    assert len(run.measurements[0].result["steps_s"]) == 3


TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64,
}  # fmt: skip


def job_file(folder: Path, **more: Any) -> Path:
    """An axolotl config of a model that a CPU trains in a moment."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(TINY))
    keys = {
        "base_model": "./model", "adapter": "lora", "lora_r": 4, "lora_target_linear": "true", "sequence_len": 32,
        "micro_batch_size": 2, "gradient_accumulation_steps": 1, "optimizer": "adamw_torch", **more,
    }  # fmt: skip
    path = folder / "job.yml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return path


@pytest.mark.oracle
@pytest.mark.slow
def test_exactly_the_job_of_a_config_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    words = ("calibrate", "run", "--device", "cpu", "--out", str(out), "--from")
    code, text, err = loraplan(capsys, *words, str(job_file(tmp_path)))
    assert code == 0, err
    assert text.startswith("2 bursts in") and "calibrate validate" in text
    (run,) = measurements.read_runs([out])
    assert [m.request["layers"] for m in run.measurements] == [None, None]
    training = training_from_dict(run.measurements[0].request["training"])
    assert training.lora is not None
    assert (training.seq_len, training.micro_batch_size, training.lora.r) == (32, 2, 4)
    assert run.measurements[0].request["config"]["hidden_size"] == 64
    code, _, err = loraplan(capsys, *words, str(job_file(tmp_path, lora_r=8)))
    assert code == 2 and "another job" in err


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"attn_implementation": "flash_attention_2"}, "flash2 needs a package"),
        ({"base_model": "meta-llama/Llama-3.1-70B"}, "not measured"),
        ({"base_model": '""'}, "model"),
    ],
)
def test_a_job_that_cannot_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    words = ("calibrate", "run", "--device", "cpu", "--out", str(out), "--from", str(job_file(tmp_path, **more)))
    code, text, err = loraplan(capsys, *words)
    assert code == 2 and text == "" and says in err.splitlines()[-1]
    assert not out.exists()
