"""OWNERS: every operation that a program can make a storage with has a row; one without is an error."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from planner.base.errors import PlannerError, UnknownName
from planner.facts import catalog, sources
from planner.memory import walk
from planner.memory.owners import ANYWHERE, CATEGORIES, OWNERS, RESULTS, Owner
from planner.model import families
from planner.model.spec import Activation, ModelSpec
from planner.step import architecture, program
from planner.step.engine import Engine, Tensor
from planner.training import stacks
from planner.training.choices import CHOICES

STEP = Path(program.__file__).parent
CARDS = [catalog.gpu(name) for name in ("a100-sxm4-80gb", "h100-sxm5-80gb", "t4")]
KEY_OF = {"dtype": "base_dtype", "checkpointing": "gradient_checkpointing"}


def models() -> list[ModelSpec]:
    """The smallest model of the catalogue of each class."""
    found: dict[str, ModelSpec] = {}
    for name in catalog.model_ids():
        try:
            spec = families.build_spec(sources.load_config(name).config, model_id=name)
        except PlannerError:
            continue
        held = found.get(spec.model_type)
        if held is None or spec.num_parameters < held.num_parameters:
            found[spec.model_type] = spec
    return list(found.values())


def drawn(rng: random.Random) -> Any:
    """Settings.

    Raises:
        PlannerError: they exclude each other.
    """
    given: dict[str, Any] = {}
    for key, values in CHOICES.items():
        if key != "method" and rng.random() < 0.4:
            given[KEY_OF.get(key, key)] = rng.choice(values)
    for name in ("use_dora", "padded", "use_reentrant"):
        if rng.random() < 0.4:
            given[name] = rng.choice((True, False))
    given |= {"lora_dropout": rng.choice((0.0, 0.1)), "seq_len": rng.choice((7, 300))}
    stack = rng.choice(sorted(stacks.STACKS))
    return stacks.to_training_spec(stacks.resolve(stack, method=rng.choice(CHOICES["method"]), given=given))


def test_every_storage_of_many_programs_has_an_owner() -> None:
    rng = random.Random(3)
    made: set[str] = set()
    for number, spec in enumerate(models() * 12):
        card = CARDS[number % len(CARDS)]
        try:
            settings = drawn(rng)
            run = program.run(spec, settings, architecture.architecture(card, settings)).record
        except PlannerError:
            continue
        found = walk.breakdown(run)
        assert sum(size for _, size in found.ledger) == found.peak_allocated_bytes
        made |= set(run.ops)
    assert made - set(OWNERS) == set()
    assert len(made) > 150


def labels(tree: ast.AST, places: dict[str, int | None]) -> Iterator[str]:
    """What is given as `op` to the functions that have such an argument, and its defaults there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in places:
                continue
            place = places[name]
            given = [item.value for item in node.keywords if item.arg == "op"]
            starred = any(isinstance(item, ast.Starred) for item in node.args)  # how many, nobody can see
            if place is not None and len(node.args) > place and not starred:
                given.append(node.args[place])
            for item in given:
                choices = (item.body, item.orelse) if isinstance(item, ast.IfExp) else (item,)
                yield from (c.value for c in choices if isinstance(c, ast.Constant) and isinstance(c.value, str))
        elif isinstance(node, ast.FunctionDef) and node.name in places:
            arguments = [*node.args.posonlyargs, *node.args.args]
            pairs = zip(reversed(arguments), reversed(node.args.defaults), strict=False)
            yield from (str(d.value) for a, d in pairs if a.arg == "op" and isinstance(d, ast.Constant))


def test_every_label_in_the_source_has_an_owner() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(STEP.rglob("*.py"))]
    places: dict[str, int | None] = {"Storage": 2}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("kernel", "matmul", "__init__"):
            names = [item.arg for item in node.args.args if item.arg != "self"]
            if "op" in [*names, *(item.arg for item in node.args.kwonlyargs)]:
                places[node.name] = names.index("op") if "op" in names else None
    found = {label for tree in trees for label in labels(tree, places)}
    assert len(found) > 120
    assert found - set(OWNERS) == set()
    assert {f"{label}_grad" for label in found & set(RESULTS)} <= set(OWNERS)


def test_every_activation_function_has_an_owner() -> None:
    for name in get_args(Activation):
        assert OWNERS[name] == Owner(category="activations", in_head="logits and loss")
        assert OWNERS[f"{name}_grad"] == Owner(category="activation gradients", in_head="logits and loss")


def test_a_storage_without_an_owner_is_an_error() -> None:
    eng = Engine()
    eng.enter("forward", 0)
    held = eng.empty(4, "bf16", "nobodys")
    eng.record.close()
    assert held.numel == 4
    with pytest.raises(UnknownName, match=r"unknown operation in the memory ledger .* 'nobodys'"):
        walk.breakdown(eng.record)


def test_rows_name_categories() -> None:
    with pytest.raises(TypeError, match="scratch is no category"):
        Owner(category="scratch", in_head="logits and loss")
    with pytest.raises(TypeError, match="scratch is no category"):
        Owner(category="activations", in_head="scratch")
    assert {row.category for row in OWNERS.values()} | {"logits and loss"} == set(CATEGORIES)
    for category, names in ANYWHERE.items():
        assert {(OWNERS[name].category, OWNERS[name].in_head) for name in names} == {(category, category)}


@pytest.mark.parametrize(
    ("category", "names"),
    [
        ("base weights", ("weight", "weight_absmax", "weight_qweight", "weight_qzeros", "weight_state2.absmax")),
        ("adapters", ("adapter",)),
        ("gradients", ("gradient",)),
        ("optimizer state", ("optimizer_state",)),
        ("checkpoints", ("checkpoint", "checkpoint_reload")),
        ("weight copies", ("dequantize", "autocast_weight", "lora_factor")),
        ("workspaces", ("cublas", "int8_product", "optimizer_temporary", "softmax_grad_times_output")),
        ("workspaces", ("flash_attention_workspace", "efficient_attention_workspace", "cudnn_attention_workspace")),
        ("inputs", ("input_ids", "attention_mask", "positions", "rotary_tables")),
        ("activations", ("linear", "flash_attention_logsumexp", "lora_dropout_mask", "norm", "alibi", "silu")),
        ("activation gradients", ("linear_grad", "weight_grad", "sum_to", "accumulate_grad", "silu_grad")),
    ],
)
def test_who_owns_what(category: str, names: tuple[str, ...]) -> None:
    """As the ledger of a trace sorts the same storages (calibrate.oracle.ledger)."""
    assert {OWNERS[name].category for name in names} == {category}


def test_where_a_storage_is_made_decides() -> None:
    """A linear's result and gradient: of the layers, or of the head, which the backward meets before the layers."""
    eng = Engine()
    places = (("forward", 0), ("loss", -1), ("backward", -1), ("backward", 0), ("backward", -1))
    held = []
    for phase, layer in places:
        eng.enter(phase, layer)
        held += [
            eng.empty(256, "bf16", "linear"),
            eng.empty(256, "bf16", "linear_grad"),
            eng.empty(256, "bf16", "weight"),
        ]
    begins = walk._layers_backward_begins(eng.record)
    found = [walk.category(eng.record, index, begins) for index in range(len(held))]
    inside = ["activations", "activation gradients", "base weights"]
    head = ["logits and loss", "logits and loss", "base weights"]
    assert found == [*inside, *head, *head, *inside, *inside]


@pytest.mark.parametrize(("layer", "in_head"), [(-1, True), (0, False)])
def test_the_moment_says_whether_it_is_in_the_head(layer: int, in_head: bool) -> None:
    eng = Engine()
    held: list[Tensor] = []
    for phase, where in (("forward", 0), ("backward", layer), ("backward", 0)):
        eng.enter(phase, where)
        held.append(eng.empty(2**20 if phase == "backward" and len(held) == 1 else 1, "bf16", "gradient"))
        if len(held) == 2:
            eng.workspace(2**20, "cublas")
    eng.record.close()
    moment = walk.breakdown(eng.record).moment
    assert (moment.op, moment.in_head) == ("cublas", in_head)
