"""OWNERS: which operation's storages belong to whom in the ledger of memory, one row each.

The program labels every storage with the operation that made it. A label without a row is an error, never a guess: a
new operation of `planner.step` gets its row here.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.base.records import Rows, record

CATEGORIES = (
    "base weights", "adapters", "gradients", "optimizer state", "activations", "checkpoints", "logits and loss",
    "activation gradients", "weight copies", "workspaces", "inputs",
)  # fmt: skip
"""Owners of memory in the ledger, in the order they are printed.

- base weights, adapters: parameters and buffers as they lie there after loading;
- gradients: of trainable parameters, from the moment they are theirs;
- optimizer state: what the optimizer keeps from step to step;
- checkpoints: layer inputs kept (or, offloaded, loaded again) for recomputation;
- logits and loss: everything between the last layer's output and its gradient: final norm, logits, loss, backward;
- weight copies: weights dequantized or cast for a product;
- workspaces: memory inside CUDA kernels and libraries, and the optimizer's temporaries;
- inputs: token ids, masks, positions, rotary tables;
- activation gradients: made by the backward of layers; activations: the rest of forward and recomputation.

calibrate.oracle.ledger sorts the storages of a trace by the same rules.
"""


@record
class Owner:
    """Who owns the storages of one operation: two of CATEGORIES."""

    category: str
    in_head: str
    """Of those made between the last layer's output and its gradient."""

    def __post_init__(self) -> None:
        for name in (self.category, self.in_head):
            if name not in CATEGORIES:
                raise TypeError(f"{name} is no category of memory")


HEAD = "logits and loss"

ANYWHERE = {
    "base weights": (
        "weight", "loading", "weight_absmax", "weight_code", "weight_g_idx", "weight_offset", "weight_qweight",
        "weight_qzeros", "weight_scales", "weight_state2.absmax", "weight_state2.code", "weight_values",
        "weight_weight",
    ),
    "adapters": ("adapter",),
    "gradients": ("gradient",),
    "optimizer state": ("optimizer_state",),
    "checkpoints": ("checkpoint", "checkpoint_reload"),
    "weight copies": ("dequantize", "autocast_weight", "lora_factor"),
    "workspaces": (
        "cublas", "int8_product", "optimizer_temporary", "softmax_grad_times_output", "cudnn_attention_workspace",
        "efficient_attention_workspace", "flash_attention_workspace",
    ),
    "inputs": ("input_ids", "attention_mask", "positions", "rotary_tables"),
}  # fmt: skip
"""Operations whose storages have one owner wherever they are made."""

RESULTS = (
    "add", "alibi", "attention", "attention_bias", "attention_dropout", "attention_fp32", "autocast", "autocast_fp32",
    "bloom_gelu", "bmm", "cast", "cat", "clamp", "clamped_swiglu", "compute_dtype_cast", "contiguous",
    "cudnn_attention", "dora_add", "dora_base", "dora_eye", "dora_mul", "dora_norm", "dora_ratio", "dora_weight",
    "dropout", "earlier_micro_batch", "efficient_attention", "embedding", "embedding_dropout", "erf", "experts",
    "expm1", "flash_attention", "flash_cast", "gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_tanh",
    "hidden_dropout", "input_dtype_cast", "int8_input_cast", "int8_quantize", "layer_norm", "linear", "linear_4bit",
    "linear_8bit", "linear_gptq", "lm_head", "log_softmax", "logits", "logits_chunk", "logits_fp32", "logits_scale",
    "logits_shifted", "logits_softcap", "lora_a", "lora_add", "lora_b", "lora_clone", "lora_dropout",
    "lora_input_cast", "lora_result_cast", "lora_scale", "lora_slices", "lora_weight", "loss", "loss_input",
    "masked_fill", "matmul_copy", "mean", "minimum", "mla_cat", "mlp", "mul", "neg", "nll_loss_cast", "norm",
    "norm_cast", "norm_input_fp32", "norm_weight", "outputs_to_fp32", "pad", "pow", "probabilities", "query",
    "quick_gelu", "relu", "relu2", "repeat_kv", "residual", "rotary", "router", "rsqrt", "scale", "scores",
    "layer_rotary_tables", "scores_fp32", "shift", "sigmoid", "silu", "softmax", "softmax_cast", "split", "subtract",
    "tanh", "unpad", "xielu",
)  # fmt: skip
"""Operations whose results are activations; the label of a gradient that their backward makes ends in "_grad"."""

KEPT_BESIDE = (
    "attention_dropout_mask", "dropout_mask", "embedding_dropout_mask", "hidden_dropout_mask", "lora_dropout_mask",
    "cudnn_attention_logsumexp", "cudnn_attention_rng", "efficient_attention_logsumexp", "efficient_attention_rng",
    "flash_attention_logsumexp", "flash_attention_rng",
)  # fmt: skip
"""What an operation keeps for its backward beside its result."""

GRADIENTS = (
    "accumulate_grad", "bias_grad", "copied_grad", "expand_grad", "heads_grad", "nll_loss_grad", "slice_grad", "sum_to",
    "unused_grad", "weight_grad",
)  # fmt: skip
"""What the backward makes that is not called after one of RESULTS."""


def _rows() -> Iterator[tuple[str, Owner]]:
    for category, names in ANYWHERE.items():
        owner = Owner(category=category, in_head=category)
        yield from ((name, owner) for name in names)
    result = Owner(category="activations", in_head=HEAD)
    gradient = Owner(category="activation gradients", in_head=HEAD)
    yield from ((name, result) for name in (*RESULTS, *KEPT_BESIDE))
    yield from ((name, gradient) for name in (*(f"{name}_grad" for name in RESULTS), *GRADIENTS))


_ROWS = list(_rows())
OWNERS: Rows[Owner] = Rows("operation in the memory ledger (planner.memory.owners)", dict(_ROWS), _ROWS)
"""By the label of a storage."""
