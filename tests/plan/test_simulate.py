"""A simulated run: steps, schedules, totals against the closed form, bounds of what is synthetic, the commands."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.base.errors import InvalidInput
from planner.cli.main import cli
from planner.course import rivals
from planner.facts import catalog
from planner.model import families
from planner.plan.curves import StepCost, grid
from planner.plan.predict import predict
from planner.plan.simulate import LOWEST_LOSS, START_LOSS, Plan, Timeline, closed_form, synthetic_loss
from planner.runs.dataset.batches import PADDINGS, Batching, Padding
from planner.runs.dataset.lengths import Lengths
from planner.runs.schedule import SHAPES, Schedule, count_steps, warmup_of, warnings
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

NAME = "Qwen/Qwen2.5-0.5B"
MODEL = families.build_spec(catalog.model_record(NAME).config, model_id=NAME)  # type: ignore[union-attr]
GPU = catalog.gpu("l4")
TRAINING = TrainingSpec(
    method="qlora", lora=LoraSpec(), quantization=QuantizationSpec(kind="nf4"), micro_batch_size=4,
    gradient_accumulation_steps=4, seq_len=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def cost() -> StepCost:
    return StepCost(predict(MODEL, TRAINING, GPU), 4)


def lengths(n: int) -> Lengths:
    rng = random.Random(3)
    return Lengths(min(int(rng.lognormvariate(4.8, 0.7)) + 4, 512) for _ in range(n))


def plan(rows: Lengths, padding: Padding = "longest", **extra: Any) -> Plan:
    how = Batching(batch=4, limit=512, padding=padding)
    return Plan(**{"lengths": rows, "batching": how, "accumulation": 4, **extra})


# --- steps and learning rate ---------------------------------------------------------------------------------------


def test_fixture_09_floor_and_ceil() -> None:
    steps = count_steps(1000, 4, 4, 3)
    assert (steps.floor_total, steps.ceil_total, steps.total) == (186, 189, 189)
    assert rivals.demo_steps(1000, 4, 4, 3) == 186
    assert count_steps(1000, 4, 4, 3, drop_last=True).total == 186


def test_fixture_10_the_peak_is_never_reached() -> None:
    steps = count_steps(100, 4, 4, 3, drop_last=True)
    schedule = Schedule(peak=2e-4, warmup_steps=100, total_steps=steps.total)
    assert steps.total == 18
    assert schedule.peak_reached == pytest.approx(3.4e-5)
    notes = list(warnings(steps, schedule, 4, 4))
    assert any("warm-up of 100 steps is not shorter than the run of 18" in note for note in notes)
    assert any("peaks at 3.4e-05, 17 % of the 0.0002" in note for note in notes)


def test_fixture_11_fewer_rows_than_an_effective_batch() -> None:
    steps = count_steps(15, 4, 4, 3)
    assert (steps.floor_total, steps.ceil_total) == (0, 3)
    (note,) = warnings(steps, Schedule(total_steps=3), 4, 4)
    assert "0 steps, the Trainer takes 3" in note
    dropped = count_steps(15, 4, 4, 3, drop_last=True)
    (note,) = warnings(dropped, Schedule(total_steps=0), 4, 4)
    assert "nothing is trained" in note


@pytest.mark.oracle
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(1, 1, 3), (4, 4, 3), (3, 5, 1), (4, 2, 0.5)])
def test_steps_are_those_of_the_trainer(rows: int, batch: int, accumulation: int, epochs: float) -> None:
    """transformers' own arithmetic, Trainer.set_initial_training_values on a data loader of that many rows."""
    pytest.importorskip("torch")
    import torch
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir="unused", num_train_epochs=epochs, per_device_train_batch_size=batch, use_cpu=True,
        gradient_accumulation_steps=accumulation, report_to="none",
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.arange(rows), batch_size=batch)  # type: ignore[arg-type]
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=args)
    *_, max_steps = trainer.set_initial_training_values(args, loader)
    assert max_steps == count_steps(rows, batch, accumulation, epochs).total


@pytest.mark.oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (30, 10), (100, 1000)])
def test_learning_rates_are_those_of_transformers(shape: Any, warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    name = "constant_with_warmup" if shape == "constant" else shape
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = Schedule(peak=2e-4, shape=shape, warmup_steps=warmup, total_steps=total)
    rates = []
    for step in range(total):
        rates.append(theirs.get_last_lr()[0])
        assert ours.rate(step) == pytest.approx(rates[-1], abs=1e-15)
        optimizer.step()
        theirs.step()
    assert ours.peak_reached == pytest.approx(max(rates))


def test_warm_up_as_a_share_is_rounded_up() -> None:
    assert warmup_of(189, None, 0.03) == 6
    with pytest.raises(InvalidInput, match="from 0 to 1"):
        warmup_of(10, None, 2.0)


# --- seconds -------------------------------------------------------------------------------------------------------


def test_equal_rows_take_exactly_what_the_planner_predicts(cost: StepCost) -> None:
    """Totals equal steps times the predicted step, to the last digits."""
    made = plan(Lengths([512] * 1600), save_steps=0)
    totals = Timeline(made, cost).totals()
    predicted = predict(MODEL, TRAINING, GPU)
    assert predicted.time is not None
    assert totals.steps == 300
    assert totals.train_s == pytest.approx(300 * predicted.time.step_s.expected, rel=1e-9)
    assert totals.tokens == totals.useful_tokens == 3 * 1600 * 512
    assert totals.memory_bytes == predicted.device.expected


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("drop_last", [False, True])
def test_totals_equal_the_closed_form(cost: StepCost, padding: Padding, drop_last: bool) -> None:
    made = plan(lengths(6003), padding, drop_last=drop_last, eval_steps=100, eval_rows=300, usd_per_hour=2.0)
    drawn, closed = Timeline(made, cost).totals(), closed_form(made, cost)
    assert (drawn.steps, drawn.rows, drawn.pause_s) == (closed.steps, closed.rows, closed.pause_s)
    for name in ("useful_tokens", "tokens", "train_s", "usd"):
        assert getattr(drawn, name) == pytest.approx(getattr(closed, name), rel=0.01)
    if not drop_last:
        assert drawn.useful_tokens == pytest.approx(closed.useful_tokens, rel=1e-12)


def test_the_steps_add_up_to_the_totals(cost: StepCost) -> None:
    timeline = Timeline(plan(lengths(900), eval_steps=30, eval_rows=90, save_steps=50, usd_per_hour=3.0), cost)
    rows, totals = list(timeline), timeline.totals()
    assert len(rows) == totals.steps == 171
    assert math.fsum(r.step_s + r.pause_s for r in rows) == pytest.approx(totals.seconds)
    assert sum(r.tokens for r in rows) == totals.tokens
    assert rows[-1].elapsed_s == pytest.approx(totals.seconds)
    assert rows[-1].remaining_s == pytest.approx(0.0, abs=1e-6)
    assert rows[-1].usd == pytest.approx(totals.usd)
    assert rows[-1].epoch == 3.0
    assert [r.step for r in rows if "checkpoint" in r.event] == [50, 100, 150, 171]
    assert [r.step for r in rows if "evaluation" in r.event] == [30, 60, 90, 120, 150]
    assert rows[0].elapsed_s + rows[0].remaining_s == pytest.approx(totals.seconds)
    memory = [r.memory_bytes for r in rows]
    assert memory == sorted(memory)
    assert memory[-1] == pytest.approx(timeline.cost.memory_bytes(max(timeline.longest)))


def test_seconds_between_the_grid_are_near_the_prediction(cost: StepCost) -> None:
    """Linear interpolation against the model itself; whole tiles make the model itself step by a few per cent."""
    for length in (23, 77, 150, 333, 471):
        exact = predict(MODEL, replace(TRAINING, seq_len=length), GPU).time
        assert exact is not None
        micro = exact.forward_s + exact.recomputation_s + exact.backward_s
        assert cost.micro_s(4, length) == pytest.approx(micro, rel=0.08)


def test_the_grid_has_both_ends() -> None:
    assert grid(7, 7, 16) == [7]
    assert grid(1, 4096, 16)[0] == 1
    assert grid(1, 4096, 16)[-1] == 4096


def test_longer_data_takes_longer(cost: StepCost) -> None:
    short, long = (closed_form(plan(Lengths([n] * 640)), cost).train_s for n in (100, 400))
    assert long > 1.5 * short


def test_out_of_memory_is_named_with_its_step() -> None:
    small = replace(GPU, memory_bytes=2 * 2**30)
    cost = StepCost(predict(MODEL, replace(TRAINING, seq_len=2048), small), 16)
    rows = Lengths([16] * 4 * 16 + [2048] * 16)
    how = Batching(batch=4, limit=2048, padding="longest")
    timeline = Timeline(Plan(lengths=rows, batching=how, accumulation=1, epochs=1), cost)
    step = timeline.out_of_memory_step()
    assert timeline.longest[step - 1] == 2048
    assert 2048 not in timeline.longest[: step - 1]
    assert any(f"out of memory in step {step}" in note for note in timeline.warnings())


# --- what is synthetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [16, 100, 1000, 52_002])
def test_fixture_21_the_synthetic_loss_is_bounded(cost: StepCost, rows: int) -> None:
    """Finite, positive and never above its start, also over the 9,753 steps of the Alpaca data."""
    timeline = Timeline(plan(Lengths([64] * rows), "max", warmup_ratio=0.03), cost)
    losses = [step.synthetic_loss for step in timeline]
    assert len(losses) == timeline.steps.total
    assert all(math.isfinite(loss) and LOWEST_LOSS <= loss <= START_LOSS for loss in losses)
    assert all(loss <= losses[0] for loss in losses)
    if rows > 1000:
        assert sum(losses[-100:]) < 0.6 * sum(losses[:100])


@settings(max_examples=200)
@given(st.floats(0, 1e6), st.integers())
def test_any_synthetic_loss_is_bounded(learned: float, seed: int) -> None:
    assert LOWEST_LOSS <= synthetic_loss(learned, random.Random(seed)) <= START_LOSS


def test_the_same_seed_gives_the_same_run(cost: StepCost) -> None:
    rows = lengths(500)
    first, again = (list(Timeline(plan(rows, seed=5), cost)) for _ in range(2))
    assert first == again
    other = list(Timeline(plan(rows, seed=6), cost))
    assert first != other
    assert [s.learning_rate for s in first] == [s.learning_rate for s in other]


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(args))
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(300):
            file.write(json.dumps({"instruction": f"Say {i}", "input": "", "output": "word " * rng.randrange(5, 200)}))
            file.write("\n")
        file.write("{broken\n")
    return str(path)


SIMULATE = ("simulate", NAME, "--gpu", "l4", "--batch", "4", "--grad-accum", "4", "--seq-len", "128")


def test_the_same_seed_gives_the_same_bytes(run: Any, data: str) -> None:
    for style in ("table", "json", "jsonl", "csv", "markdown"):
        first, again = (run(*SIMULATE, "--data", data, "--format", style) for _ in range(2))
        assert first == again
        assert first[0] == 0, first
        assert "illustration" in first[1] or style in ("jsonl", "csv")


def test_formats_hold_the_same_steps(run: Any, data: str) -> None:
    _, text, _ = run(*SIMULATE, "--data", data, "--format", "json")
    document = json.loads(text)
    _, lines, _ = run(*SIMULATE, "--data", data, "--format", "jsonl")
    _, table, _ = run(*SIMULATE, "--data", data, "--format", "csv")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert rows == document["timeline"]
    assert [float(row["elapsed_s"]) for row in csv.DictReader(io.StringIO(table))] == [r["elapsed_s"] for r in rows]
    assert document["totals"]["hours"] == pytest.approx(document["closed_form"]["hours"], rel=0.03)
    assert all(name.startswith("synthetic_") for name in rows[0] if "loss" in name or "norm" in name)


def test_a_thinned_timeline_keeps_the_totals(run: Any) -> None:
    whole, thin = (
        json.loads(run(*SIMULATE, "--rows", "1000", "--format", "json", "--every", every)[1]) for every in ("0", "50")
    )
    assert len(thin["timeline"]) < len(whole["timeline"]) == 189
    assert thin["totals"] == whole["totals"]


def test_nothing_to_train_exits_one(run: Any, flat: Any) -> None:
    code, out, _ = run(*SIMULATE, "--rows", "15", "--drop-last")
    assert code == 1
    assert "zero steps" in flat(out)


def test_a_replay_prints_every_step(run: Any) -> None:
    code, out, _ = run(*SIMULATE, "--rows", "64", "--epochs", "1", "--speed", "1e9", "--format", "jsonl")
    assert code == 0
    assert [json.loads(line)["step"] for line in out.splitlines()] == [1, 2, 3, 4]


@pytest.mark.extra
def test_pictures(run: Any, data: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        run(*SIMULATE, "--rows", "64", "--plot", str(first))
        run("data", data, "--plot", str(second))
        assert first.read_bytes().startswith(magic)
        assert second.read_bytes().startswith(magic)
    code, _, err = run("data", data, "--plot", "x.bmp")
    assert code == 2
    assert "known: .png, .svg, .pdf" in err


def test_fits_on_data(run: Any, data: str) -> None:
    base = ("fits", NAME, "--gpu", "l4", "--batch", "4", "--seq-len", "256", "--format", "json")
    documents = {
        padding: json.loads(run(*base, "--data", data, "--padding", padding, "--epochs", "2")[1])
        for padding in PADDINGS
    }
    for padding, document in documents.items():
        found = document["data"]
        assert (found["rows"], found["left_out"], found["template"]) == (300, 1, "alpaca-seed")
        assert document["configuration"]["seq_len"]["value"] == found["longest_batch"]
        assert document["run"]["optimizer_steps"] == 2 * 75 if padding != "packed" else True
    hours = {padding: document["run"]["hours"]["expected"] for padding, document in documents.items()}
    assert hours["packed"] < hours["longest"] < hours["max"]
    assert hours["grouped"] < hours["longest"]
    allocated = {padding: document["allocated"] for padding, document in documents.items()}
    assert allocated["longest"]["expected"] <= allocated["max"]["expected"]
    # what the data does not change: the same length without data allocates the same; unequal rows reserve more
    longest = documents["longest"]["data"]["longest_batch"]
    plain = json.loads(run("fits", NAME, "--gpu", "l4", "--batch", "4", "--seq-len", str(longest), "--padded",
                           "--format", "json")[1])  # fmt: skip
    assert plain["allocated"] == allocated["longest"]
    assert plain["device"] == documents["grouped"]["device"]
    assert plain["device"]["low"] <= documents["longest"]["device"]["low"]
    assert plain["device"]["expected"] < documents["longest"]["device"]["expected"]


def test_data_options_need_data(run: Any) -> None:
    code, _, err = run("fits", NAME, "--gpu", "l4", "--padding", "packed")
    assert code == 2
    assert "give --data too" in err
    code, _, err = run("fits", NAME, "--gpu", "l4", "--data", "missing.jsonl")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("data", "missing.jsonl"),
        ("data",),
        ("simulate", NAME, "--gpu", "l4"),
        ("simulate", NAME, "--gpu", "l4", "--rows", "10", "--schedule", "square"),
        ("simulate", NAME, "--gpu", "l4", "--rows", "10", "--lr", "-1"),
        ("simulate", NAME, "--gpu", "l4", "--rows", "10", "--epochs", "0"),
        ("simulate", NAME, "--gpu", "l4", "--rows", "10", "--warmup-steps", "3", "--warmup-ratio", "0.1"),
        ("lora", NAME, "--method", "full"),
        ("lora", NAME, "--with", "entrenar"),
        ("lora", NAME, "--lab", "5.1"),
        ("lora", NAME, "--rank", "0"),
        ("export", "peft"),
        ("export", "keras", NAME),
        ("export", "peft", NAME, "--part", "x"),
        ("export", "databricks-air", NAME, "--accelerator", "GPU_8xH100", "--num-accelerators", "4"),
        ("export", "databricks-fm", "--check-call", "missing.json"),
    ],
)
def test_what_cannot_be_answered_is_one_line_and_exit_two(run: Any, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert not out
    errors = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert "internal error" not in err


def test_fixture_18_bf16_on_a_t4_is_warned_about(run: Any) -> None:
    _, out, _ = run("simulate", NAME, "--gpu", "t4", "--rows", "64", "--autocast", "bf16")
    assert "Tesla T4 has no bf16 tensor cores: use fp16" in " ".join(out.split())


def test_fixture_12_a_70b_qlora_does_not_fit_24_gb(run: Any) -> None:
    code, out, _ = run("fits", "meta-llama/Llama-2-70b-hf", "--vram", "24GB", "--no-changes")
    assert code == 1
    assert out.startswith("NO")


def test_labs(run: Any, data: str) -> None:
    first = json.loads(run("lora", NAME, "--lab", "5.1", "--data", data)[1])
    assert (first["samples"], first["train"], first["validation"]) == (300, 270, 30)
    assert first["first"].startswith("### Instruction:\nSay 0\n\n### Response:\n")
    second = json.loads(run("lora", "meta-llama/Llama-2-7b-hf", "--lab", "5.2", "--targets", "q_proj,v_proj")[1])
    assert (second["scaling_factor"], second["estimated_params"], second["exact_params"]) == (2.0, 4_194_304, 4_194_304)
    assert round(second["share_of_model"] * 100, 3) == 0.062
    third = json.loads(run("lora", "meta-llama/Meta-Llama-3-8B", "--lab", "5.2", "--targets", "q_proj,v_proj")[1])
    assert (third["estimated_params"], third["exact_params"]) == (4_194_304, 3_407_872)
    config = json.loads(run("lora", NAME, "--lab", "5.3", "--batch", "4", "--grad-accum", "4")[1])
    assert list(config) == ["model", "lora", "training", "data"]
    assert config["training"]["effective_batch_size"] == 16


def test_entrenar_beside_ours(run: Any) -> None:
    document = json.loads(
        run("lora", "meta-llama/Llama-2-70b-hf", "--with", "entrenar", "--vram", "24GB", "--format", "json")[1]
    )
    theirs = document["entrenar"]
    assert theirs["rank"] == 64
    assert theirs["fits"] is False
    assert theirs["utilization"] > 3
    assert theirs["ours"]["verdict"] == theirs["asked_for"]["verdict"] == "does not fit"
    assert any("cannot be reached" in note for note in theirs["notes"])


def test_compare_with_entrenar(run: Any) -> None:
    code, out, _ = run("compare", "--with", "entrenar", "--model", NAME, "--gpu", "l4", "method=qlora", "method=lora")
    assert code == 0
    assert [line[:2] for line in out.splitlines() if line.startswith(("A:", "B:"))] == ["A:", "B:"]
    answers = json.loads(
        run("compare", "--with", "entrenar", "--model", NAME, "--gpu", "l4", "method=qlora", "--format", "json")[1]
    )["entrenar"]
    plan = rivals.entrenar_plan(MODEL.num_parameters, GPU.memory_bytes, "qlora")
    assert answers[0]["memory_bytes"] == plan.memory_bytes
    code, _, err = run("compare", "--with", "entrenar", "--model", NAME, "method=qlora")
    assert code == 2
    assert "needs a card" in err


@pytest.mark.extra
def test_max_and_pick_on_data(run: Any, data: str) -> None:
    """The data's longest row decides the batch, its distribution the hours."""
    _, text, _ = run("max", NAME, "--gpu", "l4", "--data", data, "--seq-len", "256", "--format", "json")
    (found,) = json.loads(text)["rows"]
    longest = json.loads(run("fits", NAME, "--gpu", "l4", "--data", data, "--seq-len", "256", "--format", "json")[1])
    length = str(longest["data"]["longest_batch"])
    (same,) = json.loads(run("max", NAME, "--gpu", "l4", "--seq-len", length, "--format", "json")[1])["rows"]
    assert found["micro_batch_size"] == same["micro_batch_size"]
    assert run("max", NAME, "--gpu", "l4", "--data", data, "--of", "length")[0] == 2
    args = ("--data", data, "--epochs", "2", "--batch", "4", "--seq-len", "256", "--format", "json")
    _, text, _ = run("pick", NAME, "--gpu", "l4", *args)
    picked = json.loads(text)["rows"][0]
    planned = json.loads(run("fits", NAME, "--gpu", "l4", *args)[1])["run"]
    assert picked["hours"] == pytest.approx(planned["hours"]["expected"], rel=1e-9)
    assert run("pick", NAME, "--data", data, "--tokens", "5M")[0] == 2
