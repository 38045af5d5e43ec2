"""Rules of GPU kernels against the library that owns them and against what an H200 showed."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from calibrate.fit.measurements import Measurement, read_runs
from planner.device import cuda_rules
from planner.device.cuda_rules import Architecture
from planner.facts import catalog
from planner.step.architecture import architecture
from planner.training.spec import LoraSpec, TrainingSpec, Versions

DATA = Path(__file__).parent.parent.parent / "data" / "measurements"
CARDS = ("t4", "a100-sxm4-80gb", "rtx-3090", "rtx-4090", "l4", "h100-sxm", "h200-sxm-141gb", "b200")
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (3072, 8192), (28672, 8192)]
"""[out, in] of weights."""
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


Chooses = Callable[[int, Any, int, int, int], bool]


def library_choice(sms: int, capability: tuple[int, int]) -> Chooses:
    """bitsandbytes' own choice between its fused kernel and dequantization, for a card that is not here.

    Its module wants a CUDA build of torch, so the one function is taken out of it.
    """
    torch = pytest.importorskip("torch")
    found = importlib.util.find_spec("bitsandbytes")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).parent / "backends" / "cuda" / "ops.py"
    wanted = {"_gemm_4bit_use_custom_cuda"}
    body = [
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if (isinstance(node, ast.FunctionDef) and node.name in wanted)
        or (isinstance(node, ast.Assign) and "_GEMM_4BIT_CUSTOM_FLOOR_M" in ast.unparse(node))
    ]
    space: dict[str, Any] = {
        "functools": functools, "torch": torch, "_gpu_dispatch_props": lambda index: (sms, *capability),
    }  # fmt: skip
    exec(compile(ast.Module(body=body, type_ignores=[]), str(source), "exec"), space)
    return cast(Chooses, space["_gemm_4bit_use_custom_cuda"])


@pytest.mark.oracle
@pytest.mark.parametrize("name", CARDS)
def test_the_fused_4bit_kernel_is_not_promised_where_bitsandbytes_dequantizes(name: str) -> None:
    """Large weights, as of models from 3B on: a promise too many would miss the dequantized weight's bytes."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    card = catalog.gpu(name)
    assert card.compute_capability is not None
    chooses = library_choice(card.sm_count, card.compute_capability)
    arch = Architecture(capability=card.compute_capability, num_sms=card.sm_count)
    dtype = torch.float16 if card.compute_capability < (8, 0) else torch.bfloat16
    wrong = agreed = 0
    for rows, (n, k) in itertools.product(ROWS, SHAPES):
        fused = rows <= 1536 and chooses(0, dtype, rows, n, k)
        ours = not cuda_rules.gemm_4bit_dequantizes(rows, n, k, compute_bytes=2, arch=arch)
        wrong += ours and not fused
        agreed += ours == fused
    assert wrong == 0
    assert agreed >= 0.65 * len(ROWS) * len(SHAPES)


def test_cudnn_comes_first_on_hopper_since_torch_2_11() -> None:
    training = TrainingSpec(method="lora", lora=LoraSpec(r=8), versions=Versions(torch=(2, 11)))
    older = TrainingSpec(method="lora", lora=LoraSpec(r=8), versions=Versions(torch=(2, 10)))
    assert architecture(catalog.gpu("h200-sxm-141gb"), training).cudnn_attention
    assert not architecture(catalog.gpu("h200-sxm-141gb"), older).cudnn_attention
    assert not architecture(catalog.gpu("a100-sxm4-80gb"), training).cudnn_attention


def profiled() -> list[Measurement]:
    """The H200's bursts that were profiled."""
    runs = read_runs([DATA / "h200.json", DATA / "h200-check.json"])
    return [m for run in runs for m in run.measurements if m.ok and m.kernels_s]


def test_an_h200_ran_cudnn_wherever_the_rules_say_so() -> None:
    seen = 0
    for item in profiled():
        names = [name for name, _, _ in item.result["profile"]["longest"]]
        if item.training.attention != "sdpa" or not any("sdpa" in n or "fmha" in n or "flash" in n for n in names):
            continue
        assert architecture(catalog.gpu("h200-sxm-141gb"), item.training).cudnn_attention
        assert any("cudnn_generated" in name for name in names), item.model
        seen += 1
    assert seen >= 20


def test_an_h200_dequantized_large_weights_at_every_number_of_rows_that_was_run() -> None:
    """gemm_4bit has a kernel of its own; no burst of a model from 3B on ran it, with 128 rows and more."""
    seen = 0
    for item in profiled():
        if item.training.quantization.kind != "nf4" or int(item.config["hidden_size"]) < 3000:
            continue
        assert not any("gemm_4bit" in name for name, _, _ in item.result["profile"]["longest"])
        seen += 1
    assert seen >= 20
