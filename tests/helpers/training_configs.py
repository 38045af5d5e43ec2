"""One small config of every format that is read, written by hand, with the settings that the framework would run."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A config: its file name, its text, and what it must be read as."""

    name: str
    text: str
    framework: str
    stack: str
    model: str | None
    options: dict[str, Any]
    """Options of planner.training.stacks with the value that the file or the framework gives them."""


AXOLOTL = """\
base_model: meta-llama/Llama-3.1-8B
load_in_4bit: true
adapter: qlora
datasets:
  - path: some/rows
    type: alpaca
sequence_len: 1000
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
optimizer: adamw_bnb_8bit
bf16: auto
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
attn_implementation: flash_attention_2
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
val_set_size: 0.1
wandb_project:
"""
LLAMA_FACTORY = """\
### model
model_name_or_path: Qwen/Qwen2.5-7B
trust_remote_code: true
quantization_bit: 4
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
### train
template: qwen
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
bf16: true
learning_rate: 1.0e-4
"""
LLAMA_FACTORY_V1 = """\
model: Qwen/Qwen3-4B
model_class: llm
train_dataset: rows.yaml
peft_config:
  name: lora
  r: 16
  lora_alpha: 32
  target_modules: all
quant_config:
  name: bnb
  quantization_bit: 4
micro_batch_size: 2
"""
TRL = """\
model_name_or_path: meta-llama/Llama-3.1-8B
dataset_name: some/rows
use_peft: true
load_in_4bit: true
lora_target_modules: [q_proj, v_proj]
per_device_train_batch_size: 2
optim: paged_adamw_8bit
"""
TRAINING_ARGUMENTS = {
    "output_dir": "out",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "optim": "adafactor",
    "bf16": True,
    "gradient_checkpointing": True,
    "max_grad_norm": 0.3,
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "mistralai/Mistral-7B-v0.1",
    "r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "use_dora": True,
    "bias": "none",
}
ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: fp16
num_processes: 1
"""
DEEPSPEED = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
TORCHTUNE = """\
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama3_1.qlora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 16
  lora_alpha: 32
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/tokenizer.model
  max_seq_len: 4096
batch_size: 2
gradient_accumulation_steps: 8
optimizer:
  _component_: torch.optim.AdamW
  fused: True
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
clip_grad_norm: null
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
"""
LITGPT = """\
checkpoint_dir: checkpoints/meta-llama/Llama-3.1-8B
precision: bf16-true
quantize: bnb.nf4-dq
devices: 1
lora_r: 32
lora_alpha: 16
lora_query: true
lora_key: false
lora_value: true
lora_projection: false
lora_mlp: true
lora_head: false
train:
  global_batch_size: 8
  micro_batch_size: 2
  max_seq_length: 512
optimizer:
  class_path: torch.optim.AdamW
"""
UNSLOTH = """\
model: unsloth/Meta-Llama-3.1-8B-bnb-4bit
training:
  max_seq_length: 4096
  batch_size: 4
  gradient_checkpointing: "unsloth"
  optim: adamw_8bit
lora:
  lora_r: 32
logging:
  enable_wandb: false
"""
SCRIPT_TRL = '''\
"""Fine-tune."""
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

MODEL = "mistralai/Mistral-7B-v0.1"
LENGTH = 2048
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=quantization, dtype=torch.bfloat16)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="out",
        max_length=LENGTH,
        per_device_train_batch_size=2,
        optim="paged_adamw_32bit",
        gradient_checkpointing_kwargs={"use_reentrant": True},
    ),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
'''
SCRIPT_TRANSFORMERS = """\
model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"]))
args = TrainingArguments("out", per_device_train_batch_size=16, fp16=True)
"""
SCRIPT_PEFT = """\
config = BitsAndBytesConfig(load_in_4bit=True)
model = AutoModelForCausalLM.from_pretrained("huggyllama/llama-7b", quantization_config=config)
model = prepare_model_for_kbit_training(model)
model = get_peft_model(model, LoraConfig(r=16))
"""
SCRIPT_UNSLOTH = """\
max_seq_length = 4096
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Meta-Llama-3.1-8B", max_seq_length=max_seq_length, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(model, r=32, use_gradient_checkpointing="unsloth")
trainer = SFTTrainer(model=model, args=TrainingArguments(per_device_train_batch_size=2, optim="adamw_8bit"))
"""
SCRIPT_DATABRICKS = """\
run = foundation_model.create(
    model="meta-llama/Llama-3.1-8B", train_data_path="main.data.rows", register_to="main.models", context_length=4096
)
"""


def notebook(*cells: str, output: str = "") -> str:
    """Return a notebook with code cells, the first of which printed `output`."""
    made = [
        {"cell_type": "code", "source": text.splitlines(keepends=True), "outputs": [{"text": output}] if not i else []}
        for i, text in enumerate(cells)
    ]
    return json.dumps({"cells": [{"cell_type": "markdown", "source": ["# Notes"]}, *made], "nbformat": 4})


EXAMPLES: tuple[Example, ...] = (
    Example(
        "axolotl.yml", AXOLOTL, "axolotl", "axolotl", "meta-llama/Llama-3.1-8B",
        {
            "method": "qlora", "quantization": "nf4", "double_quant": True, "r": 32, "lora_alpha": 16.0,
            "target_modules": ("all-linear",), "seq_len": 1024, "micro_batch_size": 2, "lora_dropout": 0.0,
            "gradient_accumulation_steps": 4, "optimizer": "adamw-8bit", "gradient_checkpointing": "full",
            "use_reentrant": False, "attention": "flash2", "loss": "fused", "autocast": "bf16", "padded": False,
        },
    ),
    Example(
        "lf.yaml", LLAMA_FACTORY, "llama-factory", "llama-factory", "Qwen/Qwen2.5-7B",
        {
            "method": "qlora", "quantization": "nf4", "double_quant": True, "r": 16, "lora_alpha": 32.0,
            "target_modules": ("all-linear",), "seq_len": 2048, "micro_batch_size": 1, "base_dtype": "bf16",
            "gradient_accumulation_steps": 8, "optimizer": "adamw-fused", "gradient_checkpointing": "full",
            "use_reentrant": True, "attention": "sdpa", "autocast": "bf16", "compute_dtype": "bf16",
        },
    ),
    Example(
        "lf_v1.yaml", LLAMA_FACTORY_V1, "llama-factory-v1", "llama-factory", "Qwen/Qwen3-4B",
        {"method": "qlora", "quantization": "nf4", "r": 16, "seq_len": 2048, "micro_batch_size": 2},
    ),
    Example(
        "trl.yaml", TRL, "trl", "trl", "meta-llama/Llama-3.1-8B",
        {
            "method": "qlora", "quantization": "nf4", "double_quant": False, "r": 16, "lora_alpha": 32.0,
            "lora_dropout": 0.05, "target_modules": ("q_proj", "v_proj"), "seq_len": 1024, "micro_batch_size": 2,
            "base_dtype": "fp32", "optimizer": "paged-adamw-8bit", "gradient_checkpointing": "full", "loss": "fused",
            "autocast": "bf16",
        },
    ),
    Example(
        "args.json", json.dumps(TRAINING_ARGUMENTS, indent=1), "transformers", "hf-trainer", None,
        {
            "micro_batch_size": 4, "gradient_accumulation_steps": 2, "optimizer": "adafactor", "autocast": "bf16",
            "gradient_checkpointing": "full", "max_grad_norm": 0.3,
        },
    ),
    Example(
        "adapter_config.json", json.dumps(ADAPTER, indent=1), "peft", "peft-loop", "mistralai/Mistral-7B-v0.1",
        {
            "r": 64, "lora_alpha": 16.0, "lora_dropout": 0.1, "target_modules": ("q_proj", "v_proj"), "use_dora": True,
            "use_rslora": False,
        },
    ),
    Example("default_config.yaml", ACCELERATE, "accelerate", "custom", None, {"autocast": "fp16"}),
    Example("ds.json", json.dumps(DEEPSPEED), "deepspeed", "custom", None, {"micro_batch_size": 3, "autocast": "bf16"}),
    Example(
        "8B_qlora.yaml", TORCHTUNE, "torchtune", "torchtune", "meta-llama/Llama-3.1-8B",
        {
            "method": "qlora", "quantization": "nf4", "r": 16, "lora_alpha": 32.0, "seq_len": 4096,
            "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "micro_batch_size": 2, "gradient_accumulation_steps": 8, "optimizer": "adamw-fused", "loss": "fused",
            "gradient_checkpointing": "full", "base_dtype": "bf16", "max_grad_norm": 0.0,
        },
    ),
    Example(
        "litgpt.yaml", LITGPT, "litgpt", "litgpt", "meta-llama/Llama-3.1-8B",
        {
            "method": "qlora", "quantization": "nf4", "double_quant": True, "base_dtype": "bf16", "autocast": "none",
            "r": 32, "lora_dropout": 0.05, "target_modules": ("q_proj", "v_proj", "mlp"), "seq_len": 512,
            "micro_batch_size": 2, "gradient_accumulation_steps": 4, "optimizer": "paged-adamw",
        },
    ),
    Example(
        "unsloth.yaml", UNSLOTH, "unsloth", "unsloth", "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        {
            "method": "qlora", "quantization": "nf4", "r": 32, "lora_alpha": 16.0, "seq_len": 4096,
            "micro_batch_size": 4, "gradient_accumulation_steps": 4, "optimizer": "adamw-8bit",
            "gradient_checkpointing": "offload",
        },
    ),
    Example(
        "sft.py", SCRIPT_TRL, "script-trl", "trl", "mistralai/Mistral-7B-v0.1",
        {
            "method": "qlora", "quantization": "nf4", "double_quant": True, "compute_dtype": "bf16", "r": 16,
            "lora_alpha": 32.0, "target_modules": ("all-linear",), "seq_len": 2048, "micro_batch_size": 2,
            "optimizer": "paged-adamw", "base_dtype": "bf16", "use_reentrant": True, "gradient_checkpointing": "full",
        },
    ),
    Example(
        "train.py", SCRIPT_TRANSFORMERS, "script-transformers", "hf-trainer", "openai-community/gpt2",
        {
            "method": "lora", "r": 4, "lora_alpha": 8.0, "target_modules": ("c_attn",), "micro_batch_size": 16,
            "autocast": "fp16", "gradient_checkpointing": "none",
        },
    ),
    Example(
        "loop.py", SCRIPT_PEFT, "script-peft", "peft-loop", "huggyllama/llama-7b",
        {
            "method": "qlora", "quantization": "fp4", "double_quant": False, "compute_dtype": "fp32", "r": 16,
            "kbit_preparation": True,
        },
    ),
    Example(
        "us.py", SCRIPT_UNSLOTH, "script-unsloth", "unsloth", "unsloth/Meta-Llama-3.1-8B",
        {
            "method": "qlora", "quantization": "nf4", "r": 32, "lora_alpha": 16.0, "seq_len": 4096,
            "micro_batch_size": 2, "optimizer": "adamw-8bit", "gradient_checkpointing": "offload",
        },
    ),
    Example(
        "create.py", SCRIPT_DATABRICKS, "databricks", "hf-trainer", "meta-llama/Llama-3.1-8B",
        {"method": "full", "seq_len": 4096},
    ),
    Example(
        "sft.ipynb", notebook("!pip install trl\n" + SCRIPT_TRL), "script-trl", "trl", "mistralai/Mistral-7B-v0.1",
        {"method": "qlora", "r": 16, "seq_len": 2048, "micro_batch_size": 2},
    ),
)  # fmt: skip
