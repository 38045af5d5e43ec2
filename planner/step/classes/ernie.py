"""ERNIE 4.5 (models/ernie4_5/modeling_ernie4_5.py): interleaved fp32 tables, casts in each product."""

from __future__ import annotations

from planner.step.habits import ALWAYS, Habits

HABITS = {
    "ernie4_5": Habits(fp32_tables_since=ALWAYS, interleaves_tables=True, casts_in_products=True),
}
