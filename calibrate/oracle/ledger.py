"""Ledger: who owns the memory alive at the peak of a trace, in the categories of planner.memory.owners.

The program names its storages by what made them; a trace knows the operation, the place and the lifetime. Both sort
by the meaning stated at `planner.memory.owners.CATEGORIES`.
"""

from __future__ import annotations

from collections.abc import Iterator

from calibrate.oracle.result import TraceResult
from calibrate.oracle.tracker import Block
from planner.memory.owners import CATEGORIES

_ADAPTER = ("lora_", "modules_to_save")
_DEQUANTIZE = ("bitsandbytes.dequantize", "bitsandbytes.gemm_4bit:", "bitsandbytes.int8_vectorwise_dequant")
_BACKWARD = ("backward", "recompute")
_NEVER = -1


def ledger(result: TraceResult, block: int = 1) -> tuple[tuple[str, int], ...]:
    """Return (category, bytes) of what is alive at the peak of the last step; the bytes sum to the peak.

    block=512 counts as the CUDA allocator does; 1 counts requested bytes, as the trace's own peak.
    """
    return ledger_at(result, result.peak_event, block)


def ledger_at(result: TraceResult, event: int, block: int = 1) -> tuple[tuple[str, int], ...]:
    """The ledger right after event number `event`."""
    lives = _Lifetimes(result)
    totals = dict.fromkeys(CATEGORIES, 0)
    for item in result.live_at(event):
        totals[category(result, item, lives)] += -(-item.nbytes // block) * block
    return tuple((name, totals[name]) for name in CATEGORIES if totals[name])


class _Lifetimes:
    """In which phase each block was freed (none: still alive at the end), and in which backward pass."""

    def __init__(self, result: TraceResult) -> None:
        self.freed_in: dict[int, str] = {}
        self._born: dict[int, int] = {}
        self._died: dict[int, int] = {}
        passes, inside = 0, False
        for event in result.events:
            now = event.phase in _BACKWARD
            passes += now and not inside
            inside = now
            if event.nbytes > 0:
                self._born[event.id] = passes
            else:
                self.freed_in[event.id] = event.phase
                self._died[event.id] = passes if inside else _NEVER

    def outlives_its_backward(self, block: int) -> bool:
        """Whether a block made in a backward pass stays after it: a parameter's gradient.

        The gradient of an activation (an embedding made a leaf) dies with the graph, before the optimizer runs.
        """
        return self.freed_in.get(block) != "end" and self._died.get(block, _NEVER) != self._born[block]


def category(result: TraceResult, block: Block, lives: _Lifetimes) -> str:
    """The owner of one storage of a trace."""
    if block.phase == "load":
        return _loaded(block)
    if block.phase == "optimizer":
        return "workspaces" if block.id in lives.freed_in else "optimizer state"
    if block.kept_input:
        return "checkpoints"
    if block.phase in _BACKWARD and lives.outlives_its_backward(block.id):
        return "gradients"
    if block.op.startswith(_DEQUANTIZE) or _copies_weight(result, block):
        return "weight copies"
    if ":" in block.op:  # a buffer inside a kernel
        return "workspaces"
    if block.segment == "embedding" and _is_input(block):
        return "inputs"
    if block.segment in ("head", "loss", "head backward"):
        return "logits and loss"
    return "activation gradients" if block.phase == "backward" else "activations"


def _loaded(block: Block) -> str:
    if block.op == "cublas workspace":
        return "workspaces"
    return "adapters" if any(mark in block.module for mark in _ADAPTER) else "base weights"


def _copies_weight(result: TraceResult, block: Block) -> bool:
    """Whether the block was cast or copied, perhaps in several steps, from a loaded or a dequantized weight."""
    return any(b.phase == "load" or b.op.startswith(_DEQUANTIZE) for b in _sources(result, block))


def _sources(result: TraceResult, block: Block) -> Iterator[Block]:
    while block.source >= 0:
        block = result.blocks[block.source]
        yield block


def _is_input(block: Block) -> bool:
    """Token ids, rotary tables and masks among what is made before the first layer; the rest are embeddings."""
    made_there = block.op == "aten.native_dropout"  # its mask is of bools too
    floating = made_there or block.dtype.startswith(("float", "bfloat"))
    return not floating or "rotary" in block.module or len(block.shape) > 3


__all__ = ["category", "ledger", "ledger_at"]
