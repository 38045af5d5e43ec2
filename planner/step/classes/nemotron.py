"""Nemotron (models/nemotron/modeling_nemotron.py)."""

from __future__ import annotations

from planner.step.habits import ALWAYS, NEVER, Habits

HABITS = {
    "nemotron": Habits(
        joins_nothing_since=ALWAYS,
        repeats_in_module_before=(5, 13),
        copies_for_sdpa_since=NEVER,  # calls it itself
    ),
}
