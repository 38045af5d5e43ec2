"""The trace as a command: rows of the program beside rows of the real libraries."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from calibrate.oracle.result import STEPS, TraceResult
from calibrate.oracle.trace import quiet, trace
from planner.device.cuda_rules import Architecture
from planner.training.spec import training_from_dict


def _rows(result: TraceResult, phase: str, segment: str, step: int, least: int) -> Iterator[str]:
    live = 0
    for event in result.events:
        live += event.nbytes
        if event.step != step or (phase not in ("all", event.phase)) or segment not in event.segment:
            continue
        if abs(event.nbytes) < least:
            continue
        block = result.blocks[event.id]
        made = f"{block.op} {list(block.shape)} {block.dtype}"
        what = made if event.nbytes > 0 else f"free {block.op} during {event.op}"
        yield f"{event.nbytes:>+16,d} {live:>18,d} #{event.id:<6d} {event.segment:<20s} {what}  [{block.module}]"


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m calibrate.oracle.command", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--layers", help="decoder layers to keep, or auto")
    parser.add_argument("--events", type=Path, help="write every event as JSON lines")
    parser.add_argument("--ops", metavar="PHASE", help="list events of: forward, loss, backward, recompute, ..., all")
    parser.add_argument("--segment", default="", help="only segments that contain this text")
    parser.add_argument("--step", type=int, default=STEPS)
    parser.add_argument("--min-bytes", type=int, default=0)
    parser.add_argument("--capability", default="8.0")
    parser.add_argument("--plain", action="store_true", help="switch every CUDA rule off")
    given = parser.parse_args(arguments)
    config = json.loads(given.config.read_text())
    training = training_from_dict(json.loads(given.training.read_text()))
    major, minor = (int(x) for x in given.capability.split("."))
    arch = Architecture.plain() if given.plain else Architecture(capability=(major, minor))
    with quiet():
        if given.layers == "auto":
            from calibrate.oracle.extrapolate import extrapolate

            print(json.dumps(extrapolate(config, training, arch=arch).describe(), indent=1))
            return 0
        result = trace(config, training, layers=int(given.layers) if given.layers else None, arch=arch)
    if given.events:
        lines = (json.dumps([e.id, e.nbytes, e.op, e.phase, e.segment, e.step]) for e in result.events)
        given.events.write_text("\n".join(lines) + "\n")
    if given.ops:
        for row in _rows(result, given.ops, given.segment, given.step, given.min_bytes):
            print(row)
    else:
        print(json.dumps(result.describe(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
