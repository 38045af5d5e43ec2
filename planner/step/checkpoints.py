"""Activation checkpointing, on the card or with inputs moved to the host: handlers of a layer's scope.

The two ways of torch.utils.checkpoint, in what they keep, recompute and free (torch/utils/checkpoint.py, 2.13), and
unsloth's and transformers' offloading of what they keep.
"""

from __future__ import annotations

from planner.step.context import Step
from planner.step.engine import Engine, Frame, Grads, LayerForward, Node, StopRecompute, Tensor
from planner.step.scopes import Handler, Unit
from planner.step.transfers import HOST_TRANSFER, OVERLAPPED_TRANSFER
from planner.training.losses import KERNEL_SETS


def handlers(step: Step) -> list[Handler]:
    """What the settings do with the activations of a layer: nothing, recompute them, keep its input on the host."""
    train = step.train
    if train.gradient_checkpointing == "none" or ignores_checkpoints(step):
        return []
    recomputing = Recomputing(train.use_reentrant, train.gradient_checkpointing == "offload")
    return [recomputing, ToHost(_transfer(step))] if recomputing.offloads else [recomputing]


def ignores_checkpoints(step: Step) -> bool:
    """Whether the class of this release keeps every activation whatever is asked."""
    first, end = step.habits.ignores_checkpoints
    return first <= step.train.versions.transformers < end


def _transfer(step: Step) -> str:
    """How a checkpoint's input goes to the host and comes back.

    unsloth copies in a stream of its own, which the layer waits for at its end (forward) or before it is recomputed
    (unsloth_zoo/gradient_checkpointing.py UnslothCheckpointFunction, two buffers in turn: while one layer's
    backward runs, the next one's input comes). It leaves the last layer's input and those of up to 2 MiB on the
    card, which is not modelled. transformers' own offloading (save_on_cpu with pinned memory: asynchronous copies
    in the current stream) does not overlap; trl's activation_offloading, which can, is priced as if it did not.
    """
    aside = KERNEL_SETS[step.train.kernels].offloads_aside and not step.arch.on_cpu
    return OVERLAPPED_TRANSFER if aside else HOST_TRANSFER


class Recomputing(Handler):
    """Keep a layer's input alone; run its forward again when the backward comes to it."""

    def __init__(self, reenters: bool, offloads: bool) -> None:
        self.reenters = reenters
        """The checkpoint is a node of the graph that runs a backward of its own (use_reentrant=True)."""
        self.offloads = offloads
        """The input leaves the card."""

    def wrap(self, step: Step, forward: LayerForward) -> LayerForward:
        def checkpointed(x: Tensor) -> tuple[Tensor, Tensor | None]:
            reenters = self.reenters and x.requires_grad
            return (checkpoint_reentrant if reenters else checkpoint)(step.eng, forward, x, self.offloads)

        return checkpointed


class ToHost(Handler):
    """Copy a layer's input to the host when its forward runs, and back when it runs again."""

    def __init__(self, transfer: str) -> None:
        self.transfer = transfer
        """Kind of kernel (planner.step.transfers)."""

    def before_forward(self, step: Step, unit: Unit, x: Tensor) -> None:
        step.eng.kernel(self.transfer, x.dtype, x.nbytes)


def checkpoint(eng: Engine, forward: LayerForward, x: Tensor, offload: bool) -> tuple[Tensor, Tensor | None]:
    """torch.utils.checkpoint(use_reentrant=False) around `forward(x)`; offload moves the kept input to the host."""
    autocast = eng.autocast
    kept: list[Tensor | None] = [None if offload else _kept(eng, x)]
    shape = (x.numel, x.dtype, x.requires_grad, x.node, x.slot)

    def recompute() -> None:
        again = kept.pop() or eng.empty(shape[0], shape[1], "checkpoint_reload")
        again.requires_grad, again.node, again.slot = shape[2], shape[3], shape[4]
        inner = Frame(None, frame)
        inner.stop_after = frame.saving
        outer, eng.frame = eng.frame, inner
        grad, eng.grad_enabled = eng.grad_enabled, True
        frame.recompute = None
        frame.kept = None if offload else again.view()
        before, eng.recomputing = eng.recomputing, True
        try:
            with eng.autocasting(autocast):
                forward(again)
        except StopRecompute:
            pass
        finally:
            eng.recomputing = before
            eng.frame = outer
            eng.grad_enabled = grad
        for reference, repeated in zip(frame.nodes, inner.again, strict=False):
            original = reference()
            if repeated is None or original is None:
                continue
            if original.frame is not None:
                original.saved = repeated.saved
            repeated.saved = ()
        frame.nodes.clear()
        inner.again.clear()  # no cycle may hold the frame: its input dies with its last node
        inner.original = None

    frame = Frame(recompute)
    frame.forward = forward
    outer, eng.frame = eng.frame, frame
    try:
        return forward(x)
    finally:
        eng.frame = outer


def _kept(eng: Engine, x: Tensor) -> Tensor:
    """The input a checkpoint keeps: labelled so in the ledger, outside the graph."""
    eng.record.ops[x.storage.index] = "checkpoint"
    return x.view()


def checkpoint_reentrant(eng: Engine, forward: LayerForward, x: Tensor, offload: bool) -> tuple[Tensor, Tensor | None]:
    """torch.utils.checkpoint(use_reentrant=True): a node that reruns the forward and its backward.

    A second output that the loss does not use gets a gradient of zeros (set_materialize_grads is on by default).
    """
    autocast, layer = eng.autocast, eng.layer
    with eng.no_grad():
        out, second = forward(x)
    numel, dtype = x.numel, x.dtype
    other = None if second is None else (second.numel, second.dtype)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        zeros = None if other is None else eng.empty(other[0], other[1], "unused_grad")
        source = eng.empty(numel, dtype, "checkpoint_reload") if offload else node.saved[0]
        detached = eng.leaf(source.view())
        del source
        eng.layer = layer
        with eng.autocasting(autocast):
            grad, eng.grad_enabled = eng.grad_enabled, True
            eng.recomputing = True
            again, unused = forward(detached)
            eng.recomputing = False
            eng.grad_enabled = grad
        eng.backward(again, grads[0], unused, zeros)
        result, detached.grad, detached.node = detached.grad, None, None
        return [result]

    outputs = (out,) if second is None else (out, second)
    eng.link(outputs, (x,), backward, () if offload else (_kept(eng, x),))
    return out, second
