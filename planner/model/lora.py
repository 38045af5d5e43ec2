"""Which modules a LoRA configuration adapts and how many parameters that trains, by the rules of PEFT 0.21."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Literal

from planner.base.errors import Contradiction, InvalidInput, UnknownName, one_line
from planner.base.records import record
from planner.model.spec import Experts, Layer, Linear, ModelSpec, Norm, Table
from planner.training.spec import LoraSpec

PEFT_DEFAULT_TARGETS: Final[dict[str, tuple[str, ...]]] = {
    "bloom": ("query_key_value",),
    "chatglm": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "falcon": ("query_key_value",),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gptj": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "mpt": ("Wqkv",),
    "opt": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "stablelm": ("q_proj", "v_proj"),
}
"""model_type -> the modules PEFT adapts when target_modules is not given; other families have no default there."""

ALL_LINEAR = "all-linear"
KEYWORDS = (ALL_LINEAR, "attention", "mlp")

ROUTER_WEIGHT = "gate.weight"

_MIXTRAL_NAMES = {"gate": ROUTER_WEIGHT, "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN_NAMES = {
    "gate": ROUTER_WEIGHT,
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
_OLD_EXPERT_NAMES: Final[dict[str, dict[str, str]]] = {
    "mixtral": _MIXTRAL_NAMES,
    "qwen3_moe": _QWEN_NAMES,
    "olmoe": _QWEN_NAMES,
    "glm4_moe": _QWEN_NAMES,
    "deepseek_v2": _QWEN_NAMES,
    "deepseek_v3": _QWEN_NAMES,
}
"""model_type -> expert module of transformers 4 -> fused parameter of transformers 5.

For these families PEFT turns the old names into adapters on the fused parameters, and no longer adapts linear
modules of the same name (a shared expert, a dense layer). Other expert families (qwen2_moe, gpt_oss) keep to modules.
"""


@record
class Adapted:
    """The adapter of one module or fused parameter in one kind of layer.

    A linear has lora_A [rank, in_features] and lora_B [out_features, rank]. A fused expert parameter has one such pair
    per expert, stacked: lora_A [rank * experts, in_features], lora_B [out_features, rank * experts].
    """

    name: str
    """Path inside the layer ("self_attn.q_proj", "mlp.experts.gate_up_proj"), or in the model when `layer` is None."""
    layer: Layer | None
    count: int
    """How many times the model has it."""
    kind: Literal["linear", "embedding", "parameter"]
    linear: Linear | None = None
    """The adapted module of kind "linear"."""
    in_features: int
    out_features: int
    rank: int
    """Per expert or slice; twice r on gate_up_proj, which holds two projections. May be an array in a sweep."""
    experts: int = 1
    slices: tuple[int, ...] = ()
    """Widths of the adapted parts of a fused projection, each with its own pair; empty: one pair for the whole."""
    dora: bool = False

    @property
    def a_elements(self) -> int:
        return self.rank * self.experts * self.in_features * max(1, len(self.slices))

    @property
    def b_elements(self) -> int:
        return self.rank * self.experts * (sum(self.slices) or self.out_features)

    @property
    def magnitude_elements(self) -> int:
        """DoRA's magnitude vector: one value per output."""
        return self.out_features if self.dora else 0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of one occurrence."""
        return self.a_elements + self.b_elements + self.magnitude_elements


def resolve_targets(model: ModelSpec, lora: LoraSpec) -> tuple[Adapted, ...]:
    """Return the adapters `lora` puts on `model`, layer kinds first, then modules outside the layers.

    Raises:
        UnknownName: a target that names no module of the model.
        Contradiction: targets or settings that PEFT refuses for this model.
    """
    targets = _expand_keywords(model, lora.target_modules)
    old_names = _OLD_EXPERT_NAMES.get(model.model_type, {})
    fused = {t: old_names[t.rpartition(".")[2]] for t in targets if t.rpartition(".")[2] in old_names}
    names = [t for t in targets if t not in fused]
    adapted = [
        *_in_layers(model, lora, names, frozenset(fused.values())),
        *_outside_layers(model, lora, names),
    ]
    _check_names(model, names, adapted)
    _check_fused(lora, fused, old_names, adapted)
    if not adapted:
        raise UnknownName(
            f"LoRA targets {one_line(', '.join(lora.target_modules))!r} adapt nothing in {model.model_id}; "
            f"its modules are {_listed(module_names(model))}; name some of them"
        )
    return tuple(adapted)


def trainable_lora_parameters(model: ModelSpec, lora: LoraSpec) -> int:
    """Return how many parameters `lora` trains on `model`: adapters, magnitudes and the copies of modules_to_save."""
    adapters = sum(a.num_parameters * a.count for a in resolve_targets(model, lora))
    return adapters + saved_module_parameters(model, lora)


def saved_module_parameters(model: ModelSpec, lora: LoraSpec) -> int:
    """Return the parameters of the modules in modules_to_save; PEFT trains a full copy of each."""
    if not lora.modules_to_save:
        return 0
    found: set[str] = set()
    total = 0
    for path, elements, count in _weighted_modules(model):
        hits = {s for s in lora.modules_to_save if any(p.endswith(s) for p in _with_parents(path))}
        found |= hits
        total += elements * count if hits else 0
    missing = [s for s in lora.modules_to_save if s not in found]
    if missing:
        raise _no_such_module(model, "modules_to_save", missing[0])
    return total


def module_names(model: ModelSpec) -> list[str]:
    """Return the last parts of the names of all adaptable modules, each once, in the model's order."""
    inside = (linear.name for layer, _ in model.distinct_layers() for linear in layer.linears)
    outside = (linear.name for linear in (*model.embedding_projections, model.head))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in (*inside, *outside)))


def _expand_keywords(model: ModelSpec, targets: Iterable[str]) -> list[str]:
    """Replace the keywords by module names; each name once."""
    names: dict[str, None] = {}
    for target in targets:
        keyword = target.lower()
        if keyword not in KEYWORDS:
            names[target] = None
            continue
        for layer, _ in model.distinct_layers():
            inside = layer.mixer.linears if keyword == "attention" else layer.linears
            skipped = {linear.name for linear in layer.mixer.linears} if keyword == "mlp" else set()
            names.update(dict.fromkeys(linear.name for linear in inside if linear.name not in skipped))
        if keyword == ALL_LINEAR:
            names.update(dict.fromkeys(linear.name for linear in model.embedding_projections))
        if keyword != "attention" and _has_experts(model):
            old = _OLD_EXPERT_NAMES.get(model.model_type, {})
            # the router was a linear module in transformers 4; "mlp" leaves it alone
            names.update(dict.fromkeys(n for n in old if keyword == ALL_LINEAR or old[n] != ROUTER_WEIGHT))
    return list(names)


def _has_experts(model: ModelSpec) -> bool:
    return any(layer.experts is not None for layer, _ in model.distinct_layers())


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_saved(path: str, saved: Iterable[str]) -> bool:
    """PEFT never adapts a module that modules_to_save covers, itself or through a parent."""
    return any(_matches(parent, saved) for parent in _with_parents(path))


def _with_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _in_layers(model: ModelSpec, lora: LoraSpec, names: list[str], parameters: frozenset[str]) -> Iterator[Adapted]:
    for layer, count in model.distinct_layers():
        for linear in layer.linears:
            path = f"{model.layer_prefix}.0.{linear.name}"
            if _matches(linear.name, names) and not _is_saved(path, lora.modules_to_save):
                yield _on_linear(linear, lora, layer, count)
        if layer.experts is not None:
            yield from _on_experts(layer.experts, lora, layer, count, parameters)


def _on_linear(linear: Linear, lora: LoraSpec, layer: Layer | None, count: int) -> Adapted:
    # litgpt adapts slices of the query-key-value projection only; a fused gate-up has two parts
    sliced = bool(lora.target_slices) and len(linear.parts) == 3
    if sliced and max(lora.target_slices) >= len(linear.parts):
        raise InvalidInput(f"target_slices {lora.target_slices} of {linear.name}: a projection has slices 0, 1 and 2")
    return Adapted(
        name=linear.name,
        layer=layer,
        count=count,
        kind="linear",
        linear=linear,
        in_features=linear.in_features,
        out_features=linear.out_features,
        rank=lora.r,
        slices=tuple(linear.parts[i] for i in lora.target_slices) if sliced else (),
        dora=lora.use_dora,
    )


def _on_experts(
    block: Experts, lora: LoraSpec, layer: Layer, count: int, parameters: frozenset[str]
) -> Iterator[Adapted]:
    """Adapters on the fused parameters of a block of experts, in PEFT's order of nesting."""
    hidden, width = block.hidden_size, block.intermediate_size
    shapes = (
        (block.down_name, f"{block.name}.{block.down_name}", width, hidden, lora.r, block.num_experts),
        (block.gate_up_name, f"{block.name}.{block.gate_up_name}", hidden, 2 * width, 2 * lora.r, block.num_experts),
        (ROUTER_WEIGHT, f"{block.router.name}.weight", hidden, block.num_experts, lora.r, 1),
    )
    for short, name, n_in, n_out, rank, number in shapes:
        if short in parameters:
            yield Adapted(
                name=name,
                layer=layer,
                count=count,
                kind="parameter",
                in_features=n_in,
                out_features=n_out,
                rank=rank,
                experts=number,
            )


def _outside_layers(model: ModelSpec, lora: LoraSpec, names: list[str]) -> Iterator[Adapted]:
    for linear in (*model.embedding_projections, model.head):
        if _matches(linear.name, names) and not _is_saved(linear.name, lora.modules_to_save):
            yield _on_linear(linear, lora, None, 1)
    for table in _tables(model):
        if _matches(table.name, names) and not _is_saved(table.name, lora.modules_to_save):
            yield Adapted(
                name=table.name,
                layer=None,
                count=1,
                kind="embedding",
                in_features=table.rows,
                out_features=table.width,
                rank=lora.r,
                dora=lora.use_dora,
            )


def _tables(model: ModelSpec) -> tuple[Table, ...]:
    tables = (model.token_embedding, model.position_embedding)
    return tuple(table for table in tables if table is not None)


def _weighted_modules(model: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Yield (path, parameters, occurrences) of every module that owns parameters."""
    for layer, count in model.distinct_layers():
        prefix = f"{model.layer_prefix}.0"
        inner: tuple[Linear | Norm, ...] = (*layer.linears, *layer.norms, *layer.mixer.norms)
        for part in inner:
            yield f"{prefix}.{part.name}", part.num_parameters, count
        for weight in layer.mixer.weights:
            yield f"{prefix}.{weight.name.rpartition('.')[0]}", weight.num_parameters, count
        if layer.experts is not None:
            yield f"{prefix}.{layer.experts.name}", layer.experts.expert_elements, count
            if not layer.experts.router_is_linear:
                yield f"{prefix}.{layer.experts.router.name}", layer.experts.router.num_parameters, count
    norms = tuple(norm for norm in (model.embedding_norm, model.final_norm) if norm is not None)
    outer: tuple[Linear | Table | Norm, ...] = (*model.embedding_projections, model.head, *_tables(model), *norms)
    yield from ((module.name, module.num_parameters, 1) for module in outer)


def _check_names(model: ModelSpec, names: list[str], adapted: list[Adapted]) -> None:
    """Refuse names that match nothing: PEFT would skip them in silence, and the plan would be of another run."""
    for name in names:
        if any(part.isdigit() for part in name.split(".")):
            raise InvalidInput(
                f"LoRA target {one_line(name)!r} picks one layer by number, which is not planned yet; "
                "name the module without it, for example q_proj"
            )
        if not any(_matches(a.name, (name,)) for a in adapted) and not _names_saved(model, name):
            raise _no_such_module(model, "LoRA target", name)


def _names_saved(model: ModelSpec, name: str) -> bool:
    """Return whether `name` exists at all (it may be left out because modules_to_save covers it)."""
    linears = [linear.name for layer, _ in model.distinct_layers() for linear in layer.linears]
    outer = [x.name for x in (*model.embedding_projections, model.head)] + [x.name for x in _tables(model)]
    return any(_matches(path, (name,)) for path in (*linears, *outer))


def _check_fused(lora: LoraSpec, fused: dict[str, str], old_names: dict[str, str], adapted: list[Adapted]) -> None:
    """Refuse what PEFT refuses for fused expert parameters."""
    leaves = {target.rpartition(".")[2] for target in fused}
    pair = {old for old, new in old_names.items() if new == "gate_up_proj"}
    if leaves & pair and not pair <= leaves:
        raise Contradiction(
            f"LoRA target {', '.join(sorted(leaves & pair))} without {', '.join(sorted(pair - leaves))}: "
            "transformers 5 fuses them into gate_up_proj and PEFT adapts both or none; name both or drop it"
        )
    if any(a.kind == "parameter" for a in adapted):
        wrong = "lora_dropout above 0" if lora.lora_dropout else "DoRA" if lora.use_dora else ""
        if wrong:
            raise Contradiction(
                f"PEFT cannot adapt fused expert parameters with {wrong}; "
                "switch it off, or target the attention modules only"
            )


def _no_such_module(model: ModelSpec, what: str, name: str) -> UnknownName:
    return UnknownName(
        f"{what} {one_line(name)!r} matches no module of {model.model_id}; its modules are "
        f"{_listed(module_names(model))}; use those names or {', '.join(KEYWORDS)}"
    )


def _listed(names: list[str]) -> str:
    return one_line(", ".join(names), 300)
