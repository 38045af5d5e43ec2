"""What a plan's user must see is printed by every command that takes a model, a new command's included.

The commands are read from the click group: one that takes a model, a config, a card or a calibration is called with
each kind of note, as text and as JSON. A command that needs more than that needs a line in MORE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from planner.cli.main import cli
from planner.facts import calibration_files, catalog
from planner.timing import coefficients

pytestmark = pytest.mark.extra

GEMMA = "google/gemma-3-4b-it"
TOWER = "vision tower not included"
UNMODELLED = "relora"
NAMES_SEVERAL = "names several cards"
CONFIG = f"""\
base_model: {GEMMA}
adapter: qlora
load_in_4bit: true
sequence_len: 512
lora_r: 8
lora_target_modules: [q_proj, v_proj]
micro_batch_size: 1
gradient_accumulation_steps: 1
optimizer: adamw_torch
gradient_checkpointing: true
relora: true
"""
MORE: dict[str, list[str]] = {
    "simulate": ["--rows", "8"],
    "trace": ["--layers", "1"],
    "compare": ["batch=1", "batch=2"],
    "report": ["-o", "REPORT"],
    "lint": ["CONFIG"],
    "data": ["DATA"],
}
"""What a command needs beside its model."""
ON_A_CARD = ("table", "max")
"""Commands that say what they need when no card is named."""
FIRST = {"export": ["peft"]}
"""Arguments before the model."""
MEASURES = ("calibrate run",)
"""Runs bursts of real training for minutes: its notes have a test of their own below."""


def commands(group: click.Group = cli, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command with its words."""
    context = click.Context(group)
    for name in group.list_commands(context):
        child = group.get_command(context, name)
        assert child is not None
        if isinstance(child, click.Group):
            yield from commands(child, (*words, name))
        else:
            yield " ".join((*words, name)), child


def parameter(command: click.Command, *names: str) -> click.Parameter | None:
    return next((found for found in command.params if found.name in names), None)


def with_model() -> list[str]:
    found = [
        name
        for name, command in commands()
        if parameter(command, "model", "models", "configs", "base_model", "model_id") is not None
    ]
    assert len(found) > 12
    return [name for name in found if name not in MEASURES]


def those_with(*names: str) -> list[str]:
    chosen = [name for name, command in commands() if parameter(command, *names) is not None]
    return [name for name in with_model() if name in chosen]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Call a command with a model or a config and whatever else it needs; return all that it printed or wrote."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, data, report = tmp_path / "qlora.yml", tmp_path / "rows.jsonl", tmp_path / "report.html"
    config.write_text(CONFIG, encoding="utf-8")
    data.write_text('{"text": "a row"}\n' * 4, encoding="utf-8")
    stand_ins = {"CONFIG": str(config), "DATA": str(data), "REPORT": str(report)}
    every = dict(commands())

    def run(name: str, *options: str, model: str | None = GEMMA, style: str = "") -> str:
        command, words = every[name], [*name.split(), *FIRST.get(name, [])]
        place = parameter(command, "model", "models")
        if model is None:
            if place is None or parameter(command, "configs") is not None:
                options = ("--from", str(config), *options)
        elif isinstance(place, click.Argument):
            words.append(model)
        elif place is not None:
            options = ("--model", model, *options)
        words += [stand_ins.get(word, word) for word in MORE.get(name, [])]
        card = parameter(command, "gpu")
        if "--gpu" not in options and (name in ON_A_CARD or (card is not None and card.required)):
            options = ("--gpu", "l4", *options)
        if style and parameter(command, "style") is not None:
            options = (*options, "--format", style)
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *options])
        captured = capsys.readouterr()
        written = report.read_text(encoding="utf-8") if report.exists() else ""
        assert stop.value.code in (0, 1), captured.err
        has_style = style == "json" and parameter(command, "style") is not None
        return captured.out if has_style else captured.out + captured.err + written

    return run


def plain(text: str) -> str:
    """Text without regard to where its lines break."""
    return " ".join(text.replace("&#x27;", "'").split())


def warnings_in(document: str) -> str:
    """All that stands under a key `warnings` of a JSON document."""
    found: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "warnings" in value:
                found.append(value["warnings"])
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                walk(item)

    walk(json.loads(document))
    return json.dumps(found)


@pytest.mark.parametrize("name", with_model())
def test_a_note_of_the_model_is_printed(call: Any, name: str) -> None:
    assert TOWER in plain(call(name))


@pytest.mark.parametrize("name", those_with("style"))
def test_a_note_of_the_model_is_in_the_json(call: Any, name: str) -> None:
    assert TOWER in warnings_in(call(name, style="json"))


@pytest.mark.parametrize("style", ["csv", "markdown"])
@pytest.mark.parametrize("name", [name for name in those_with("style") if name != "trace"])
def test_a_note_of_the_model_is_said_beside_rows_and_in_documents(call: Any, name: str, style: str) -> None:
    assert TOWER in plain(call(name, style=style))


@pytest.mark.parametrize("name", those_with("configs"))
def test_a_setting_of_a_config_that_is_not_modelled_is_named(call: Any, name: str) -> None:
    assert f"{UNMODELLED}: ReLoRA's restarts" in plain(call(name, model=None))


@pytest.mark.parametrize("name", [name for name in those_with("gpu", "gpus") if name != "lora"])
def test_a_card_whose_name_leaves_something_open_is_said(call: Any, name: str) -> None:
    assert NAMES_SEVERAL in plain(call(name, "--gpu", "a100"))


@pytest.mark.parametrize("name", those_with("calibration"))
def test_a_borrowed_calibration_is_said(call: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = plain(call(name, "--gpu", "h100-sxm5-80gb"))
    assert "borrowed from NVIDIA H200" in shown
    assert "calibrated on h100" not in shown


def test_the_lab_s_document_and_the_rival_s_have_the_notes(call: Any) -> None:
    assert TOWER in warnings_in(call("lora", "--lab", "5.2", style="json"))
    assert NAMES_SEVERAL in plain(call("lora", "--with", "entrenar", "--gpu", "a100"))


@pytest.mark.parametrize("style", ["table", "csv", "markdown", "github", "json"])
def test_several_configs_print_their_notes(call: Any, tmp_path: Path, style: str) -> None:
    other = tmp_path / "other.yml"
    other.write_text(CONFIG.replace("relora: true", "").replace(GEMMA, "Qwen/Qwen2.5-0.5B"), encoding="utf-8")
    shown = plain(call("fits", str(other), "--gpu", "l4", "--format", style, model=str(tmp_path / "qlora.yml")))
    assert TOWER in shown
    assert UNMODELLED in shown
    if style in ("table", "csv", "markdown"):
        assert "warning (1 of 2 files): vision tower" in shown


def test_a_measured_job_prints_the_notes_of_its_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from calibrate.measure import job as measured
    from planner.base.errors import InvalidInput
    from planner.cli.terminal import echo_notes
    from planner.importers import read_job

    path = tmp_path / "qlora.yml"
    path.write_text(CONFIG, encoding="utf-8")

    def refuse(_: Any) -> None:
        raise InvalidInput("nothing is measured here")

    monkeypatch.setattr(measured, "refuse", refuse)
    monkeypatch.setattr(measured, "device_gpu", lambda _: catalog.gpu("a100"))
    with pytest.raises(InvalidInput, match="nothing is measured here"):
        device: Any = SimpleNamespace(identity=lambda: None)
        measured.one_job(read_job((str(path),)), device, device, echo_notes)
    shown = plain(capsys.readouterr().out)
    assert TOWER in shown
    assert UNMODELLED in shown
    assert NAMES_SEVERAL in shown


def test_a_table_says_a_note_once_with_its_rows(call: Any) -> None:
    shown = plain(call("table", "microsoft/phi-2", "--gpu", "l4", "--batch", "1,2"))
    assert shown.count(TOWER) == 1
    assert f"warning (2 of 4 rows): {TOWER}" in shown
    document = json.loads(call("table", "microsoft/phi-2", "--gpu", "l4", "--batch", "1..40", style="json"))
    assert [(item["rows"], TOWER in item["text"]) for item in document["warnings"]] == [(40, True)]


def test_the_calibration_of_several_cards_is_worded_in_one_place() -> None:
    cards = [catalog.gpu(name) for name in ("h200", "h100-sxm5-80gb", "l4")]
    h200, chosen = cards[0].gpu_id, calibration_files.select_each(cards)
    assert [chosen[card.gpu_id].borrowed for card in cards] == [False, True, False]
    label = chosen[h200].coefficients.label.removeprefix("calibrated on ")
    assert coefficients.time_words(chosen) == (
        f"time calibrated on {h200}; h100-sxm5-80gb not calibrated: dimensionless coefficients borrowed from {label}, "
        "intervals wider, elsewhere from data sheets"
    )
    assert coefficients.time_words({"l4": chosen["l4"]}) == "time from data sheets, not calibrated on these cards"
    assert coefficients.time_words({h200: chosen[h200]}) == f"time calibrated on {h200}"
    assert chosen["h100-sxm5-80gb"].notes[0].endswith(coefficients.borrowed_words(label))


def test_a_table_does_not_call_a_borrowed_calibration_its_own(call: Any) -> None:
    shown = plain(call("table", "--gpu", "h100-sxm5-80gb", model="Qwen/Qwen2.5-VL-72B-Instruct-AWQ"))
    assert "time calibrated on" not in shown
    assert "h100-sxm5-80gb not calibrated: dimensionless coefficients borrowed from NVIDIA H200" in shown
