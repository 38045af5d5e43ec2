"""A CPU's nominal rates from what /proc/cpuinfo says, worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.device import processor


@pytest.mark.parametrize(
    ("text", "threads", "clock", "fp32", "bf16", "bandwidth"),
    [
        # the clock in the name goes before the running one; 64 FLOPs a cycle, twice that with bf16 instructions
        (
            "model name : Xeon @ 2.00GHz\ncpu MHz : 2900.1\nflags : avx2 avx512f avx512_bf16",
            4,
            2e9,
            512e9,
            1024e9,
            256e9,
        ),
        ("model name : Xeon @ 2.00GHz\nflags : avx2 avx512f", 1, 2e9, 128e9, 128e9, 64e9),
        # 3012.345 MHz to hundreds; 32 FLOPs a cycle
        ("model name : EPYC\ncpu MHz : 3012.345\nflags : avx avx2", 2, 3e9, 192e9, 192e9, 192e9),
        ("model name : Neoverse\nFeatures : asimd bf16", 1, 2.5e9, 40e9, 80e9, 80e9),  # no clock is stated
        ("", 1, 2.5e9, 20e9, 20e9, 80e9),  # nor any unit
    ],
)
def test_rates_follow_from_threads_clock_and_vector_unit(
    monkeypatch: pytest.MonkeyPatch, text: str, threads: int, clock: float, fp32: float, bf16: float, bandwidth: float
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: text)
    found = processor.facts(threads)
    assert found["clock_hz"] == clock
    assert found["fp32_flops_per_s"] == fp32
    assert found["bf16_flops_per_s"] == bf16
    assert found["bandwidth_bytes_per_s"] == bandwidth
    card = processor.as_gpu(found)
    assert (card.sm_count, card.bandwidth_bytes_per_s, card.synchronous) == (threads, bandwidth, True)
