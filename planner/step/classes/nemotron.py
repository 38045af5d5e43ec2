"""Nemotron (models/nemotron/modeling_nemotron.py)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "nemotron": Habits(joins_nothing=True),
}
