"""Validation: the mapping of table rows, the scoring arithmetic, and hostile tables. The predictor is a fake."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import InvalidInput, PlannerError, UnknownName
from planner.cli.main import cli
from planner.facts import measurements
from planner.facts.measurements import COLUMNS, parse_measurements, select
from planner.plan import published_rows, validation
from planner.plan.published_rows import NotScored, row_flags, row_options
from planner.plan.validation import score
from planner.training import stacks
from planner.training.spec import TrainingSpec

BASE = {
    "id": "x-1", "source": "x", "model": "org/model", "framework": "peft-loop", "method": "lora",
    "quantization": "none", "quantized_modules": "none", "base_dtype": "bf16", "compute_dtype": "bf16",
    "autocast": "none", "adapter_dtype": "fp32", "rank": "16", "alpha": "32", "dropout": "0.05",
    "target_modules": "q_proj;v_proj", "micro_batch": "2", "grad_accum": "4", "seq_len": "1024",
    "packing": "true", "checkpointing": "full", "attention": "sdpa", "loss": "full-logits-fp32",
    "optimizer": "adamw", "compile": "false", "gpu": "t4", "num_gpus": "1", "parallel": "single",
    "cpu_offload": "false", "outcome": "ok", "allocated_bytes_low": "100", "allocated_bytes_high": "110",
    "confidence_memory": "A",
}  # fmt: skip


def make(**changes: str) -> dict[str, str]:
    return {**dict.fromkeys(COLUMNS, ""), **BASE, **changes}


def table(*rows: dict[str, str], header: tuple[str, ...] = COLUMNS) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[row.get(column, "") for column in header] for row in rows])
    return out.getvalue().encode()


@dataclass
class Bounds:
    low: float
    expected: float
    high: float


@dataclass
class Fake:
    allocated: Bounds
    reserved: Bounds
    device: Bounds
    step_s: Bounds | None = None
    verdict: str | None = "fits"
    warnings: tuple[str, ...] = ()


def fake(
    allocated: int = 105, reserved: int = 150, device: int = 200, step: float | None = None,
    verdict: str | None = "fits",
) -> Fake:  # fmt: skip
    a, r, d = (Bounds(v - 5, v, v + 5) for v in (allocated, reserved, device))
    return Fake(a, r, d, None if step is None else Bounds(step / 2, step, step * 2), verdict)


def run(*rows: dict[str, str], answer: Fake | None = None, **options: Any) -> validation.Report:
    return score(rows, lambda *_: answer or fake(), **options)


def built(**changes: str) -> TrainingSpec:
    options = row_options(make(**changes))
    stack = options.pop("stack")
    return stacks.to_training_spec(stacks.resolve(stack, method=options["method"], given=options))


# Mapping


def test_filled_cells_become_given_values() -> None:
    options = row_options(make())
    assert options["stack"] == "peft-loop"
    resolved = stacks.resolve("peft-loop", method="lora", given={k: v for k, v in options.items() if k != "stack"})
    given = {key for key, setting in resolved.settings.items() if setting.origin == "given"}
    assert {"r", "lora_alpha", "lora_dropout", "micro_batch_size", "seq_len", "autocast", "loss"} <= given
    training = stacks.to_training_spec(resolved)
    assert training.lora is not None
    assert (training.lora.r, training.lora.lora_alpha, training.lora.target_modules) == (16, 32.0, ("q_proj", "v_proj"))
    assert (training.micro_batch_size, training.gradient_accumulation_steps, training.seq_len) == (2, 4, 1024)


def test_empty_cells_are_left_to_the_framework() -> None:
    training = built(framework="trl", method="qlora", quantization="nf4", autocast="", adapter_dtype="", rank="")
    assert training.lora is not None
    assert (training.lora.r, training.lora.dtype, training.autocast) == (16, "bf16", "bf16")


def test_a_full_row_has_no_adapter() -> None:
    assert built(method="full").lora is None


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("method", "prefix"), ("quantization", "hqq"), ("attention", "ring"), ("loss", "huge"), ("optimizer", "muon"),
        ("kernels", "secret"), ("checkpointing", "some"), ("outcome", "maybe"), ("token_convention", "words"),
        ("time_scope", "epoch"), ("confidence_memory", "D"), ("packing", "yes"), ("parallel", "pipeline"),
        ("autocast", "fp8"), ("quantized_modules", "half"), ("compile", "TRUE"),
    ],
)  # fmt: skip
def test_unknown_values_are_named(column: str, value: str) -> None:
    report = run(make(**{column: value}))
    assert report.skipped == (("x-1", f"unknown {column} '{value}'"),)
    assert not report.comparisons


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_gpus": "4", "parallel": "fsdp"}, "4 GPUs"),
        ({"parallel": "zero3"}, "parallel zero3"),
        ({"cpu_offload": "true"}, "parameters on the CPU"),
        ({"quantization": "other"}, "quantization other is not modelled"),
        ({"checkpointing": "selective"}, "checkpointing selective is not modelled"),
        ({"seq_len": ""}, "no sequence length given"),
        ({"method": ""}, "no method given"),
        ({"torch": "nightly"}, "torch version is 'nightly'"),
    ],
)
def test_what_is_not_modelled_is_skipped_with_its_reason(changes: dict[str, str], reason: str) -> None:
    (skipped,) = run(make(**changes)).skipped
    assert skipped.reason.startswith(reason)


def test_unlisted_frameworks_are_scored_and_flagged() -> None:
    report = run(make(framework="new\x1bframe"))
    assert len(report.comparisons) == 1
    assert report.flagged[0].reason.startswith("framework new\\x1bframe: scored with the habits")
    assert row_options(make(framework="nobody"))["stack"] == "custom"
    assert row_options(make(framework="custom"))["stack"] == "custom"


def test_the_upper_bound_of_the_length_is_used_and_flagged() -> None:
    row = make(seq_len="", seq_len_max="768")
    assert row_options(row)["seq_len"] == 768
    assert row_flags(row)[0] == "padded length unknown: scored at its upper bound 768"


def test_unstated_upcast_is_fp32_unless_a_kernel_reads_the_logits() -> None:
    assert built(loss="full-logits").loss == "full-logits-fp32"
    assert built(loss="full-logits", kernels="fms-fused", framework="fms").loss == "full-logits"
    assert built(loss="", framework="torchtune").loss == "chunked"


def test_the_optimizer_column_tells_state_dtype_not_implementation() -> None:
    assert built(framework="torchtune", method="full", optimizer="adamw-bf16-states").optimizer == "adamw-fused"
    assert built(framework="fms", optimizer="adamw").optimizer == "adamw"
    assert built(framework="hf-trainer", optimizer="adamw", transformers="4.48.1").optimizer == "adamw"
    assert built(optimizer="paged-adamw-8bit").optimizer == "paged-adamw-8bit"
    assert not built(framework="torchtune", method="full", grad_accum="1").optimizer_in_backward


def test_settings_without_a_column_come_from_the_fixed_wording() -> None:
    note = "counter is torch active peak; optimizer step fused into backward"
    row = {"framework": "torchtune", "method": "full", "grad_accum": "1"}
    assert built(notes=note, **row).optimizer_in_backward
    training = built(notes="rsLoRA scaling; x")
    assert training.lora is not None
    assert training.lora.use_rslora
    nf4 = {"framework": "fms", "method": "qlora", "quantization": "nf4", "notes": "baseline-peft-bnb"}
    assert built(**nf4).fp32_norms_only
    assert not built(**{**nf4, "notes": "accelerated-peft-bnb"}).fp32_norms_only


def test_a_stated_base_dtype_leaves_nothing_to_kbit_preparation() -> None:
    nf4 = {"method": "qlora", "quantization": "nf4"}
    assert built(**nf4, base_dtype="").kbit_preparation
    stated = built(**nf4, base_dtype="bf16")
    assert (stated.kbit_preparation, stated.base_dtype) == (False, "bf16")


def test_padding_masks_exist_where_rows_are_padded_in_transformers() -> None:
    padded = {"packing": "false", "mean_tokens_per_row": "209.9"}
    assert built(**padded).padded
    assert not built(**padded, micro_batch="1").padded
    assert not built(**padded, framework="litgpt").padded
    assert not built(packing="false").padded
    assert not built(packing="true", mean_tokens_per_row="900").padded


def test_rules_do_not_know_sources_or_ids() -> None:
    for key in ("id", "source"):
        assert row_options(make(**{key: "fms-a100"})) == row_options(make(**{key: "anything"}))


# Scoring


@pytest.mark.parametrize(
    ("predicted", "expected"), [(100, 0.0), (105, 0.0), (110, 0.0), (90, -10.0), (121, 10.0), (1, -99.0)]
)
def test_error_is_to_the_nearer_end(predicted: int, expected: float) -> None:
    assert validation.signed_error_pct(predicted, 100, 110) == pytest.approx(expected)


def test_each_counter_is_compared_with_its_own_prediction() -> None:
    row = make(
        reserved_bytes_low="300", reserved_bytes_high="300", device_bytes_low="100", device_bytes_high="100",
        unspecified_bytes_low="203", unspecified_bytes_high="300",
    )  # fmt: skip
    found = {c.quantity: c for c in run(row).comparisons}
    assert {q: c.predicted for q, c in found.items()} == {
        "allocated": 105, "reserved": 150, "device": 200, "unspecified": 150,
    }  # fmt: skip
    assert found["reserved"].error_pct == -50.0
    assert found["device"].error_pct == 100.0
    assert {q: c.covered for q, c in found.items()} == {
        "allocated": True, "reserved": False, "device": False, "unspecified": True,
    }  # fmt: skip


def test_groups_and_the_mean_over_sources() -> None:
    rows = [
        make(id="a", allocated_bytes_low="210", allocated_bytes_high="210"),  # -50 %
        make(id="b", allocated_bytes_low="105", allocated_bytes_high="105"),  # exact
        make(id="c", allocated_bytes_low="84", allocated_bytes_high="84"),  # +25 %
        make(id="d", source="y", allocated_bytes_low="70", allocated_bytes_high="70"),  # +50 %
    ]
    report = run(*rows).to_json()
    assert list(report) == ["schema_version", "groups", "verdicts", "skipped", "flagged"]
    assert json.loads(json.dumps(report)) == report
    x, y, every = report["groups"]
    assert x == {
        "source": "x", "quantity": "allocated", "n": 3, "mean_abs_pct": 25.0, "median_abs_pct": 25.0,
        "worst_under_pct": -50.0, "worst_over_pct": 25.0, "coverage": pytest.approx(1 / 3),
    }  # fmt: skip
    assert (y["n"], y["mean_abs_pct"], y["worst_under_pct"]) == (1, 50.0, 0.0)
    assert (every["source"], every["n"], every["mean_abs_pct"]) == ("*", 4, 37.5)
    assert (every["worst_under_pct"], every["worst_over_pct"]) == (-50.0, 50.0)


def test_verdicts() -> None:
    oom = {"outcome": "oom", "allocated_bytes_low": "", "allocated_bytes_high": ""}
    rows = [make(id="1"), make(id="2", **oom)]
    none = dict.fromkeys(validation.VERDICT_COUNTS, 0)
    assert run(*rows, answer=fake(verdict="does not fit")).verdicts == {**none, "oom_right": 1, "ok_wrong": 1}
    assert run(*rows, answer=fake(verdict="fits")).verdicts == {**none, "oom_wrong": 1, "ok_right": 1}
    close = run(*rows, answer=fake(verdict="too close to call"))
    assert close.verdicts == {**none, "oom_undecided": 1, "ok_undecided": 1}
    assert close.judged() == {"right": 0, "wrong": 0, "undecided": 2}


def test_a_row_without_a_card_is_scored_for_memory_only() -> None:
    seen: list[Any] = []

    def predict(options: dict[str, Any], model: str, gpu: str | None) -> Fake:
        seen.append((model, gpu))
        return fake(step=1.0, verdict=None)

    rows = [make(id="1", gpu="", optimizer_step_s="1.5"), make(id="2", gpu="", outcome="oom", seq_len="512")]
    report = score(rows, predict)
    assert seen == [("org/model", None)] * 2
    assert [c.quantity for c in report.comparisons] == ["allocated"]
    assert [s.reason for s in report.skipped] == [
        "time without a named card",
        "out of memory on a card of unknown size (not named)",
    ]
    assert sum(report.verdicts.values()) == 0


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"tokens_per_s_per_gpu": "4096", "token_convention": "computed", "optimizer_step_s": "9"}, 2.0),
        ({"tokens_per_s_per_gpu": "400", "token_convention": "useful", "mean_tokens_per_row": "200"}, 4.0),
        (
            {"tokens_per_s_per_gpu": "400", "token_convention": "unknown", "packing": "false", "optimizer_step_s": "9"},
            9.0,
        ),
        ({"tokens_per_s_per_gpu": "4096", "token_convention": "unknown"}, 2.0),
        ({"optimizer_step_s": "0.5"}, 0.5),
        ({"micro_step_s": "0.5"}, 2.0),
        ({}, None),
    ],
)
def test_published_time_becomes_seconds_per_optimizer_step(changes: dict[str, str], seconds: float | None) -> None:
    assert published_rows.published_step_s(make(**changes)) == seconds


def test_time_is_scored_where_the_prediction_has_it() -> None:
    row = make(optimizer_step_s="2", confidence_time="A")
    (item,) = (c for c in run(row, answer=fake(step=1.0)).comparisons if c.quantity == "time")
    assert (item.error_pct, item.covered) == (-50.0, True)
    assert all(c.quantity != "time" for c in run(row).comparisons)
    for changes, reason in (
        ({"time_scope": "fwd-bwd"}, "time without the optimizer step (fwd-bwd)"),
        (
            {"optimizer_step_s": "", "tokens_per_s_per_gpu": "5", "packing": "false"},
            "speed in tokens of unknown number per step",
        ),
    ):
        assert run({**row, **changes}, answer=fake(step=1.0)).skipped == (("x-1", reason),)


def test_confidence_c_is_left_out_unless_asked_for() -> None:
    row = make(confidence_memory="C", confidence_time="C", optimizer_step_s="2")
    report = run(row, answer=fake(step=1.0))
    assert not report.comparisons
    assert sum(report.verdicts.values()) == 0
    assert [s.reason for s in report.skipped] == ["confidence C", "confidence C (time)"]
    loose = run(row, answer=fake(step=1.0), include_loose=True)
    assert len(loose.comparisons) == 2
    assert not loose.skipped
    assert [s.reason for s in loose.flagged][-2:] == ["confidence C", "confidence C (time)"]


def test_equal_configurations_are_predicted_once_and_refusals_become_reasons() -> None:
    calls: list[str] = []

    def predict(options: dict[str, Any], model: str, gpu: str | None) -> Fake:
        calls.append(model)
        raise UnknownName(f"unknown model {model}")

    rows = [make(id="1"), make(id="2"), make(id="3", model="org/other")]
    report = score(rows, predict)
    assert calls == ["org/model", "org/other"]
    assert [s.reason for s in report.skipped] == ["unknown model org/model"] * 2 + ["unknown model org/other"]


# Reading and selecting


def test_round_trip_and_filters() -> None:
    rows = parse_measurements(b"\xef\xbb\xbf" + table(make(id="1"), make(id="2", source="y", gpu="")))
    assert [row["id"] for row in rows] == ["1", "2"]
    assert [row["id"] for row in select(rows, sources=["y"])] == ["2"]
    assert [row["id"] for row in select(rows, where=["gpu=t4", "method=lora"])] == ["1"]
    assert [row["id"] for row in select(rows, where=["gpu="])] == ["2"]
    with pytest.raises(UnknownName, match="unknown source 'z'"):
        select(rows, sources=["z"])
    with pytest.raises(UnknownName, match="unknown column 'metod'; did you mean method"):
        select(rows, where=["metod=lora"])
    with pytest.raises(InvalidInput, match="not COLUMN=VALUE"):
        select(rows, where=["method"])


def test_columns_may_come_in_any_order() -> None:
    assert parse_measurements(table(make(), header=tuple(reversed(COLUMNS))))[0] == make()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n", "line 1: column id is missing"),
        (b"a,b\n1,2\n", "line 1: unknown column 'a'"),
        (table(header=COLUMNS[1:]), "line 1: column id is missing"),
        (table(header=(*COLUMNS, "notes")), "line 1: column notes occurs twice"),
        (table(make(), make()), "line 3: id 'x-1' occurs twice"),
        (table(make(id="")), "line 2: id is empty"),
        (table(make()) + b"x,y\n", "line 3: 2 cells"),
        (table(make(rank="-4")), "line 2: rank is '-4'; must be a whole number"),
        (table(make(rank="1" * 16)), "line 2: rank is"),
        (table(make(rank="\u0664".encode().decode())), "line 2: rank is"),
        (table(make(alpha="nan")), "line 2: alpha is 'nan'; must be a decimal number"),
        (table(make(dropout="1e-3")), "line 2: dropout is"),
        (table(make(allocated_bytes_low="")), "line 2: allocated_bytes is"),
        (table(make(allocated_bytes_low="120")), "line 2: allocated_bytes is"),
        (table(make(allocated_bytes_low="0")), "line 2: allocated_bytes is"),
        (table(make(notes="a\nb")), "line 3: notes is too long or not printable"),
        (table(make(notes="x" * 2001)), "line 2: notes is too long"),
        (table(make(notes="y" * 200_000)), "line 2: not CSV"),
        (table(make()) + b'"abc\n', "line 3: not CSV"),
        (table(make()) + b"\xff\n", "line 3: not UTF-8"),
        (b"x" * (64 * 2**20 + 1), "larger than 64 MiB"),
    ],
)  # fmt: skip
def test_broken_tables_are_refused_with_the_line(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_measurements(data)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_mutated_tables_never_give_another_error() -> None:
    whole = table(make(), make(id="2", method="qlora", quantization="nf4"))
    rng = random.Random(7)
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            choice = rng.randrange(3)
            if choice == 0:
                data[at] = rng.randrange(256)
            elif choice == 1:
                del data[at : at + rng.randint(1, 40)]
            else:
                data[at:at] = rng.choice([b'"', b",", b"\n", b"\0", b"9" * 30, b"-", b"\xf0"])
        json.dumps(outcome(bytes(data)))


def outcome(data: bytes) -> Any:
    try:
        return run(*parse_measurements(data)).to_json()
    except PlannerError as error:
        return str(error)


def test_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(table(make()))
    assert measurements.read_measurements(path) == [make()]
    with pytest.raises(InvalidInput, match="cannot read"):
        measurements.read_measurements(tmp_path / "none.csv")
    with pytest.raises(InvalidInput, match="cannot read"):
        measurements.read_measurements(tmp_path)


def test_not_scored_is_the_only_refusal_of_a_row() -> None:
    with pytest.raises(NotScored, match="unknown method 'x'"):
        row_options(make(method="x"))


# A table from elsewhere


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({}, "no library release given: the newest are assumed"),
        (
            {"torch": "2.1.1", "method": "qlora", "quantization": "nf4"},
            "library releases of the time of those given: transformers 4.37, peft 0.7, bitsandbytes 0.42",
        ),
        ({"torch": "2.4.1", "transformers": "4.45.2", "peft": "0.13.2"}, ""),  # no bitsandbytes in the run
        ({"method": "full", "torch": "2.9", "transformers": "4.57"}, ""),
    ],
)
def test_assumed_releases_are_flagged(changes: dict[str, str], flag: str) -> None:
    assert row_flags(make(**changes)) == ((flag,) if flag else ())


def test_a_table_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real predictor on rows that no source here has: each is scored, or skipped with its reason."""
    size = str(4 * 2**30)
    known = make(model="HuggingFaceTB/SmolLM2-360M", allocated_bytes_low=size, allocated_bytes_high=size)
    rows = [
        {**known, "id": "framework", "framework": "homegrown-trainer"},
        {**known, "id": "no-card", "gpu": ""},
        {**known, "id": "no-card-oom", "gpu": "", "outcome": "oom"},
        {**known, "id": "card", "gpu": "voodoo-3"},
        {**known, "id": "value", "attention": "ring"},
        {**known, "id": "optimizer", "optimizer": "muon"},
        {**known, "id": "model", "model": "nobody/nothing-9b"},
        {**known, "id": "gpus", "num_gpus": "4", "parallel": "fsdp"},
        {**known, "id": "old", "torch": "2.1.0"},
        {**known, "id": "release", "torch": "nightly"},
    ]
    path = tmp_path / "elsewhere.csv"
    path.write_bytes(table(*rows))
    with pytest.raises(SystemExit) as stop:
        cli.main(["validate", str(path), "--rows", "--format", "json"])
    document = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    scored = {row["id"] for row in document["rows"]}
    assert scored == {"framework", "no-card", "card", "old"}
    reasons = {item["id"]: item["reason"] for item in document["skipped"]}
    assert reasons.keys() == {row["id"] for row in rows} - scored
    assert reasons["value"] == "unknown attention 'ring'" and reasons["optimizer"] == "unknown optimizer 'muon'"
    assert "unknown model 'nobody/nothing-9b'" in reasons["model"] and "4 GPUs" in reasons["gpus"]
    assert "unknown size" in reasons["no-card-oom"] and "'nightly'" in reasons["release"]
    flags = {(item["id"], item["reason"].partition(":")[0]) for item in document["flagged"]}
    assert ("framework", "framework homegrown-trainer") in flags
    assert ("old", "library releases of the time of those given") in flags
