"""Optimizer state and the optimizer step: bytes per parameter tensor, and what the step allocates on the way.

What tells one optimizer from another is its row in `planner.training.optimizers`.
"""

from __future__ import annotations

import typing

from planner.base.errors import unknown
from planner.step.context import Step
from planner.step.engine import FP32, ITEMSIZE, MATRIX, Size, Storage, Tensor, elements_of
from planner.step.scopes import Unit
from planner.step.transfers import PAGED_TRANSFER
from planner.training.optimizers import (
    BNB_8BIT_BLOCK,
    BNB_MIN_8BIT_ELEMENTS,
    BNB_PAGED_ELEMENTS,
    OPTIMIZERS,
    StateLayout,
)

TENSORS_PER_LAUNCH = 30
"""Tensors that one multi-tensor kernel takes (ATen/native/cuda/MultiTensorApply.cuh depth_to_max_tensors, 5 lists)."""


class OptimizerState:
    """The state of every trainable parameter, laid out layer by layer."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.eng = step.eng
        self.row = OPTIMIZERS[step.train.optimizer]
        self.groups: list[tuple[Unit, list[Tensor]]] = []
        """Parameters of one unit that were made in a row."""
        self.tensors_per_launch = 1 if step.arch.on_cpu else TENSORS_PER_LAUNCH
        """A CPU's foreach operations go through the tensors one by one (ATen/native/ForeachOpsKernels.cpp)."""
        for leaf in step.parameters:
            assert leaf.owner is not None
            unit = leaf.owner.unit
            if not self.groups or self.groups[-1][0] != unit:
                self.groups.append((unit, []))
            self.groups[-1][1].append(leaf)
        self.held: list[Storage] = []
        for where, leaves in self.groups:
            self._enter("state", where)
            for leaf in leaves:
                self.held += [self.eng.workspace(n, "optimizer_state") for n in self.state_bytes(leaf)]

    def _enter(self, phase: str, where: Unit) -> None:
        """Begin a segment for one layer's parameters."""
        layer, self.eng.record.sublayer = where
        self.eng.enter(phase, layer)

    def state_bytes(self, leaf: Tensor) -> list[Size]:
        """Bytes of each state tensor of one parameter, as they lie on the GPU."""
        row, n = self.row, leaf.numel
        paged = self.paged_bytes(leaf)
        if row.state_layout == "none":
            sizes: list[Size] = []
        elif row.state_layout == "factors":
            sizes = [4 * factors(leaf)]
        elif row.state_layout == "like-parameter":
            sizes = [leaf.nbytes] * row.state_tensors
        elif row.state_layout == "blocks-of-8-bit":
            wide, narrow = 4 * n, n + 4 * -(-n // BNB_8BIT_BLOCK)
            sizes = [_where(n < BNB_MIN_8BIT_ELEMENTS, wide, narrow) - paged] * row.state_tensors
        elif row.state_layout == "fp32":
            sizes = [4 * n - paged] * row.state_tensors
        else:
            raise unknown("state layout", row.state_layout, typing.get_args(StateLayout))
        return [*sizes, row.step_counter_bytes] if row.step_counter_bytes else sizes

    def paged_bytes(self, leaf: Tensor) -> Size:
        """Bytes of one state tensor in managed memory, beside torch's: quantized states without their absmax."""
        row, n = self.row, leaf.numel
        if not row.paged:
            return 0
        each = n if row.state_layout == "blocks-of-8-bit" else 4 * n
        return _where(n >= BNB_PAGED_ELEMENTS, each, 0 * n)

    def hold_gradients(self) -> None:
        """Gradients left by earlier micro batches of the accumulation."""
        for where, leaves in self.groups:
            self._enter("state", where)
            for leaf in leaves:
                leaf.grad = self.eng.empty(leaf.numel, leaf.dtype, "gradient")

    def run_step(self) -> None:
        """The optimizer step: foreach AdamW holds one copy of all parameters (sqrt of the second moment)."""
        if self.step.train.max_grad_norm and not self.step.train.optimizer_in_backward:
            self._clip()
        if self.row.temporary == "copy-of-all-parameters" and not self.step.train.optimizer_in_backward:
            held: list[tuple[Unit, list[Tensor]]] = []
            for layer, leaves in self.groups:
                self._enter("optimizer", layer)
                copies = [self.eng.empty(leaf.numel, leaf.dtype, "optimizer_temporary") for leaf in leaves]
                held.append((layer, copies))
            while held:
                layer, copies = held.pop(0)
                self._enter("optimizer", layer)
                copies.clear()
                del copies
        update: list[Tensor] = []
        for layer, leaves in self.groups:
            self._enter("optimizer", layer)
            for leaf in leaves:
                if self.row.temporary == "factored-update":
                    self._adafactor(leaf, update)
                self._update(leaf)

    def _adafactor(self, leaf: Tensor, update: list[Tensor]) -> None:
        """transformers' Adafactor on one parameter: everything in fp32 (optimization.py Adafactor.step).

        `update` is the name of that frame: it holds the last parameter's update until this one's takes its place.
        """

        def empty() -> Tensor:
            return self.eng.empty(leaf.numel, FP32, "optimizer_temporary")

        copies = [empty(), empty()] if leaf.dtype != FP32 else []  # of a 16-bit gradient and parameter
        square = empty()
        total = empty()  # grad**2 + eps
        del square
        update.clear()
        update.append(empty())
        del total
        negated = empty()
        del negated, copies

    def _update(self, leaf: Tensor) -> None:
        """One tensor's share of the update: bytes read and written, and its part of the launches."""
        row = self.row
        if self.step.arch.on_cpu and row.cpu_passes is not None:
            passes, kernels = row.cpu_passes
            self.eng.kernel("optimizer", FP32, passes * leaf.numel * ITEMSIZE[FP32], count=kernels)
            return
        paged = self.paged_bytes(leaf) * row.state_tensors
        moved = row.passes * leaf.nbytes if row.passes else 3 * leaf.nbytes + 2 * (sum(self.state_bytes(leaf)) + paged)
        launches = row.launches / self.tensors_per_launch if row.multi_tensor else row.launches
        self.eng.kernel("optimizer", leaf.dtype, moved, count=launches)
        if row.paged:
            self._prefetch(leaf, paged)

    def _prefetch(self, leaf: Tensor, paged: Size) -> None:
        """What bitsandbytes moves of a paged state where the card has no room for all of it.

        The state lies in managed memory (functional.py get_paged: cudaMallocManaged, first written by the GPU) and is
        prefetched to the card, in the kernels' stream, before each tensor's update (optim/optimizer.py prefetch_state).
        Pages that are there already do not move: with room for all, nothing does. Assumed: without that room every
        page moves in and out once a step, as least recently used pages are evicted and the step uses them in turn; the
        price is timing's, which knows the room. The calls themselves are not counted.
        """
        if not self.step.arch.on_cpu:
            self.eng.kernel(PAGED_TRANSFER, leaf.dtype, 2 * paged)

    def _clip(self) -> None:
        """clip_grad_norm_: every gradient is read for its norm, then scaled in place (foreach)."""
        for layer, leaves in self.groups:
            self._enter("optimizer", layer)
            for leaf in leaves:
                self.eng.kernel("optimizer", leaf.dtype, 3 * leaf.nbytes, count=2 / self.tensors_per_launch)

    def parameter_count(self) -> Size:
        """Trainable parameters of the whole model."""
        repeats = self.eng.repeats
        return sum(leaf.numel * repeats.get(layer, 1) for (layer, _), leaves in self.groups for leaf in leaves)


def factors(leaf: Tensor) -> Size:
    """What a factored second moment keeps: a number for each row and each column of a matrix, all of a vector."""
    if len(leaf.shape) < MATRIX:
        return leaf.numel
    *stacked, rows, columns = leaf.shape
    return elements_of((*stacked, rows + columns))


def _where(condition: Size, yes: Size, no: Size) -> Size:
    return yes if condition else no
