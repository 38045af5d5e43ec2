"""Classes whose code comes with the checkpoint and never took logits_to_keep."""

from __future__ import annotations

from planner.step.habits import NEVER, Habits

HABITS = {
    "baichuan": Habits(slices_hidden_since=NEVER),
    "chatglm": Habits(slices_hidden_since=NEVER),
    "internlm2": Habits(slices_hidden_since=NEVER),
    "mimo": Habits(slices_hidden_since=NEVER),
}
