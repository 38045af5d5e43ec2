"""gpt-oss (models/gpt_oss/modeling_gpt_oss.py): tables of half a head, both halves rotated apart."""

from __future__ import annotations

from planner.step import ops
from planner.step.context import Step
from planner.step.engine import Size, Tensor
from planner.step.habits import Habits


def _turn(step: Step, x: Tensor, rotated: Size, rest: Size, tables: tuple[Tensor, Tensor]) -> Tensor:
    """_apply_rotary_emb: cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin), with tables of half a head."""
    eng = step.eng
    cos, sin = tables
    half = x.numel // 2
    x1, x2 = ops.split(eng, x, (half, half), "rotary_grad")
    first = ops.subtract(eng, ops.mul(eng, x1, cos, "rotary"), ops.mul(eng, x2, sin, "rotary"), "rotary")
    second = ops.add(eng, ops.mul(eng, x2, cos, "rotary"), ops.mul(eng, x1, sin, "rotary"), "rotary")
    return ops.cat_half(eng, first, second, "rotary")


HABITS = {"gpt_oss": Habits(turn=_turn, half_tables=True, router_dtype="hidden")}
