"""Calibration files and the choice among them: versions, other cards, other stacks, borrowing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.base import data_files
from planner.base.errors import InvalidInput, UnknownName
from planner.device import processor
from planner.device.hardware import Gpu
from planner.facts import calibration_files, catalog, sources
from planner.model import families
from planner.plan.predict import predict, predict_on
from planner.timing import formulas
from planner.timing.coefficients import Calibration, Coefficients, matches, priors, select
from planner.timing.formulas import fingerprint
from planner.training.spec import LoraSpec, TrainingSpec, Versions
from tests.helpers.calibration_samples import CPU_FACTS

LLAMA = families.build_spec(sources.load_config("meta-llama/Llama-2-7b-hf").config, model_id="llama")


def test_what_ships_is_named_after_its_kind() -> None:
    """`known` passes over by name what a card cannot use; what is chosen is what all of them would give."""
    shipped = [calibration_files.read(path) for path in calibration_files.paths()]
    assert {one.device["kind"] for one in shipped} == {"cpu", "cuda"}
    for one in shipped:
        assert Path(one.path).name.startswith(calibration_files.SHIPPED_CPU) == (one.device["kind"] == "cpu")
    for gpu in (*catalog.gpus(), processor.as_gpu(CPU_FACTS)):
        assert calibration_files.select(gpu) == select(gpu, shipped)
        assert len(calibration_files.known(gpu)[0]) < len(shipped)


H100, A100, T4, L40S = (catalog.gpu(name) for name in ("h100-sxm", "a100-sxm4-80gb", "t4", "l40s"))
SHIPPED = sorted(Path(data_files.data_path("calibrations")).glob("*.json"))
VERSIONS = {"torch": "2.13.0+cu130", "transformers": "5.24.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}


def made(gpu: Gpu = H100, created: str = "2026-01-02", matmul: float = 0.6, **changes: Any) -> Calibration:
    """A calibration that fitted one coefficient."""
    items = dict(priors(gpu))
    fitted = {"matmul": matmul, "launch_forward": 2e-5}
    for name, value in fitted.items():
        items[name] = replace(items[name], value=value, standard_error=0.02 * value, origin="fitted", source="test")
    values: dict[str, Any] = {
        "gpu_id": gpu.gpu_id,
        "device": {"kind": "cuda", "name": gpu.name, "compute_capability": list(gpu.compute_capability or (0, 0)),
                   "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s},
        "formula_version": fingerprint(), "created": created, "versions": VERSIONS,
        "coefficients": Coefficients(items, 0.04, "calibrated on a test"), "repeatability": 0.02,
        "context_bytes": (1, 2, 3), "bursts": 30, "report": {},
    }  # fmt: skip
    return Calibration(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAPLAN_DATA", str(tmp_path))
    monkeypatch.setattr(calibration_files.data_files, "data_path", lambda *parts: str(tmp_path / "shipped"))
    return tmp_path / "calibrations"


def test_a_file_says_what_was_fitted(folder: Path) -> None:
    path = calibration_files.write(made())
    assert path == folder / "h100-sxm5-80gb-2026-01-02.json"
    found = calibration_files.read(path)
    assert found.coefficients.formula_error == 0.04
    assert found.coefficients.value("matmul") == 0.6
    assert found.coefficients["bandwidth"].origin != "fitted"
    assert found.context_bytes == (1, 2, 3)
    assert dict(found.device) == dict(made().device)


def test_a_file_is_never_overwritten(folder: Path, tmp_path: Path) -> None:
    first, second = calibration_files.write(made()), calibration_files.write(made())
    assert first != second
    assert second.name == "h100-sxm5-80gb-2026-01-02-2.json"
    target = tmp_path / "mine.json"
    target.write_text("precious")
    with pytest.raises(InvalidInput, match="not overwritten"):
        calibration_files.write(made(), target)
    assert target.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibrations", "mine.json"]


def changed_file(folder: Path, **changes: Any) -> Path:
    path = calibration_files.write(made())
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))
    return path


def test_a_newer_version_is_refused_with_the_remedy(folder: Path) -> None:
    path = changed_file(folder, version=99)
    with pytest.raises(InvalidInput, match=r"version 99.*upgrade loraplan"):
        calibration_files.read(path)
    found = calibration_files.select(H100)
    assert found.calibration is None
    assert "version 99" in found.notes[0]


def test_an_older_version_is_migrated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = changed_file(folder, version=0, bursts=None, measured=12)
    monkeypatch.setattr(calibration_files, "MIGRATIONS", {0: lambda d: {**d, "bursts": d["measured"], "version": 1}})
    assert calibration_files.read(path).bursts == 12


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "loraplan-calibration"}', "\x00", '{"kind": 1}'])
def test_what_is_no_calibration_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        calibration_files.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["coefficients", "device", "formula_error", "created"])
def test_a_damaged_file_is_one_line(key: str, folder: Path) -> None:
    path = calibration_files.write(made())
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match=r"damaged.*fit it again"):
        calibration_files.read(path)


def test_the_newest_of_the_card_is_chosen(folder: Path) -> None:
    calibration_files.write(made(created="2026-01-02", matmul=0.6))
    calibration_files.write(made(created="2026-03-01", matmul=0.7))
    calibration_files.write(made(A100, created="2026-05-01", matmul=0.5))
    found = calibration_files.select(H100)
    assert found.calibration is not None
    assert found.coefficients.value("matmul") == 0.7
    assert found.notes == ()
    assert calibration_files.select(H100, "none").coefficients.value("matmul") == priors(H100).value("matmul")
    named = calibration_files.select(H100, "h100-sxm5-80gb-2026-01-02")
    assert named.coefficients.value("matmul") == 0.6


def test_another_card_or_formula_is_refused_when_named(folder: Path) -> None:
    path = calibration_files.write(made(A100))
    with pytest.raises(InvalidInput, match=r"not on NVIDIA H100"):
        calibration_files.select(H100, str(path))
    old = changed_file(folder, formula_version=1)
    with pytest.raises(InvalidInput, match=r"formula version.*fit its measurements again"):
        calibration_files.select(H100, str(old))
    with pytest.raises(UnknownName, match="no calibration 'nothing'"):
        calibration_files.select(H100, "nothing")


def test_another_formula_version_is_passed_over_and_told(folder: Path) -> None:
    """Never applied silently: a line names the file; cards that it does not concern say nothing."""
    path = changed_file(folder, formula_version="0badf00d")
    found = calibration_files.select(H100)
    assert found.calibration is None
    (note,) = found.notes
    assert str(path) in note
    assert f"formula version 0badf00d, this loraplan has {fingerprint()}" in note
    assert calibration_files.select(T4).notes == ()


def test_a_fit_carries_the_formulas_fingerprint_and_others_only_are_refused(folder: Path) -> None:
    path = calibration_files.write(made())
    assert json.loads(path.read_text())["formula_version"] == fingerprint()
    assert calibration_files.select(H100).calibration is not None


def test_no_fingerprint_is_computed_where_no_calibration_concerns_the_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration_files.write(made(H100))

    def never() -> str:
        raise AssertionError("computed")

    monkeypatch.setattr(formulas, "fingerprint", never)
    assert calibration_files.select(T4).calibration is None
    with pytest.raises(AssertionError, match="computed"):
        calibration_files.select(H100)


def test_shipped_calibrations_belong_to_these_formulas() -> None:
    """Else: fit data/measurements again (data/README.md) and say in the change log how the coefficients moved."""
    shipped = [calibration_files.read(Path(path)) for path in SHIPPED]
    assert {item.formula_version for item in shipped} == {fingerprint()}
    assert len(shipped) == 3


def test_another_stack_warns() -> None:
    same = Versions(torch=(2, 13), transformers=(5, 24), peft=(0, 21), bitsandbytes=(0, 50))
    assert select(H100, [made()], same).notes == ()
    (note,) = select(H100, [made()], replace(same, torch=(2, 4))).notes
    assert "torch 2.13.0 (planned 2.4)" in note


def test_an_uncalibrated_card_borrows_what_has_no_unit() -> None:
    card = replace(L40S, measured_matmul_flops_per_s=0.0)
    found = select(card, [made(H100, matmul=0.5), made(A100, matmul=0.6), made(T4, matmul=0.3)])
    assert found.borrowed
    assert found.calibration is not None
    assert found.calibration.gpu_id == A100.gpu_id  # of its generation
    matmul = found.coefficients["matmul"]
    assert (matmul.value, matmul.origin) == (0.6, "borrowed")
    assert matmul.relative_error > made().coefficients["matmul"].relative_error
    assert found.coefficients["launch_forward"] == priors(card)["launch_forward"]  # seconds of that host stay there
    assert found.context_bytes is None
    assert "not calibrated" in found.notes[0]
    assert found.coefficients.formula_error == pytest.approx(0.06)


def test_what_was_published_of_the_card_itself_is_not_replaced() -> None:
    card = replace(L40S, measured_matmul_flops_per_s=0.7 * L40S.bf16_flops_per_s)
    found = select(card, [made(A100, matmul=0.6)])
    assert found.borrowed
    assert found.coefficients["matmul"].value == pytest.approx(0.7)


def test_cards_do_not_borrow_from_another_generation() -> None:
    assert select(A100, [made(H100), made(T4)]).calibration is None


def test_cards_do_not_borrow_from_a_cpu() -> None:
    cpu = made(device={"kind": "cpu", "name": "X", "threads": 1}, gpu_id="cpu")
    assert select(H100, [cpu]).calibration is None


def test_a_calibration_narrows_the_interval() -> None:
    training = TrainingSpec(method="lora", lora=LoraSpec(r=16), micro_batch_size=1, seq_len=2048)
    chosen = select(H100, [made()])
    plain = predict(LLAMA, training, H100).step_s
    fitted = predict(LLAMA, training, chosen.card(H100), coefficients=chosen.coefficients)
    assert plain is not None
    assert fitted.step_s is not None
    assert fitted.step_s.high / fitted.step_s.low < plain.high / plain.low
    assert fitted.device.expected == fitted.reserved.expected + 2


def test_a_chosen_file_serves_its_card_among_several(folder: Path) -> None:
    calibration_files.write(made(A100, created="2026-05-01", matmul=0.5))
    path = calibration_files.write(made(matmul=0.61))
    found = calibration_files.select_each([H100, A100, L40S], str(path))
    assert found[H100.gpu_id].coefficients.value("matmul") == 0.61
    assert found[A100.gpu_id].coefficients.value("matmul") == 0.5
    assert found[L40S.gpu_id].borrowed
    assert all(s.calibration is None for s in calibration_files.select_each([H100, T4], "none").values())
    with pytest.raises(InvalidInput, match="none of the cards"):
        calibration_files.select_each([A100, T4], str(path))


def test_a_coefficient_that_came_later_is_at_its_prior() -> None:
    old = made()
    items = {name: c for name, c in old.coefficients.items() if name != "dequantize"}
    found = select(H100, [replace(old, coefficients=Coefficients(items, 0.04, "old"))]).coefficients
    assert found["dequantize"] == priors(H100)["dequantize"]
    assert (found.value("matmul"), found.formula_error, found.label) == (0.6, 0.04, "old")


def test_a_measured_context_decides_the_verdict_too() -> None:
    training = TrainingSpec(method="lora", lora=LoraSpec(r=8), seq_len=512)
    need = predict(LLAMA, training).allocated
    near = replace(T4, memory_bytes=need.high + 700 * 2**20)  # room beside the assumed context, not beside this one
    assert predict(LLAMA, training, near).verdict == "fits"
    large = made(T4, context_bytes=(900 * 2**20, 1000 * 2**20, 1100 * 2**20))
    found = predict_on(LLAMA, training, near, select(near, [large]))
    assert found.verdict == "does not fit"
    assert found.device.expected - found.reserved.expected == 1000 * 2**20


def test_a_cpu_is_known_by_name_vector_unit_and_threads() -> None:
    cpu = made(device={"kind": "cpu", "name": "AMD EPYC", "vector": "avx2", "threads": 1}, gpu_id="cpu")
    same = processor.as_gpu({**CPU_FACTS, "name": "AMD EPYC", "vector": "avx2"})
    assert matches(cpu, same)
    for key, value in (("vector", "avx512f"), ("threads", 2), ("name", "AMD EPYC 9B14")):
        assert not matches(cpu, processor.as_gpu({**CPU_FACTS, "name": "AMD EPYC", "vector": "avx2", key: value})), key
