"""A symbolic eager engine: tensors without data, an autograd graph, and a record of every allocation and kernel.

Layers are written against it as PyTorch modules are written against torch. A storage is freed when the last Python
reference to it goes, as in PyTorch, so the lifetime of a tensor is what the code says: local variables, saved
tensors of autograd nodes, gradient buffers. (This relies on CPython's reference counting.)

A tensor knows its shape as far as the modules say it. Parameters, the embeddings, outputs of linear modules, products
of batches, norms, fused attention and the experts' inputs have one, and element-wise operations keep that of their
larger operand; there, the number of rows comes from the shape. What is still counted in elements, a shape of one
number: heads split and joined for the rotation, masks, gradients, and the loss (planner.step.modules.losses takes its
tokens from the step: shifted logits count rows that they no longer have).

Sizes are bytes or elements: ints, or in a sweep polynomials (planner.base.polynomials) that stand for all cells in
which the step has the same structure. The backward order, the in-place accumulation of gradients and the moments at
which inputs, saved tensors and outputs die follow torch/csrc/autograd/engine.cpp and input_buffer.cpp (torch 2.13).
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

from planner.step.kernels import Kernel
from planner.step.kernels import Layout as Layout
from planner.step.kernels import Shape as Shape
from planner.step.kernels import Size as Size
from planner.step.scopes import Owner, Unit

if TYPE_CHECKING:
    from typing import Protocol

    class Watcher(Protocol):
        """What is told when the backward comes to the nodes of a unit, and when it leaves them."""

        def before_backward(self, unit: Unit) -> None: ...

        def after_backward(self, unit: Unit) -> None: ...


FP32, BF16, FP16, INT8, INT64 = "fp32", "bf16", "fp16", "int8", "int64"
ITEMSIZE: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int64": 8}


class Storage:
    """Bytes on the device. Its end of life is an event of the record."""

    __slots__ = ("index", "nbytes", "record")

    def __init__(self, record: Record, nbytes: Size, op: str) -> None:
        self.record = record
        self.nbytes = nbytes
        self.index = index = len(record.ops)
        record.ops.append(op)
        record.segment_of.append(len(record.segments) - 1)
        record.sublayer_of.append(record.sublayer)
        record.events.append((index, nbytes))

    def __del__(self) -> None:
        record = self.record
        if not record.closed:
            record.events.append((self.index, -self.nbytes))


MATRIX = 2
"""Dimensions of a matrix; more of them are several matrices."""
Dimensions = tuple[Size, ...]
"""Shape of a tensor, slowest dimension first."""


def elements_of(shape: Dimensions) -> Size:
    """Elements of a tensor of this shape."""
    if len(shape) == MATRIX:
        return shape[0] * shape[1]
    numel = shape[0]
    for size in shape[1:]:
        numel = numel * size
    return numel


INPUT_GRAD: dict[Layout, Layout] = {"nt": "nn", "nn": "nt", "tn": "nn"}
"""Layout of the product that gives the left operand's gradient; the right one's has "tn"."""


class Segment:
    """A named stretch of the step: where in the event list it lies and how often it stands for itself."""

    __slots__ = ("end", "layer", "phase", "repeat", "start")

    def __init__(self, phase: str, layer: int, repeat: int, start: int) -> None:
        self.phase = phase
        self.layer = layer
        self.repeat = repeat
        self.start = start
        self.end = start


class Record:
    """Everything that happened, in order: allocations (index, +bytes), frees (index, -bytes), kernels, segments."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Size]] = []
        self.ops: list[str] = []
        """Per storage: the operation that made it (may be relabelled, e.g. a kept layer input)."""
        self.segment_of: list[int] = []
        self.sublayer = 0
        """Which layer of its unit runs now (0 where a unit is one layer)."""
        self.sublayer_of: list[int] = []
        self.kernels: list[Kernel] = []
        self.segments: list[Segment] = [Segment("load", -1, 1, 0)]
        self.first_products: dict[bool, tuple[int, int]] = {}
        """In the backward (True) or before it: (segment, events before it) of the first product by cuBLAS."""
        self.arrivals: list[int] = []  # storages that hold a weight as it was read
        self.readers = 0  # threads that read them ahead (loading.overlap)
        self.closed = False

    def enter(self, phase: str, layer: int = -1, repeat: int = 1) -> None:
        """Begin a new segment; the current one ends here."""
        self.segments[-1].end = len(self.events)
        self.segments.append(Segment(phase, layer, repeat, len(self.events)))

    def close(self) -> None:
        self.segments[-1].end = len(self.events)
        self.closed = True


class Tensor:
    """A tensor without data: shape, dtype, storage, and its place in the autograd graph.

    A shape of one number only counts elements.
    """

    __slots__ = ("dtype", "grad", "is_view", "node", "numel", "owner", "requires_grad", "shape", "slot", "storage")

    def __init__(self, storage: Storage, shape: Size | Dimensions, dtype: str, numel: Size = None) -> None:
        self.storage = storage
        if type(shape) is tuple:
            self.shape = shape
            self.numel = elements_of(shape) if numel is None else numel
        else:
            self.shape = (shape,)
            self.numel = shape
        self.dtype = dtype
        self.owner: Owner | None = None
        """Of a parameter."""
        self.requires_grad = False
        self.node: Node | None = None
        self.slot = 0
        self.grad: Tensor | None = None
        self.is_view = False
        """Whether torch holds its base beside it (autograd/variable.h DifferentiableViewMeta): two owners."""

    @property
    def nbytes(self) -> Size:
        return self.numel * ITEMSIZE[self.dtype]

    def view(self, shape: Size | Dimensions | None = None) -> Tensor:
        """Return another tensor on the same storage, outside the graph; None: of the same shape."""
        if shape is None:
            return Tensor(self.storage, self.shape, self.dtype, self.numel)
        return Tensor(self.storage, shape, self.dtype)

    def rows(self, width: int) -> Size:
        """Vectors of `width` elements in it: all dimensions but the last, where it says that it is one of rows."""
        shape = self.shape
        if len(shape) > 1 and type(shape[-1]) is int and shape[-1] == width:
            return shape[0] if len(shape) == MATRIX else elements_of(shape[:-1])
        return self.numel // width


Grads = list["Tensor | None"]
Backward = Callable[["Node", Grads], Sequence["Tensor | None"]]

LayerForward = Callable[["Tensor"], "tuple[Tensor, Tensor | None]"]
"""A decoder layer: its output, and the attention probabilities where the class returns them too."""

_LEAF = sys.maxsize  # AccumulateGrad runs as soon as it is ready: highest priority


class Node:
    """A node of the autograd graph: edges to the producers of its inputs, what it saved, and its backward."""

    __slots__ = (
        "__weakref__", "attributes", "backward", "dtypes", "edges", "frame", "is_parameter", "layer", "leaf", "numels",
        "outputs", "saved", "seq", "sublayer",
    )  # fmt: skip

    def __init__(self, seq: int, backward: Backward | None, saved: tuple[Tensor, ...]) -> None:
        self.seq = seq
        self.backward = backward
        self.saved = saved
        self.attributes = False
        """Whether `saved` are attributes of a custom function: they live as long as the graph, not until it ran."""
        self.edges: list[tuple[Node, int] | None] = []
        self.dtypes: list[str] = []
        self.numels: list[Size] = []
        self.outputs = 1
        self.leaf: Tensor | None = None
        self.is_parameter = False
        """Whether `leaf` is a parameter of the model, not an activation made a leaf."""
        self.frame: Frame | None = None
        self.layer = -1
        self.sublayer = 0


class Frame:
    """A non-reentrant checkpoint: the nodes of a forward whose saved tensors are recomputed on first use."""

    __slots__ = ("again", "forward", "kept", "nodes", "original", "recompute", "saving", "stop_after")

    def __init__(self, recompute: Callable[[], Any] | None, original: Frame | None = None) -> None:
        self.kept: Tensor | None = None
        """The checkpoint's input: alive until the last node of the frame has run."""
        self.forward: LayerForward | None = None
        """What is checkpointed, with the arguments it holds: alive as long."""
        self.nodes: list[ReferenceType[Node]] = []
        """The nodes of the forward: those of a result that nobody uses die with it, and their repetition too."""
        self.original = original
        self.again: list[Node | None] = []
        """A recomputation's nodes, kept where the original node is alive (checkpoint.py keeps by weak holders)."""
        self.recompute = recompute
        self.saving = 0
        self.stop_after = 0


class StopRecompute(Exception):
    """Every tensor the backward needs has been recomputed (torch.utils.checkpoint's early stop)."""


class Engine:
    """Grad mode, autocast mode, the graph being built and the record being written."""

    def __init__(self, accumulates_in_place: bool = True, colons_are_slices: bool = False) -> None:
        self.record = Record()
        self.accumulates_in_place = accumulates_in_place
        """False under a dispatch mode: torch then adds gradients out of place (isTensorSubclassLike)."""
        self.colons_are_slices = colons_are_slices
        """Whether `:` in an index makes a node (cuda_rules.colons_are_slices)."""
        self.grad_enabled = True
        self.autocast: str | None = None
        self.cast_cache: dict[int, tuple[int, Tensor]] = {}
        """Autocast's cached weights: (layer, cast) by the leaf's identity."""
        self.frame: Frame | None = None
        self.layer = -1
        self.sublayer = 0
        """The decoder layer that runs now (-1: outside the layers); nodes remember it for the backward."""
        self.repeats: dict[int, int] = {}
        """How many equal layers an emulated layer stands for (1 where not listed)."""
        self.recomputing = False
        """Whether a checkpoint runs its forward again."""
        self.in_backward = False
        """Whether autograd's own thread runs, recomputations included."""
        self.watcher: Watcher | None = None
        self._unit: Unit | None = None
        """Whose nodes the backward runs."""
        self._seq = 0

    # --- making tensors ---------------------------------------------------------------------------------------

    def empty(self, shape: Size | Dimensions, dtype: str, op: str) -> Tensor:
        """Allocate a tensor."""
        numel = elements_of(shape) if type(shape) is tuple else shape
        return Tensor(Storage(self.record, numel * ITEMSIZE[dtype], op), shape, dtype, numel)

    def like(self, x: Tensor, dtype: str, op: str) -> Tensor:
        """Allocate a tensor of x's shape."""
        return Tensor(Storage(self.record, x.numel * ITEMSIZE[dtype], op), x.shape, dtype, x.numel)

    def enter(self, phase: str, layer: int = -1) -> None:
        """Begin a segment of the record."""
        self.layer = layer
        self.record.enter(phase, layer, self.repeats.get(layer, 1))

    def workspace(self, nbytes: Size, op: str) -> Storage:
        """Allocate bytes inside a kernel; they live as long as the caller keeps the handle."""
        return Storage(self.record, nbytes, op)

    def read(self, shape: Size | Dimensions, dtype: str, op: str) -> Tensor:
        """Allocate a weight that comes from the checkpoint."""
        tensor = self.empty(shape, dtype, op)
        self.record.arrivals.append(tensor.storage.index)
        return tensor

    def leaf(self, tensor: Tensor, is_parameter: bool = False) -> Tensor:
        """Make `tensor` a leaf that requires grad."""
        tensor.requires_grad = True
        node = Node(_LEAF, None, ())
        node.leaf = tensor
        node.is_parameter = is_parameter
        tensor.node = node
        return tensor

    def kernel(
        self, op: str, dtype: str, nbytes: Size, flops: Size = 0, count: Size = 1, shape: Shape | None = None,
        layout: Layout = "nt", elements: Size = 0,
    ) -> None:  # fmt: skip
        """Record work on the device, of a kind of KERNELS; `elements` of an "indexed" kernel.

        Raises:
            UnknownName: there is no such kind.
        """
        record = self.record
        segment = len(record.segments) - 1
        record.kernels.append(
            Kernel(op, dtype, flops, nbytes, count, segment, shape, self.recomputing, layout, elements)
        )

    def indexed(self, dtype: str, nbytes: Size, elements: Size) -> None:
        """Record an element-wise kernel that computes addresses one by one instead of reading vectors.

        Source: ATen/native/cuda/CUDALoops.cuh: only contiguous operands of the result's dtype take
        vectorized_elementwise_kernel (and copies from fp32 to 16 bits, Copy.cu); others go through offset
        calculators (elementwise_kernel, unrolled_elementwise_kernel).
        """
        self.kernel("indexed", dtype, nbytes, elements=elements)

    def matmul(
        self, op: str, dtype: str, m: Size, n: Size, k: Size, batch: Size = 1, count: Size = 1, layout: Layout = "nt"
    ) -> None:
        """Record `batch` matrix products [m, k] x [k, n]: operands read once, the result written once."""
        moved = batch * (m * k + k * n + m * n) * ITEMSIZE[dtype]
        flops = 2.0 * batch * m * n * k  # a float: int64 would overflow silently in a sweep
        self.kernel(op, dtype, moved, flops, count, (batch, m, n, k), layout)
        self.calls_blas()

    def calls_blas(self) -> None:
        """Remember the first product of each thread: its handle then gets its workspace."""
        record = self.record
        if self.in_backward not in record.first_products:
            record.first_products[self.in_backward] = (len(record.segments) - 1, len(record.events))

    # --- the graph --------------------------------------------------------------------------------------------

    def needs_grad(self, *inputs: Tensor | None) -> bool:
        """Whether an operation on `inputs` is recorded for backward."""
        return self.grad_enabled and any(t is not None and t.requires_grad for t in inputs)

    def link(
        self,
        outputs: Tensor | Sequence[Tensor],
        inputs: Sequence[Tensor | None],
        backward: Backward,
        saved: tuple[Tensor, ...] = (),
        hooked: bool = True,
    ) -> None:
        """Record a node after its outputs exist: `backward(node, grads)` returns one gradient (or None) per input.

        hooked=False: the function keeps its tensors as attributes, so checkpoint hooks do not see them and they die
        with the graph (its root is a variable of the caller until the backward ends).
        """
        self.finish(self.begin(inputs, backward, saved, hooked), outputs)

    def begin(
        self,
        inputs: Sequence[Tensor | None],
        backward: Backward,
        saved: tuple[Tensor, ...] = (),
        hooked: bool = True,
    ) -> Node | None:
        """Record a node before its outputs exist, as operations that save only inputs do (None: no graph)."""
        if not self.grad_enabled:
            return None
        for t in inputs:
            if t is not None and t.requires_grad:
                break
        else:
            return None
        self._seq += 1
        node = Node(self._seq, backward, saved)
        node.layer, node.sublayer = self.layer, self.record.sublayer
        node.attributes = not hooked and bool(saved)
        for t in inputs:
            if t is None or not t.requires_grad or t.node is None:
                node.edges.append(None)
                node.dtypes.append("")
                node.numels.append(0)
            else:
                node.edges.append((t.node, t.slot))
                node.dtypes.append(t.dtype)
                node.numels.append(t.numel)
        if self.frame is not None:
            self._file(node, saved if hooked else ())
        return node

    @staticmethod
    def finish(node: Node | None, outputs: Tensor | Sequence[Tensor]) -> None:
        """Make `outputs` the results of `node`."""
        if node is None:
            return
        produced = (outputs,) if isinstance(outputs, Tensor) else outputs
        node.outputs = len(produced)
        for slot, out in enumerate(produced):
            out.requires_grad = True
            out.node = node
            out.slot = slot

    def _file(self, node: Node, saved: tuple[Tensor, ...]) -> None:
        frame = self.frame
        assert frame is not None
        if frame.original is None:
            frame.nodes.append(ref(node))
        else:
            alive = frame.original.nodes[len(frame.again)]() is not None
            frame.again.append(node if alive else None)
        if not saved:
            return
        node.frame = frame  # only a node that unpacks saved tensors starts the recomputation
        frame.saving += 1
        if frame.recompute is not None:
            node.saved = ()  # refilled when the backward first asks for anything of this frame
        elif frame.saving == frame.stop_after:
            raise StopRecompute

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def autocasting(self, dtype: str | None) -> Iterator[None]:
        """Enter autocast; its cache of cast weights is dropped when the outermost context ends."""
        before, self.autocast = self.autocast, dtype
        outer, self.cast_cache = self.cast_cache, self.cast_cache if before else {}
        try:
            yield
        finally:
            self.autocast = before
            cache, self.cast_cache = self.cast_cache, outer
            if cache is not outer:
                self._drop_casts(cache)

    def _drop_casts(self, cache: dict[int, tuple[int, Tensor]]) -> None:
        """Free cached casts layer by layer, so that a layer's share counts as often as the layer does."""
        layers = sorted({layer for layer, _ in cache.values()})
        here = self.layer
        for layer in layers:
            if layer != here:
                self.enter("forward", layer)
            for key in [k for k, (owner, _) in cache.items() if owner == layer]:
                del cache[key]
        if any(layer != here for layer in layers):
            self.enter("loss", here)

    # --- backward ---------------------------------------------------------------------------------------------

    def backward(
        self, root: Tensor, grad: Tensor | None, second: Tensor | None = None, second_grad: Tensor | None = None
    ) -> None:
        """Run the backward from `root` with the gradient `grad`, and from a second root that `root` depends on."""
        assert root.node is not None
        start = root.node
        pending = self._dependencies(start)
        buffers: dict[int, Grads] = {}
        first: Grads = [None] * start.outputs
        first[root.slot] = grad
        buffers[id(start)] = first
        if second is not None and second.node is not None:
            buffers[id(second.node)] = [None] * second.node.outputs
            buffers[id(second.node)][second.slot] = second_grad
        held: list[tuple[int, tuple[Tensor, ...]]] = []
        ready: list[tuple[int, int, Node]] = [(-start.seq, 0, start)]
        del first, grad
        outer, self.grad_enabled = self.grad_enabled, False
        thread, self.in_backward = self.in_backward, True
        tie = 0
        while ready:
            node = heapq.heappop(ready)[2]
            if node.leaf is None:
                if self.watcher is not None:
                    self._arrive(node, self.watcher)
                else:
                    self.record.sublayer = node.sublayer
                    if node.layer != self.layer:
                        self.enter("backward", node.layer)
            attributes = node.saved if node.attributes else ()
            results = self._evaluate(node, buffers.pop(id(node)))
            if attributes:
                held.append((node.layer, attributes))
            del attributes
            for slot, edge in enumerate(node.edges):
                if edge is None:
                    continue
                target, index = edge
                result = results[slot]
                results[slot] = None
                key = id(target)
                if key not in buffers:
                    buffers[key] = [None] * target.outputs
                if result is not None:
                    self._accumulate(buffers[key], index, result)
                del result
                pending[key] -= 1
                if pending[key] == 0:
                    tie += 1
                    heapq.heappush(ready, (-target.seq, tie, target))
            node.edges = []
            del results, node
        self.grad_enabled, self.in_backward = outer, thread
        if not thread:
            self._leave()
        self._drop_attributes(held)

    def _arrive(self, node: Node, watcher: Watcher) -> None:
        """The backward comes to a node that is not a leaf: it may be the first one of its unit."""
        crosses = self._unit is None or self._unit[0] != node.layer or self._unit[1] != node.sublayer
        if crosses:
            self._leave()
        self.record.sublayer = node.sublayer
        if node.layer != self.layer:
            self.enter("backward", node.layer)
        if crosses:
            self._unit = Unit(node.layer, node.sublayer)
            watcher.before_backward(self._unit)

    def _leave(self) -> None:
        """The backward has run all nodes of a unit that were ready, those that accumulate its gradients included."""
        if self._unit is not None and self.watcher is not None:
            self.watcher.after_backward(self._unit)
        self._unit = None

    def _drop_attributes(self, held: list[tuple[int, tuple[Tensor, ...]]]) -> None:
        """Free what custom functions kept, in segments of the layers that it belongs to."""
        while held:
            layer, tensors = held.pop(0)
            if layer != self.layer:
                self.enter("backward", layer)
            del tensors

    @staticmethod
    def _dependencies(start: Node) -> dict[int, int]:
        counts: dict[int, int] = {id(start): 0}
        stack = [start]
        while stack:
            for edge in stack.pop().edges:
                if edge is None:
                    continue
                key = id(edge[0])
                if key in counts:
                    counts[key] += 1
                else:
                    counts[key] = 1
                    stack.append(edge[0])
        return counts

    def _evaluate(self, node: Node, grads: Grads) -> list[Tensor | None]:
        """Run one node and validate its outputs; its inputs and its saved tensors die after that."""
        if node.leaf is not None:
            self._accumulate_leaf(node.leaf, grads, node.is_parameter)
            return []
        frame = node.frame
        if frame is not None and frame.recompute is not None:
            frame.recompute()
        assert node.backward is not None
        results = list(node.backward(node, grads))
        if frame is not None:
            node.saved = ()  # a checkpoint hands its tensors out: they die with the call (checkpoint.py unpack_hook)
        for slot, result in enumerate(results):  # validate_outputs runs before the inputs are gone
            if result is not None and node.edges[slot] is not None:
                results[slot] = self._validate(result, node.numels[slot], node.dtypes[slot])
                result = None
        grads.clear()
        node.saved = ()
        node.backward = node.frame = frame = None
        return results

    def _validate(self, grad: Tensor, numel: Size, dtype: str) -> Tensor:
        """Reduce a broadcast gradient and cast it to its input's dtype, as validate_outputs does."""
        if grad.numel is not numel and not _same(grad.numel, numel):
            reduced = self.empty(numel, grad.dtype, "sum_to")
            self.kernel("reduce", grad.dtype, grad.nbytes + reduced.nbytes)
            grad = reduced
        if grad.dtype != dtype:
            cast = self.empty(numel, dtype, "cast_grad")
            self.kernel("cast", dtype, grad.nbytes + cast.nbytes)
            grad = cast
        return grad

    def _accumulate(self, buffer: Grads, index: int, grad: Tensor) -> None:
        old = buffer[index]
        if old is None:
            buffer[index] = grad
            return
        self.kernel("elementwise", old.dtype, 2 * old.nbytes + grad.nbytes)
        # In place when the buffer holds the last reference (getrefcount adds its argument, this frame one name).
        if (
            self.accumulates_in_place
            and not old.is_view
            and sys.getrefcount(old.storage) <= 2
            and sys.getrefcount(old) <= 3
        ):
            return
        buffer[index] = self.empty(old.numel, old.dtype, "accumulate_grad")

    def _accumulate_leaf(self, leaf: Tensor, grads: Grads, is_parameter: bool) -> None:
        """AccumulateGrad: the first gradient is stolen if nobody else holds it, else cloned; later ones are added."""
        grad = grads[0]
        grads.clear()
        if grad is None:
            return
        if leaf.grad is not None:
            self.kernel("elementwise", grad.dtype, 3 * grad.nbytes)
            return
        if sys.getrefcount(grad.storage) > 2:
            copy = self.empty(grad.numel, grad.dtype, "copied_grad")
            self.kernel("copy", grad.dtype, 2 * grad.nbytes)
            grad = copy
        if is_parameter:
            self.record.ops[grad.storage.index] = "gradient"
        leaf.grad = grad


def _same(a: Size, b: Size) -> bool:
    return bool(a == b)
