"""Tracker: a dispatch mode that sees every tensor storage come to life and die.

It is entered above FakeTensorMode (or over real CPU tensors: the same code checks the fake run against a real one).
Storages are identified by their C++ object, so views never count twice. Memory that a CUDA kernel allocates inside
itself is invisible to PyTorch's dispatcher; `synthetic` rules add it around the operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calibrate.oracle import flops

_DEVICE = torch.ops.prim.device.default
_META = torch.device("meta")

COPIES = ("aten._to_copy", "aten.clone")
"""Operations whose result holds the values of their first argument."""

Temporaries = Sequence[tuple[str, int]]
SyntheticRule = Callable[[Any, Sequence[Any], dict[str, Any]], Temporaries]


HOST = -1
"""Stands for a storage in host memory among the live ones."""


@dataclass(slots=True)
class Block:
    """One storage: how many bytes, made by which operation, where."""

    id: int
    nbytes: int
    op: str
    phase: str
    segment: str
    module: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    source: int = -1
    """The block that this one is a cast or a copy of (-1: not one)."""
    kept_input: bool = False
    """Whether it is a checkpoint: the input of a layer kept for its recomputation."""

    def describe(self) -> dict[str, Any]:
        """Return the block as plain JSON values."""
        return {
            "id": self.id, "nbytes": self.nbytes, "op": self.op, "phase": self.phase, "segment": self.segment,
            "module": self.module, "shape": list(self.shape), "dtype": self.dtype,
        }  # fmt: skip


@dataclass(slots=True)
class Event:
    """A change of the live bytes, in program order; `nbytes` is negative for a release."""

    id: int
    nbytes: int
    phase: str
    segment: str
    step: int
    op: str
    """The operation running when it happened (for a release: the last one that ran)."""


@dataclass(slots=True)
class Labels:
    """Where the program is now."""

    step: int = 0
    phase: str = "load"
    segment: str = "load"
    modules: list[str] = field(default_factory=list)
    backward_module: str = ""

    @property
    def module(self) -> str:
        """The innermost module running forward, else the one whose backward runs."""
        return self.modules[-1] if self.modules else self.backward_module


class Tracker(TorchDispatchMode):
    """Record allocations and releases of every storage the dispatcher returns."""

    def __init__(
        self,
        synthetic: SyntheticRule | None = None,
        host_ops: frozenset[str] = frozenset(),
        late_ops: frozenset[str] = frozenset(),
    ) -> None:
        """Args say which operations hide memory.

        Args:
            synthetic: the hidden buffers of an operation.
            host_ops: operations whose results live in host memory on a CUDA run and are not counted.
            late_ops: operations that allocate their results before their hidden buffers (an allocator sees the order).
        """
        super().__init__()
        self._late_ops = late_ops
        self._host_ops = host_ops
        self.labels = Labels()
        self.blocks: list[Block] = []
        self.events: list[Event] = []
        self._synthetic = synthetic
        self.flops: dict[tuple[int, str, str, str], int] = {}
        """FLOPs by (step, phase, segment, operation)."""
        self._live: dict[int, int] = {}
        self._names: dict[Any, tuple[str, flops.Formula | None]] = {}
        self._last_op = ""
        self._ignoring = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # more than half of all calls: not passed on
            return _META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        kwargs = kwargs or {}
        known = self._names.get(func)
        if known is None:
            known = self._names[func] = str(func).removesuffix(".default"), flops.formula(func)
        name, formula = known
        if name.startswith(("prim.", "profiler.")):  # questions about tensors: no memory
            return func(*args, **kwargs)
        hidden = self._synthetic(func, args, kwargs) if self._synthetic is not None and not self._ignoring else ()
        late = name in self._late_ops
        held = [] if late else self._allocate_hidden(name, hidden)
        self._last_op = name
        out = func(*args, **kwargs)
        if formula is not None:
            self._count(name, formula(args, kwargs, out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                made = self.register(leaf, name)
                if made is not None and name in COPIES:
                    made.source = self._live.get(args[0].untyped_storage()._cdata, -1)
        if late:
            held = self._allocate_hidden(name, hidden)
        for block in reversed(held):
            self.release(block)
        return out

    def _count(self, name: str, number: int) -> None:
        at = self.labels
        key = (at.step, at.phase, at.segment, name)
        self.flops[key] = self.flops.get(key, 0) + number

    def _allocate_hidden(self, name: str, hidden: Temporaries) -> list[int]:
        return [self.allocate(nbytes, f"{name}:{label}") for label, nbytes in hidden]

    def register(self, tensor: torch.Tensor, op: str) -> Block | None:
        """Record the tensor's storage if it is new, and return its block then."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or storage.nbytes() == 0:
            return None
        if self._ignoring or op in self._host_ops:
            self._live[key] = HOST
            weakref.finalize(storage, self._live.pop, key, None)
            return None
        block = self.allocate(storage.nbytes(), op, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self._live[key] = block
        weakref.finalize(storage, self._freed, key, block)
        return self.blocks[block]

    def mark_checkpoint(self, tensor: torch.Tensor) -> None:
        """Remember that the tensor's storage is the kept input of a checkpointed layer."""
        block = self._live.get(tensor.untyped_storage()._cdata, HOST)
        if block != HOST:
            self.blocks[block].kept_input = True

    def adopt(self, tensor: torch.Tensor, op: str) -> None:
        """Record a storage that exists already (a parameter after loading)."""
        self.register(tensor, op)

    @property
    def next_block(self) -> int:
        """The id that the next block gets."""
        return len(self.blocks)

    def alive_since(self, first: int) -> bool:
        """Whether a block with this id or a later one is alive."""
        return any(block >= first for block in self._live.values())

    def allocate(self, nbytes: int, op: str, shape: tuple[int, ...] = (), dtype: str = "") -> int:
        """Record `nbytes` of new memory and return its id."""
        at = self.labels
        block = Block(len(self.blocks), nbytes, op, at.phase, at.segment, at.module, shape, dtype)
        self.blocks.append(block)
        self.events.append(Event(block.id, nbytes, at.phase, at.segment, at.step, op))
        return block.id

    def release(self, block: int) -> None:
        """Record that the block's memory is free again."""
        at = self.labels
        nbytes = self.blocks[block].nbytes
        self.events.append(Event(block, -nbytes, at.phase, at.segment, at.step, self._last_op))

    def _freed(self, key: int, block: int) -> None:
        self._live.pop(key, None)
        self.release(block)

    @contextmanager
    def ignore(self) -> Iterator[None]:
        """Memory made inside is not device memory (host scalars, paged optimizer state)."""
        self._ignoring += 1
        try:
            yield
        finally:
            self._ignoring -= 1
