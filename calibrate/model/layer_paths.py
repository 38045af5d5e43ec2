"""How the paths of modules name decoder layers in transformers' classes."""

from __future__ import annotations

import re

_STACKS = "layers|h|blocks|block"
LAYER = re.compile(rf"(.*\.)?({_STACKS})\.(\d+)$")
"""The path of a layer; its number is the third group."""
IN_LAYER = re.compile(rf"^(?:.*\.)?(?:{_STACKS})\.(\d+)\.")
"""The way to a layer, whose number is the group: what follows names a module in it ("attn.c_proj" where the MLP has a
c_proj too)."""
