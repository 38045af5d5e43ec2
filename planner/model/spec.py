"""ModelSpec: what a causal language model is made of (dimensions and modules; no training settings).

Module names are those of the Hugging Face implementation, because LoRA targets and quantization skip lists are
written with them. Shapes are in elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Literal

from planner.base.errors import InvalidInput
from planner.base.records import record, replace

LinearClass = Literal["Linear", "Conv1D", "subclass"]
"""What class the module is: bitsandbytes converts exactly nn.Linear and Conv1D, not subclasses of nn.Linear."""

NormKind = Literal[
    "rms",  # x.float() -> pow -> mean -> rsqrt -> mul -> cast back, then weight * x   (llama)
    "rms_fp32_weight",  # the weight multiplies in fp32, cast back last                (olmo2, gpt_oss)
    "rms_gemma",  # as above with (1 + weight.float())                                (gemma)
    "layernorm",  # torch layer_norm, weight and bias
    "layernorm_fp32",  # mean/var written out in fp32, weight in fp32, cast back      (cohere)
    "layernorm_upcast",  # x.float() -> torch layer_norm without weight -> cast back  (olmo)
    "layernorm_1p",  # torch layer_norm with weight + 1, made anew in every call      (nemotron)
    "layernorm_per_head",  # one torch LayerNorm per head, outputs concatenated       (stablelm 2 12b)
]


@record
class Linear:
    """A matrix product module: weight [out_features, in_features], optional bias [out_features]."""

    name: str
    """Path inside the decoder layer ("self_attn.q_proj"), or in the model for the head ("lm_head")."""
    in_features: int
    out_features: int
    bias: bool = False
    cls: LinearClass = "Linear"
    parts: tuple[int, ...] = ()
    """Output widths of the projections fused into this one (q, k, v or gate, up); empty: not fused."""

    @property
    def weight_elements(self) -> int:
        return self.in_features * self.out_features

    @property
    def num_parameters(self) -> int:
        return self.weight_elements + (self.out_features if self.bias else 0)


@record
class Norm:
    """A normalisation over `size` elements."""

    name: str
    size: int
    kind: NormKind = "rms"
    weight: bool = True
    bias: bool = False
    weight_elements: int = 0
    """Elements of the weight when they differ from `size` (per-head weights); 0: same as size."""

    @property
    def num_parameters(self) -> int:
        n = self.weight_elements or self.size
        return n * (int(self.weight) + int(self.bias))


@record
class Weight:
    """A learned tensor of a mixer that is neither a linear module's nor a norm's (a convolution's, a decay, ...)."""

    name: str
    """With its module, as in the checkpoint ("conv.conv.weight")."""
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)


if TYPE_CHECKING:
    from typing import Protocol

    class Mixer(Protocol):
        """What exchanges between the tokens of a row in one layer: a frozen record of its parts.

        How a kind runs is its row in `planner.step.modules.mixers`.
        """

        @property
        def kind(self) -> str:
            """The row of MIXERS."""

        @property
        def linears(self) -> tuple[Linear, ...]:
            """Its linear modules, in the order of the modules: what is quantized and adapted."""

        @property
        def norms(self) -> tuple[Norm, ...]: ...

        @property
        def weights(self) -> tuple[Weight, ...]:
            """Its other learned tensors."""

        @property
        def num_parameters(self) -> int: ...


MixerKind = Literal["standard", "mla"]
"""Kinds of mixers: attention, multi-head latent attention."""
Position = Literal["rope", "alibi", "learned", "none"]


@record
class Attention:
    """Self-attention of one layer, a mixer.

    `projections` are the modules that read the layer's input, in call order: q, k, v; or one fused module with
    `parts`; for MLA q_a/q_b (or q), kv_a, kv_b. `output` is the projection back to the hidden size.
    """

    kind: MixerKind = "standard"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int = 0
    """Width of a value head when it differs from head_dim (MLA); 0: same."""
    projections: tuple[Linear, ...]
    output: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    qk_norm_after_rope: bool = False
    """The norms follow the rotation instead of preceding it (llama4)."""
    q_a_norm: Norm | None = None
    kv_a_norm: Norm | None = None
    """MLA: norms of the compressed query and key/value."""
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    """MLA: the part of head_dim that is rotated (shared single key head)."""
    position: Position = "rope"
    rotary_dim: int = 0
    """Rotated elements per head (partial rotary); 0 with position="rope": all of head_dim."""
    sliding_window: int = 0
    """Window in tokens; 0: full attention."""
    logit_softcap: bool = False
    sinks: bool = False
    """A learned sink logit per head (gpt_oss)."""
    sdpa: bool = True
    """False: the class has no scaled_dot_product_attention path; transformers falls back to eager."""
    sdpa_since: tuple[int, int] = (0, 0)
    """The transformers release that gave the class its scaled_dot_product_attention path."""
    scores_fp32: bool = False
    """The class's own eager path casts q and k to fp32 before their product (gptj, codegen, gpt_neo)."""
    clips_qkv: bool = False
    """Queries, keys and values are clamped as their projections leave them (olmo in place, mpt)."""
    dropout: bool = False
    """Attention weights pass a dropout with p > 0 unless the caller sets it to 0 (gpt2: 0.1)."""

    def has_sdpa(self, transformers: tuple[int, int]) -> bool:
        """Whether the class has a scaled_dot_product_attention path in a release of transformers."""
        return self.sdpa and transformers >= self.sdpa_since

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.projections, self.output)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return tuple(n for n in (self.q_norm, self.k_norm, self.q_a_norm, self.kv_a_norm) if n is not None)

    @property
    def weights(self) -> tuple[Weight, ...]:
        return ()

    @property
    def rotary_width(self) -> int:
        """Entries of a rotary table for one position."""
        return (self.qk_rope_head_dim if self.kind == "mla" else self.rotary_dim) or self.head_dim

    @property
    def num_parameters(self) -> int:
        parts: tuple[Linear | Norm, ...] = (*self.linears, *self.norms)
        return sum(x.num_parameters for x in parts) + (self.num_heads if self.sinks else 0)


Activation = Literal[
    "silu", "gelu", "gelu_tanh", "gelu_new", "gelu_fast", "gelu_python", "quick_gelu", "bloom_gelu", "relu",
    "relu2", "xielu", "clamped_swiglu",
]  # fmt: skip
"""clamped_swiglu: (clamp(up) + 1) * g * sigmoid(1.702 * g) with g = clamp(gate), written out (gpt_oss)."""


@record
class Mlp:
    """Feed-forward: gated act(gate(x)) * up(x), or plain act(up(x)); `gate` None means plain.

    A fused gate_up module is `up` with parts (gate, up) and `gate` None and `gated` True.
    """

    gated: bool
    up: Linear
    down: Linear
    gate: Linear | None = None
    activation: Activation = "silu"
    intermediate_size: int
    extra_parameters: int = 0
    """Learned scalars of the activation itself (xIELU: 2)."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(x for x in (self.gate, self.up, self.down) if x is not None)

    @property
    def num_parameters(self) -> int:
        return sum(x.num_parameters for x in self.linears) + self.extra_parameters


@record
class Experts:
    """A mixture of experts whose expert weights are fused 3-D parameters (transformers 5).

    gate_up [E, 2*intermediate, hidden], down [E, hidden, intermediate]; neither is an nn.Linear, so bitsandbytes
    quantizes neither. The router is a Linear module (or a bare parameter).
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    name: str = "mlp.experts"
    gate_up_name: str = "gate_up_proj"
    down_name: str = "down_proj"
    bias: bool = False
    router: Linear
    router_is_linear: bool = False
    """True when the router is an nn.Linear module (quantizable, adaptable), False for a bare parameter."""
    router_fp32: bool = False
    router_extra_parameters: int = 0
    """e_score_correction_bias and the like, when they are parameters and not buffers."""
    shared: Mlp | None = None
    shared_gate: Linear | None = None
    every_token: bool = False
    """Every expert computes every token, scaled by its score or zero (llama4); top_k then saves nothing."""
    activation: Activation = "silu"

    @property
    def expert_elements(self) -> int:
        """Elements of all fused expert weights, biases included."""
        weights = 3 * self.num_experts * self.hidden_size * self.intermediate_size
        biases = self.num_experts * (2 * self.intermediate_size + self.hidden_size) if self.bias else 0
        return weights + biases

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The nn.Linear modules of the block (router if it is one, shared expert)."""
        own = (self.router,) if self.router_is_linear else ()
        shared = self.shared.linears if self.shared else ()
        gate = (self.shared_gate,) if self.shared_gate else ()
        return (*own, *shared, *gate)

    @property
    def num_parameters(self) -> int:
        router = 0 if self.router_is_linear else self.router.num_parameters
        own = self.expert_elements + router + self.router_extra_parameters
        return own + sum(x.num_parameters for x in self.linears)


@record
class Layer:
    """One decoder layer: a mixer, then a feed-forward or experts.

    Residual scheme (attn: the mixer): x + attn(input_norm(x)), then x + mlp(pre_mlp_norm(x)). `post_attention_norm` and
    `post_mlp_norm` normalise a branch's output before the addition (gemma2, olmo2 with no input norms).
    parallel: x + attn(input_norm(x)) + mlp(pre_mlp_norm(x) or the same norm's output).
    """

    mixer: Mixer
    mlp: Mlp | None = None
    experts: Experts | None = None
    input_norm: Norm | None = None
    post_attention_norm: Norm | None = None
    pre_mlp_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    parallel: bool = False
    residual_multiplier: bool = False
    """The branch output is multiplied by a scalar before the addition (granite)."""
    norm_after_residual: bool = False
    """input_norm and pre_mlp_norm normalise the sum after their branch instead of its input (opt-350m)."""
    hidden_dropout: bool = False
    """Branch outputs pass a dropout whose p in the config is above 0 (gpt2: 0.1); at p = 0 it is an identity."""

    @property
    def attention(self) -> Attention | None:
        """The mixer where it is attention (of either kind)."""
        return self.mixer if isinstance(self.mixer, Attention) else None

    @property
    def norms(self) -> tuple[Norm, ...]:
        own = (self.input_norm, self.post_attention_norm, self.pre_mlp_norm, self.post_mlp_norm)
        return tuple(n for n in own if n is not None)

    @property
    def linears(self) -> tuple[Linear, ...]:
        mlp = self.mlp.linears if self.mlp else ()
        experts = self.experts.linears if self.experts else ()
        return (*self.mixer.linears, *mlp, *experts)

    @property
    def num_parameters(self) -> int:
        total = self.mixer.num_parameters + sum(n.num_parameters for n in self.norms)
        total += self.mlp.num_parameters if self.mlp else 0
        return total + (self.experts.num_parameters if self.experts else 0)


@record
class Table:
    """An embedding table [rows, width]."""

    name: str
    rows: int
    width: int

    @property
    def num_parameters(self) -> int:
        return self.rows * self.width


@record
class KeptInFp32:
    """Parameters that transformers' from_pretrained loads in fp32 although a 16-bit dtype was asked for.

    Source: modeling_utils.py _get_dtype_plan (5.24): `_keep_in_fp32_modules_strict` of the class for fp16 and bf16,
    `_keep_in_fp32_modules` for fp16 only; core_model_loading.py looks for each entry anywhere in a parameter's name.
    """

    name: str
    """What the parameter's name contains."""
    fp16_only: bool
    since: tuple[int, int]
    """The first release of transformers in which the class's list is known to name it."""


@record
class UnreadModel:
    """What is known of a model whose structure no family here describes: sizes that its own class reports."""

    model_id: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_parameters: int
    max_position_embeddings: int = 0
    exact_parameters: int = 0


@record
class ModelSpec:
    """A decoder-only language model.

    `layers` has one entry per decoder layer, in order; equal layers are the same object. `head` reads the final
    hidden states; when `tied` its weight is the token embedding's.
    """

    model_id: str
    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    token_embedding: Table
    position_embedding: Table | None = None
    embedding_norm: Norm | None = None
    embedding_projections: tuple[Linear, ...] = ()
    """Projections between the embedding width and the hidden size (opt-350m: project_in, project_out)."""
    embedding_scale: bool = False
    """Embeddings are multiplied by a scalar after the look-up (gemma, granite)."""
    embedding_dropout: bool = False
    """The embeddings pass a dropout whose p in the config is above 0 (gpt2: 0.1)."""
    final_norm: Norm | None = None
    head: Linear
    tied: bool
    logit_softcap: bool = False
    logit_scale: bool = False
    """Logits are multiplied or divided by a scalar (cohere, granite)."""
    stored_dtype: str = ""
    """dtype of the published checkpoint ("bfloat16", ...); empty: not stated by any source."""
    max_position_embeddings: int = 0
    stored_quantization: str = ""
    """quant_method of the checkpoint itself (gptq, awq, mxfp4, fp8, ...); empty: none."""
    remote_code: bool = False
    """The published class is not in transformers: the structure rests on the model's own code."""
    derived: bool = False
    """Read from transformers' class on the meta device (calibrate.model.meta_spec), not by a family of the registry."""
    keep_in_fp32: tuple[KeptInFp32, ...] = ()
    """Parameters that transformers' class keeps in fp32 when it is loaded in 16 bit."""
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exact_parameters: int = 0
    """Parameter count read from safetensors or GGUF tensor headers; 0: not read."""
    layer_prefix: str = "model.layers"

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidInput(f"{self.model_id}: a model needs at least one layer")
        for name in ("hidden_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{self.model_id}: {name} is {getattr(self, name)}; must be at least 1")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def stored_as(self, parameter: str, dtype: str, transformers: tuple[int, int]) -> str:
        """The dtype that a parameter has after from_pretrained(dtype=`dtype`): `dtype`, or fp32 where it is kept so."""
        if not self.keep_in_fp32 or dtype not in ("fp16", "bf16"):
            return dtype
        kept = any(
            rule.name in parameter and transformers >= rule.since and (dtype == "fp16" or not rule.fp16_only)
            for rule in self.keep_in_fp32
        )
        return "fp32" if kept else dtype

    def distinct_layers(self) -> Iterator[tuple[Layer, int]]:
        """Yield every distinct layer with how often it occurs, in order of first occurrence."""
        counts: dict[int, int] = {}
        kinds: dict[int, Layer] = {}
        for layer in self.layers:
            counts[id(layer)] = counts.get(id(layer), 0) + 1
            kinds[id(layer)] = layer
        for key, number in counts.items():
            yield kinds[key], number

    def attentions(self) -> tuple[Attention, ...]:
        """The attention of every distinct layer that has one, in order."""
        return tuple(layer.attention for layer, _ in self.distinct_layers() if layer.attention is not None)

    def positions(self, kind: Position) -> Attention | None:
        """The first attention whose tokens know their place in this way; None: no layer's."""
        return next((attention for attention in self.attentions() if attention.position == kind), None)

    def elements_kept_in_fp32(self, dtype: str, transformers: tuple[int, int]) -> int:
        """Elements of norms and routers that are fp32 after from_pretrained(dtype=`dtype`), a 16-bit one."""
        if not self.keep_in_fp32:
            return 0
        parts: list[tuple[str, int]] = [(n.name, n.num_parameters) for n in (self.final_norm,) if n is not None]
        for layer, number in self.distinct_layers():
            inside = [(n.name, n.num_parameters) for n in (*layer.mixer.norms, *layer.norms)]
            if layer.experts is not None:
                inside.append((layer.experts.router.name, layer.experts.router.weight_elements))
            parts += [(name, elements * number) for name, elements in inside]
        return sum(n for name, n in parts if self.stored_as(f"{name}.weight", dtype, transformers) != dtype)

    def first_layers(self, layers: int) -> ModelSpec:
        """The model that ends after its first `layers` decoder layers."""
        return replace(self, layers=self.layers[:layers])

    def with_tokens(self, added: int) -> ModelSpec:
        """The model after resize_token_embeddings(vocab_size + added): table, head and logits grow."""
        if not added:
            return self
        return replace(
            self,
            vocab_size=self.vocab_size + added,
            token_embedding=replace(self.token_embedding, rows=self.token_embedding.rows + added),
            head=replace(self.head, out_features=self.head.out_features + added),
        )

    @property
    def num_parameters(self) -> int:
        """Unique parameters (a tied head counts once), as `sum(p.numel() for p in model.parameters())`."""
        total = self.token_embedding.num_parameters
        total += self.position_embedding.num_parameters if self.position_embedding else 0
        total += sum(x.num_parameters for x in self.embedding_projections)
        total += sum(n.num_parameters for n in (self.embedding_norm, self.final_norm) if n is not None)
        total += sum(layer.num_parameters * number for layer, number in self.distinct_layers())
        if self.tied:
            return total + (self.head.out_features if self.head.bias else 0)
        return total + self.head.num_parameters
