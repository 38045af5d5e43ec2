"""The program of litgpt's own modules against a trace of the genuine litgpt, and the record that the tests read.

litgpt and lightning pin other releases than the project's libraries, so they are not among its extras. Put them into a
folder of their own and name it:

    pip install --no-deps --target /tmp/litgpt litgpt==0.5.13 lightning lightning-utilities torchmetrics
    PYTHONPATH=/tmp/litgpt python -m benchmarks.litgpt_agreement [--write]

Every case runs litgpt's GPT with its LoRA layers, its chunked loss and, quantized, bitsandbytes' Linear4bit and
StableEmbedding, as finetune/lora.py and finetune/full.py put them together, under the tracer's fake tensors.
`--write` puts the traced peaks into tests/step/litgpt_trace.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from torch import nn

from calibrate.model import fake_model
from calibrate.oracle import trace
from calibrate.oracle.step import Step
from planner.device.cuda_rules import Architecture
from planner.memory import walk
from planner.model.families import build_spec
from planner.step import program
from planner.training import stacks, versions
from planner.training.spec import TrainingSpec

RECORD = Path(__file__).parents[1] / "tests" / "step" / "litgpt_trace.json"

_DIMS = {"n_layer": 4, "n_embd": 512, "n_head": 8, "block_size": 4096, "bias": False, "parallel_residual": False}
_HF = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "tie_word_embeddings": False}
_LLAMA = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 1376,
    "rotary_percentage": 1.0,
}
_NEOX = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "intermediate_size": 2048}

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {**_DIMS, **_LLAMA, "n_query_groups": 8, "padded_vocab_size": 32000},
        {**_HF, "model_type": "llama", "intermediate_size": 1376, "num_key_value_heads": 8, "vocab_size": 32000},
    ),
    "llama-gqa": (
        {**_DIMS, **_LLAMA, "n_query_groups": 2, "padded_vocab_size": 32000},
        {**_HF, "model_type": "llama", "intermediate_size": 1376, "num_key_value_heads": 2, "vocab_size": 32000},
    ),
    "gemma": (
        {**_DIMS, **_LLAMA, "mlp_class_name": "GemmaMLP", "intermediate_size": 2048, "n_query_groups": 1,
         "head_size": 64, "padded_vocab_size": 32000, "scale_embeddings": True},
        {**_HF, "model_type": "gemma", "intermediate_size": 2048, "num_key_value_heads": 1, "head_dim": 64,
         "vocab_size": 32000, "tie_word_embeddings": True},
    ),
    "gpt_neox": (
        {**_DIMS, **_NEOX, "n_query_groups": 8, "padded_vocab_size": 32000, "parallel_residual": True, "bias": True,
         "rotary_percentage": 0.25},
        {**_HF, "model_type": "gpt_neox", "intermediate_size": 2048, "vocab_size": 32000, "rotary_pct": 0.25,
         "hidden_act": "gelu"},
    ),
    "phi": (
        {**_DIMS, **_NEOX, "n_query_groups": 8, "padded_vocab_size": 51200, "parallel_residual": True, "bias": True,
         "shared_attention_norm": True, "lm_head_bias": True, "rotary_percentage": 0.4, "gelu_approximate": "tanh"},
        {**_HF, "model_type": "phi", "intermediate_size": 2048, "vocab_size": 51200, "partial_rotary_factor": 0.4},
    ),
    "falcon": (
        {**_DIMS, **_NEOX, "n_query_groups": 1, "padded_vocab_size": 65024, "parallel_residual": True,
         "shared_attention_norm": True, "rotary_percentage": 1.0},
        {**_HF, "model_type": "falcon", "vocab_size": 65024, "multi_query": True, "parallel_attn": True,
         "new_decoder_architecture": False, "bias": False, "alibi": False},
    ),
}  # fmt: skip
"""Name -> (litgpt's Config, a Hugging Face config of the same model)."""

SHAPES = ((2, 512, 4), (1, 700, 1), (3, 2048, 4))
"""(micro batch, tokens, gradient accumulation)."""


def cases() -> Iterator[dict[str, Any]]:
    """Every model: LoRA on q and v or on everything, in bf16 or NF4, and full fine-tuning, in three shapes."""
    for name, (_, config) in MODELS.items():
        fused = config["model_type"] in ("gpt_neox", "falcon")
        for targets, quantization in (("qv", "none"), ("qv", "nf4"), ("all", "none"), ("all", "nf4"), ("full", "none")):
            for batch, length, steps in SHAPES:
                given: dict[str, Any] = {
                    "micro_batch_size": batch, "seq_len": length, "gradient_accumulation_steps": steps,
                    "base_dtype": "bf16", "optimizer": "adamw",
                }  # fmt: skip
                if targets != "full":
                    attention = ["query_key_value"] if fused else ["q_proj", "v_proj"]
                    given |= {"r": 16, "lora_dropout": 0.05}
                    given["target_modules"] = attention if targets == "qv" else ["all-linear", "lm_head"]
                if targets == "all" and fused:
                    given["target_slices"] = []
                if quantization != "none":
                    given |= {"quantization": quantization, "double_quant": False}
                yield {"model": name, "targets": targets, "config": config, "given": given}


def training_of(case: dict[str, Any]) -> TrainingSpec:
    """The settings of a case: litgpt's habits under those given, with the bitsandbytes that the tracer runs."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in case["given"].items()}
    given["versions"] = versions.parse_versions({"bitsandbytes": "0.50.2"})
    method = "full" if case["targets"] == "full" else "qlora" if "quantization" in given else "lora"
    return stacks.to_training_spec(stacks.resolve("litgpt", method=method, given=given))


def program_bytes(case: dict[str, Any]) -> int:
    """Peak of the program, by the rules of a dispatch mode."""
    spec = build_spec(case["config"], model_id=case["model"])
    run = program.run(spec, training_of(case), Architecture(), accumulates_in_place=False)
    return walk.peak_bytes(run.record, block=1)


# --- litgpt ---------------------------------------------------------------------------------------------------------


class _Loop(nn.Module):
    """What one iteration of fit() does with the model, and what Fabric does around it."""

    def __init__(self, gpt: Any, training: TrainingSpec, vocab_size: int) -> None:
        super().__init__()
        self.model, self.training_spec = gpt, training
        self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(vocab_size=vocab_size))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        from litgpt.utils import chunked_cross_entropy

        full = self.training_spec.method == "full"
        torch.set_default_dtype(torch.bfloat16)
        try:
            logits = self.model(input_ids, **({} if full else {"lm_head_chunk_size": 128}))
        finally:
            torch.set_default_dtype(torch.float32)
        if full:
            logits = logits.float()
            return {"loss": chunked_cross_entropy(logits[..., :-1, :], labels[..., 1:]), "logits": logits}
        logits = [chunk.float() for chunk in logits]
        logits[-1] = logits[-1][..., :-1, :]
        return {"loss": chunked_cross_entropy(logits, labels[..., 1:]), "logits": logits}


class _Step(Step):
    """The optimizer is made before the StableEmbedding takes its place, and never knows it."""

    def _make_optimizer(self) -> Any:
        stable = self.training.quantization.kind != "none"
        self.trainable = [
            p for name, p in self.model.named_parameters() if p.requires_grad and not (stable and "wte" in name)
        ]
        return super()._make_optimizer()


def _quantize(module: nn.Module) -> None:
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            _quantize(child)
            continue
        with torch.device("meta"):
            made = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=torch.bfloat16,
                quant_type="nf4", compress_statistics=False,
            )  # fmt: skip
        made.weight.requires_grad = False
        if child.bias is not None:
            made.bias = child.bias
        setattr(module, name, made)


def _build(case: dict[str, Any], training: TrainingSpec) -> tuple[nn.Module, list[str]]:
    dims = MODELS[case["model"]][0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        gpt = _full(dims) if training.lora is None else _adapted(dims, case["targets"], training)
    finally:
        torch.set_default_dtype(torch.float32)
    old = None
    if training.quantization.kind != "none":
        _quantize(gpt)
        old = gpt.transformer.wte
        with torch.device("meta"):
            stable = bnb.nn.StableEmbedding(old.num_embeddings, old.embedding_dim)
        gpt.transformer.wte = stable.to(torch.bfloat16)
    with torch.device("meta"):
        gpt.max_seq_length = training.seq_len
    loop = _Loop(gpt, training, dims["padded_vocab_size"])
    loop.old_embedding = old
    return loop.train(), []


def _full(dims: dict[str, Any]) -> Any:
    from litgpt.config import Config
    from litgpt.model import GPT

    with torch.device("meta"):
        return GPT(Config(name="model", **dims))


def _adapted(dims: dict[str, Any], targets: str, training: TrainingSpec) -> Any:
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

    assert training.lora is not None
    everything = {"lora_key": True, "lora_projection": True, "lora_mlp": True, "lora_head": True}
    config = Config(
        name="model", lora_r=training.lora.r, lora_alpha=16, lora_dropout=training.lora.lora_dropout, lora_query=True,
        lora_value=True, **(everything if targets == "all" else {}), **dims,
    )  # fmt: skip
    with torch.device("meta"):
        gpt = GPT(config)
    mark_only_lora_as_trainable(gpt)
    return gpt


def _half_states(n: int, k: int, training: TrainingSpec, make: fake_model.Maker) -> tuple[torch.Tensor, Any]:
    """Lightning quantizes from .half(): that is the dtype in which weights are dequantized."""
    weight, state = _fake_4bit(n, k, training, make)
    state.dtype = torch.float16
    return weight, state


_fake_4bit = fake_model._fake_4bit


def traced_bytes(case: dict[str, Any]) -> int:
    """Peak of the traced step."""
    training = training_of(case)
    gc.disable()
    try:
        for whole in (False, True):
            built = _build(case, training)
            result = trace._trace(built, training, Architecture(), real=False, whole_first_step=whole)
            if result is not None:
                return result.peak_bytes
    finally:
        gc.enable()
    raise AssertionError("the second try runs the first step itself")


def compared() -> list[dict[str, Any]]:
    """Run and print every case; return the cases with their traced peaks."""
    found = []
    for case in cases():
        theirs, ours = traced_bytes(case), program_bytes(case)
        given = case["given"]
        shape = f"{given['micro_batch_size']} x {given['seq_len']}, {given['gradient_accumulation_steps']} steps"
        kind = f"{case['model']} {case['targets']} {given.get('quantization', 'none')}"
        print(f"{kind:24s} {shape:20s} {theirs / 2**20:9.1f} MiB {100 * (ours / theirs - 1):+8.4f} %", flush=True)
        found.append({**case, "peak_bytes": theirs})
    return found


def main() -> None:
    """Print every case with its difference; `--write` records the traced peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    with patch.object(trace, "Step", _Step), patch.object(fake_model, "_fake_4bit", _half_states):
        found = compared()
    if write:
        lines = ",\n".join(json.dumps(case) for case in found)
        RECORD.write_text(f'{{"litgpt": "0.5.13", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
