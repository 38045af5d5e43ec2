"""Facts about kernels, one row per source statement: tests/facts/kernels.csv (probe, arguments, expected, source).

A probe runs one step of a toy model (tests/helpers/step_toy.py: 2 layers of 128, 4 heads of 32, 2 of them for
keys, feed-forward 256, vocabulary 1000, 128 tokens in 2 rows, adapters of rank 4 on q and v) and adds up the kernels of
one kind. The numbers are worked by hand from what the source says a kernel reads and writes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.base.records import replace
from planner.step import loading, program
from planner.step.engine import Kernel
from planner.training.spec import Versions
from tests.helpers.step_toy import TOYS, architecture, recorded, toy, training

FILE = Path(__file__).parent.parent / "facts" / "kernels.csv"
TOYS["narrow window"] = {**TOYS["mistral"], "sliding_window": 48}
for _size in (64, 80, 96):
    TOYS[f"heads of {_size}"] = {**TOYS["llama"], "head_dim": _size}
TOYS["llama4_text"] = {
    **TOYS["llama"], "model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1,
    "intermediate_size": 64, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 1,
}  # fmt: skip
TOYS["latent"] = {
    **TOYS["llama"], "model_type": "deepseek_v3", "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip


def chosen(op: str, phase: str = "", layer: int = -2, **settings: Any) -> list[Kernel]:
    """The kernels of one kind, of all the step or of one phase and layer (-1: outside the layers)."""
    record = recorded(**settings)
    found = []
    for kernel in record.kernels:
        segment = record.segments[kernel.segment]
        if kernel.op == op and phase in ("", segment.phase) and layer in (-2, segment.layer):
            found.append(kernel)
    return found


def kernels(**rest: Any) -> list[float]:
    """[kernels, bytes they move]."""
    some = chosen(**rest)
    return [round(float(sum(k.count for k in some)), 9), float(sum(k.bytes for k in some))]


def traffic(**rest: Any) -> list[int]:
    """Bytes of each, rising."""
    return sorted(int(kernel.bytes) for kernel in chosen(**rest))


def flops(**rest: Any) -> float:
    """Products' FLOPs of all."""
    return float(sum(kernel.flops for kernel in chosen(**rest)))


def done_over_counted(**rest: Any) -> float:
    """What fused attention computes, heads padded, over the FLOPs that count."""
    some = chosen(**rest)
    return round(sum(k.elements for k in some) / sum(k.flops for k in some), 9)


def indexed_elements(**rest: Any) -> float:
    """Results of the kernels that compute an index for each."""
    return round(float(sum(kernel.elements for kernel in chosen(op="indexed", **rest))), 6)


def layouts(**rest: Any) -> dict[str, int]:
    """How many products have their operands in which layout."""
    found: dict[str, int] = {}
    for kernel in chosen(**rest):
        found[kernel.layout] = found.get(kernel.layout, 0) + 1
    return dict(sorted(found.items()))


def transferred(**settings: Any) -> dict[str, int]:
    """Kind of copy between card and host -> bytes."""
    found = {op: sum(traffic(op=op, **settings)) for op in ("host_transfer", "overlapped_transfer", "paged_transfer")}
    return {op: nbytes for op, nbytes in found.items() if nbytes}


def made(op: str, number: int, **settings: Any) -> list[int]:
    """Bytes of the first storages that an operation makes, in their order."""
    record = recorded(**settings)
    return [int(size) for index, size in record.events if size > 0 and record.ops[index] == op][:number]


def trained(**settings: Any) -> int:
    """Trainable parameters of a run at its emulated depth, of a model of 9 equal layers."""
    TOYS["deep"] = {**TOYS["llama"], "num_hidden_layers": 9}
    return int(program.run(toy("deep"), training(**settings), architecture()).trainable_parameters)


PROBES: dict[str, Callable[..., Any]] = {
    probe.__name__: probe
    for probe in (kernels, traffic, flops, done_over_counted, indexed_elements, layouts, transferred, made, trained)
}


def rows() -> list[dict[str, str]]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['probe']} {row['arguments']}"[:120])
def test_fact(row: dict[str, str]) -> None:
    found = PROBES[row["probe"]](**json.loads(row["arguments"]))
    assert found == json.loads(row["expected"]), row["source"]


def test_every_fact_names_its_source() -> None:
    facts = rows()
    assert all(len(row["source"]) > 20 for row in facts)
    assert len({(row["probe"], row["arguments"]) for row in facts}) == len(facts)


def test_a_card_limits_the_block_that_loading_begins_with() -> None:
    """transformers 4.57 caching_allocator_warmup: what the weights need (2 B of 551,552), or what the card has free."""
    for limit, taken in ((0, 1_103_104), (1000, 1000), (1 << 30, 1_103_104)):
        arch = replace(architecture(), warmup_limit=limit)
        settings = training(device_map=True, versions=Versions(transformers=(4, 57)))
        record = program.run(toy("llama"), settings, arch, full_depth=True).record
        assert [int(n) for index, n in record.events if record.ops[index] == "loading" and n > 0] == [taken]


def test_a_weight_is_quantized_before_the_reader_that_was_busy_takes_the_next() -> None:
    """Two readers at 2 GB/s: 2 GB take one a second, 4 GB the other two; the first then reads the third weight."""
    sizes = {1: 2 * 10**9, 2: 4 * 10**9, 3: 1000}
    events = [event for name, size in sizes.items() for event in ((name, size), (name + 10, 500), (name, -size))]
    found = loading.overlap(events, [1, 2, 3], 2)
    assert [event for event in found if event[1] > 0][:4] == [(1, 2 * 10**9), (2, 4 * 10**9), (11, 500), (3, 1000)]
