"""Gemma 1 to 3 (models/gemma, gemma2, gemma3): the embedding module scales its output (*TextScaledWordEmbedding).

Gemma's and Gemma 2's model did so itself before (`normalizer` in modeling_gemma.py of 4.40 to 5.3).
"""

from __future__ import annotations

from planner.step.habits import ALWAYS, Habits

_GEMMA = Habits(scales_in_embedding_since=(5, 4), tables_per_layer_before=(4, 48))

HABITS = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": Habits(scales_in_embedding_since=ALWAYS),
    "gemma3_text": Habits(scales_in_embedding_since=ALWAYS, tables_by_window=True),
}
