"""Peaks of a deep stack from traces of 3 and 4 layers.

The global peak is not linear in depth (its place moves), but the peak inside each segment is: linear in the depth L and
in the layer index i, with the first and the last layer apart. Stacks of unlike layers are traced in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibrate import fake_model
from calibrate.trace import TraceResult, trace
from planner.cuda_rules import Architecture
from planner.training import TrainingSpec

SHALLOW, DEEP = 3, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolated:
    """Static bytes and peaks of the full stack; `traced` holds the depths that were run."""

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
    """Return the peaks of the model's own depth."""
    layers = depth(config)
    if layers <= DEEP + 1 or not uniform(config):
        full = trace(config, training, arch=arch)
        return Extrapolated(
            layers=layers, static_bytes=full.static_bytes, segment_peaks=full.segment_peaks, traced=(layers,)
        )
    shallow = trace(config, training, layers=SHALLOW, arch=arch)
    deep = trace(config, training, layers=DEEP, arch=arch)
    segments: dict[str, int] = {}
    for name, value in deep.segment_peaks.items():
        if not name.startswith("layer."):
            segments[name] = _linear(shallow.segment_peaks[name], value, layers)
    for direction in ("forward", "backward"):
        for index in range(layers):
            segments[f"layer.{index} {direction}"] = _layer_peak(shallow, deep, index, layers, direction)
    return Extrapolated(
        layers=layers,
        static_bytes=_linear(shallow.static_bytes, deep.static_bytes, layers),
        segment_peaks=segments,
        traced=(SHALLOW, DEEP),
    )


def _linear(shallow: int, deep: int, layers: int) -> int:
    return deep + (deep - shallow) * (layers - DEEP)


def _layer_peak(shallow: TraceResult, deep: TraceResult, index: int, layers: int, direction: str) -> int:
    def at(result: TraceResult, i: int) -> int:
        return result.segment_peaks[f"layer.{i} {direction}"]

    if index == 0:
        return _linear(at(shallow, 0), at(deep, 0), layers)
    if index == layers - 1:
        return _linear(at(shallow, SHALLOW - 1), at(deep, DEEP - 1), layers)
    per_index = at(deep, 2) - at(deep, 1)
    return _linear(at(shallow, 1), at(deep, 1), layers) + per_index * (index - 1)


def depth(config: dict[str, Any]) -> int:
    """Decoder layers of the config."""
    return int(fake_model.model_config(config).get_text_config().num_hidden_layers)


def uniform(config: dict[str, Any]) -> bool:
    """Whether every decoder layer of the config is of one kind."""
    cfg = fake_model.model_config(config).get_text_config()
    for name in fake_model.PER_LAYER_LISTS:
        kinds = getattr(cfg, name, None)
        if isinstance(kinds, list) and len(set(kinds)) > 1:
            return False
    return not (getattr(cfg, "first_k_dense_replace", 0) or getattr(cfg, "mlp_only_layers", None))
