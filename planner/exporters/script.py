"""Target `peft`: a Python script with LoraConfig, BitsAndBytesConfig and SFTConfig that trains the planned run.

Written for trl 1.16, peft 0.21 and transformers 5.24 (SFTConfig and SFTTrainer read their defaults from there).
"""

from __future__ import annotations

from typing import Any

from planner.exporters.recipe import ATTENTION, DTYPES, Artifact, Export, Recipe, common_notes
from planner.exporters.text import comment, python
from planner.training.losses import KERNEL_SETS, LOSSES

NAME = "train.py"

_FORMATS = {
    "alpaca-seed": (
        'middle = f"\\n\\n### Input:\\n{row[\'input\']}" if row.get("input") else ""',
        'return {"text": f"### Instruction:\\n{row[\'instruction\']}{middle}\\n\\n### Response:\\n{answer(row)}"}',
    ),
    "alpaca-stanford": (
        'start = "Below is an instruction that describes a task"',
        'start += ", paired with an input that provides further context. " if row.get("input") else ". "',
        'start += "Write a response that appropriately completes the request.\\n\\n"',
        'middle = f"\\n\\n### Input:\\n{row[\'input\']}" if row.get("input") else ""',
        'return {"text": f"{start}### Instruction:\\n{row[\'instruction\']}{middle}\\n\\n### Response:{answer(row)}"}',
    ),
    "chat-seed": (
        'middle = f"\\n{row[\'input\']}" if row.get("input") else ""',
        'return {"text": f"<|user|>\\n{row[\'instruction\']}{middle}\\n<|assistant|>\\n{answer(row)}"}',
    ),
    "chatml": (
        "turns = (f\"<|im_start|>{m['role']}\\n{m['content']}<|im_end|>\\n\" for m in messages(row))",
        'return {"text": "".join(turns)}',
    ),
    "model": ('return {"messages": messages(row)}',),
    "plain": ('return {"text": row["text"] if row.get("text") else row["prompt"] + answer(row)}',),
}
"""Template -> the body of to_text(row); the same texts as planner.runs.dataset.templates renders."""

_HELPERS = '''

def answer(row):
    return next(row[key] for key in ("output", "response", "completion") if row.get(key) is not None)


def messages(row):
    """The row as role and content, whatever its shape."""
    if row.get("messages"):
        return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    if row.get("conversations"):
        roles = {"human": "user", "gpt": "assistant"}
        return [{"role": roles.get(m["from"], m["from"]), "content": m["value"]} for m in row["conversations"]]
    question = row.get("prompt") or row["instruction"]
    if row.get("input"):
        question += "\\n" + row["input"]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer(row)}]
'''


def export(recipe: Recipe) -> Export:
    """Write the script."""
    return Export(artifacts=(Artifact(NAME, script(recipe)),), notes=tuple(notes(recipe)))


def notes(recipe: Recipe) -> list[str]:
    """What the reader of the script must know."""
    found = common_notes(recipe)
    if recipe.template == "plain" and recipe.data_shape not in ("text", "prompt"):
        found.append(f"template plain reads text or prompt rows; the data is {recipe.data_shape}")
    if LOSSES[recipe.training.loss].logits == "whole":
        found.append(
            "trl 1.16 computes the loss in chunks: the run takes less memory than planned (--loss fused plans it)"
        )
    lora = recipe.training.lora
    if recipe.adapter == "qlora" and lora and lora.dtype == "fp32" and not recipe.training.kbit_preparation:
        found.append(
            "TRL casts the adapters of a quantized base to bf16; the plan keeps them in fp32 (--stack trl plans it)"
        )
    return found


def script(recipe: Recipe) -> str:
    """The text of the script."""
    training = recipe.training
    lines = [
        comment(f"Fine-tune {recipe.model_id}: {recipe.plan_words}" if recipe.plan_words else recipe.model_id),
        comment("Written by loraplan for trl 1.16, peft 0.21 and transformers 5.24. Run: python train.py"),
        "import torch",
        "from datasets import load_dataset",
        *(["from peft import LoraConfig"] if training.lora else []),
        *(["from peft import prepare_model_for_kbit_training"] if training.kbit_preparation else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", BitsAndBytesConfig" if recipe.adapter == "qlora" else ""),
        "from trl import SFTConfig, SFTTrainer",
        "",
        f"MODEL = {python(recipe.model_id)}",
        f"DATA = {python(recipe.data)}",
        f"OUTPUT = {python(recipe.output_dir)}",
        "GPU = torch.cuda.is_available()",
        "",
        *_quantization(recipe),
        *_lora(recipe),
        f"training = {_call('SFTConfig', sft_arguments(recipe))}",
    ]
    return "\n".join(lines) + "\n" + _HELPERS + _to_text(recipe) + _main(recipe)


def _call(name: str, arguments: dict[str, Any]) -> str:
    inside = "".join(f"    {key}={value},\n" for key, value in arguments.items())
    return f"{name}(\n{inside})"


def _quantization(recipe: Recipe) -> list[str]:
    quant = recipe.training.quantization
    if recipe.adapter != "qlora":
        return []
    if recipe.eight_bit:
        return [f"quantization = {_call('BitsAndBytesConfig', {'load_in_8bit': 'True'})}"]
    arguments = {
        "load_in_4bit": "True",
        "bnb_4bit_quant_type": python(recipe.bnb_4bit_type),
        "bnb_4bit_use_double_quant": python(quant.double_quant),
        "bnb_4bit_compute_dtype": f"torch.{DTYPES[quant.compute_dtype]}",
    }
    if quant.skip_modules != ("lm_head",):
        arguments["llm_int8_skip_modules"] = python(list(quant.skip_modules))
    return [f"quantization = {_call('BitsAndBytesConfig', arguments)}"]


def lora_arguments(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of LoraConfig as plain values."""
    lora = recipe.training.lora
    if lora is None:
        return {}
    targets: Any = "all-linear" if lora.target_modules == ("all-linear",) else recipe.targets
    alpha = int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha
    found: dict[str, Any] = {
        "r": lora.r, "lora_alpha": alpha, "lora_dropout": lora.lora_dropout, "target_modules": targets,
        "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if lora.modules_to_save:
        found["modules_to_save"] = list(lora.modules_to_save)
    if lora.use_rslora:
        found["use_rslora"] = True
    if lora.use_dora:
        found["use_dora"] = True
    return found


def _lora(recipe: Recipe) -> list[str]:
    arguments = {key: python(value) for key, value in lora_arguments(recipe).items()}
    return [f"lora = {_call('LoraConfig', arguments)}"] if arguments else []


def sft_arguments(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of SFTConfig as source text."""
    training = recipe.training
    found = {key: python(value) for key, value in sft_values(recipe).items()}
    found["output_dir"] = "OUTPUT"
    found["use_cpu"] = "not GPU"
    if training.autocast == "none":
        found["bf16"] = "False"
    return found


def sft_values(recipe: Recipe) -> dict[str, Any]:
    """The settings of SFTConfig that the plan decides, as plain values."""
    training = recipe.training
    values: dict[str, Any] = {
        "output_dir": recipe.output_dir,
        "max_length": recipe.limit,
        "packing": recipe.packing,
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": recipe.optim,
        "gradient_checkpointing": training.gradient_checkpointing != "none",
        "bf16": training.autocast == "bf16",
        "fp16": training.autocast == "fp16",
        "logging_steps": 10,
        "save_steps": recipe.save_steps or 500,
        "seed": recipe.seed,
        "report_to": "none",
    }
    if training.gradient_checkpointing != "none":
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": training.use_reentrant}
    if training.gradient_checkpointing == "offload":
        values["activation_offloading"] = True
    if recipe.padding == "grouped":
        values["train_sampling_strategy"] = "group_by_length"
    switch = KERNEL_SETS[training.kernels].transformers_argument
    if switch:
        values[switch] = True
    if training.compile:
        values["torch_compile"] = True
    if recipe.max_steps:
        values["max_steps"] = recipe.max_steps
    return values


def _to_text(recipe: Recipe) -> str:
    body = "".join(f"    {line}\n" for line in _FORMATS[recipe.template])
    return f"\n\ndef to_text(row):\n{body}"


def _main(recipe: Recipe) -> str:
    training = recipe.training
    load = {
        "dtype": f"torch.{DTYPES[training.base_dtype]}",
        "attn_implementation": python(ATTENTION[training.attention]),
    }
    if recipe.adapter == "qlora":
        load["quantization_config"] = "quantization"
        load["device_map"] = '{"": 0} if GPU else None'
    arguments = "".join(f"        {key}={value},\n" for key, value in load.items())
    prepare = ""
    if training.kbit_preparation:
        checkpointing = training.gradient_checkpointing != "none"
        prepare = f"    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing={checkpointing})\n"
    peft = ", peft_config=lora" if training.lora else ""
    return f"""

def main():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        MODEL,
{arguments}    )
{prepare}    rows = load_dataset("json", data_files=DATA, split="train")
    rows = rows.map(to_text, remove_columns=rows.column_names)
    trainer = SFTTrainer(model=model, args=training, train_dataset=rows, processing_class=tokenizer{peft})
    trainer.train()
    trainer.save_model(OUTPUT)


if __name__ == "__main__":
    main()
"""
