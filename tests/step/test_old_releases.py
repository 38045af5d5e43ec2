"""Old releases of transformers: the program against traces of the genuine libraries, recorded once.

`tests/traces/README.md` says how. Nothing here loads torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from calibrate.oracle.agreement import PEAK_PCT, differing, segment_of
from planner.device.cuda_rules import Architecture
from planner.memory import walk
from planner.model.families import build_spec
from planner.step import program
from planner.step.classes import registry
from planner.training import stacks
from planner.training.spec import training_from_dict
from planner.training.versions import parse_versions

FOLDER = Path(__file__).parent.parent / "traces"
CASES: dict[str, dict[str, Any]] = {c["name"]: c for c in json.loads((FOLDER / "cases.json").read_text())["cases"]}
RECORDS: dict[str, dict[str, Any]] = {
    path.stem.removeprefix("transformers-"): json.loads(path.read_text())
    for path in sorted(FOLDER.glob("transformers-*.json"))
}
DIFFERENCES: dict[str, dict[str, float]] = json.loads((FOLDER / "differences.json").read_text())
"""release -> case -> error in per cent where the program is not what the release did: open."""
PAIRS = [(release, name) for release, document in RECORDS.items() for name in document["cases"]]
OPEN = [(release, name) for release, names in DIFFERENCES.items() for name in names]


@dataclass(frozen=True)
class Outcome:
    """The program beside a recorded trace."""

    error_pct: float
    segment: str
    op: str
    recorded: tuple[str, ...]
    """Segments in which the trace reaches its peak."""
    components: tuple[tuple[str, int, int], ...]
    """(category, program, trace) of those that differ."""

    @property
    def agrees(self) -> bool:
        """As `calibrate.agreement` understands it."""
        return abs(self.error_pct) <= PEAK_PCT and self.segment in self.recorded and not self.components


@cache
def outcome(release: str, name: str) -> Outcome:
    """Run the program of a case at a release and compare as `calibrate.agreement` does."""
    case, traced = CASES[name], RECORDS[release]["cases"][name]
    texts = {"transformers": release, "torch": "2.13", "bitsandbytes": "0.50", "peft": "0.21"}
    training = replace(training_from_dict(case["training"]), versions=parse_versions(texts))
    spec = build_spec(case["config"], model_id=name)
    record = program.run(spec, training, Architecture(), full_depth=True, accumulates_in_place=False).record
    ours = walk.breakdown(record, block=1)
    segment = segment_of(record, ours)
    peak, moments = traced["peak_bytes"], traced["moments"]
    theirs = moments.get(segment) or next(iter(moments.values()))
    return Outcome(
        error_pct=100 * (ours.peak_allocated_bytes - peak) / peak,
        segment=segment,
        op=ours.moment.op,
        recorded=tuple(moments),
        components=differing(ours.ledger, tuple(theirs.items()), peak),
    )


@pytest.mark.parametrize(("release", "name"), [pair for pair in PAIRS if pair not in OPEN])
def test_the_program_is_what_the_release_did(release: str, name: str) -> None:
    found = outcome(release, name)
    assert found.agrees, found


@pytest.mark.parametrize(("release", "name"), OPEN)
def test_an_open_difference_is_as_large_as_recorded(release: str, name: str) -> None:
    """A rule that mends or worsens one of them says so here."""
    found = outcome(release, name)
    assert not found.agrees, "mended: take it out of differences.json"
    assert found.error_pct == pytest.approx(DIFFERENCES[release][name], abs=0.02)


def test_most_cases_agree() -> None:
    assert len(RECORDS) >= 4
    assert len(OPEN) <= len(PAIRS) / 8


@pytest.mark.parametrize("release", RECORDS)
def test_every_case_was_recorded_or_has_no_class(release: str) -> None:
    document = RECORDS[release]
    missed = document.get("not_traced", [])
    assert {*document["cases"], *document["without_the_class"], *missed} == set(CASES)
    assert not missed or (release, missed) == ("4.44", ["bloom head", "bloom layers"])  # it reads its mask's values
    assert document["versions"]["transformers"].startswith(f"{release}.")


@pytest.mark.parametrize("release", RECORDS)
def test_defaults_are_what_the_release_does_unless_told(release: str) -> None:
    found = RECORDS[release]["defaults"]
    texts = {"transformers": release, "torch": "2.13"}
    given = {"versions": parse_versions(texts), "gradient_checkpointing": "full"}
    settings = stacks.to_training_spec(stacks.resolve("hf-trainer", method="full", given=given))
    assert settings.use_reentrant == found["use_reentrant"]
    assert settings.optimizer == {"adamw_torch": "adamw", "adamw_torch_fused": "adamw-fused"}[found["optim"]]
    assert settings.max_grad_norm == found["max_grad_norm"]


@pytest.mark.parametrize("release", RECORDS)
def test_classes_have_the_paths_that_the_program_takes(release: str) -> None:
    """SDPA, and the slice of hidden states before the head (seen only in the traces of a torch before 2.9)."""
    number = parse_versions({"transformers": release}).transformers
    specs = {case["config"]["model_type"]: case for case in CASES.values()}
    for name, found in RECORDS[release]["classes"].items():
        attention = build_spec(specs[name]["config"], model_id=name).layers[0].attention
        if name != "gemma2":  # supports SDPA, but its class picks eager unless told otherwise
            assert attention.has_sdpa(number) == found["sdpa"], name
        assert (number >= registry.habits_of(name).slices_hidden_since) == found["slices_hidden"], name
