"""Peaks of a deep stack from traces of a few of its layers: `oracle.summary` with requested bytes, and its speed.

python -m calibrate.oracle.extrapolate MODEL [--batch 1] [--length 2048] [--full]
    prints the seconds and the peak of a QLoRA run of a catalogue model; --full traces every layer
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

from calibrate.oracle import alike
from calibrate.oracle.summary import summarise
from calibrate.oracle.trace import trace
from planner.device.cuda_rules import Architecture
from planner.facts import catalog
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolated:
    """Peaks of the full stack and what is alive before the step; `traced` holds the depths that were run."""

    layers: int
    static_bytes: int
    segment_peaks: dict[str, int]
    traced: tuple[int, ...]

    @property
    def peak_segment(self) -> str:
        """Where the highest level of the step is reached."""
        return max(self.segment_peaks, key=self.segment_peaks.__getitem__)

    @property
    def peak_bytes(self) -> int:
        """Peak of the step with the optimizer state."""
        return self.segment_peaks[self.peak_segment]

    def describe(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {
            "layers": self.layers, "traced_layers": list(self.traced), "static_bytes": self.static_bytes,
            "peak_bytes": self.peak_bytes, "peak_place": {"segment": self.peak_segment},
            "segment_peak_bytes": self.segment_peaks,
        }  # fmt: skip


def extrapolate(config: dict[str, Any], training: TrainingSpec, *, arch: Architecture | None = None) -> Extrapolated:
    """Return the peaks of the model's own depth, in requested bytes."""
    found = summarise(config, training, arch=arch, block=1)
    return Extrapolated(
        layers=found.layers,
        static_bytes=found.static_bytes,
        segment_peaks={segment.name: segment.peak for segment in found.segments},
        traced=found.traced,
    )


def main(arguments: list[str] | None = None) -> int:
    """Time the trace of a catalogue model; imports are not counted."""
    parser = argparse.ArgumentParser(prog="python -m calibrate.oracle.extrapolate", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--full", action="store_true", help="trace every layer")
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    record = catalog.model_record(given.model)
    if record is None:
        print(f"{given.model} is not in the catalogue", file=sys.stderr)
        return 2
    training = TrainingSpec(
        lora=LoraSpec(r=16), quantization=QuantizationSpec(kind="nf4", double_quant=True),
        micro_batch_size=given.batch, seq_len=given.length,
    )  # fmt: skip
    config = dict(record.config)
    alike.layer_kinds(config, 1)  # what transformers and peft import for this family is not timed
    trace(config, training, layers=1)
    start, cpu = time.perf_counter(), time.process_time()
    result: Any = trace(config, training) if given.full else extrapolate(config, training)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{given.model}: {seconds:.1f} s ({cpu:.1f} s of CPU), peak {result.peak_bytes} bytes, {result.layers} layers"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
