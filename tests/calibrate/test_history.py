"""Real allocator histories of an H200 against the allocator's replay and the program; nothing here needs a GPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from calibrate.measure import history, recorder
from planner.base.errors import InvalidInput

RECORDED = Path(__file__).parents[2] / "data" / "measurements" / "h200-history.json.gz"
"""Three of nine runs of 2026-11-26 (torch 2.11+cu130, transformers 5.17.0, peft 0.21.0, bitsandbytes 0.50.2)."""
RUNS = {run.request["model"]: run for run in history.read(RECORDED)}
QLORA, FULL, INT8 = "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.2-3B"


@pytest.mark.parametrize("model", [QLORA, FULL, INT8])
def test_the_replay_is_what_the_allocator_did(model: str) -> None:
    """Given where the driver put segments: every one at its request and of its size, and both peaks to the byte."""
    run = RUNS[model]
    again = history.replay(run, recorded_addresses=True)
    assert again.segments_equal == again.segments == len(history.by_request(run)) > 50
    assert again.peak_reserved == history.peak_reserved(run) == run.counters["reserved"]
    assert again.peak_allocated == run.counters["allocated"]


@pytest.mark.parametrize(("model", "equal"), [(QLORA, 92), (INT8, 96), (FULL, 37)])
def test_simulated_addresses_lead_to_the_same_segments(model: str, equal: int) -> None:
    """A process has holes from its start that are not simulated: one run leaves the recorded order, not its peaks."""
    run = RUNS[model]
    again = history.replay(run)
    assert again.segments_equal == equal
    assert again.peak_reserved == run.counters["reserved"]
    assert again.peak_allocated == pytest.approx(run.counters["allocated"], rel=2e-4)


@pytest.mark.parametrize("model", [QLORA, FULL, INT8])
def test_the_program_foretells_the_measured_peaks(model: str) -> None:
    run = RUNS[model]
    allocated, reserved = history.predicted(run)
    assert allocated == pytest.approx(run.counters["allocated"], rel=2e-4)
    assert reserved == pytest.approx(run.counters["reserved"], rel=2e-3)


def test_torchs_trace_becomes_numbered_requests() -> None:
    """Releases of what was there before are nobody's, a reused address is a new request, segments are no requests."""
    entries = [
        entry("free_requested", 7, 512, 1), entry("segment_alloc", 4096, 2 << 20, 2), entry("alloc", 4096, 512, 3),
        entry("alloc", 4608, 1024, 4), entry("free_requested", 4096, 512, 5), entry("free_completed", 4096, 512, 6),
        entry("alloc", 4096, 256, 7), entry("segment_free", 4096, 2 << 20, 8),
        entry("segment_map", 1 << 30, 20 << 20, 9), entry("free_requested", 4608, 1024, 10),
        entry("segment_unmap", 1 << 30, 20 << 20, 11),
    ]  # fmt: skip
    events, segments, times = recorder.packed(entries)
    assert events == [512, 1024, -1, 256, -2]
    assert segments == [[0, 2 << 20, 4096], [4, -2 << 20, 4096], [4, 20 << 20, 1 << 30], [5, -20 << 20, 1 << 30]]
    assert times == [3, 4, 5, 7, 10]


def entry(action: str, address: int, size: int, at: int) -> dict[str, Any]:
    """As torch.cuda.memory._snapshot()["device_traces"] has them."""
    return {"action": action, "addr": address, "size": size, "time_us": at, "stream": 0}


RUN: dict[str, Any] = {
    "request": {}, "events": [512, -1], "segments": [[0, 2 << 20, 4096]], "marks": [["load", 0]],
    "counters": {"allocated": 512, "reserved": 2 << 20}, "versions": {}, "device": {},
}  # fmt: skip


def test_what_was_written_is_read(tmp_path: Path) -> None:
    history.write([RUN], tmp_path / "one.gz")
    (run,) = history.read(tmp_path / "one.gz")
    again = history.replay(run)
    assert (again.peak_reserved, again.peak_allocated, again.allocated) == (2 << 20, 512, 0)
    assert (again.segments_equal, again.segments) == (1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"events": [512, -2]},
        {"events": [512, -1, -1]},
        {"events": [1 << 60]},
        {"events": ["512"]},
        {"events": 5},
        {"segments": [[0, 2 << 20]]},
        {"segments": [[9, 2 << 20, 0]]},
        {"counters": {"allocated": 0, "reserved": 1}},
        {"counters": {}},
        {"marks": [5]},
        {"request": []},
        {"allocator": "no_such_option:1"},
        {"allocator": 3},
        {"unknown": 1},
    ],
    ids=str,
)
def test_runs_that_contradict_themselves_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    history.write([{**RUN, **changes}], tmp_path / "bad.gz")
    with pytest.raises(InvalidInput):
        history.read(tmp_path / "bad.gz")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"plain text", gzip.compress(b"{}"), gzip.compress(b"[]"), gzip.compress(b"\xff\xfe"),
        gzip.compress(b"[" * 100_000), gzip.compress(json.dumps({"kind": history.KIND, "version": 99}).encode()),
        gzip.compress(json.dumps({"kind": history.KIND, "version": 1, "runs": None}).encode())[:-12],
        gzip.compress(b"0" * 40)[:12] + b"broken stream", gzip.compress(bytes(history.MOST_BYTES + 2)),
    ],
    ids=range(10),
)  # fmt: skip
def test_files_that_are_no_recording_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gz"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"bad\.gz"):
        history.read(path)
    with pytest.raises(InvalidInput):
        history.read(tmp_path / "missing.gz")


def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json.gz"
    bad.write_bytes(b"no recording")
    assert history.main(["compare", str(bad)]) == 2
    seen = capsys.readouterr().err
    assert seen.startswith("error: ")
    assert seen.count("\n") == 1
