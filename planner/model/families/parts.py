"""Builders shared by the families: read the sizes of a config.json, make the parts of a layer, assemble a ModelSpec."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from planner.base.config_values import MISSING, boolean, integer, mapping, number, text, text_list
from planner.base.errors import InvalidInput, unknown
from planner.base.records import record
from planner.model.spec import (
    Activation,
    Attention,
    Experts,
    Layer,
    Linear,
    LinearClass,
    Mlp,
    ModelSpec,
    Norm,
    NormKind,
    Table,
)

Config = Mapping[str, Any]

MAX_LAYERS = 10_000
MAX_WIDTH = 2**24

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu_python",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_new",  # the same passes
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_fast",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}


_WIDE_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@record
class Sizes:
    """What nearly every family has, under one set of names: the widths and counts, and whether attention drops."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int
    attention_dropout: bool = False

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


def sizes(config: Config, *, four_times: bool = False, attention_dropout: float = 0.0, **defaults: int) -> Sizes:
    """Read the sizes; `defaults` are the class defaults of keys that files of the family may leave out.

    `four_times`: an absent or null feed-forward width is four times the hidden size. `head_dim=0` means
    hidden_size // num_attention_heads; `num_key_value_heads=0` means num_attention_heads.
    """

    def size(name: str, *spellings: str, high: int = MAX_WIDTH) -> int:
        return integer(config, name, *spellings, default=defaults.get(name, MISSING), high=high)

    hidden = size("hidden_size", "n_embd", "d_model")
    heads = size("num_attention_heads", "n_head", "n_heads", "num_heads")
    widest = defaults.get("intermediate_size", 4 * hidden if four_times else MISSING)
    return Sizes(
        hidden=hidden,
        layers=size("num_hidden_layers", "n_layer", "n_layers", "num_layers", high=MAX_LAYERS),
        heads=heads,
        kv_heads=key_value_heads(config, heads, defaults.get("num_key_value_heads", 0)),
        head_dim=head_width(config, hidden, heads, defaults.get("head_dim", 0)),
        intermediate=integer(config, *_WIDE_KEYS, default=widest, high=MAX_WIDTH),
        vocab=size("vocab_size", "padded_vocab_size"),
        positions=integer(config, *_POSITION_KEYS, default=defaults.get("max_position_embeddings", 0)),
        attention_dropout=drops(config, "attention_dropout", "attn_pdrop", default=attention_dropout),
    )


def key_value_heads(config: Config, heads: int, default: int = 0) -> int:
    """Return num_key_value_heads: null means as many as heads, absent means the class default."""
    kv_heads = optional_integer(config, "num_key_value_heads", default, low=1) or heads
    if heads % kv_heads:
        raise InvalidInput(
            f"config has num_attention_heads {heads} and num_key_value_heads {kv_heads}; "
            "the first must be a multiple of the second; correct config.json"
        )
    return kv_heads


def head_width(config: Config, hidden: int, heads: int, default: int = 0) -> int:
    """Return head_dim: null means hidden_size / num_attention_heads, absent means the class default."""
    width = optional_integer(config, "head_dim", default, low=1)
    if width:
        return width
    if hidden < heads:
        raise InvalidInput(
            f"config has hidden_size {hidden} and num_attention_heads {heads} but no head_dim; "
            "hidden_size must be at least num_attention_heads; correct config.json"
        )
    return hidden // heads


def optional_integer(config: Config, key: str, default: int = 0, *, low: int = 0) -> int:
    """Return the integer of `key`, at least `low`; 0 when the file says null, `default` when it says nothing."""
    if key in config and config[key] is None:
        return 0
    return integer(config, key, default=default, low=low)


def attention_bias(config: Config, default: bool = False) -> bool:
    return boolean(config, "attention_bias", default=default)


def mlp_bias(config: Config) -> bool:
    return boolean(config, "mlp_bias", default=False)


def drops(config: Config, *keys: str, default: float = 0.0) -> bool:
    """Return whether a dropout probability, the first present of `keys`, is above 0."""
    return number(config, *keys, default=default, low=0.0, high=1.0) > 0


def activation(config: Config, *keys: str, default: str = "silu") -> Activation:
    """Return the activation named by the first present key."""
    name = text(config, *(keys or ("hidden_act",)), default=default)
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def rotary_width(config: Config, head_dim: int, default: float = 1.0) -> int:
    """Return how many elements of a head are rotated (partial_rotary_factor under its spellings); 0: all of them."""
    nested = mapping(config, "rope_parameters", "rope_scaling", default={})
    source = nested if nested.get("partial_rotary_factor") is not None else config
    factor = number(source, "partial_rotary_factor", "rotary_pct", default=default, low=0.0, high=1.0)
    width = int(head_dim * factor)
    return 0 if width == head_dim else width


def windows_from_types(config: Config, layers: int, window: int, default: Callable[[int], bool]) -> tuple[int, ...]:
    """Return the attention window of every layer: `window` where it slides, 0 where it sees everything.

    `default(i)` says whether layer i slides in a file without layer_types.
    """
    kinds = text_list(
        config,
        "layer_types",
        default=tuple("sliding_attention" if default(i) else "full_attention" for i in range(layers)),
        length=layers,
        allowed=("sliding_attention", "full_attention"),
    )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


Kind = TypeVar("Kind", bound=Hashable)


def uniform(s: Sizes, layer: Layer) -> tuple[Layer, ...]:
    """Return a stack of one kind of layer."""
    return (layer,) * s.layers


def stack(kinds: Iterable[Kind], make: Callable[[Kind], Layer]) -> tuple[Layer, ...]:
    """Return one layer per kind, the same object for equal kinds."""
    made: dict[Kind, Layer] = {}
    return tuple(made[kind] if kind in made else made.setdefault(kind, make(kind)) for kind in kinds)


def standard_attention(
    s: Sizes,
    *,
    prefix: str = "self_attn",
    out: str = "o_proj",
    bias: bool = False,
    out_bias: bool | None = None,
    **rest: Any,
) -> Attention:
    """Attention with separate q_proj, k_proj, v_proj; `rest` are further Attention fields."""
    wide = [("q_proj", s.q_size), ("k_proj", s.kv_size), ("v_proj", s.kv_size)]
    return Attention(
        num_heads=s.heads,
        num_kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        dropout=s.attention_dropout,
        projections=tuple(
            Linear(name=f"{prefix}.{name}", in_features=s.hidden, out_features=n, bias=bias) for name, n in wide
        ),
        output=Linear(
            name=f"{prefix}.{out}",
            in_features=s.q_size,
            out_features=s.hidden,
            bias=bias if out_bias is None else out_bias,
        ),
        **rest,
    )


def fused_attention(
    s: Sizes,
    *,
    qkv: str,
    out: str,
    bias: bool = False,
    out_bias: bool | None = None,
    cls: LinearClass = "Linear",
    **rest: Any,
) -> Attention:
    """Attention whose query, key and value come from one module."""
    return Attention(
        num_heads=s.heads,
        num_kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        dropout=s.attention_dropout,
        projections=(
            Linear(
                name=qkv,
                in_features=s.hidden,
                out_features=s.q_size + 2 * s.kv_size,
                bias=bias,
                cls=cls,
                parts=(s.q_size, s.kv_size, s.kv_size),
            ),
        ),
        output=Linear(
            name=out,
            in_features=s.q_size,
            out_features=s.hidden,
            bias=bias if out_bias is None else out_bias,
            cls=cls,
        ),
        **rest,
    )


def gated_mlp(
    hidden: int,
    width: int,
    *,
    prefix: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
    act: Activation = "silu",
) -> Mlp:
    """act(gate(x)) * up(x), then down."""
    gate, up, down = names
    return Mlp(
        gated=True,
        gate=Linear(name=f"{prefix}.{gate}", in_features=hidden, out_features=width, bias=bias),
        up=Linear(name=f"{prefix}.{up}", in_features=hidden, out_features=width, bias=bias),
        down=Linear(name=f"{prefix}.{down}", in_features=width, out_features=hidden, bias=bias),
        activation=act,
        intermediate_size=width,
    )


def fused_gated_mlp(
    hidden: int,
    width: int,
    *,
    up: str = "mlp.gate_up_proj",
    down: str = "mlp.down_proj",
    bias: bool = False,
    act: Activation = "silu",
) -> Mlp:
    """The gated form with gate and up in one module."""
    return Mlp(
        gated=True,
        up=Linear(name=up, in_features=hidden, out_features=2 * width, bias=bias, parts=(width, width)),
        down=Linear(name=down, in_features=width, out_features=hidden, bias=bias),
        activation=act,
        intermediate_size=width,
    )


def plain_mlp(
    hidden: int,
    width: int,
    *,
    up: str,
    down: str,
    bias: bool = True,
    act: Activation = "gelu",
    cls: LinearClass = "Linear",
    extra_parameters: int = 0,
) -> Mlp:
    """act(up(x)), then down."""
    return Mlp(
        gated=False,
        up=Linear(name=up, in_features=hidden, out_features=width, bias=bias, cls=cls),
        down=Linear(name=down, in_features=width, out_features=hidden, bias=bias, cls=cls),
        activation=act,
        intermediate_size=width,
        extra_parameters=extra_parameters,
    )


def layer_norm(name: str, size: int, bias: bool = True) -> Norm:
    """A torch LayerNorm."""
    return Norm(name=name, size=size, kind="layernorm", bias=bias)


def head_norms(s: Sizes, kind: NormKind = "rms") -> dict[str, Any]:
    """The q_norm and k_norm fields of an attention that normalises every head."""
    return {name: Norm(name=f"self_attn.{name}", size=s.head_dim, kind=kind) for name in ("q_norm", "k_norm")}


def pre_norm_layer(
    attention: Attention, feed_forward: Mlp | Experts, s: Sizes, *, kind: NormKind = "rms", **rest: Any
) -> Layer:
    """The llama layer: input_layernorm before attention, post_attention_layernorm before the feed-forward."""
    bias = kind == "layernorm"
    return Layer(
        mixer=attention,
        mlp=feed_forward if isinstance(feed_forward, Mlp) else None,
        experts=feed_forward if isinstance(feed_forward, Experts) else None,
        input_norm=Norm(name="input_layernorm", size=s.hidden, kind=kind, bias=bias),
        pre_mlp_norm=Norm(name="post_attention_layernorm", size=s.hidden, kind=kind, bias=bias),
        **rest,
    )


def _stored_dtype(config: Config) -> str:
    """Return the checkpoint's dtype; files may also hold one per submodule, which states none for all."""
    dtypes = (config.get("torch_dtype"), config.get("dtype"))
    return next((dtype.removeprefix("torch.") for dtype in dtypes if isinstance(dtype, str)), "")


def causal_lm(
    config: Config,
    model_id: str,
    s: Sizes,
    layers: tuple[Layer, ...],
    *,
    final_norm: Norm | None,
    tied: bool,
    embedding: str = "model.embed_tokens",
    embedding_width: int = 0,
    head: str = "lm_head",
    head_bias: bool = False,
    **rest: Any,
) -> ModelSpec:
    """Put a stack between an embedding and a head; `tied` is the class default of tie_word_embeddings."""
    width = embedding_width or s.hidden
    return ModelSpec(
        model_id=model_id,
        model_type=text(config, "model_type"),
        hidden_size=s.hidden,
        vocab_size=s.vocab,
        layers=layers,
        token_embedding=Table(name=embedding, rows=s.vocab, width=width),
        final_norm=final_norm,
        head=Linear(name=head, in_features=width, out_features=s.vocab, bias=head_bias),
        tied=boolean(config, "tie_word_embeddings", default=tied),
        stored_dtype=_stored_dtype(config),
        stored_quantization=text(mapping(config, "quantization_config", default={}), "quant_method", default=""),
        max_position_embeddings=s.positions,
        **rest,
    )
