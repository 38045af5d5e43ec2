"""Facts about memory, one row per source statement: tests/facts/memory.csv (function, arguments, expected, source).

`function` is a function or constant of the planner ("module:name"), or a probe of this file that runs one step of a
toy model and looks at what it allocated. Numbers are worked by hand from the source that the row names, or counted in
the row's own words; they are never copied from what the planner prints.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.device import cuda_rules
from planner.memory import sequence, walk
from planner.memory.owners import OWNERS
from planner.model import storage
from planner.model.spec import Linear
from planner.step import program
from planner.step.classes import registry
from planner.step.context import Step
from planner.step.engine import Record, Storage
from planner.step.habits import ALWAYS, COMMON, NEVER, Habits
from planner.step.optimizers import OptimizerState
from planner.training.spec import QuantizationSpec
from tests.helpers.step_toy import architecture, recorded, toy, training

FILE = Path(__file__).parent.parent / "facts" / "memory.csv"


def allocated(op: str, phase: str = "", **settings: Any) -> int:
    """Bytes of all storages that an operation of one step makes, in one phase or in all."""
    record = recorded(**settings)
    return sum(
        int(size)
        for index, size in record.events
        if size > 0 and record.ops[index] == op and phase in ("", record.segments[record.segment_of[index]].phase)
    )


def alive(op: str, at: str, **settings: Any) -> int:
    """Bytes of `op`'s storages that are alive when the first storage of `at` has been made."""
    record = recorded(**settings)
    level = 0
    for index, size in record.events:
        level += int(size) if record.ops[index] == op else 0
        if record.ops[index] == at and size > 0:
            return level
    raise AssertionError(f"no {at} was made")


def made_by_the_loss(**settings: Any) -> list[list[Any]]:
    """[operation, bytes] of all that the backward makes before it reaches the last layer."""
    record = recorded(**settings)
    return [
        [record.ops[index], int(size)]
        for index, size in record.events
        if size > 0
        and record.segments[record.segment_of[index]].phase in ("backward", "loss")
        and record.segments[record.segment_of[index]].layer < 0
        and record.segment_of[index] > _first_backward(record)
    ]


def _first_backward(record: Record) -> int:
    return next(n for n, segment in enumerate(record.segments) if segment.phase == "backward") - 1


def kernels(op: str, **settings: Any) -> list[float]:
    """[kernels, bytes they move, products' FLOPs] of an operation in one step."""
    found = [k for k in recorded(**settings).kernels if k.op == op]
    return [float(sum(k.count for k in found)), float(sum(k.bytes for k in found)), float(sum(k.flops for k in found))]


def weights_read(number: int, **settings: Any) -> list[int]:
    """Bytes of the first weights that come from the checkpoint, in their order."""
    record = recorded(**settings)
    sizes = {index: int(size) for index, size in record.events if size > 0}
    return [sizes[index] for index in record.arrivals[:number]]


def readers(**settings: Any) -> int:
    """Threads that read weights ahead of the one that quantizes them."""
    return recorded(**settings).readers


def peak_of_all_steps(optimizer: str, steps: int) -> int:
    """Bytes by which the highest level of the first `steps` steps exceeds that with SGD, which has no states."""
    peaks = []
    for name in (optimizer, "sgd"):
        level = peak = 0
        for _, size in sequence.expand(recorded(optimizer=name), steps):
            level += int(size)
            peak = max(peak, level)
        peaks.append(peak)
    return peaks[0] - peaks[1]


def quantized(kind: str, out: int, into: int, **quant: Any) -> dict[str, int]:
    """Bytes of each tensor of a quantized weight [out, into]."""
    spec = Linear(name="x", in_features=into, out_features=out)
    return dict(storage.quantized_bytes(spec, QuantizationSpec(kind=kind, **quant)))  # type: ignore[arg-type]


def _state(optimizer: str, dtype: str, elements: int, factors: int, cpu: bool = False) -> tuple[OptimizerState, Any]:
    arch = cuda_rules.Architecture.plain() if cpu else architecture()
    step = Step(toy("llama"), training(optimizer=optimizer), arch, COMMON)
    leaf = step.trainable("weight", _shape(elements, factors), dtype, "weight")
    return OptimizerState(step), leaf


def _shape(elements: int, factors: int) -> tuple[int, ...]:
    """Of a vector, or of the matrix that has so many elements and so many rows and columns together."""
    if not factors:
        return (elements,)
    rows = next(rows for rows in range(1, factors) if rows * (factors - rows) == elements)
    return rows, factors - rows


def state_bytes(optimizer: str, dtype: str, elements: int, factors: int = 0) -> list[int]:
    """Bytes of every state tensor of one parameter."""
    state, leaf = _state(optimizer, dtype, elements, factors)
    return [int(n) for n in state.state_bytes(leaf)]


def optimizer_step(optimizer: str, dtype: str, elements: int, factors: int = 0, cpu: bool = False) -> list[float]:
    """[kernels, bytes they move] of the step on one parameter; kernels in thirtieths where one takes thirty tensors."""
    state, leaf = _state(optimizer, dtype, elements, factors, cpu)
    state._update(leaf)
    (kernel,) = (k for k in state.eng.record.kernels if k.op == "optimizer")
    return [round(float(kernel.count) * (1 if cpu else 30), 6), float(kernel.bytes)]


def sdpa(dtype: str, capability: list[int], torch: list[int], **rest: Any) -> str:
    """The kernel that scaled_dot_product_attention picks."""
    arch = architecture(capability, {"torch": torch})
    named: dict[str, Any] = {"has_mask": False, "head_dim": 128, "v_head_dim": 128} | rest
    return str(cuda_rules.sdpa_kernel(dtype, arch=arch, **named))


def habit(field: str) -> dict[str, Any] | list[str]:
    """Model type -> its value, where a class does otherwise than most; of functions, the model types alone."""
    found = {name: getattr(registry.habits_of(name), field) for name in sorted(registry.FILES)}
    found = {name: value for name, value in found.items() if value != getattr(COMMON, field)}
    return sorted(found) if any(map(callable, found.values())) else found


def common_habit(field: str) -> Any:
    """What most classes do."""
    return getattr(COMMON, field)


def owners(operations: list[str]) -> dict[str, str]:
    """Operation -> the line of the ledger that its storages are in, wherever they are made."""
    return {op: OWNERS[op].category for op in operations}


PROBES: dict[str, Callable[..., Any]] = {
    probe.__name__: probe
    for probe in (
        allocated, alive, made_by_the_loss, kernels, peak_of_all_steps, weights_read, readers, quantized, state_bytes,
        optimizer_step, sdpa, habit, owners, common_habit,
    )
}  # fmt: skip


def rows() -> list[dict[str, str]]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plain(value: Any) -> Any:
    """A value as JSON has it; pairs of names and bytes as an object."""
    if isinstance(value, tuple) and value and all(isinstance(v, tuple) and isinstance(v[0], str) for v in value):
        return dict(value)
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['function']} {row['arguments']}"[:120])
def test_fact(row: dict[str, str]) -> None:
    arguments = json.loads(row["arguments"])
    if row["function"] in PROBES:
        found = PROBES[row["function"]](**arguments)
    else:
        module, _, name = row["function"].partition(":")
        found = getattr(importlib.import_module(f"planner.{module}"), name)
        if callable(found):
            named = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
            if "arch" in named:
                named["arch"] = architecture(list(named["arch"]))
            found = found(**named)
    assert plain(found) == json.loads(row["expected"]), row["source"]


def test_every_fact_names_its_source() -> None:
    facts = rows()
    assert len(facts) > 150
    assert all(len(row["source"]) > 12 for row in facts)
    assert len({(row["function"], row["arguments"]) for row in facts}) == len(facts)


def test_every_release_of_the_step_is_a_fact() -> None:
    """A new constant (major, minor), or table of such, in planner/step or cuda_rules needs a row."""
    named = {row["function"] for row in rows()}
    folder = Path(program.__file__).parent
    for path in [*sorted(folder.rglob("*.py")), Path(cuda_rules.__file__)]:
        inside = path.relative_to(folder.parent).with_suffix("").as_posix().replace("/", ".")
        module = importlib.import_module(f"planner.{inside}")
        for name, value in vars(module).items():
            if not name.isupper() or name.startswith("_") or name in ("NEVER", "ALWAYS", "OUTSIDE"):
                continue
            releases = value.values() if isinstance(value, dict) else [value]
            if all(isinstance(v, tuple) and len(v) == 2 and all(isinstance(n, int) for n in v) for v in releases):
                assert any(fact.endswith(f":{name}") for fact in named), f"{inside}:{name}"


def test_every_habit_of_a_class_is_a_fact() -> None:
    """What any class of transformers does otherwise than most needs a row that says which do, and by what source."""
    named = {json.loads(row["arguments"])["field"] for row in rows() if row["function"] == "habit"}
    assert {field for field in vars(COMMON) if habit(field)} == named


def test_every_release_that_most_classes_share_is_a_fact() -> None:
    named = {json.loads(row["arguments"])["field"] for row in rows() if row["function"] == "common_habit"}
    shared = {field for field in vars(COMMON) if "Release" in str(Habits.__annotations__[field])}
    assert {field for field in shared if getattr(COMMON, field) not in (ALWAYS, NEVER, (ALWAYS, ALWAYS))} == named


def test_a_walk_by_hand() -> None:
    """Load 1000 and 600 B; a layer that stands for 3 keeps 512 each; a workspace of 100 on top in the backward.

    Blocks of 512: weights 1024, adapter 1024, activations 3 x 512; the peak is in the backward, with the workspace and
    a gradient of 700 (1024).
    """
    record = Record()
    held = [Storage(record, 1000, "weight"), Storage(record, 600, "adapter")]
    record.enter("state")
    held.append(Storage(record, 300, "optimizer_state"))
    record.enter("forward", 0, 3)
    kept = Storage(record, 512, "linear")
    record.enter("loss")
    logits = Storage(record, 512, "lm_head")
    record.enter("backward")
    del logits
    record.enter("backward", 0, 3)
    grad = Storage(record, 700, "linear_grad")
    work = Storage(record, 100, "flash_attention_workspace")
    del work, grad, kept
    record.enter("optimizer")
    del held[0]
    record.close()
    found = walk.breakdown(record)
    assert found.static_bytes == 1024 + 1024 + 512
    assert found.peak_allocated_bytes == walk.peak_bytes(record) == 2560 + 3 * 512 + 1024 + 512
    assert dict(found.ledger) == {
        "base weights": 1024, "adapters": 1024, "optimizer state": 512, "activations": 3 * 512,
        "activation gradients": 1024, "workspaces": 512,
    }  # fmt: skip
    assert (found.moment.phase, found.moment.op) == ("backward", "flash_attention_workspace")
    assert walk.peak_bytes(record, block=1) == 1000 + 600 + 300 + 3 * 512 + 700 + 100
