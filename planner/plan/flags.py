"""What the keys of `planner.training.stacks` are called on the command line, for messages that name a setting."""

from __future__ import annotations

OTHERWISE = {
    "r": "--rank", "lora_alpha": "--alpha", "lora_dropout": "--dropout", "use_dora": "--dora",
    "use_rslora": "--rslora", "kbit_preparation": "--kbit-prep", "fp32_norms_only": "--fp32-norms",
    "seq_len": "--length", "gradient_accumulation_steps": "--grad-accum",
    "gradient_checkpointing": "--checkpointing", "use_reentrant": "--reentrant",
}  # fmt: skip
"""Keys whose flag is not the key with dashes; a test compares all of them with the commands' options."""

ALSO = {
    "r": ("r",), "target_modules": ("targets",), "quantization": ("q",), "micro_batch_size": ("batch",),
    "seq_len": ("seq-len",),
}  # fmt: skip
"""Other names of options by key; a test compares them with the commands' options."""


def flag_of(key: str) -> str:
    """Return the flag that sets a key of `planner.training.stacks`."""
    return OTHERWISE.get(key) or f"--{key.replace('_', '-')}"
