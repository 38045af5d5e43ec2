"""The fake trace against real CPU execution of the same libraries, byte for byte, and against itself."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for _library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(_library)

from calibrate.oracle.command import main  # noqa: E402
from calibrate.oracle.result import TraceResult  # noqa: E402
from calibrate.oracle.trace import trace  # noqa: E402
from planner.device import cuda_rules  # noqa: E402
from planner.device.cuda_rules import Architecture  # noqa: E402
from planner.training.spec import TrainingSpec, training_from_dict  # noqa: E402

pytestmark = pytest.mark.oracle

pytestmark = pytest.mark.slow

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 128,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "tie_word_embeddings": True}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 128, "rotary_pct": 0.25,
}  # fmt: skip
LORA = {"r": 8, "lora_dropout": 0.05, "target_modules": ["all-linear"], "dtype": "fp32"}
NF4 = {"kind": "nf4", "double_quant": True}
SMALL = {"micro_batch_size": 2, "seq_len": 64, "gradient_checkpointing": "none", "optimizer": "adamw"}
QLORA = {**SMALL, "method": "qlora", "lora": LORA, "quantization": NF4}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4-prep-autocast": (LLAMA, {**QLORA, "kbit_preparation": True}),
    "nf4-prep-autocast-ckpt": (LLAMA, {**QLORA, "kbit_preparation": True, "gradient_checkpointing": "full"}),
    "nf4-prep-eager-reentrant-keep": (
        LLAMA,
        {**QLORA, "quantization": {"kind": "nf4"}, "kbit_preparation": True, "gradient_checkpointing": "full",
         "use_reentrant": True, "attention": "eager", "autocast": "none", "keeps_outputs": True},
    ),
    "nf4-bf16-adapter": (LLAMA, {**QLORA, "lora": {**LORA, "dtype": "bf16"}, "optimizer": "adamw-fused"}),
    "fp4-8bit-optimizer": (LLAMA, {**QLORA, "quantization": {"kind": "fp4"}, "optimizer": "adamw-8bit"}),
    "int8": (LLAMA, {**QLORA, "quantization": {"kind": "int8"}, "optimizer": "sgd"}),
    "lora-autocast-ckpt": (LLAMA, {**SMALL, "method": "lora", "lora": LORA, "gradient_checkpointing": "full"}),
    "dora-padded": (LLAMA, {**SMALL, "method": "dora", "lora": LORA, "padded": True, "autocast": "none"}),
    "dora-nf4": (LLAMA, {**QLORA, "lora": {**LORA, "use_dora": True}, "gradient_checkpointing": "full"}),
    "full-bf16-accumulate": (
        LLAMA, {**SMALL, "method": "full", "autocast": "none", "gradient_accumulation_steps": 2, "optimizer": "lion"}
    ),
    "full-fp32-eager": (LLAMA, {**SMALL, "method": "full", "base_dtype": "fp32", "attention": "eager"}),
    "full-16bit-loss": (LLAMA, {**SMALL, "method": "full", "autocast": "none", "loss": "full-logits"}),
    "gpt2-nf4": (GPT2, {**QLORA, "kbit_preparation": True, "gradient_checkpointing": "full"}),
    "neox-nf4": (NEOX, {**QLORA, "optimizer": "adafactor"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: several threads only wait for each other
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def _training(values: dict[str, Any]) -> TrainingSpec:
    return training_from_dict(values)


def _allocations(result: TraceResult) -> Counter[tuple[int, str, str, int]]:
    """Every allocation by phase, segment, size and operation."""
    return Counter((b.nbytes, b.phase, b.segment, 1) for b in result.blocks)


@pytest.mark.parametrize("name", CASES)
def test_fake_equals_real_cpu(name: str) -> None:
    config, values = CASES[name]
    plain = Architecture.plain()
    fake = trace(config, _training(values), arch=plain)
    real = trace(config, _training(values), arch=plain, real=True)
    assert fake.static_bytes == real.static_bytes
    assert fake.segment_peaks == real.segment_peaks
    assert fake.step_peaks == real.step_peaks
    assert _allocations(fake) == _allocations(real)


def test_cuda_rules_change_what_they_say() -> None:
    """Each rule alone moves the peak or the allocations in its own direction."""
    config, values = CASES["nf4-prep-eager-reentrant-keep"]
    scores = 4 * 2 * 4 * 64 * 64  # fp32, rows, heads, tokens squared
    cuda = trace(config, _training(values), layers=1)
    products = [b.nbytes for b in cuda.blocks if b.op.endswith("grad*output")]
    assert set(products) == {scores}
    long = trace(config, _training({**values, "seq_len": 1024}), layers=1)
    assert any(b.op == "bitsandbytes.gemm_4bit:B_dq" for b in long.blocks)
    masks = [b for b in cuda.blocks if b.op == "aten.native_dropout" and b.dtype == "bool"]
    assert masks
    assert all(b.nbytes == math.prod(b.shape) for b in masks)


def test_half_softmax_makes_no_fp32_copy() -> None:
    values = {**SMALL, "method": "full", "base_dtype": "fp16", "autocast": "none", "attention": "eager"}
    scores = [b for b in trace(LLAMA, _training(values), layers=1).blocks if b.shape[1:] == (4, 64, 64)]
    assert ("aten._softmax", "float32") in {(b.op, b.dtype) for b in scores}
    assert ("aten._to_copy", "float32") not in {(b.op, b.dtype) for b in scores if b.phase == "forward"}
    assert ("aten._softmax_backward_data", "float16") in {(b.op, b.dtype) for b in scores}


def test_offload_keeps_checkpoints_off_the_device() -> None:
    values = CASES["nf4-prep-autocast-ckpt"][1]
    kept = trace(LLAMA, _training(values), layers=3)
    offloaded = trace(LLAMA, _training({**values, "gradient_checkpointing": "offload"}), layers=3)
    hidden = 4 * 2 * 64 * 128
    # The embedding output requires a gradient by itself, so autograd keeps it: only the later layers' inputs leave.
    assert kept.segment_peaks["loss"] - offloaded.segment_peaks["loss"] == 2 * hidden


def test_paged_states_are_not_device_memory() -> None:
    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024}
    lora = {**LORA, "r": 256}  # 256 x 512 elements: above the paging threshold
    values = {**SMALL, "method": "lora", "lora": lora, "seq_len": 8, "optimizer": "paged-adamw"}
    result = trace(wide, _training(values), layers=1)
    states = [b for b in result.blocks if b.op == "aten.zeros_like" and b.phase == "optimizer"]
    assert states
    assert all(b.nbytes < 4 * 100_000 for b in states)


def test_efficient_attention_rules_by_gpu() -> None:
    turing = Architecture(capability=(7, 5))
    assert cuda_rules.sdpa_kernel("fp16", has_mask=False, head_dim=64, v_head_dim=64, arch=turing) == "efficient"
    assert cuda_rules.sdpa_kernel("bf16", has_mask=False, head_dim=64, v_head_dim=64, arch=turing) == "math"
    ampere = Architecture(capability=(8, 0))
    assert cuda_rules.sdpa_kernel("bf16", has_mask=False, head_dim=64, v_head_dim=64, arch=ampere) == "flash"
    assert cuda_rules.sdpa_kernel("bf16", has_mask=True, head_dim=64, v_head_dim=64, arch=ampere) == "efficient"
    grouped = cuda_rules.sdpa_kernel("fp32", has_mask=False, head_dim=64, v_head_dim=64, arch=ampere, grouped=True)
    assert grouped == "math"


@pytest.mark.parametrize(("torch_version", "capability"), [((2, 13), (7, 5)), ((2, 14), (7, 5)), ((2, 13), (9, 0))])
def test_attention_kernels_run(torch_version: tuple[int, int], capability: tuple[int, int]) -> None:
    values = {**SMALL, "method": "full", "base_dtype": "fp16", "autocast": "none"}
    arch = Architecture(capability=capability, torch=torch_version, cudnn_attention=capability[0] == 9)
    ops = {b.op.split(":")[0] for b in trace(LLAMA, _training(values), layers=1, arch=arch).blocks}
    expected = {
        ((2, 13), (7, 5)): "aten._softmax",
        ((2, 14), (7, 5)): "aten._scaled_dot_product_efficient_attention",
        ((2, 13), (9, 0)): "aten._scaled_dot_product_cudnn_attention",
    }
    assert any(expected[torch_version, capability] in op for op in ops)


def test_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config, training = tmp_path / "config.json", tmp_path / "training.json"
    config.write_text(json.dumps(LLAMA))
    spec = _training(CASES["nf4-bf16-adapter"][1])
    training.write_text(json.dumps(spec.describe()))
    arguments = ["--config", str(config), "--training", str(training)]
    assert main([*arguments, "--layers", "1", "--events", str(tmp_path / "events")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["layers"] == 1
    assert document["peak_bytes"] == max(document["segment_peak_bytes"].values())
    total = sum(json.loads(line)[1] for line in (tmp_path / "events").read_text().splitlines())
    assert total > 0
    assert main([*arguments, "--ops", "backward"]) == 0
    assert "layer.1 backward" in capsys.readouterr().out
    assert main([*arguments, "--layers", "auto"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 2
