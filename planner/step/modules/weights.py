"""The weights of a linear layer and of a layer, as tensors."""

from __future__ import annotations

from planner.model.spec import Attention, Layer, Linear
from planner.step.engine import FP32, Size, Tensor


class LinearWeights:
    """The tensors of one linear module."""

    __slots__ = ("bias", "dora", "dtype", "kind", "lora", "packed", "rank", "spec", "state_bytes", "weight")

    def __init__(self, spec: Linear) -> None:
        self.spec = spec
        self.kind = "none"
        self.dtype = FP32
        self.weight: Tensor | None = None
        self.packed: list[Tensor] = []
        self.bias: Tensor | None = None
        self.lora: list[tuple[Tensor, Tensor, Size, Size]] = []
        """(A [r, in], B [out, r], rank, out) of each adapter on this module; several for fused slices."""
        self.rank: Size = 0
        self.dora: Tensor | None = None


class LayerWeights:
    """The tensors of one decoder layer, by module name."""

    __slots__ = ("buffer", "expert_adapters", "experts", "linears", "mixing", "norms", "router", "spec", "tables")

    def __init__(self, spec: Layer) -> None:
        self.spec = spec
        self.linears: dict[str, LinearWeights] = {}
        self.norms: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.mixing: dict[str, Tensor] = {}
        """The mixer's weights that are neither a linear's nor a norm's."""
        self.experts: list[Tensor] = []
        self.router: Tensor | None = None
        self.buffer: Tensor | None = None
        """What the class registers in every layer beside its parameters."""
        self.tables: tuple[Tensor, Tensor] | None = None
        """Rotary tables of all positions, in old releases (planner.step.modules.positions.load_tables)."""
        self.expert_adapters: dict[str, tuple[Tensor, Tensor]] = {}
        """Fused parameter -> its (A, B), stacked over the experts (peft lora.ParamWrapper)."""

    @property
    def attention(self) -> Attention:
        """The layer's attention: for modules that run no other mixer."""
        found = self.spec.attention
        assert found is not None, f"{self.spec.mixer.kind} is no attention"
        return found
