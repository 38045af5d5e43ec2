"""A ModelSpec read from the real class on the meta device, for model types that `planner.model.families` does not know.

Modules, shapes and norms are those of the class; the order of operations is taken to be that of a common decoder
layer. What is not recognised is said in a note; what would make the plan wrong (state-space layers, experts as separate
modules, parameters without a place) is an error. No weights, no GPU, no remote code.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from planner.base.errors import InvalidInput, PlannerError, UnknownName, one_line
from planner.model.families import known_families, text_part
from planner.model.families.parts import ACTIVATIONS
from planner.model.spec import (  # fmt: skip
    Activation,
    Attention,
    Experts,
    KeptInFp32,
    Layer,
    Linear,
    Mlp,
    ModelSpec,
    Norm,
    NormKind,
    Table,
)

MAX_COUNT = 2048
"""Layers, experts and the like: every one becomes a module, so a config must not ask for millions."""

NOT_CONFIG = ("torch_dtype", "dtype", "quantization_config", "architectures", "auto_map", "transformers_version")
_COUNTS = re.compile(r"(layers?|experts?|blocks?|depth)$")
_RECURRENT = re.compile(r"mamba|ssm|deltanet|(linear|lightning)attention|rwkv|lstm|shortconv|recurrent|hyena", re.I)
_ATTENTION = re.compile(r"attention|attn", re.I)
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj", "o", "output")
_DOWN = ("down_proj", "c_proj", "fc2", "fc_out", "w2", "dense_4h_to_h", "output_linear", "wo", "down")
_ROLES = tuple(
    re.compile(rf"({x}_?(proj|lin)?|w{x}|{word}(_proj)?)$")
    for x, word in (("q", "query"), ("k", "key"), ("v", "value"))
)
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts",
    "top_k",
)  # fmt: skip
_HIDDEN_DROPOUTS = ("resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout")
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_FIRST_NORM = re.compile(r"input|pre_?att|attn_norm|attention_norm|ln_?1|norm_?1|self_attn")


def kept_in_fp32(model: Any) -> Iterator[KeptInFp32]:
    """What from_pretrained of a class keeps in fp32, by the lists that it and its parts have."""
    for fp16_only, names in ((False, model._keep_in_fp32_modules_strict), (True, model._keep_in_fp32_modules)):
        yield from (KeptInFp32(name=name, fp16_only=fp16_only, since=(0, 0)) for name in sorted(names or ()))


class Modules(NamedTuple):
    """What lies inside one decoder layer, by path."""

    linears: dict[str, Linear]
    norms: dict[str, Norm]
    all: dict[str, nn.Module]


def spec_from_class(config: Mapping[str, Any], *, model_id: str) -> ModelSpec:
    """Build the model of this config on the meta device and describe it.

    Raises:
        UnknownName: transformers has no such decoder-only model, or its layers are of a kind that is not modelled.
        InvalidInput: the class refuses the config.
    """
    part = text_part(config)
    model = _real_model(part)
    try:
        return _Reader(model, part, model_id).spec()
    except PlannerError:
        raise
    except Exception as error:  # noqa: BLE001 - a class without the usual attributes raises errors of its own
        raise _unmodelled(str(part.get("model_type")), f"attributes of another form ({one_line(str(error))})") from None


def _real_model(part: Mapping[str, Any]) -> PreTrainedModel:
    model_type = str(part.get("model_type"))
    values = {k: v for k, v in part.items() if not k.startswith("_") and k not in (*NOT_CONFIG, "model_type")}
    for key, value in values.items():
        if _COUNTS.search(key) and isinstance(value, int) and not isinstance(value, bool) and value > MAX_COUNT:
            what = f"config key {one_line(key, 40)} is {value}"
            raise InvalidInput(f"{what}; must be at most {MAX_COUNT}; correct config.json")
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            settings = AutoConfig.for_model(model_type, **values)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # noqa: BLE001 - the constructors of 200 classes meet a stranger's values
        raise _refused(model_type, error) from None
    finally:
        logging.disable(logging.NOTSET)
    model.tie_weights()
    return model


def _refused(model_type: str, error: Exception) -> UnknownName | InvalidInput:
    from importlib.metadata import version

    reason = one_line(" ".join(str(error).split()), 160)
    if "Unrecognized model identifier" in reason or "Unrecognized configuration class" in reason:
        return UnknownName(
            f"unknown model_type {one_line(model_type)!r}: neither loraplan nor transformers {version('transformers')} "
            f"has such a causal language model; known: {one_line(', '.join(known_families()), 600)}"
        )
    return InvalidInput(
        f"transformers cannot build model_type {one_line(model_type)!r} from this config "
        f"({type(error).__name__}: {reason}); correct config.json"
    )


def _unmodelled(model_type: str, what: str) -> UnknownName:
    return UnknownName(
        f"model_type {one_line(model_type)!r} is not in the registry, and its class has {what}, which is not "
        f"modelled; choose a model of a known family: {one_line(', '.join(known_families()), 600)}"
    )


class _Reader:
    """Reads one model: what is recognised becomes part of the spec, the rest a note or an error."""

    def __init__(self, model: PreTrainedModel, part: Mapping[str, Any], model_id: str) -> None:
        self.model, self.part, self.model_id = model, part, model_id
        self.config: Any = model.config.get_text_config()
        self.model_type = str(part.get("model_type"))
        self.notes: dict[str, None] = {}
        self.modules = dict(model.named_modules())
        self.embedding = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        if not isinstance(self.embedding, nn.Embedding) or not isinstance(self.head, nn.Linear):
            raise self._unmodelled("an embedding or a head of an unknown kind")
        self.hidden = int(self.config.hidden_size)
        self.prefix, self.layers = self._find_layers()

    def spec(self) -> ModelSpec:
        """Describe the whole model; its parameters are the class's, every one in its place."""
        made: dict[Layer, Layer] = {}
        layers = tuple(made.setdefault(layer, layer) for layer in map(self._layer, range(len(self.layers))))
        outer = self._outer_norms()
        tied = self.head.weight is self.embedding.weight
        forward = _source(self.model)
        spec = ModelSpec(
            model_id=self.model_id,
            model_type=self.model_type,
            hidden_size=self.hidden,
            vocab_size=self.embedding.num_embeddings,
            layers=layers,
            token_embedding=self._table(self.embedding),
            position_embedding=self._position_embedding(),
            embedding_norm=outer.get("embedding"),
            embedding_scale=self._scales_embedding(),
            final_norm=outer.get("final"),
            head=self._linear(self._path(self.head), self.head),
            tied=tied,
            logit_softcap=bool(getattr(self.config, "final_logit_softcapping", None)),
            logit_scale=bool(re.search(r"logit_scale|logits_scaling|lm_head_multiplier", forward)),
            stored_dtype=_dtype_name(self.part),
            max_position_embeddings=_positive(self.config, "max_position_embeddings"),
            stored_quantization=_quantization(self.part),
            keep_in_fp32=tuple(kept_in_fp32(self.model)),
            derived=True,
            layer_prefix=self.prefix,
        )  # fmt: skip
        self._check_count(spec)
        intro = (
            f"model_type {one_line(self.model_type)} is not in the registry: shapes are read from transformers' "
            f"{type(self.model).__name__}, operations are those of a common decoder layer"
        )
        return replace(spec, notes=(intro, *self.notes))

    # --- the whole model --------------------------------------------------------------------------------------------

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        depth = int(self.config.num_hidden_layers)
        for name, module in self.modules.items():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return name, module
        raise self._unmodelled(f"no list of its {depth} layers")

    def _path(self, wanted: nn.Module) -> str:
        return str(next(name for name, module in self.modules.items() if module is wanted))

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.modules.items():
            if name != self.prefix and not name.startswith(self.prefix + "."):
                yield name, module

    def _outer_norms(self) -> dict[str, Norm]:
        found = {name: _norm(name, module, self.hidden) for name, module in self._outside() if _is_norm(module)}
        early = [n for name, n in found.items() if re.search(r"embed|emb_", name)]
        late = [n for name, n in found.items() if not re.search(r"embed|emb_", name)]
        if len(early) > 1 or len(late) > 1:
            raise self._unmodelled(f"several norms outside its layers ({', '.join(found)})")
        return {**({"embedding": early[0]} if early else {}), **({"final": late[0]} if late else {})}

    def _position_embedding(self) -> Table | None:
        others = [m for _, m in self._outside() if isinstance(m, nn.Embedding) and m is not self.embedding]
        wide = [m for m in others if m.embedding_dim == self.hidden and m.weight.requires_grad]
        return self._table(wide[0]) if wide else None

    def _table(self, module: nn.Embedding) -> Table:
        return Table(name=self._path(module), rows=module.weight.shape[0], width=module.weight.shape[1])

    def _linear(self, name: str, module: nn.Module) -> Linear:
        weight: Any = module.weight
        rows, columns = weight.shape
        if isinstance(module, Conv1D):
            return Linear(name=name, in_features=rows, out_features=columns, bias=True, cls="Conv1D")
        kind: Any = "Linear" if type(module) is nn.Linear else "subclass"
        return Linear(name=name, in_features=columns, out_features=rows, bias=module.bias is not None, cls=kind)

    def _scales_embedding(self) -> bool:
        own = type(self.embedding).forward is not nn.Embedding.forward
        words = r"embed_scale|embedding_multiplier|scale_emb|normalizer"
        return own or bool(re.search(words, _source(self.model.base_model)))

    def _check_count(self, spec: ModelSpec) -> None:
        """Every parameter must have a place: a plan that leaves some out would be silently too small."""
        real = sum(p.numel() for p in self.model.parameters())
        if spec.num_parameters != real:
            raise self._unmodelled(f"{real:,} parameters, of which {spec.num_parameters:,} could be placed")

    def _unmodelled(self, what: str) -> UnknownName:
        return _unmodelled(self.model_type, what)

    def _note(self, text: str) -> None:
        self.notes[text] = None

    # --- one layer --------------------------------------------------------------------------------------------------

    def _layer(self, index: int) -> Layer:
        inside = self._inside(self.layers[index])
        root = self._attention_root(inside)
        attention = self._attention(index, root, inside)
        outer = Modules(
            {n: x for n, x in inside.linears.items() if not _within(n, root)},
            {n: x for n, x in inside.norms.items() if not _within(n, root)},
            {n: m for n, m in inside.all.items() if not _within(n, root)},
        )
        mlp, experts = self._feed_forward(outer)
        norms, parallel = self._layer_norms(outer.norms)
        source = _source(self.layers[index])
        layer = Layer(
            input_norm=norms.get("input_norm"),
            post_attention_norm=norms.get("post_attention_norm"),
            pre_mlp_norm=norms.get("pre_mlp_norm"),
            post_mlp_norm=norms.get("post_mlp_norm"),
            mixer=attention,
            mlp=mlp,
            experts=experts,
            parallel=parallel,
            residual_multiplier=bool(re.search(r"residual_multiplier|residual_scale|scale_depth", source)),
            hidden_dropout=any(_above_zero(self.config, key) for key in _HIDDEN_DROPOUTS),
        )
        return self._with_rest(index, layer, inside)

    def _inside(self, layer: nn.Module) -> Modules:
        named = dict(layer.named_modules())
        for name, module in named.items():
            if _RECURRENT.search(type(module).__name__) or isinstance(module, nn.Conv1d):
                kind = type(module).__name__
                raise self._unmodelled(f"layers with {kind} ({one_line(name, 60)}), a state-space or convolution mixer")
            if re.search(r"cross_?att|encoder_?att", f"{name} {type(module).__name__}", re.I):
                raise self._unmodelled("layers with cross-attention")
            if re.search(r"experts\.\d+$", name):
                raise self._unmodelled("experts that are separate modules")
        linears = {n: self._linear(n, m) for n, m in named.items() if isinstance(m, (nn.Linear, Conv1D))}
        return Modules(linears, {n: _norm(n, m, self.hidden) for n, m in named.items() if _is_norm(m)}, named)

    def _attention_root(self, inside: Modules) -> str:
        for name, module in inside.all.items():
            if name and _ATTENTION.search(type(module).__name__) and any(_within(n, name) for n in inside.linears):
                return name
        raise self._unmodelled("layers without attention")

    def _with_rest(self, index: int, layer: Layer, inside: Modules) -> Layer:
        """Count the parameters of a layer that no part of it holds; they are small, or the model is refused."""
        real = sum(p.numel() for p in self.layers[index].parameters())
        known = layer.num_parameters
        rest = real - known
        if rest == 0:
            return layer
        if not 0 < rest <= real // 1000:
            raise self._unmodelled(f"{real:,} parameters in layer {index}, of which {known:,} have a place")
        held = {norm.name for norm in (*layer.norms, *layer.mixer.norms)} | inside.linears.keys()
        others = [
            name
            for name, parameter in self.layers[index].named_parameters()
            if name.rpartition(".")[0] not in held and parameter.dim() != 3
        ]
        self._note(f"{', '.join(others)}: {rest:,} parameters a layer, counted but not computed with")
        if layer.experts is not None:
            return replace(layer, experts=replace(layer.experts, router_extra_parameters=rest))
        assert layer.mlp is not None
        return replace(layer, mlp=replace(layer.mlp, extra_parameters=rest))

    # --- attention --------------------------------------------------------------------------------------------------

    def _attention(self, index: int, root: str, inside: Modules) -> Attention:
        linears = {n: x for n, x in inside.linears.items() if _within(n, root)}
        norms = {n: x for n, x in inside.norms.items() if _within(n, root)}
        module = inside.all[root]
        last = (
            x for n, x in reversed(linears.items()) if _leaf(n).lower() in _OUTPUT and x.out_features == self.hidden
        )
        output = next(last, None)
        if output is None:
            raise self._unmodelled(f"an attention without a known output projection ({', '.join(linears)})")
        rest = {n: x for n, x in linears.items() if x is not output}
        sinks = any(_leaf(n) == "sinks" for n, _ in module.named_parameters())
        if sinks:
            self._note("attention sinks are planned with the operations of gpt_oss")
        common = {
            "output": output,
            "sliding_window": self._window(index, module),
            "logit_softcap": bool(getattr(self.config, "attn_logit_softcapping", None)),
            "sinks": sinks,
            "sdpa": bool(self.model._supports_sdpa),
            "dropout": any(_above_zero(self.config, key) for key in _ATTENTION_DROPOUTS),
        }
        if any(_leaf(n).startswith("kv_a_proj") for n in rest):
            return self._latent(rest, norms, common)
        position: Any = self._position()
        common |= {"position": position, "rotary_dim": self._rotary_width() if position == "rope" else 0}
        common |= self._head_norms(norms)
        by_kind = [next((x for n, x in rest.items() if p.match(_leaf(n))), None) for p in _ROLES]
        if all(by_kind):
            return self._separate([x for x in by_kind if x is not None], rest, common)
        return self._fused(module, rest, common)

    def _separate(self, qkv: list[Linear], rest: dict[str, Linear], common: dict[str, Any]) -> Attention:
        query, key, value = qkv
        output: Linear = common["output"]
        heads = int(self.config.num_attention_heads)
        if query.out_features == 2 * output.in_features:
            self._note(f"{query.name} also makes an output gate, whose activations are not planned")
        elif query.out_features % heads or output.in_features % heads:
            raise self._unmodelled(f"{heads} heads that do not divide its projections")
        head = query.out_features // heads
        kv_heads = max(key.out_features // head, 1) if query.out_features != 2 * output.in_features else 0
        if not kv_heads:
            head = output.in_features // heads
            kv_heads = max(key.out_features // head, 1)
        extra = [x for x in rest.values() if x not in qkv]
        for x in extra:
            self._note(f"{x.name} is counted (weights, adapters), its activations are not planned")
        width = value.out_features // kv_heads
        return Attention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head,
            v_head_dim=0 if width == head else width,
            projections=(*qkv, *extra),
            **common,
        )

    def _fused(self, module: nn.Module, rest: dict[str, Linear], common: dict[str, Any]) -> Attention:
        if len(rest) != 1:
            raise self._unmodelled(f"attention projections of unknown roles ({', '.join(rest)})")
        ((_, fused),) = rest.items()
        heads, q_size = int(self.config.num_attention_heads), common["output"].in_features
        kv_size, odd = divmod(fused.out_features - q_size, 2)
        head = q_size // heads
        if odd or kv_size <= 0 or q_size % heads or kv_size % head:
            raise self._unmodelled(f"a fused projection of unknown parts ({fused.name})")
        whole = replace(fused, parts=(q_size, kv_size, kv_size))
        return Attention(num_heads=heads, num_kv_heads=kv_size // head, head_dim=head, projections=(whole,), **common)

    def _latent(self, rest: dict[str, Linear], norms: dict[str, Norm], common: dict[str, Any]) -> Attention:
        """DeepSeek's latent attention under its usual names."""
        wanted = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj")
        ordered = [x for name in wanted for n, x in rest.items() if _leaf(n) == name]
        for x in rest.values():
            if x not in ordered:
                self._note(f"{x.name} is counted (weights, adapters), its activations are not planned")
                ordered.append(x)
        c = self.config
        return Attention(
            kind="mla",
            num_heads=int(c.num_attention_heads),
            num_kv_heads=int(c.num_attention_heads),
            head_dim=int(c.qk_nope_head_dim) + int(c.qk_rope_head_dim),
            v_head_dim=int(c.v_head_dim),
            projections=tuple(ordered),
            q_a_norm=next((x for n, x in norms.items() if _leaf(n).startswith("q_a")), None),
            kv_a_norm=next((x for n, x in norms.items() if _leaf(n).startswith("kv_a")), None),
            q_lora_rank=_positive(c, "q_lora_rank"),
            kv_lora_rank=int(c.kv_lora_rank),
            qk_rope_head_dim=int(c.qk_rope_head_dim),
            **common,
        )

    def _head_norms(self, norms: dict[str, Norm]) -> dict[str, Any]:
        """q_norm and k_norm; others are counted with the layer's rest."""
        query = next((x for n, x in norms.items() if _leaf(n).startswith("q")), None)
        key = next((x for n, x in norms.items() if _leaf(n).startswith("k")), None)
        for name, x in norms.items():
            if x not in (query, key):
                self._note(f"norm {name} inside the attention is counted, not computed with")
        if query is None or key is None:
            return {}
        head = _positive(self.config, "head_dim") or self.hidden // int(self.config.num_attention_heads)
        query, key = (x if x.weight else replace(x, size=head) for x in (query, key))
        return {"q_norm": query, "k_norm": key}

    def _window(self, index: int, module: nn.Module) -> int:
        """The window that the attention module carries, else what layer_types says of this layer."""
        owners = (module, self.layers[index])
        width: Any = next((x.sliding_window for x in owners if hasattr(x, "sliding_window")), 0)
        if getattr(module, "is_sliding", True) and isinstance(width, int) and width:
            return width
        kinds = getattr(self.config, "layer_types", None) or ()
        slides = index < len(kinds) and kinds[index] == "sliding_attention"
        return _positive(self.config, "sliding_window") if slides and not hasattr(module, "is_sliding") else 0

    def _position(self) -> str:
        if any(re.search(r"rotary|rope", type(m).__name__, re.I) for m in self.modules.values()):
            return "rope"
        if getattr(self.config, "alibi", False):
            return "alibi"
        return "learned" if self._position_embedding() is not None else "none"

    def _rotary_width(self) -> int:
        nested = getattr(self.config, "rope_parameters", None)
        factor = nested.get("partial_rotary_factor") if isinstance(nested, dict) else None
        factor = factor or getattr(self.config, "partial_rotary_factor", None) or 1.0
        head = _positive(self.config, "head_dim") or self.hidden // int(self.config.num_attention_heads)
        return 0 if not 0 < factor < 1 else int(head * factor)

    # --- feed-forward -----------------------------------------------------------------------------------------------

    def _feed_forward(self, outer: Modules) -> tuple[Mlp | None, Experts | None]:
        for name, module in outer.all.items():
            fused = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
            if fused:
                return None, self._experts(name, fused, module, outer)
        return self._mlp(outer.linears), None

    def _mlp(self, linears: dict[str, Linear]) -> Mlp:
        down = next(
            (x for n, x in linears.items() if _leaf(n).lower() in _DOWN and x.out_features == self.hidden), None
        )
        ups = [x for x in linears.values() if x is not down]
        if down is None or not 1 <= len(ups) <= 2 or any(x.in_features != self.hidden for x in ups):
            raise self._unmodelled(f"a feed-forward of unknown form ({', '.join(linears) or 'no linear module'})")
        width, act = down.in_features, self._activation()
        if len(ups) == 2:
            gate = next((x for x in ups if "gate" in x.name or _leaf(x.name) in ("w1", "wi_0", "linear_1")), ups[0])
            up = next(x for x in ups if x is not gate)
            return Mlp(gated=True, gate=gate, up=up, down=down, activation=act, intermediate_size=width)
        if ups[0].out_features == 2 * width:
            fused = replace(ups[0], parts=(width, width))
            return Mlp(gated=True, up=fused, down=down, activation=act, intermediate_size=width)
        if ups[0].out_features != width:
            raise self._unmodelled(f"a feed-forward of unknown form ({', '.join(linears)})")
        return Mlp(gated=False, up=ups[0], down=down, activation=act, intermediate_size=width)

    def _experts(self, name: str, fused: dict[str, nn.Parameter], module: nn.Module, outer: Modules) -> Experts:
        number = next(iter(fused.values())).shape[0]
        ordered = sorted(fused, key=lambda n: -fused[n].numel())
        if len(fused) != 2 or fused[ordered[0]].numel() != 2 * fused[ordered[1]].numel():
            raise self._unmodelled(f"experts of an unknown form ({', '.join(fused)})")
        top_k = next((n for n in (_positive(self.config, key) for key in _TOP_K) if n), 0)
        if not top_k:
            raise self._unmodelled("experts without a stated number per token")
        router, is_linear = self._router(number, outer)
        shared = {n: x for n, x in outer.linears.items() if "shared" in n and x.out_features != 1}
        gates = [x for n, x in outer.linears.items() if "shared" in n and x.out_features == 1]
        return Experts(
            num_experts=number,
            top_k=top_k,
            hidden_size=self.hidden,
            intermediate_size=fused[ordered[1]].numel() // number // self.hidden,
            name=name,
            gate_up_name=ordered[0],
            down_name=ordered[1],
            bias=any(p.dim() == 2 for p in module.parameters(recurse=False)),
            router=router,
            router_is_linear=is_linear,
            shared=self._mlp(shared) if shared else None,
            shared_gate=gates[0] if gates else None,
            activation=self._activation(),
        )

    def _router(self, number: int, outer: Modules) -> tuple[Linear, bool]:
        """The module that scores the experts, and whether it is a linear or holds a bare [experts, hidden] weight."""
        for name, linear in outer.linears.items():
            if linear.out_features == number and linear.in_features == self.hidden and "shared" not in name:
                return linear, True
        for name, module in outer.all.items():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and tuple(weight.shape) == (number, self.hidden):
                bias = isinstance(getattr(module, "bias", None), nn.Parameter)
                return Linear(name=name, in_features=self.hidden, out_features=number, bias=bias), False
        raise self._unmodelled("experts without a known router")

    def _activation(self) -> Activation:
        keys = ("hidden_act", "hidden_activation", "activation_function", "hidden_function", "mlp_hidden_act", "afn")
        name = next((v for v in (getattr(self.config, key, None) for key in keys) if isinstance(v, str)), "")
        if name in ACTIVATIONS:
            return ACTIVATIONS[name]
        self._note(f"activation {one_line(name) or 'not named'} is planned as silu")
        return "silu"

    def _layer_norms(self, norms: dict[str, Norm]) -> tuple[dict[str, Norm], bool]:
        """Give the layer's own norms their roles by name and number; and whether the branches are parallel."""
        flagged = any(getattr(self.config, key, False) is True for key in ("use_parallel_residual", "parallel_attn"))
        roles: dict[str, Norm] = {}
        inner = [name for name, x in norms.items() if "." in name or x.size != self.hidden]
        for name in inner:
            self._note(f"norm {name} inside the feed-forward is counted, not computed with")
        norms = {name: x for name, x in norms.items() if name not in inner}
        for name, x in norms.items():
            leaf = _leaf(name)
            if re.search(r"post_?(att|self)", leaf) and (len(norms) > 2 or _all_post(norms)):
                roles["post_attention_norm"] = x
            elif re.search(r"pre_?(feed|mlp|ff|moe)", leaf):
                roles["pre_mlp_norm"] = x
            elif re.search(r"post_?(feed|mlp|ff|moe)", leaf):
                roles["post_mlp_norm"] = x
            elif _FIRST_NORM.search(leaf) and "input_norm" not in roles:
                roles["input_norm"] = x
            else:
                free = next((r for r in ("input_norm", "pre_mlp_norm") if r not in roles), "")
                if not free or (free == "input_norm" and any(_FIRST_NORM.search(_leaf(n)) for n in norms)):
                    free = "pre_mlp_norm"
                roles[free] = x
        for name, x in norms.items():
            if x not in roles.values():
                raise self._unmodelled(f"norms of unknown roles ({', '.join(norms)}: {name})")
        return roles, len(norms) == 1 or flagged


def _all_post(norms: dict[str, Norm]) -> bool:
    return len(norms) == 2 and all("post" in _leaf(name) for name in norms)


def _source(module: nn.Module) -> str:
    try:
        return str(inspect.getsource(type(module).forward))
    except (OSError, TypeError):  # made at run time, or written in C
        return ""


def _within(name: str, root: str) -> bool:
    return name == root or name.startswith(root + ".")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _norm(name: str, module: nn.Module, width: int) -> Norm:
    """A norm module; one without a weight normalises `width` elements."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    size = weight.numel() if isinstance(weight, torch.Tensor) else width
    return Norm(name=name, size=size, kind=_norm_kind(module), weight=weight is not None, bias=bias is not None)


def _norm_kind(module: nn.Module) -> NormKind:
    """The kind by class, and by what its forward does to the weight."""
    if isinstance(module, nn.LayerNorm):
        return "layernorm"
    source = _source(module)
    if re.search(r"1(\.0)? \+ self\.weight", source):
        return "rms_gemma"
    if "F.layer_norm" in source:
        return "layernorm_upcast"
    if re.search(r"self\.weight(\.to\(torch\.float32\)|\.float\(\))? \* \w+\)\.(to|type)", source):
        return "layernorm_fp32" if "mean(-1" in source and "- mean" in source else "rms_fp32_weight"
    return "rms"


def _above_zero(config: Any, key: str) -> bool:
    value = getattr(config, key, 0)
    return isinstance(value, (int, float)) and value > 0


def _positive(config: Any, key: str) -> int:
    value = getattr(config, key, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _dtype_name(part: Mapping[str, Any]) -> str:
    found = (part.get("torch_dtype"), part.get("dtype"))
    return next((x.removeprefix("torch.") for x in found if isinstance(x, str)), "")


def _quantization(part: Mapping[str, Any]) -> str:
    stored = part.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    return method if isinstance(method, str) else ""


__all__ = ["spec_from_class"]
