"""KERNELS: the kinds of kernels that a step runs, one row each. Every consumer reads its field of the row.

`planner.timing` prices them (`planner.timing.prices` holds the ways), `planner.sweep` adds them up, the ledger of time
and the fit of a calibration sort them by class, and profiles of real steps find them by parts of their names. All
fields are required: what is forgotten fails at import, by name.
"""

from __future__ import annotations

import typing
from typing import Any, Literal

from planner.base.errors import unknown
from planner.base.records import Rows, record, replace
from planner.training.optimizers import OPTIMIZERS

Lane = Literal["compute", "communication", "copy", "host"]
"""Queues whose work runs side by side: the stream of kernels, one of collectives, one of copies between card and host,
and the thread that launches."""

Price = Literal["product", "attention", "traffic", "index", "link"]
"""How a kernel is priced: whole tiles of a matrix product; FLOPs of a fused attention; bytes over a bandwidth; an index
computed for each element, or the bytes where those take longer; bytes over the host's link."""

PRICE_WAYS = typing.get_args(Price)

Compiled = Literal["alone", "kept", "merged"]
"""What torch.compile does with a kernel: nothing; its graph launches it; its graph merges it with its neighbours."""

COMPILED_LAUNCHES = 0.3
"""Share of the launches that torch.compile leaves where it fuses element-wise kernels: assumed."""

LOG_SOFTMAX_PASSES = 2.0
"""Rows of a whole vocabulary do not fit a block's shared memory: log_softmax reads its input three times and writes
once, its backward reads the gradient twice and the result once (ATen/native/cuda/SoftMax.cu cunn_SoftMaxForward,
cunn_SoftMaxBackward), where the program counts input and output once."""

INT8_QUANTIZE_BANDWIDTH, INT8_DEQUANTIZE_BANDWIDTH = 0.48, 0.67
"""Shares of the reached bandwidth that bitsandbytes' 8-bit kernels have (H200 profiles: kInt8VectorQuant, a block a
row, 2.0 TB/s; kdequant_mm_int32_fp16 2.9 TB/s)."""


Size = Any
"""int, or a Polynomial in a sweep."""

Shape = tuple[Size, Size, Size, Size]
"""Of a matrix product: how many of them, and m, n, k of each ([m, k] x [k, n])."""

Layout = Literal["nt", "nn", "tn"]
"""How the two operands of a product lie in memory, in BLAS letters (t: transposed): x @ weight.T, grad @ weight,
grad.T @ x."""


# --- classes of the ledger ---------------------------------------------------------------------------------------


@record
class LedgerClass:
    """A line of the ledger of time."""

    compared_as: str | None
    """The class of a profile's kernels that a fit compares it with, as far as names tell them apart; None: no burst
    that is fitted has any."""


LINK_CLASS = "host transfer"
"""Copies between the card and its host: whatever is priced by the link, and waiting for it."""
LINK_COEFFICIENT = "host_link"

PRODUCTS, ATTENTION, DEQUANTIZATION, REST = "matrix products", "attention", "dequantization", "the rest"
"""Classes of a profile's kernels that a fit compares; an 8-bit base's own kernels, half of them element-wise, belong
to the rest."""

_CLASSES = {
    "matrix products": PRODUCTS, "adapters": PRODUCTS, "attention": ATTENTION, "dequantization": DEQUANTIZATION,
    "element-wise": REST, "loss": REST, "optimizer": REST, LINK_CLASS: None,
}  # fmt: skip
LEDGER: Rows[LedgerClass] = Rows(
    "class of kernels", _CLASSES, ((name, LedgerClass(compared_as=found)) for name, found in _CLASSES.items())
)
"""Classes of kernels in the ledger of time, in the order they are printed."""

PROFILED = ("attention", "dequantization", "optimizer", "matrix products", "loss")
"""Classes that the kernels and operations of a profile are sorted into by `KernelKind.marks`, in the order they are
looked for: the first whose marks are part of a name. The rest is UNMARKED."""
UNMARKED = "element-wise"


# --- ways of torch.compile ---------------------------------------------------------------------------------------


@record
class CompiledWay:
    """What is left of a kernel under torch.compile."""

    latency_share: float
    """Of the recorded kernels that run."""
    launched_share: float
    """Of the recorded launches that the host still makes."""
    traffic: str | None
    """The coefficient that says which share of its bytes still moves; None: all."""


COMPILED: Rows[CompiledWay] = Rows(
    "way of torch.compile",
    typing.get_args(Compiled),
    (
        ("alone", CompiledWay(latency_share=1.0, launched_share=1.0, traffic=None)),
        ("kept", CompiledWay(latency_share=1.0, launched_share=COMPILED_LAUNCHES, traffic=None)),
        ("merged", CompiledWay(
            latency_share=COMPILED_LAUNCHES, launched_share=COMPILED_LAUNCHES, traffic="compiled_traffic",
        )),
    ),
)  # fmt: skip


# --- kinds of kernels --------------------------------------------------------------------------------------------


@record
class FusedAttention:
    """What tells one fused attention kernel from another."""

    hopper: str | None
    """The coefficient that its rate on Hopper is a share of; None: it uses Hopper's instructions, or is as slow."""
    short_rows: str | None
    """The coefficient that is the row's length at which it reaches half its rate; None: any length alike."""
    own_fp32: bool
    """Its fp32 variant, without matrix units, has a rate of its own on a GPU as well (on a CPU each has)."""


@record
class KernelKind:
    """One kind of kernel."""

    name: str
    lane: Lane
    """Where it runs. What is not in the stream of kernels runs beside those of the decoder layers."""
    price: Price
    coefficient: str | None
    """What its rate is a share of (`planner.timing.coefficients`); None: that of large products of its dtype."""
    bandwidth_share: float
    """Of the reached bandwidth, that it has on any device."""
    gpu_passes: float
    """How often a GPU goes over the bytes that the program counts."""
    attention: FusedAttention | None
    """Of a fused attention kernel, and of no other."""
    compiled: Compiled
    call_cost: str | None
    """The coefficient of what a call costs the host beyond its launches; None: nothing."""
    only_without_room: bool
    """Managed memory: moves once an optimizer step, only where the card has less room than its bytes (each is counted
    twice, in and out)."""
    ledger: str
    """Its class in a decoder layer."""
    ledger_outside: str
    """Its class outside of decoder layers."""
    profiled: str
    """The class that its names in a profile belong to."""
    marks: tuple[str, ...]
    """Parts of its lower-case names in a profile, by which it is known; none of what is UNMARKED."""

    def __post_init__(self) -> None:
        for name in (self.ledger, self.ledger_outside):
            LEDGER[name]
        if self.price not in PRICE_WAYS:
            raise unknown("way of pricing", self.price, PRICE_WAYS)
        if self.lane not in ("compute", "copy"):  # a lane's rule for what waits for it is in planner.timing.step_time
            raise unknown(f"lane of kernel {self.name}", self.lane, ("compute", "copy"))
        over_link, by_bytes = self.price == "link", self.price in ("traffic", "index")
        wrong = {
            "bandwidth_share": self.bandwidth_share != 1.0 and not by_bytes,
            "gpu_passes": self.gpu_passes != 1.0 and not by_bytes,
            "compiled": COMPILED[self.compiled].traffic is not None and not by_bytes,
            "attention": (self.attention is not None) != (self.price == "attention"),
            "coefficient": (self.coefficient is None) != (self.price == "product"),
            "lane": self.lane == "copy" and not over_link,
            "only_without_room": self.only_without_room and not over_link,
            "ledger": over_link and not self.ledger == self.ledger_outside == LINK_CLASS,
            "profiled": self.profiled not in (*PROFILED, UNMARKED),
            "marks": bool(self.marks) != (self.profiled in PROFILED),
        }
        for field, is_wrong in wrong.items():
            if is_wrong:
                raise TypeError(f"kernel {self.name}: {field} does not go with its other fields")

    def ledger_class(self, layer: int) -> str:
        """Its class in the ledger in a decoder layer, or outside of them (-1)."""
        return self.ledger if layer >= 0 else self.ledger_outside


_GEMM = ("gemm", "mm", "linear", "cutlass", "matmul", "mkldnn", "nvjet", "splitk")
_ATTENTION = ("attention", "flash_fwd", "flash_bwd", "fmha", "sdpa")
_QUANTIZE = ("dequantize", "quantize", "kdequant")
_SOFTMAX = ("log_softmax", "nll_loss", "cross_entropy", "softmax")
_OPTIMIZER = tuple(sorted({word for row in OPTIMIZERS.values() for word in row.kernel_words}))


def _product(name: str, ledger: str) -> KernelKind:
    """Matrix products; `ledger`: whose."""
    return KernelKind(
        name=name, lane="compute", price="product", coefficient=None, bandwidth_share=1.0, gpu_passes=1.0,
        attention=None, compiled="alone", call_cost=None, only_without_room=False, ledger=ledger,
        ledger_outside=ledger, profiled="matrix products", marks=_GEMM,
    )  # fmt: skip


def _attention(name: str, coefficient: str, attention: FusedAttention) -> KernelKind:
    """One direction of a fused attention."""
    return KernelKind(
        name=name, lane="compute", price="attention", coefficient=coefficient, bandwidth_share=1.0, gpu_passes=1.0,
        attention=attention, compiled="kept", call_cost=None, only_without_room=False, ledger="attention",
        ledger_outside="attention", profiled="attention", marks=_ATTENTION,
    )  # fmt: skip


def _quantization(name: str, coefficient: str, bandwidth_share: float, call_cost: str | None) -> KernelKind:
    """A kernel of bitsandbytes or of another quantized base."""
    return KernelKind(
        name=name, lane="compute", price="traffic", coefficient=coefficient, bandwidth_share=bandwidth_share,
        gpu_passes=1.0, attention=None, compiled="kept", call_cost=call_cost, only_without_room=False,
        ledger="dequantization", ledger_outside="dequantization", profiled="dequantization", marks=_QUANTIZE,
    )  # fmt: skip


def _transfer(name: str, lane: Lane, only_without_room: bool) -> KernelKind:
    """Copies between the card and its host."""
    return KernelKind(
        name=name, lane=lane, price="link", coefficient=LINK_COEFFICIENT, bandwidth_share=1.0, gpu_passes=1.0,
        attention=None, compiled="alone", call_cost=None, only_without_room=only_without_room, ledger=LINK_CLASS,
        ledger_outside=LINK_CLASS, profiled=UNMARKED, marks=(),
    )  # fmt: skip


def _plain(name: str) -> KernelKind:
    """A kernel that reads and writes as fast as memory: of the loss where it is outside of the layers."""
    return KernelKind(
        name=name, lane="compute", price="traffic", coefficient="bandwidth", bandwidth_share=1.0, gpu_passes=1.0,
        attention=None, compiled="merged", call_cost=None, only_without_room=False, ledger="element-wise",
        ledger_outside="loss", profiled=UNMARKED, marks=(),
    )  # fmt: skip


_FLASH = FusedAttention(hopper="flash_hopper", short_rows="flash_length_half", own_fp32=False)
"""FlashAttention-2 (Dao 2023)."""
_CUDNN = FusedAttention(hopper=None, short_rows="flash_length_half", own_fp32=False)
_EFFICIENT = FusedAttention(hopper=None, short_rows=None, own_fp32=True)
"""xFormers' CUTLASS kernel."""

ROWS = (
    _product("matmul", "matrix products"),
    _product("lora", "adapters"),
    _product("bmm", "attention"),
    _attention("flash_attention", "flash_forward", _FLASH),
    _attention("flash_attention_backward", "flash_backward", _FLASH),
    _attention("efficient_attention", "efficient_forward", _EFFICIENT),
    _attention("efficient_attention_backward", "efficient_backward", _EFFICIENT),
    _attention("cudnn_attention", "cudnn_forward", _CUDNN),
    _attention("cudnn_attention_backward", "cudnn_backward", _CUDNN),
    _quantization("dequantize", "dequantize", 1.0, "launch_quantized"),
    _quantization("int8_quantize", "bandwidth", INT8_QUANTIZE_BANDWIDTH, "launch_quantized"),
    _quantization("int8_dequantize", "bandwidth", INT8_DEQUANTIZE_BANDWIDTH, None),
    replace(
        _plain("optimizer"), ledger="optimizer", ledger_outside="optimizer", compiled="alone", profiled="optimizer",
        marks=_OPTIMIZER,
    ),
    _transfer("host_transfer", "compute", False),
    _transfer("overlapped_transfer", "copy", False),
    _transfer("paged_transfer", "compute", True),
    replace(_plain("softmax"), ledger="attention", profiled="loss", marks=_SOFTMAX),
    replace(_plain("log_softmax"), gpu_passes=LOG_SOFTMAX_PASSES, profiled="loss", marks=_SOFTMAX),
    replace(_plain("indexed"), price="index", coefficient="indexed"),
    *(_plain(name) for name in ("elementwise", "norm", "reduce", "cast", "copy", "dropout")),
)  # fmt: skip

KERNELS: Rows[KernelKind] = Rows("kind of kernel", dict.fromkeys(row.name for row in ROWS), ((r.name, r) for r in ROWS))
"""By name. The fingerprint of the formulas depends on the order."""


# --- what a step records -----------------------------------------------------------------------------------------


class Kernel:
    """One device kernel (or a few of the same kind): floating-point operations, bytes moved, launches."""

    __slots__ = (
        "bytes", "count", "dtype", "elements", "flops", "kind", "layout", "op", "recomputed", "segment", "shape",
    )  # fmt: skip

    def __init__(
        self, op: str, dtype: str, flops: Size, nbytes: Size, count: Size, segment: int, shape: Shape | None,
        recomputed: bool, layout: Layout = "nt", elements: Size = 0,
    ) -> None:  # fmt: skip
        """`op`: the name of a row of KERNELS, which alone says what it means.

        Raises:
            UnknownName: there is no such row.
        """
        self.kind = KERNELS[op]
        self.op = op
        self.dtype = dtype
        self.flops = flops
        self.bytes = nbytes
        self.count = count
        self.segment = segment
        self.shape = shape
        self.recomputed = recomputed
        """Whether checkpointing runs it a second time, inside the backward."""
        self.layout = layout
        """Of a matrix product."""
        self.elements = elements
        """Results of a kernel that computes an index for each ("indexed"): strides, broadcasts, conversions. Of a
        fused attention kernel the FLOPs it really does."""


Marks = tuple[tuple[str, frozenset[str]], ...]
"""(class, parts of names): the first class of which a part is in a lower-case name has it."""


def profile_marks() -> Marks:
    """The parts of names by which the classes of PROFILED are known."""
    return tuple(
        (name, frozenset(mark for kind in KERNELS.values() if kind.profiled == name for mark in kind.marks))
        for name in PROFILED
    )
