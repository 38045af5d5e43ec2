"""What every module of the step needs at hand: the engine, the model, the training settings, the shapes."""

from __future__ import annotations

from collections.abc import Sequence

from planner.device import cuda_rules
from planner.model.spec import ModelSpec
from planner.step.engine import FP32, Dimensions, Engine, Size, Tensor
from planner.step.habits import Habits
from planner.step.scopes import OUTSIDE, Backwards, Handler, Owner, Scope, Unit
from planner.training.own_modules import OWN_MODULES
from planner.training.spec import TrainingSpec


class Step:
    """One configuration being run on the symbolic engine."""

    __slots__ = (
        "alibi", "arch", "autocast", "backward_began", "batch", "cache", "cos_sin", "embedding_dtype", "eng", "habits",
        "handlers", "here", "kept_inputs", "lora_dropout", "mask", "model", "norm_dtype", "parameters", "probabilities",
        "seq", "tokens", "train", "unquantized_dtype", "unused_probabilities", "widened",
    )  # fmt: skip

    def __init__(
        self,
        model: ModelSpec,
        train: TrainingSpec,
        arch: cuda_rules.Architecture,
        habits: Habits,
        accumulates_in_place: bool = True,
    ) -> None:
        self.eng = Engine(accumulates_in_place, cuda_rules.colons_are_slices(arch.torch))
        self.model = model
        self.train = train
        self.arch = arch
        self.habits = habits
        """What the model's class, or the framework's own modules, do otherwise than most."""
        self.batch: Size = train.micro_batch_size
        self.seq: Size = train.seq_len
        self.tokens: Size = train.micro_batch_size * train.seq_len
        self.autocast = None if train.autocast == "none" else train.autocast
        self.lora_dropout = train.lora.lora_dropout if train.lora else 0.0
        self.unquantized_dtype = FP32 if train.kbit_preparation else train.base_dtype
        self.embedding_dtype = self.unquantized_dtype
        self.norm_dtype = FP32 if train.fp32_norms_only else self.unquantized_dtype
        self.here: Unit = OUTSIDE
        """Whose parameters are being loaded."""
        self.widened: list[Tensor] = []
        """16-bit parameters that k-bit preparation is going to cast to fp32."""
        self.parameters: list[Tensor] = []
        """Trainable leaves, in creation order."""
        self.cos_sin: tuple[Tensor, Tensor] | None = None
        self.mask: Tensor | None = None
        self.alibi: Tensor | None = None
        self.probabilities: Tensor | None = None
        """Attention probabilities that the running layer is going to return beside its output."""
        self.unused_probabilities: Tensor | None = None
        """Eager attention returns them to the decoder layer, whose frame names them (`_`) until it ends."""
        self.cache: list[tuple[int, Tensor]] = []
        """(layer, keys and values) of classes that cache them while training."""
        self.kept_inputs: dict[int, tuple[int, Size]] = {}
        """(layer, bytes) of every storage that a function keeps as an attribute: it lives as long as the graph."""
        self.backward_began = False
        self.handlers: Sequence[Handler] = ()
        """Strategies that act at the borders of units, in the order in which they come first."""

    def handle(self, handlers: Sequence[Handler]) -> None:
        """Let strategies act at the borders of units."""
        self.handlers = handlers
        self.eng.watcher = Backwards(self) if any(handler.watches_backward for handler in handlers) else None

    def unit(self, unit: Unit, x: Tensor) -> Scope:
        """The scope of a unit that runs on x."""
        return Scope(self, unit, x)

    def owned(self, tensor: Tensor, name: str, trainable: bool = False) -> Tensor:
        """Make `tensor` the parameter `name` ("self_attn.q_proj.weight") of the unit that is being loaded."""
        module, _, role = name.rpartition(".")
        tensor.owner = Owner(self.here, module, role, trainable)
        return tensor

    def owned_together(self, parts: list[Tensor], module: str) -> list[Tensor]:
        """Make `parts` what is kept of a module's weight."""
        owner = Owner(self.here, module, "weight", False)
        for part in parts:
            part.owner = owner
        return parts

    def trainable(self, name: str, shape: Dimensions, dtype: str, op: str) -> Tensor:
        """Allocate a trainable parameter and remember it for the optimizer."""
        leaf = self.owned(self.eng.leaf(self.eng.empty(shape, dtype, op), is_parameter=True), name, True)
        self.parameters.append(leaf)
        return leaf

    def arch_4bit_forward(self, m: Size, n: int, k: int, itemsize: int) -> list[Size]:
        """Buffers of a 4-bit forward product: empty where bitsandbytes' fused kernel runs."""
        nested = self.train.quantization.double_quant
        if not self.arch.gemm_4bit_dequantizes:  # a CPU dequantizes for any number of rows (backends/default/ops.py)
            return [
                size for _, size in cuda_rules.gemm_4bit_temporaries(n, k, double_quant=nested, compute_bytes=itemsize)
            ]
        buffers = cuda_rules.gemm_4bit_temporaries(n, k, double_quant=nested, compute_bytes=itemsize)
        if not cuda_rules.gemm_4bit_dequantizes(m, n, k, compute_bytes=itemsize, arch=self.arch):
            return []
        return [size for _, size in buffers]

    def keeps_fp32(self, name: str) -> bool:
        """Whether transformers' class keeps this parameter in fp32 when it is loaded in 16 bit."""
        train = self.train
        if not OWN_MODULES[train.own_modules].keeps_fp32:
            return False
        dtype = self.model.stored_as(name, train.base_dtype, train.versions.transformers)
        return dtype == FP32 != train.base_dtype

    def weight(self, name: str, shape: Dimensions) -> Tensor:
        """Allocate an unquantized base weight of a module: frozen, or trainable in full fine-tuning."""
        return self.base(name, shape, self.unquantized_dtype)

    def base(self, name: str, shape: Dimensions, dtype: str) -> Tensor:
        """Allocate a base parameter in `dtype`, or in fp32 where the class keeps it so."""
        dtype = FP32 if self.keeps_fp32(name) else dtype
        if self.train.method == "full":
            return self.trainable(name, shape, dtype, "weight")
        return self.owned(self._frozen(name, shape, dtype), name)

    def _frozen(self, name: str, shape: Dimensions, dtype: str) -> Tensor:
        """Allocate a frozen base parameter; before k-bit preparation it lies in the dtype that was loaded."""
        if not self.train.kbit_preparation or self.keeps_fp32(name):
            return self.eng.read(shape, dtype, "weight")
        held = self.eng.read(shape, self.train.base_dtype, "weight")
        if held.dtype != FP32:
            self.widened.append(held)
        return held

    def widen(self, held: Tensor) -> None:
        """Cast a parameter to fp32 in place: the copy exists before the 16-bit one goes."""
        held.storage = self.eng.empty(held.numel, FP32, "weight").storage
        held.dtype = FP32
