"""loraplan: does a LoRA or QLoRA fine-tuning run fit on a GPU, how fast will it run and what will it cost."""

__version__ = "0.1.0"
