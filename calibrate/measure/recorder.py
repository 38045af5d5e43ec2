"""Recording torch's allocator: requests, releases and segments of real steps."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any

STEPS = 3
"""The first makes the optimizer's state, the second is the steady one, the third shows that it is."""

MOST_EVENTS = 2_000_000


def recorded_steps(load: Callable[[], Any], device: Any) -> dict[str, Any]:
    """Load a model and run three steps of it with torch's memory history on; nothing may be on the GPU before."""
    import torch

    history: Any = torch.cuda.memory
    index = torch.device(device.name).index
    history._record_memory_history(enabled="all", context=None, max_entries=MOST_EVENTS)
    marks: list[tuple[str, int]] = [("load", _now_us())]
    step = load()
    step._enter = lambda phase, segment: marks.append((phase, _now_us()))
    device.reset_peak()
    for _ in range(STEPS):
        step.run()
    device.synchronize()
    counters = {**device.peak(), "used": device.used_bytes() or 0}
    entries = history._snapshot(index)["device_traces"][index]
    history._record_memory_history(enabled=None)
    events, segments, times = packed(entries)
    return {
        "events": events, "segments": segments, "counters": counters,
        "marks": [[name, bisect_left(times, at)] for name, at in marks],
    }  # fmt: skip


def _now_us() -> int:
    return time.time_ns() // 1000


def packed(entries: Iterable[Mapping[str, Any]]) -> tuple[list[int], list[list[int]], list[int]]:
    """Events, segments and the events' times (microseconds) of torch's trace entries."""
    events: list[int] = []
    segments: list[list[int]] = []
    times: list[int] = []
    number = 0
    alive: dict[int, int] = {}
    for entry in entries:
        action, address, size = entry["action"], int(entry["addr"]), int(entry["size"])
        if action == "alloc":
            alive[address] = number
            number += 1
            events.append(size)
        elif action == "free_requested" and address in alive:
            events.append(-1 - alive.pop(address))
        else:
            if action in ("segment_alloc", "segment_map"):
                segments.append([len(events), size, address])
            elif action in ("segment_free", "segment_unmap"):
                segments.append([len(events), -size, address])
            continue
        times.append(int(entry.get("time_us", 0)))
    return events, segments, times
