"""What is proposed when a run does not fit: it fits, it is no more than needed, and it can be pasted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.device.hardware import Gpu
from planner.facts import catalog, sources
from planner.model.families import build_spec
from planner.plan import search
from planner.plan.configure import configure
from planner.plan.models import load_model
from planner.plan.predict import predict
from planner.training import stacks
from planner.training.spec import TrainingSpec

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def llama():
    loaded = sources.load_config(LLAMA)
    return build_spec(loaded.config, model_id=loaded.model_id)


def _training(model, **given) -> TrainingSpec:
    return configure(model, given.pop("stack", "custom"), given)[1]


def _card(gib: float) -> Gpu:
    return Gpu(gpu_id="custom", name="card", memory_bytes=int(gib * 2**30), memory_basis="user")


def _changes(model, card, **given):
    found = predict(model, _training(model, **given), card)
    return found, search.nearest_changes(found, catalog.gpus())


def test_a_run_that_fits_needs_no_change(llama):
    found = predict(llama, _training(llama), _card(80))
    assert found.verdict == "fits"
    assert search.nearest_changes(found, catalog.gpus()) == ()
    assert search.nearest_changes(predict(llama, _training(llama)), catalog.gpus()) == ()


@pytest.mark.parametrize(
    ("gib", "given", "key"),
    [
        (16, {"gradient_checkpointing": "none", "seq_len": 512, "micro_batch_size": 4}, "gradient_checkpointing"),
        (16, {"micro_batch_size": 16, "seq_len": 1024}, "micro_batch_size"),
        (16, {"method": "lora"}, "quantization"),
        (24, {"method": "full"}, "method"),
        (11.5, {"seq_len": 3072}, "loss"),
        (24, {"attention": "eager", "seq_len": 12288, "loss": "fused"}, "attention"),
        (72, {"method": "full", "optimizer": "adamw"}, "optimizer"),
    ],
)
def test_the_obvious_change_is_proposed_and_makes_it_fit(llama, gib, given, key):
    found, changes = _changes(llama, _card(gib), **given)
    assert found.verdict != "fits"
    assert any(key in dict(change.settings) for change in changes), [change.text for change in changes]


def test_proposals_fit_when_they_are_made(llama):
    card = _card(20)
    given = {"gradient_checkpointing": "none", "micro_batch_size": 8, "seq_len": 1024}
    found, changes = _changes(llama, card, **given)
    assert found.verdict == "does not fit"
    assert changes
    for change in changes:
        again = predict(llama, _training(llama, **{**given, **dict(change.settings)}), change.gpu or card)
        assert again.verdict == "fits", change.text
        assert again.device.expected == change.device.expected


def test_a_smaller_batch_is_the_largest_that_fits_and_keeps_the_rows_of_a_step(llama):
    card = _card(20)
    _, changes = _changes(llama, card, micro_batch_size=32, seq_len=512)
    settings = next(dict(c.settings) for c in changes if "micro_batch_size" in dict(c.settings))
    batch, steps = settings["micro_batch_size"], settings["gradient_accumulation_steps"]
    assert 1 < batch < 32
    assert batch * steps >= 32 > batch * (steps - 1)
    larger = _training(llama, micro_batch_size=batch + batch // 8 + 1, seq_len=512, gradient_accumulation_steps=steps)
    assert predict(llama, larger, card).verdict != "fits"


def test_a_combination_comes_only_when_no_single_change_helps_and_has_no_spare_part(llama):
    card = _card(15)
    given = {"gradient_checkpointing": "none", "micro_batch_size": 8, "stack": "hf-trainer", "seq_len": 2048}
    _, changes = _changes(llama, card, **given)
    combined = changes[0]
    assert len(combined.settings) > 1
    assert dict(combined.settings)["gradient_checkpointing"] == "full"
    without = {key: value for key, value in combined.settings if key != "gradient_checkpointing"}
    assert predict(llama, _training(llama, **{**given, **without}), card).verdict != "fits"


def test_larger_cards_are_the_smallest_that_hold_the_run(llama):
    found, changes = _changes(llama, catalog.gpu("rtx-4090"), method="full")
    cards = [change.gpu for change in changes if change.gpu]
    assert 1 <= len(cards) <= search.MAX_CARDS
    assert [card.memory_bytes for card in cards] == sorted(card.memory_bytes for card in cards)
    assert all(card.vendor == "NVIDIA" for card in cards)
    between = [
        card for card in catalog.gpus()
        if card.vendor == "NVIDIA" and (card.compute_capability or (0, 0)) >= (8, 9)
        and card.memory_bytes < cards[0].memory_bytes
    ]  # fmt: skip
    assert all(predict(llama, found.training, card).verdict != "fits" for card in between)


def test_the_model_is_not_asked_too_often(llama, monkeypatch):
    calls = []
    real = search.predict
    monkeypatch.setattr(search, "predict", lambda *a, **k: calls.append(1) or real(*a, **k))
    found = predict(llama, _training(llama, micro_batch_size=1024, seq_len=8192), _card(12))
    search.nearest_changes(found, catalog.gpus())
    assert len(calls) <= search.MAX_PREDICTIONS


def test_nothing_is_proposed_that_cannot_be(llama):
    """A card too small for the weights: no setting helps, only cards do."""
    big = load_model("meta-llama/Llama-3.1-70B").spec
    _, changes = _changes(big, catalog.gpu("t4"))
    assert changes
    assert all(change.gpu is not None for change in changes)


def test_proposals_of_every_stack_are_valid(llama):
    for stack in stacks.STACKS:
        _, changes = _changes(llama, _card(8), stack=stack)
        assert all(change.option.startswith("--") for change in changes), stack


def test_levers_apply_only_where_there_is_something_to_change(llama):
    lean = replace(_training(llama, double_quant=True, optimizer="paged-adamw-8bit", loss="fused"), micro_batch_size=1)
    levers = (
        search._sdpa, search._checkpointing, search._fused_loss, search._eight_bit, search._paged, search._no_kbit,
        search._norms_only, search._double_quant, search._quantize, search._adapters, search._single_row,
    )  # fmt: skip
    assert [lever(lean) for lever in levers] == [None] * len(levers)
