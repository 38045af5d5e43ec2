"""OPTIMIZERS: all that is known of each optimizer, one row each. Every consumer reads its field of the row.

Sources: torch/optim (adamw.py and adam.py, foreach and fused; sgd.py), bitsandbytes optim/optimizer.py and
backends/cpu/ops.py (0.50), transformers optimization.py (Adafactor) and training_args.py (OptimizerNames).
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, Literal

from planner.base.records import Rows, record

Optimizer = Literal[
    "adamw",  # torch AdamW, foreach
    "adamw-fused",
    "adamw-bf16-states",  # torch AdamW on bf16 parameters keeps bf16 states (foreach)
    "adamw-8bit",
    "paged-adamw",
    "paged-adamw-8bit",
    "lion",
    "lion-8bit",
    "adafactor",
    "sgd",
]

Variant = Optimizer | Literal[""]
"""Another optimizer; empty: there is none."""

StateLayout = Literal["none", "like-parameter", "fp32", "blocks-of-8-bit", "factors"]
"""How a state lies there: in the parameter's dtype; in fp32; one byte an element and an fp32 scale a block; or, of a
matrix, one fp32 number for every row and column (a vector keeps one for every element)."""

Temporary = Literal["none", "copy-of-all-parameters", "factored-update"]
"""What the step allocates: foreach AdamW holds the square roots of all second moments at once (torch/optim/adam.py
_multi_tensor_adam); Adafactor makes fp32 copies, a parameter at a time (transformers optimization.py)."""

BNB_MIN_8BIT_ELEMENTS = 4096
"""Smaller tensors keep 32-bit states (bitsandbytes optim/optimizer.py min_8bit_size)."""
BNB_PAGED_ELEMENTS = 100_000
"""States of smaller tensors are not paged (bitsandbytes optim/optimizer.py get_state_buffer)."""
BNB_8BIT_BLOCK = 256
"""Elements of an 8-bit state that share one fp32 absmax (bitsandbytes optim/optimizer.py init_state: blocksize 256)."""


@record
class OptimizerRow:
    """One optimizer. All fields are required: what is forgotten fails at import, by name."""

    state_tensors: int
    """Parameter-sized states."""
    state_layout: StateLayout
    step_counter_bytes: int
    """Of the step counter of every tensor, where it lies on the GPU (fused AdamW; foreach keeps it on the host)."""
    temporary: Temporary
    passes: int
    """Parameter-sized reads and writes of the step on a GPU; 0: the gradient is read, the parameter and the states are
    read and written."""
    launches: int
    """Kernels of the step on a GPU, per tensor or, with `multi_tensor`, per group of tensors."""
    multi_tensor: bool
    """One kernel takes a group of tensors (torch's foreach and fused optimizers)."""
    cpu_passes: tuple[int, int] | None
    """On a CPU: fp32 passes and kernels for every tensor, where it differs from the GPU."""
    unpaged: Variant
    """The optimizer that it is without paging its states to the host; empty: it does not page."""
    eight_bit: Variant
    """The optimizer with 8-bit states that can take its place; empty: none, or it has them."""
    paged_eight_bit: Variant
    """The optimizer with paged 8-bit states that can take its place; empty: none, or it pages."""
    transformers_name: str
    """Its name in transformers' TrainingArguments.optim; empty: it has none, and trainers of transformers lack it."""
    transformers_aliases: tuple[str, ...]
    """Further names there that mean it."""
    aliases: tuple[str, ...]
    """What else the command line takes for it."""
    from_transformers: bool
    """Whether that name means this row: two may share one, where the dtype of the parameters decides."""
    entrenar_name: str
    """Its name in entrenar's schema.rs; empty: it has none."""
    made_by: str
    """The class that runs it: its module and name, of torch, transformers or bitsandbytes."""
    arguments: Mapping[str, Any]
    """What that class is told beside the learning rate."""
    kernel_words: tuple[str, ...]
    """Parts of its kernels' names in a profile, in lower case; none: they are plain element-wise ones."""

    @property
    def paged(self) -> bool:
        """Whether large states live in host memory."""
        return bool(self.unpaged)

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether bitsandbytes runs it."""
        return self.made_by.startswith("bitsandbytes.")

    @property
    def is_8bit(self) -> bool:
        """Whether bitsandbytes keeps its states in 8 bit."""
        return self.state_layout == "blocks-of-8-bit"


_FOREACH_ADAMW = {
    "state_tensors": 2, "state_layout": "like-parameter", "step_counter_bytes": 0,
    "temporary": "copy-of-all-parameters",
    # torch/optim/adam.py _multi_tensor_adam: decay 2, lerp 3, mul 2, addcmul 3, sqrt 2, divisions 4, addcdiv 4
    "passes": 20, "launches": 9, "multi_tensor": True, "cpu_passes": None, "unpaged": "", "eight_bit": "adamw-8bit",
    "paged_eight_bit": "paged-adamw-8bit", "transformers_name": "adamw_torch", "transformers_aliases": (),
    "entrenar_name": "adamw", "made_by": "torch.optim.AdamW", "arguments": {"foreach": True},
    "kernel_words": ("adam", "multi_tensor", "_foreach"),
}  # fmt: skip
_BNB = {
    "step_counter_bytes": 0, "temporary": "none", "passes": 0, "launches": 1, "multi_tensor": False,
    "from_transformers": True, "entrenar_name": "", "arguments": {},
}  # fmt: skip
"""bitsandbytes on a GPU: one kernel a tensor. On a CPU its optimizers are sequences of torch operations in fp32
(backends/cpu/ops.py _optimizer_update_8bit_blockwise_cpu, _optimizer_update_32bit_cpu, 0.50)."""

_ROWS: dict[str, dict[str, typing.Any]] = {
    "adamw": {
        **_FOREACH_ADAMW, "transformers_aliases": ("adamw_hf",), "aliases": ("adamw-torch",),
        "from_transformers": True,
    },
    "adamw-fused": {
        **_FOREACH_ADAMW, "step_counter_bytes": 4, "temporary": "none", "passes": 0, "launches": 1,
        "transformers_name": "adamw_torch_fused", "transformers_aliases": ("adamw_apex_fused",),
        "aliases": ("adamw_fused",), "from_transformers": True, "arguments": {"fused": True},
    },
    "adamw-bf16-states": {**_FOREACH_ADAMW, "entrenar_name": "", "aliases": (), "from_transformers": False},
    "adamw-8bit": {
        **_BNB, "state_tensors": 2, "state_layout": "blocks-of-8-bit", "cpu_passes": (30, 26), "unpaged": "",
        "eight_bit": "", "paged_eight_bit": "paged-adamw-8bit", "transformers_name": "adamw_8bit",
        "transformers_aliases": ("adamw_bnb_8bit", "adamw_torch_8bit", "ao_adamw_8bit"), "aliases": (),
        "made_by": "bitsandbytes.optim.AdamW8bit", "kernel_words": ("adam", "optimizer"),
    },
    "paged-adamw": {
        **_BNB, "state_tensors": 2, "state_layout": "fp32", "cpu_passes": (27, 16), "unpaged": "adamw",
        "eight_bit": "adamw-8bit", "paged_eight_bit": "", "transformers_name": "paged_adamw_32bit",
        "transformers_aliases": ("paged_adamw",), "aliases": ("paged-adamw-32bit",),
        "made_by": "bitsandbytes.optim.PagedAdamW32bit", "kernel_words": ("adam", "optimizer"),
    },
    "paged-adamw-8bit": {
        **_BNB, "state_tensors": 2, "state_layout": "blocks-of-8-bit", "cpu_passes": (30, 26),
        "unpaged": "adamw-8bit", "eight_bit": "", "paged_eight_bit": "", "transformers_name": "paged_adamw_8bit",
        "transformers_aliases": (), "aliases": (), "made_by": "bitsandbytes.optim.PagedAdamW8bit",
        "kernel_words": ("adam", "optimizer"),
    },
    "lion": {
        **_BNB, "state_tensors": 1, "state_layout": "fp32", "cpu_passes": (17, 10), "unpaged": "",
        "eight_bit": "lion-8bit", "paged_eight_bit": "", "transformers_name": "lion_32bit",
        "transformers_aliases": ("lion", "paged_lion_32bit", "paged_lion"), "aliases": (),
        "made_by": "bitsandbytes.optim.Lion", "kernel_words": ("lion", "optimizer"),
    },
    "lion-8bit": {
        **_BNB, "state_tensors": 1, "state_layout": "blocks-of-8-bit", "cpu_passes": (19, 16), "unpaged": "",
        "eight_bit": "", "paged_eight_bit": "", "transformers_name": "lion_8bit",
        "transformers_aliases": ("paged_lion_8bit",), "aliases": (), "made_by": "bitsandbytes.optim.Lion8bit",
        "kernel_words": ("lion", "optimizer"),
    },
    "adafactor": {
        # transformers optimization.py Adafactor.step: about 20 operations for every tensor
        "state_tensors": 1, "state_layout": "factors", "step_counter_bytes": 0, "temporary": "factored-update",
        "passes": 0, "launches": 20, "multi_tensor": False, "cpu_passes": None, "unpaged": "", "eight_bit": "",
        "paged_eight_bit": "", "transformers_name": "adafactor", "transformers_aliases": (), "aliases": (),
        "from_transformers": True, "entrenar_name": "", "made_by": "transformers.optimization.Adafactor",
        "arguments": {"scale_parameter": False, "relative_step": False}, "kernel_words": (),
    },
    "sgd": {
        "state_tensors": 0, "state_layout": "none", "step_counter_bytes": 0, "temporary": "none",
        "passes": 3, "launches": 1, "multi_tensor": True, "cpu_passes": None, "unpaged": "", "eight_bit": "",
        "paged_eight_bit": "", "transformers_name": "sgd", "transformers_aliases": (), "aliases": (),
        "from_transformers": True, "entrenar_name": "sgd", "made_by": "torch.optim.SGD",
        "arguments": {"foreach": True}, "kernel_words": ("sgd", "multi_tensor", "_foreach"),
    },
}  # fmt: skip

OPTIMIZERS = Rows("optimizer", typing.get_args(Optimizer), ((n, OptimizerRow(**row)) for n, row in _ROWS.items()))


def by_transformers_name() -> dict[str, str]:
    """TrainingArguments.optim -> the name of the row it means."""
    return {
        word: name
        for name, row in OPTIMIZERS.items()
        if row.from_transformers and row.transformers_name
        for word in (row.transformers_name, *row.transformers_aliases)
    }


def by_class() -> dict[str, str]:
    """The class that runs it, in lower case -> the name of the row; the first of those that share a class."""
    return {row.made_by.lower(): name for name, row in reversed(OPTIMIZERS.items())}


def words() -> dict[str, str]:
    """Every other word that the command line takes for an optimizer -> its name."""
    own = {word: name for name, row in OPTIMIZERS.items() for word in row.aliases}
    return {word: name for word, name in {**by_transformers_name(), **own}.items() if word != name}
