"""GLM-4 and Helium (models/glm, glm4, helium): tables interleaved in every layer."""

from __future__ import annotations

from planner.step.habits import ALWAYS, Habits

HABITS = {
    "glm": Habits(interleaves_tables=True, joins_nothing_since=ALWAYS),
    "glm4": Habits(interleaves_tables=True, joins_nothing_since=ALWAYS),
    "helium": Habits(interleaves_tables=True),
}
