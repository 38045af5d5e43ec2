"""What each training framework does unasked, as data: defaults and dtype habits with their source, merged per run.

A value the user gives wins over the framework's default, which wins over loraplan's neutral default. Every value
keeps where it came from, so that `--explain` can print each default that was used. Sources are written
"repository@commit:path" or "wheel version:path".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.base.errors import Contradiction, one_line, unknown
from planner.base.records import Rows, record
from planner.training.choices import choice
from planner.training.optimizers import OPTIMIZERS
from planner.training.quantizations import BNB, BNB_4BIT, QUANTIZATIONS
from planner.training.settings import SETTINGS, Default, Resolved, Setting, checked, conditions, neutral, values_of
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec, Versions

GPTQ = QUANTIZATIONS.where(lambda row: row.keeps_column_groups)
TORCH_ADAMW = OPTIMIZERS.where(lambda row: row.state_layout == "like-parameter")


_PLACES = {key: place for place, key in enumerate(SETTINGS)}


@record
class Stack:
    """A training framework. All fields are required: what is forgotten fails at import, by name."""

    defaults: tuple[tuple[str, Default], ...]
    """Setting and default: of those of one setting, the first that holds wins."""
    notes: tuple[str, ...]
    """What the defaults cannot express."""
    read: str
    """Releases or commits the defaults were read from."""
    torch_adamw: str
    """Which torch AdamW the framework runs when it says only "AdamW": foreach ("adamw") or "adamw-fused"."""
    transformers_code: bool
    """It runs the modelling code of transformers (padding masks, fp32 loss, its Trainer's optimizers), not its own."""
    splits_fused: bool
    """Target modules have the names of modules that it splits, or names otherwise, where transformers fuses them."""

    def __post_init__(self) -> None:
        for key, entry in self.defaults:
            late = [name for name, _ in entry.when if _PLACES.get(name, len(_PLACES)) >= _PLACES.get(key, -1)]
            if key not in _PLACES:
                raise TypeError(f"Stack: a default of {key}, which is no setting")
            if late:
                raise TypeError(f"Stack: a default of {key} depends on {', '.join(late)}: no setting before it")
        if self.torch_adamw not in TORCH_ADAMW:
            raise TypeError(f"Stack: torch_adamw {self.torch_adamw!r} is not one of {', '.join(TORCH_ADAMW)}")


_READ: list[tuple[str, Stack]] = []
"""Every framework of this file, in its order."""


def _stack(name: str, defaults: tuple[tuple[str, Default], ...], **facts: Any) -> None:
    """Write down a framework: the one place where it is listed."""
    _READ.append((name, Stack(defaults=defaults, **facts)))


def resolve(stack: str, *, method: str, given: Mapping[str, object]) -> Resolved:
    """Merge given values, the framework's defaults and the neutral defaults; None in `given` means not given.

    Raises:
        UnknownName: for an unknown framework, option or option value.
        Contradiction: if `given` names another method.
    """
    if stack not in STACKS:
        raise unknown("stack", stack, STACKS, f"(use {CUSTOM} for your own loop)")
    chosen = {"method": method, **checked(given)}
    if chosen["method"] != method:
        raise Contradiction(f"method is {method} and {one_line(chosen['method'])!r} at once; give it once")
    choice("method", method)
    if method == "dora" and chosen.get("use_dora") is False:
        raise Contradiction("method dora with use_dora false; drop use_dora, or choose method lora")
    known: dict[str, Setting] = {}
    for key in SETTINGS:
        known[key] = Setting(chosen[key], "given") if key in chosen else _default(stack, key, known)
    return Resolved(stack=stack, settings=known, notes=STACKS[stack].notes)


def torch_adamw(stack: str, versions: Versions) -> str:
    """Return the torch AdamW implementation ("adamw" is foreach) behind a plain "AdamW" of this framework.

    Raises:
        UnknownName: for an unknown framework.
    """
    row = STACKS[stack]
    if row.transformers_code and versions.transformers < (5, 0):
        return "adamw"
    return row.torch_adamw


def to_training_spec(resolved: Resolved) -> TrainingSpec:
    """Build the TrainingSpec of a resolved run; its own checks raise on settings that exclude each other."""
    value = resolved.__getitem__
    lora = LoraSpec(**values_of("lora", value)) if value("method") != "full" else None
    stored = values_of("quantization", value)
    if value("quantization") == "none":
        stored["quantized_modules"] = "none"
    return TrainingSpec(lora=lora, quantization=QuantizationSpec(**stored), **values_of("training", value))


def _default(name: str, key: str, known: Mapping[str, Setting]) -> Setting:
    """Return the first default of the framework that holds, else the first neutral one."""
    for setting, entry in STACKS[name].defaults:
        if setting == key and entry.holds(known):
            return Setting(entry.value, f"stack {name}: {entry.source}")
    return Setting(neutral(key, known), "loraplan default")


def _d(
    key: str, value: object, source: str, before: tuple[str, tuple[int, int]] | None = None, **when: Any
) -> tuple[str, Default]:
    """Write one table row: `_d(key, value, source, earlier_key=value_or_tuple)`."""
    return key, Default(value, source, conditions(when), before)


_BEFORE_V5 = ("transformers", (5, 0))

_TF = "transformers 5.23 training_args.py"
_TF4 = "transformers 4.45 to 4.57 training_args.py"
_GC4 = "transformers 4.48.1 modeling_utils.py gradient_checkpointing_enable"
_ACC = "accelerate 1.0.1 utils/operations.py convert_outputs_to_fp32 (mixed precision only)"
_PEFT = "huggingface/peft@5d602fd:src/peft/tuners/lora/config.py"
_PEFT_TARGETS = "huggingface/peft@5d602fd:src/peft/utils/constants.py (q and v for llama-like families)"
_PEFT_FP32 = "huggingface/peft@5d602fd autocast_adapter_dtype (16-bit adapters become fp32)"
_QV = ("q_proj", "v_proj")
_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_HF_TRAINER_HABITS = (
    _d("use_reentrant", True, _GC4, before=_BEFORE_V5),
    _d("optimizer", "adamw", "transformers 4.40 to 4.53 training_args.py", before=("transformers", (4, 54))),
    _d("optimizer", "adamw-fused", f"{_TF} (torch 2.8 and later)"),
    _d("outputs_to_fp32", True, _ACC, autocast=("bf16", "fp16")),
)

_stack(
    "hf-trainer",
    (
        _d("base_dtype", "fp32", "transformers 4 from_pretrained loads fp32 unless told", before=_BEFORE_V5),
        _d("base_dtype", "bf16", "transformers 5.23 from_pretrained dtype auto (a bf16 checkpoint assumed)"),
        _d("autocast", "none", f"{_TF} bf16, fp16 false"),
        _d("adapter_dtype", "fp32", _PEFT_FP32),
        _d("lora_alpha", 8.0, _PEFT),
        _d("target_modules", _QV, _PEFT_TARGETS),
        _d("micro_batch_size", 8, f"{_TF} per_device_train_batch_size"),
        _d("gradient_checkpointing", "none", f"{_TF} activation_checkpointing"),
        *_HF_TRAINER_HABITS,
    ),
    notes=("double quantization is off in transformers' BitsAndBytesConfig, whose default type is fp4, not nf4",),
    read="transformers 5.23.0, huggingface/peft@5d602fd",
    torch_adamw="adamw-fused",
    transformers_code=True,
    splits_fused=False,
)

_TRL_CONFIG = "huggingface/trl@f2cd577:trl/trainer/sft_config.py"
_TRL_MODEL = "huggingface/trl@f2cd577:trl/trainer/model_config.py"
_TRL_SFT = "huggingface/trl@f2cd577:trl/trainer/sft_trainer.py"
_BEFORE_CHUNKS = ("transformers", (5, 12))  # TRL's release is no input: 1.7.0 (2026-06-25) came after 5.12
_stack(
    "trl",
    (
        _d("base_dtype", "fp32", f"{_TRL_MODEL} dtype float32"),
        _d("autocast", "bf16", "huggingface/trl@f2cd577:trl/trainer/base_config.py bf16 unless fp16"),
        _d("compute_dtype", "fp32", "huggingface/trl@f2cd577:trl/trainer/utils.py (the load dtype)", base_dtype="fp32"),
        _d("adapter_dtype", "bf16", f"{_TRL_SFT} (adapters of a quantized base)", quantization=BNB),
        _d("adapter_dtype", "fp32", _PEFT_FP32),
        _d("r", 16, _TRL_MODEL),
        _d("lora_alpha", 32.0, _TRL_MODEL),
        _d("lora_dropout", 0.05, _TRL_MODEL),
        _d("target_modules", _QV, _PEFT_TARGETS),
        _d("micro_batch_size", 8, f"{_TF} per_device_train_batch_size"),
        _d("seq_len", 1024, f"{_TRL_CONFIG} max_length"),
        _d("gradient_checkpointing", "full", "huggingface/trl@f2cd577:trl/trainer/base_config.py"),
        # Computed in chunks, logits never exist whole: nearer to "fused" than to torchtune's "chunked", whose do.
        _d("loss", "full-logits-fp32", "trl 1.6.0:trl/trainer/sft_config.py nll", _BEFORE_CHUNKS, kernels="none"),
        _d("loss", "fused", "trl 1.16.0:trl/trainer/sft_config.py nll (1.7 to 1.14: chunked_nll)", kernels="none"),
        *_HF_TRAINER_HABITS,
    ),
    notes=(
        "no k-bit preparation in the SFT trainer of 2026; TRL 0.11 to 0.13 prepared and then left only norms in fp32",
        "double quantization off unless use_bnb_nested_quant",
        "TRL before 1.7 holds whole logits (--loss full-logits-fp32; assumed with transformers before 5.12), loss_type "
        "nll up to 1.14",
    ),
    read="huggingface/trl@f2cd577 (2026-07-24); the loss in trl 1.4.0 to 1.16.0",
    torch_adamw="adamw-fused",
    transformers_code=True,
    splits_fused=False,
)

_LOOP = "huggingface/peft@5d602fd:method_comparison/MetaMathQA/default_training_params.json"
_LOOP_CODE = "huggingface/peft@5d602fd:method_comparison/MetaMathQA/run.py"
_PREPARE = "huggingface/peft@5d602fd:src/peft/utils/other.py prepare_model_for_kbit_training (the PEFT recipe)"
_stack(
    "peft-loop",
    (
        _d("autocast", "none", f"{_LOOP} use_amp"),
        _d("adapter_dtype", "fp32", _PEFT_FP32),
        _d("kbit_preparation", True, _PREPARE, quantization=BNB),
        _d("lora_alpha", 8.0, _PEFT),
        _d("target_modules", _QV, _PEFT_TARGETS),
        _d("micro_batch_size", 4, _LOOP),
        _d("seq_len", 768, _LOOP),
        _d("gradient_checkpointing", "none", f"{_LOOP} use_gc"),
        _d("use_reentrant", True, _GC4, before=_BEFORE_V5),
        _d("optimizer", "adamw", f"{_LOOP} torch AdamW (foreach)"),
        _d("keeps_outputs", True, f"{_LOOP_CODE} (outputs stay bound during backward)"),
    ),
    notes=("your own loop around PEFT: accelerate's fp32 copy of the logits is not made",),
    read="huggingface/peft@5d602fd (2026-08-21)",
    torch_adamw="adamw",
    transformers_code=True,
    splits_fused=False,
)

_AX = "axolotl-ai-cloud/axolotl@067b021"
_stack(
    "axolotl",
    (
        _d("double_quant", True, f"{_AX}:src/axolotl/loaders/model.py", quantization=BNB_4BIT),
        _d("autocast", "bf16", f"{_AX}:src/axolotl/utils/schemas/config.py bf16 auto"),
        _d("adapter_dtype", "fp32", f"{_PEFT_FP32}; peft_autocast_adapter_dtype unset"),
        _d("kbit_preparation", False, f"{_AX}:src/axolotl/loaders/model.py (cast back to 16 bit after preparation)"),
        _d("r", 32, f"{_AX}:examples/llama-3/qlora-1b.yml (no default in the schema)"),
        _d("lora_alpha", 16.0, f"{_AX}:examples/llama-3/qlora-1b.yml (no default in the schema)"),
        _d("target_modules", _SEVEN, f"{_AX}:examples/llama-3/qlora-1b.yml (no default in the schema)"),
        _d("seq_len", 512, f"{_AX}:src/axolotl/utils/schemas/config.py sequence_len"),
        _d("gradient_checkpointing", "none", f"{_AX}:src/axolotl/utils/schemas/config.py"),
        _d("use_reentrant", False, f"{_AX}:src/axolotl/core/builders/base.py"),
        _d("optimizer", "adamw-fused", f"{_AX}:src/axolotl/utils/schemas/training.py"),
        *_HF_TRAINER_HABITS,
    ),
    notes=(
        "embeddings and norms are fp32 for a moment while loading; the steady state counted here is 16 bit",
        "the fused LoRA kernels axolotl switches on for lora and qlora are not modelled; it pads rows to 64 tokens",
    ),
    read=f"{_AX} (2026-07-24)",
    torch_adamw="adamw-fused",
    transformers_code=True,
    splits_fused=False,
)

_LF = "hiyouga/LLaMA-Factory@ff6d4d1"
_LF_EXAMPLE = f"{_LF}:examples/train_lora/qwen3_lora_sft.yaml"
_stack(
    "llama-factory",
    (
        _d("double_quant", True, f"{_LF}:src/llamafactory/hparams/model_args.py", quantization=BNB_4BIT),
        _d("base_dtype", "fp32", f"{_LF}:src/llamafactory/model/adapter.py (trainable weights)", method="full"),
        _d("autocast", "bf16", f"{_LF_EXAMPLE} bf16: true (no default in its own arguments)"),
        _d("adapter_dtype", "fp32", f"{_LF}:src/llamafactory/model/adapter.py (unless pure_bf16)"),
        _d("r", 8, f"{_LF}:src/llamafactory/hparams/finetuning_args.py"),
        _d("lora_alpha", 16.0, f"{_LF}:src/llamafactory/hparams/finetuning_args.py (twice the rank)"),
        _d("target_modules", ("all-linear",), f"{_LF}:src/llamafactory/hparams/finetuning_args.py lora_target all"),
        _d("micro_batch_size", 8, f"{_TF} per_device_train_batch_size"),
        _d("seq_len", 2048, f"{_LF}:src/llamafactory/hparams/data_args.py cutoff_len"),
        _d("gradient_checkpointing", "full", f"{_LF}:src/llamafactory/hparams/model_args.py"),
        _d("use_reentrant", True, f"{_LF}:src/llamafactory/hparams/model_args.py use_reentrant_gc"),
        *_HF_TRAINER_HABITS,
    ),
    notes=("no k-bit preparation; upcast_layernorm and upcast_lmhead_output are off unless asked",),
    read=f"{_LF} (2026-08-18)",
    torch_adamw="adamw-fused",
    transformers_code=True,
    splits_fused=False,
)

_US = "unslothai/unsloth@015bdef"
_stack(
    "unsloth",
    (
        _d("double_quant", True, f"{_US}:unsloth/models/llama.py", quantization=BNB_4BIT),
        _d("autocast", "bf16", f"{_US}:unsloth/models/_utils.py"),
        _d("adapter_dtype", "fp32", f"{_US}:unsloth/models/_utils.py float32_mixed_precision"),
        _d("r", 16, f"{_US}:unsloth/models/llama.py get_peft_model"),
        _d("lora_alpha", 16.0, f"{_US}:unsloth/models/llama.py get_peft_model"),
        _d("target_modules", _SEVEN, f"{_US}:unsloth/models/llama.py get_peft_model"),
        _d("micro_batch_size", 2, "unsloth 2026.10.9 unsloth_cli/config.py"),
        _d("seq_len", 2048, f"{_US}:unsloth/models/llama.py"),
        _d("gradient_accumulation_steps", 4, "unsloth 2026.10.9 unsloth_cli/config.py"),
        _d("gradient_checkpointing", "offload", f'{_US}:unsloth/models/llama.py ("unsloth": inputs go to the host)'),
        _d("use_reentrant", True, f"{_US}:unsloth/models/_utils.py"),
        _d("kernels", "unsloth", f"{_US}:unsloth/kernels"),
        _d("loss", "fused", f"{_US}:unsloth/models/llama.py unsloth_fused_ce_loss", kernels="unsloth"),
        _d("optimizer", "adamw-8bit", f"{_US}:unsloth/models/rl.py (its replacement for the trainer's default)"),
        *_HF_TRAINER_HABITS,
    ),
    read=f"{_US} (2026-08-22)",
    torch_adamw="adamw-fused",
    notes=(),
    transformers_code=True,
    splits_fused=False,
)

_TT = "torchtune 0.4.0 recipes/configs/llama3_2/3B"
_TT_FULL = f"{_TT}_full_single_device.yaml"
_stack(
    "torchtune",
    (
        _d("double_quant", True, "torchtune 0.4.0 modules/low_precision (NF4 scalers are int8)", quantization="nf4"),
        _d("base_dtype", "bf16", f"{_TT}_lora_single_device.yaml dtype"),
        _d("autocast", "none", "torchtune 0.4.0 recipes (pure bf16)"),
        _d("adapter_dtype", "bf16", "torchtune 0.4.0 recipes (pure bf16)"),
        _d("r", 8, "pytorch/torchtune@bd2a0fc:recipes/configs/llama3_1/8B_qlora_single_device.yaml"),
        _d("lora_alpha", 16.0, "pytorch/torchtune@bd2a0fc:recipes/configs/llama3_1/8B_qlora_single_device.yaml"),
        _d("target_modules", ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), f"{_TT}_lora"),
        _d("micro_batch_size", 4, f"{_TT}_lora_single_device.yaml batch_size"),
        _d("gradient_accumulation_steps", 1, _TT_FULL, method="full"),
        _d("gradient_accumulation_steps", 8, f"{_TT}_lora_single_device.yaml"),
        _d("gradient_checkpointing", "full", f"{_TT}_lora_single_device.yaml enable_activation_checkpointing"),
        _d("use_reentrant", False, "torch CheckpointWrapper (set_activation_checkpointing)"),
        _d("loss", "chunked", f"{_TT}_lora_single_device.yaml CEWithChunkedOutputLoss"),
        _d("optimizer", "paged-adamw-8bit", _TT_FULL, method="full"),
        _d("optimizer", "adamw-fused", f"{_TT}_lora_single_device.yaml fused: True"),
        _d("optimizer_in_backward", True, f"{_TT_FULL} optimizer_in_bwd", method="full", gradient_accumulation_steps=1),
        _d("max_grad_norm", 0.0, "torchtune 0.4.0 recipes clip_grad_norm null"),
        _d("device_map", False, "torchtune 0.4.0 (loads by itself)"),
    ),
    notes=("until July 2024 only linears with an adapter were quantized (quantized_modules adapted-only)",),
    read="torchtune 0.4.0 (2024-11), pytorch/torchtune@bd2a0fc",
    torch_adamw="adamw-fused",
    transformers_code=False,
    splits_fused=True,
)

_LIT = "Lightning-AI/litgpt@2685705"
_LIT_LORA = f"{_LIT}:litgpt/finetune/lora.py"
_FABRIC = "lightning 2.1.2 fabric/plugins/precision"
_FUSED_QKV = (("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",), ("W_pack",))
_stack(
    "litgpt",
    (
        _d("versions", Versions(bitsandbytes=(0, 49)), f"{_LIT}:pyproject.toml (bitsandbytes below 0.50)"),
        _d("base_dtype", "bf16", f"{_LIT_LORA} (quantization needs a true precision)", quantization=BNB_4BIT),
        _d("base_dtype", "fp32", f"{_LIT}:litgpt/utils.py (bf16-mixed)"),
        _d("autocast", "bf16", f"{_LIT}:litgpt/utils.py (bf16-mixed)", base_dtype="fp32"),
        _d("autocast", "none", f"{_FABRIC}/half.py (true precision)"),
        _d("adapter_dtype", "bf16", f"{_FABRIC}/half.py (casts every parameter)", base_dtype="bf16"),
        _d("adapter_dtype", "fp16", f"{_FABRIC}/half.py (casts every parameter)", base_dtype="fp16"),
        _d("adapter_dtype", "fp32", f"{_LIT}:litgpt/utils.py (bf16-mixed)"),
        _d("skip_modules", (), f"{_FABRIC}/bitsandbytes.py (the head is quantized too)"),
        _d("tf32", True, f"{_LIT}:litgpt/__main__.py set_float32_matmul_precision"),
        _d("r", 8, _LIT_LORA),
        _d("lora_alpha", 16.0, _LIT_LORA),
        _d("lora_dropout", 0.05, _LIT_LORA),
        _d("target_modules", _QV, f"{_LIT_LORA} lora_query, lora_value"),
        _d("target_slices", (0, 2), f"{_LIT_LORA} (q and v of a fused projection)", target_modules=_FUSED_QKV),
        _d("micro_batch_size", 1, _LIT_LORA),
        _d("gradient_accumulation_steps", 16, f"{_LIT_LORA} global_batch_size"),
        _d("gradient_checkpointing", "none", f"{_LIT_LORA} (one device)"),
        _d("loss", "chunked", f"{_LIT_LORA} lm_head_chunk_size 128"),
        _d("optimizer", "paged-adamw", f"{_LIT}:litgpt/utils.py instantiate_bnb_optimizer", quantization=BNB),
        _d("optimizer", "adamw", f"{_LIT_LORA} torch AdamW (foreach)"),
        _d("max_grad_norm", 0.0, f"{_LIT}:litgpt/args.py max_norm"),
        _d("keeps_outputs", True, f"{_LIT_LORA} fit (the logits list stays bound during backward)"),
        _d("own_modules", "litgpt", f"{_LIT}:litgpt/model.py (its head is never tied)"),
        _d("device_map", False, f"{_LIT}:litgpt/utils.py (loads by itself)"),
    ),
    notes=(
        "logits chunks become fp32 on leaving the model (Fabric convert_output) and all of them stay alive",
        "the vocabulary is padded to a multiple of 512 unless the model's config says otherwise",
        "since 2024-10 a quantized run holds a second embedding and a gradient that is never zeroed (StableEmbedding)",
    ),
    read=f"{_LIT} (2026-06-29), Lightning-AI/litgpt@f684138 (2023-10-30)",
    torch_adamw="adamw",
    transformers_code=False,
    splits_fused=True,
)

_FMS = "foundation-model-stack/fms-acceleration@24bdadb"
_FMS_BENCH = f"{_FMS}:scripts/benchmarks/scenarios.yaml"
_FT = "foundation-model-stack/fms-hf-tuning@v2.5.0"
_stack(
    "fms",
    (
        _d("double_quant", True, f"{_FMS}:plugins/accelerated-peft (framework_plugin_bnb.py)", quantization=BNB_4BIT),
        _d("base_dtype", "fp16", f"{_FMS_BENCH} torch_dtype float16", quantization=GPTQ),
        _d("base_dtype", "bf16", f"{_FT}:tuning/config/configs.py torch_dtype"),
        _d("autocast", "fp16", f"{_FMS_BENCH} fp16", quantization=GPTQ),
        _d("autocast", "bf16", f"{_FMS}:plugins/accelerated-peft (mixed precision required)", quantization=BNB),
        _d("autocast", "none", f"{_TF4} bf16 false"),
        _d("adapter_dtype", "fp32", "peft 0.13.2 tuners/tuners_utils.py autocast_adapter_dtype"),
        _d("lora_alpha", 32.0, f"{_FT}:tuning/config/peft_config.py"),
        _d("lora_dropout", 0.05, f"{_FT}:tuning/config/peft_config.py"),
        _d("target_modules", _QV, _PEFT_TARGETS),
        _d("micro_batch_size", 8, f"{_TF4} per_device_train_batch_size"),
        _d("seq_len", 4096, f"{_FMS}:scripts/benchmarks/benchmark.py max_seq_len_matrix"),
        _d("gradient_checkpointing", "full", f"{_FMS}:scripts/benchmarks/defaults.yaml"),
        _d("use_reentrant", True, _GC4),
        _d("attention", "flash2", f"{_FT}:tuning/config/configs.py use_flash_attn"),
        _d("optimizer", "adamw", _TF4),
        _d("outputs_to_fp32", True, _ACC, autocast=("bf16", "fp16")),
        _d("added_tokens", 1, f"{_FT}:tuning/utils/tokenizer_data_utils.py (a padding token, where there is none)"),
    ),
    notes=(
        "the accelerated plugins keep norms, embeddings and head in 16 bit; plain TRL preparation keeps norms in fp32",
        "a quantized run with the Liger loss keeps the stock RMSNorm (the shipped configuration misspells the key)",
    ),
    read=f"{_FMS} (2025-02-07), {_FT}, transformers 4.48.1, peft 0.13.2, trl 0.13.0",
    torch_adamw="adamw",
    transformers_code=True,
    splits_fused=False,
)

_SWIFT = "modelscope/ms-swift@8a27ae2"
# 1.4.0 to 2.6.1 wrap torch.utils.checkpoint.checkpoint: without a word of the caller it is not reentrant. transformers
# says reentrant from 4.38 on (modeling_utils.py gradient_checkpointing_enable), ms-swift 3.0 and later do themselves.
_SWIFT_CHECKPOINT = f"{_SWIFT}:swift/llm/utils/model.py fix_gradient_checkpointing_warning"
_BEFORE_PINNED_REENTRANT = ("transformers", (4, 38))
_stack(
    "ms-swift",
    (
        _d("double_quant", True, f"{_SWIFT}:swift/llm/utils/argument.py", quantization=BNB_4BIT),
        _d("base_dtype", "bf16", f"{_SWIFT}:swift/llm/utils/argument.py dtype AUTO"),
        _d("autocast", "bf16", f"{_SWIFT}:swift/llm/sft.py"),
        _d(
            "adapter_dtype",
            "bf16",
            "huggingface/peft@v0.7.1:src/peft/tuners/lora/layer.py (dtype of the base)",
            before=("peft", (0, 12)),
            quantization="none",
            base_dtype="bf16",
        ),
        _d("adapter_dtype", "fp32", "ms-swift 1.5.2 swift/llm/utils/argument.py lora_dtype"),
        _d("lora_alpha", 32.0, f"{_SWIFT}:swift/llm/utils/argument.py"),
        _d("lora_dropout", 0.05, f"{_SWIFT}:swift/llm/utils/argument.py"),
        _d("use_reentrant", False, _SWIFT_CHECKPOINT, before=_BEFORE_PINNED_REENTRANT),
        _d("gradient_accumulation_steps", 16, f"{_SWIFT}:swift/llm/utils/argument.py"),
        _d("gradient_checkpointing", "full", f"{_SWIFT}:swift/llm/utils/argument.py"),
        *_HF_TRAINER_HABITS,
    ),
    notes=("no k-bit preparation: norms, embeddings and head keep the load dtype",),
    read=f"{_SWIFT} (2023-12-30), ms-swift 1.5.2",
    torch_adamw="adamw-fused",
    transformers_code=True,
    splits_fused=False,
)

_stack(
    "custom",
    (),
    notes=("framework not listed: the habits of a transformers training loop under the settings given",),
    read="",
    torch_adamw="adamw",
    transformers_code=True,
    splits_fused=False,
)

STACKS = Rows("stack", (name for name, _ in _READ), _READ)
CUSTOM = "custom"
"""Of which nothing is known but the settings that are given."""
LISTED = tuple(name for name in STACKS if name != CUSTOM)
"""Frameworks whose defaults are known."""
