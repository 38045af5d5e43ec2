"""The words that several ways in share."""

from __future__ import annotations

COST = ("tokens", "rows", "epochs", "mean_tokens", "price", "dbu_table", "dbu_rate")
"""Parameters that `cost_options` adds."""
