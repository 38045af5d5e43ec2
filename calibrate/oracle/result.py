"""What a trace found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from calibrate.oracle.tracker import Block, Event

STEPS = 2


@dataclass(slots=True)
class TraceResult:
    """What a trace saw. Bytes are requested bytes of live storages (no allocator rounding)."""

    static_bytes: int
    step_peaks: list[int]
    """Of what stands for the first step (calibrate.oracle.step Step.prepare), and of the second."""
    peak_event: int
    segment_peaks: dict[str, int]
    """Highest live bytes inside each segment of the last step."""
    segment_peak_events: dict[str, int]
    """The event that reaches it."""
    blocks: list[Block]
    events: list[Event]
    layers: int
    segment_flops: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """FLOPs of one micro batch by (phase, segment, operation); calibrate.oracle.flops says what counts."""
    trainable_parameters: int = 0
    parameters: int = 0
    """Elements of all base weights, a tied one once; adapters not included."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Peak of the last step, when the optimizer state exists."""
        return self.step_peaks[-1]

    @property
    def flops(self) -> dict[str, dict[str, int]]:
        """FLOPs of one micro batch by phase (forward with the loss, recompute, backward) and operation."""
        found: dict[str, dict[str, int]] = {"forward": {}, "recompute": {}, "backward": {}}
        for (phase, _, op), number in self.segment_flops.items():
            counts = found.setdefault("forward" if phase == "loss" else phase, {})
            counts[op] = counts.get(op, 0) + number
        return found

    def live_at(self, event: int) -> list[Block]:
        """Return the storages alive right after event number `event`, largest first."""
        alive: set[int] = set()
        for item in self.events[: event + 1]:
            (alive.add if item.nbytes > 0 else alive.discard)(item.id)
        return sorted((self.blocks[i] for i in alive), key=lambda b: -b.nbytes)

    def describe(self) -> dict[str, Any]:
        """Return the result as plain JSON values (without the event list)."""
        peak = self.events[self.peak_event]
        return {
            "static_bytes": self.static_bytes,
            "peak_bytes": self.peak_bytes,
            "step_peak_bytes": self.step_peaks,
            "peak_place": {
                "op": peak.op, "phase": peak.phase, "segment": peak.segment, "module": self.blocks[peak.id].module,
            },
            "segment_peak_bytes": self.segment_peaks,
            "live_at_peak": [b.describe() for b in self.live_at(self.peak_event)],
            "layers": self.layers,
            "blocks": len(self.blocks),
            "events": len(self.events),
            "notes": self.notes,
            "versions": self.versions,
        }  # fmt: skip
