"""Targets `trl`, `axolotl`, `llama-factory` and `entrenar`: the YAML that each framework launches."""

from __future__ import annotations

from typing import Any

from planner.exporters.recipe import ATTENTION, DTYPES, Artifact, Export, Recipe, common_notes
from planner.exporters.script import lora_arguments, sft_values
from planner.exporters.script import notes as script_notes
from planner.exporters.text import comment, json_file, yaml
from planner.training.losses import KERNEL_SETS
from planner.training.optimizers import OPTIMIZERS
from planner.training.quantizations import QUANTIZATIONS


def _file(name: str, recipe: Recipe, command: str, values: dict[str, Any]) -> Artifact:
    head = [comment(f"{recipe.model_id}: {recipe.plan_words}"), comment(f"Written by loraplan. Run: {command}")]
    return Artifact(name, "\n".join(head) + "\n" + yaml(values))


# --- trl ------------------------------------------------------------------------------------------------------------


def trl(recipe: Recipe) -> Export:
    """A config of `trl sft` (trl 1.16: ScriptArguments, SFTConfig, ModelConfig)."""
    quant, training = recipe.training.quantization, recipe.training
    lora = lora_arguments(recipe)
    values: dict[str, Any] = {
        "model_name_or_path": recipe.model_id,
        "dtype": DTYPES[training.base_dtype],
        "attn_implementation": ATTENTION[training.attention],
        "datasets": [{"path": "json", "data_files": recipe.data}],
        **({"use_peft": True} if lora else {}),
        **_trl_lora(lora),
        "load_in_4bit": True if recipe.four_bit else None,
        "load_in_8bit": True if recipe.eight_bit else None,
        "bnb_4bit_quant_type": recipe.bnb_4bit_type,
        "use_bnb_nested_quant": quant.double_quant if recipe.four_bit else None,
        **sft_values(recipe),
    }
    notes = script_notes(recipe)
    if recipe.data_shape in ("alpaca", "sharegpt"):
        notes.append(
            f"trl reads messages, prompt and completion, or text; write {recipe.data_shape} rows as one of them: "
            "loraplan data FILE --write FOLDER --as messages"
        )
    if quant.compute_dtype != training.base_dtype and recipe.four_bit:
        notes.append(f"trl computes 4-bit products in the load dtype, not in {quant.compute_dtype}")
    if training.kbit_preparation:
        notes.append("trl does not run k-bit preparation: plan with --stack trl")
    return Export(artifacts=(_file("sft.yaml", recipe, "trl sft --config sft.yaml", values),), notes=tuple(notes))


def _trl_lora(lora: dict[str, Any]) -> dict[str, Any]:
    names = {
        "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save",
        "use_rslora": "use_rslora", "use_dora": "use_dora",
    }  # fmt: skip
    found = {names[key]: value for key, value in lora.items() if key in names}
    if isinstance(found.get("lora_target_modules"), str):
        found["lora_target_modules"] = [found["lora_target_modules"]]
    return found


# --- axolotl --------------------------------------------------------------------------------------------------------

_AXOLOTL_DATA: dict[str, dict[str, Any]] = {
    "alpaca": {"type": "alpaca"},
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "sharegpt": {
        "type": "chat_template", "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "prompt": {
        "type": {"field_instruction": "prompt", "field_output": "response", "format": "{instruction}",
                 "no_input_format": "{instruction}"},
    },
    "text": {"type": "completion"},
}  # fmt: skip


def axolotl(recipe: Recipe) -> Export:
    """A config of axolotl 0.19 (utils/schemas/config.py AxolotlInputConfig)."""
    training, lora = recipe.training, recipe.training.lora
    checkpoint: Any = {"none": False, "full": True, "offload": "offload"}[training.gradient_checkpointing]
    values: dict[str, Any] = {
        "base_model": recipe.model_id,
        "load_in_4bit": recipe.four_bit,
        "load_in_8bit": recipe.eight_bit,
        "adapter": None if lora is None else "qlora" if recipe.four_bit else "lora",
        "lora_r": lora.r if lora else None,
        "lora_alpha": int(lora.lora_alpha) if lora else None,
        "lora_dropout": lora.lora_dropout if lora else None,
        "lora_target_modules": recipe.targets if lora else None,
        "lora_modules_to_save": list(lora.modules_to_save) if lora and lora.modules_to_save else None,
        "peft_use_dora": True if lora and lora.use_dora else None,
        "peft_use_rslora": True if lora and lora.use_rslora else None,
        "bnb_config_kwargs": _axolotl_bnb(recipe),
        "datasets": [{"path": recipe.data, "ds_type": "json", **_AXOLOTL_DATA[recipe.data_shape]}],
        "sequence_len": recipe.limit,
        "sample_packing": recipe.packing,
        "pad_to_sequence_len": recipe.padding == "max" or recipe.packing,
        "micro_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "num_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or None,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "optimizer": recipe.optim,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.autocast == "bf16",
        "fp16": training.autocast == "fp16",
        "gradient_checkpointing": checkpoint,
        "gradient_checkpointing_kwargs": {"use_reentrant": training.use_reentrant} if checkpoint is True else None,
        "attn_implementation": ATTENTION[training.attention],
        "chunked_cross_entropy": True if recipe.in_chunks else None,
        "torch_compile": True if training.compile else None,
        "group_by_length": True if recipe.padding == "grouped" else None,
        "save_steps": recipe.save_steps or None,
        "seed": recipe.seed,
        "output_dir": recipe.output_dir,
    }
    values |= KERNEL_SETS[training.kernels].axolotl_values
    notes = common_notes(recipe)
    if lora and lora.lora_alpha != int(lora.lora_alpha):
        notes.append(f"axolotl takes whole numbers for lora_alpha: {lora.lora_alpha:g} is cut")
    if recipe.template not in ("alpaca-stanford", "chatml", "model") and recipe.data_shape == "alpaca":
        notes.append("axolotl's alpaca format has the Stanford preamble: 25 to 35 tokens a row more than planned")
    return Export(artifacts=(_file("axolotl.yaml", recipe, "axolotl train axolotl.yaml", values),), notes=tuple(notes))


_AXOLOTL_TYPE = "nf4"


def _axolotl_bnb(recipe: Recipe) -> dict[str, Any] | None:
    """What differs from axolotl's fixed 4-bit settings (loaders/model.py: nf4, double quantization)."""
    quant = recipe.training.quantization
    found: dict[str, Any] = {}
    if recipe.four_bit and not quant.double_quant:
        found["bnb_4bit_use_double_quant"] = False
    if recipe.bnb_4bit_type not in (None, _AXOLOTL_TYPE):
        found["bnb_4bit_quant_type"] = recipe.bnb_4bit_type
    return found or None


# --- LLaMA-Factory --------------------------------------------------------------------------------------------------

LLAMA_FACTORY_DATASET = "loraplan"
_COLUMNS: dict[str, dict[str, Any]] = {
    "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                 "system_tag": "system"},
    },
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "prompt": {"columns": {"prompt": "prompt", "response": "response"}},
    "text": {"columns": {"prompt": "text"}},
}  # fmt: skip
_TEMPLATES = {
    "qwen2": "qwen", "qwen2_moe": "qwen", "qwen3": "qwen3", "qwen3_moe": "qwen3", "mistral": "mistral",
    "mixtral": "mistral", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi",
    "falcon": "falcon", "gpt_oss": "gpt_oss",
}  # fmt: skip


def _template(recipe: Recipe) -> str:
    """LLaMA-Factory's own template of the model's family (data/template.py); `default` where none is sure."""
    if recipe.model.model_type == "llama":
        return "llama3" if recipe.model.vocab_size > 100_000 else "llama2"
    return _TEMPLATES.get(recipe.model.model_type, "default")


def llama_factory(recipe: Recipe) -> Export:
    """A config of LLaMA-Factory 0.9.5 (hparams/*.py) and the dataset_info.json that names the data."""
    training, quant, lora = recipe.training, recipe.training.quantization, recipe.training.lora
    shared = sft_values(recipe)
    kernels = KERNEL_SETS[training.kernels]
    drop = (
        "max_length", "packing", "gradient_checkpointing", "gradient_checkpointing_kwargs",
        kernels.transformers_argument,
    )  # fmt: skip
    values: dict[str, Any] = {
        "model_name_or_path": recipe.model_id,
        "stage": "pt" if recipe.data_shape == "text" else "sft",
        "do_train": True,
        "finetuning_type": "lora" if lora else "full",
        "lora_rank": lora.r if lora else None,
        "lora_alpha": int(lora.lora_alpha) if lora else None,
        "lora_dropout": lora.lora_dropout if lora else None,
        "lora_target": ",".join(recipe.targets) if lora else None,
        "additional_target": ",".join(lora.modules_to_save) if lora and lora.modules_to_save else None,
        "use_dora": True if lora and lora.use_dora else None,
        "use_rslora": True if lora and lora.use_rslora else None,
        "pure_bf16": True if lora and lora.dtype == "bf16" else None,
        "quantization_bit": QUANTIZATIONS[quant.kind].bits or None,
        "quantization_method": "bnb" if recipe.adapter == "qlora" else None,
        "quantization_type": recipe.bnb_4bit_type,
        "double_quantization": quant.double_quant if recipe.four_bit else None,
        "flash_attn": {"eager": "disabled", "sdpa": "sdpa", "flash2": "fa2"}[training.attention],
        "disable_gradient_checkpointing": training.gradient_checkpointing == "none",
        "use_reentrant_gc": training.use_reentrant,
        **({kernels.llama_factory_argument: True} if kernels.llama_factory_argument else {}),
        "dataset": LLAMA_FACTORY_DATASET,
        "dataset_dir": ".",
        "template": _template(recipe),
        "cutoff_len": recipe.limit,
        "packing": recipe.packing,
        **{key: value for key, value in shared.items() if key not in drop},
    }
    values.pop("activation_offloading", None)
    info = {LLAMA_FACTORY_DATASET: {"file_name": recipe.data, **_COLUMNS[recipe.data_shape]}}
    notes = common_notes(recipe)
    if values["template"] == "default":
        notes.append(f"no template of LLaMA-Factory is known for {recipe.model.model_type}: check `template`")
    if recipe.padding == "grouped":
        notes.append("with transformers 4 write group_by_length: true instead of train_sampling_strategy")
    if recipe.in_chunks:
        notes.append("LLaMA-Factory has no chunked loss without liger: it takes the memory of whole fp32 logits")
    if training.gradient_checkpointing == "offload":
        notes.append("LLaMA-Factory offloads checkpoints only with unsloth (use_unsloth_gc); plain ones are written")
    if training.autocast == "bf16" and values.get("pure_bf16"):
        notes.append("pure_bf16 keeps the trained parameters in bf16, as planned with --adapter-dtype bf16")
    return Export(
        artifacts=(
            _file("llamafactory.yaml", recipe, "llamafactory-cli train llamafactory.yaml", values),
            Artifact("dataset_info.json", json_file(info)),
        ),
        notes=tuple(notes),
    )


# --- entrenar -------------------------------------------------------------------------------------------------------


_ENTRENAR_OPTIMIZER = OPTIMIZERS["adamw"].entrenar_name
"""What an optimizer becomes that it does not have."""


def entrenar(recipe: Recipe) -> Export:
    """Its YAML manifest (entrenar 0.7.13 at 5d021a95, src/config/schema.rs TrainSpec)."""
    training, lora = recipe.training, recipe.training.lora
    values: dict[str, Any] = {
        "model": {
            "path": recipe.model_id,
            "layers": recipe.targets if lora else [],
            "mode": "transformer",
        },
        "data": {
            "train": recipe.data,
            "batch_size": training.micro_batch_size,
            "seq_len": recipe.limit,
            "max_length": recipe.limit,
            **_entrenar_columns(recipe),
        },
        "optimizer": {
            "name": OPTIMIZERS[training.optimizer].entrenar_name or _ENTRENAR_OPTIMIZER,
            "lr": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
        },
        "lora": None if lora is None else {
            "rank": lora.r,
            "alpha": float(lora.lora_alpha),
            "target_modules": recipe.targets,
            "dropout": lora.lora_dropout,
            "quantize_base": recipe.four_bit,
            "double_quantize": training.quantization.double_quant,
        },
        "quantize": {"bits": QUANTIZATIONS[training.quantization.kind].bits, "symmetric": True, "per_channel": True}
        if recipe.adapter == "qlora"
        else None,
        "training": {
            "mode": "causal_lm",
            "epochs": max(1, round(recipe.epochs)),
            "grad_clip": training.max_grad_norm or None,
            "lr_scheduler": recipe.schedule,
            "warmup_steps": recipe.warmup_steps,
            "gradient_accumulation": training.gradient_accumulation_steps,
            "mixed_precision": training.autocast if training.autocast != "none" else None,
            "max_steps": recipe.max_steps or None,
            "seed": recipe.seed,
            "output_dir": recipe.output_dir,
        },
    }  # fmt: skip
    notes = [
        "entrenar's own audit of 2026-03-08 says that its standard trainer ignores the lora section, adapts q and v "
        "whatever is named, and freezes the base on the CUDA NF4 path only: check what it trains",
        "its trainer keeps everything but NF4 weights in fp32: the memory planned here is not its own",
        *common_notes(recipe),
    ]
    if recipe.epochs != round(recipe.epochs):
        notes.append(f"entrenar takes whole epochs: {recipe.epochs:g} is rounded")
    if not OPTIMIZERS[training.optimizer].entrenar_name:
        notes.append(f"entrenar has adam, adamw and sgd; {training.optimizer} becomes {_ENTRENAR_OPTIMIZER}")
    return Export(
        artifacts=(_file("entrenar.yaml", recipe, "entrenar train entrenar.yaml", values),), notes=tuple(notes)
    )


def _entrenar_columns(recipe: Recipe) -> dict[str, str]:
    columns = {"alpaca": ("instruction", "output"), "prompt": ("prompt", "response"), "text": ("text", "text")}
    names = columns.get(recipe.data_shape)
    return {"input_column": names[0], "output_column": names[1]} if names else {}
