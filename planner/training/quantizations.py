"""QUANTIZATIONS: how the frozen base weights can be stored, one row each. Every consumer reads its field of the row.

Sources: bitsandbytes functional.py and nn/modules.py (0.50), auto_gptq nn_modules/qlinear, AutoAWQ modules/linear,
transformers quantizers/ and modeling_utils.py.
"""

from __future__ import annotations

import typing
from typing import Literal

from planner.base.records import Rows, record

Quantization = Literal["none", "nf4", "fp4", "int8", "gptq4", "gptq8", "awq4"]

Storing = Literal["plain", "blocks-of-4-bit", "rows-of-8-bit", "groups"]
"""How a weight lies there and is multiplied: as it is; packed in blocks of 64 with a scale each; one byte an element
and an fp32 scale a row; packed, with an fp16 scale and a zero point for every group of a column."""


@record
class QuantizationRow:
    """One way to store weights. All fields are required: what is forgotten fails at import, by name."""

    storing: Storing
    bits: int
    """Of one packed weight, without its scales; 0: not packed."""
    by_bitsandbytes: bool
    """bitsandbytes quantizes while the model loads (exactly nn.Linear and Conv1D), and peft has modules for it."""
    keeps_column_groups: bool
    """An int32 for every input column says its group (GPTQ's g_idx)."""
    warm_up_half_bytes: int | None
    """Half bytes that transformers 5 reckons for a quantized weight before it loads (modeling_utils.py
    get_total_byte_count); None: as many as for one that is not quantized."""
    bnb_4bit_type: str
    """Its name in BitsAndBytesConfig.bnb_4bit_quant_type; empty: it is none of those."""
    better: Quantization | Literal[""]
    """One as large and more accurate; empty: none."""
    aliases: tuple[str, ...]
    """What else the command line takes for it."""

    @property
    def packed_4bit(self) -> bool:
        """Whether bitsandbytes packs two weights in a byte (nf4, fp4): scales can be quantized again."""
        return self.storing == "blocks-of-4-bit"

    @property
    def by_rows(self) -> bool:
        """Whether it is LLM.int8(): products in 8 bit of values with a scale for every row."""
        return self.storing == "rows-of-8-bit"

    @property
    def grouped(self) -> bool:
        """Whether a group size belongs to it (GPTQ, AWQ)."""
        return self.storing == "groups"


QUANTIZATIONS = Rows(
    "quantization",
    typing.get_args(Quantization),
    (
        ("none", QuantizationRow(
            storing="plain", bits=0, by_bitsandbytes=False, keeps_column_groups=False, warm_up_half_bytes=None,
            bnb_4bit_type="", better="", aliases=("no",),
        )),
        ("nf4", QuantizationRow(
            storing="blocks-of-4-bit", bits=4, by_bitsandbytes=True, keeps_column_groups=False, warm_up_half_bytes=1,
            bnb_4bit_type="nf4", better="", aliases=("4bit", "int4"),
        )),
        ("fp4", QuantizationRow(
            storing="blocks-of-4-bit", bits=4, by_bitsandbytes=True, keeps_column_groups=False, warm_up_half_bytes=1,
            bnb_4bit_type="fp4", better="nf4", aliases=(),
        )),
        ("int8", QuantizationRow(
            storing="rows-of-8-bit", bits=8, by_bitsandbytes=True, keeps_column_groups=False, warm_up_half_bytes=2,
            bnb_4bit_type="", better="", aliases=("8bit",),
        )),
        ("gptq4", QuantizationRow(
            storing="groups", bits=4, by_bitsandbytes=False, keeps_column_groups=True, warm_up_half_bytes=None,
            bnb_4bit_type="", better="", aliases=(),
        )),
        ("gptq8", QuantizationRow(
            storing="groups", bits=8, by_bitsandbytes=False, keeps_column_groups=True, warm_up_half_bytes=None,
            bnb_4bit_type="", better="", aliases=(),
        )),
        ("awq4", QuantizationRow(
            storing="groups", bits=4, by_bitsandbytes=False, keeps_column_groups=False, warm_up_half_bytes=None,
            bnb_4bit_type="", better="", aliases=("awq",),
        )),
    ),
)  # fmt: skip

BNB_4BIT = QUANTIZATIONS.where(lambda row: row.packed_4bit)
BNB = QUANTIZATIONS.where(lambda row: row.by_bitsandbytes)
USUAL = QUANTIZATIONS.where(lambda row: row.packed_4bit and not row.better)[0]
"""What is meant by a 4-bit base without a further word."""
EIGHT_BIT = QUANTIZATIONS.where(lambda row: row.by_rows)[0]
"""What BitsAndBytesConfig's load_in_8bit means."""


def by_bnb_type() -> dict[str, str]:
    """BitsAndBytesConfig.bnb_4bit_quant_type -> the name of the row."""
    return {row.bnb_4bit_type: name for name, row in QUANTIZATIONS.items() if row.bnb_4bit_type}


def words() -> dict[str, str]:
    """Every other word that the command line takes for a quantization -> its name."""
    return {word: name for name, row in QUANTIZATIONS.items() for word in row.aliases}
