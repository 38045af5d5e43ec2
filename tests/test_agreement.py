"""A fast sample of the agreement suite: the program against the trace of the real libraries."""

from __future__ import annotations

import random
import warnings

import pytest

pytest.importorskip("torch")
for _library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(_library)

from calibrate import agreement  # noqa: E402

SAMPLE = agreement.MODELS[:24:2]
WITHIN_PCT = 0.5


@pytest.mark.parametrize("model_id", SAMPLE)
def test_peak_agrees_with_the_trace(model_id: str) -> None:
    """One drawn case a model: method, adapter, dtypes, attention, checkpointing, optimizer, batch, length."""
    warnings.filterwarnings("ignore")
    case = agreement.draw(random.Random(f"{model_id} 5"), model_id)
    found = agreement.run(case)
    assert abs(found.error_pct) <= WITHIN_PCT, f"{case.label()}: {found.program_place} | {found.trace_place}"


def test_cases_cover_every_model_and_repeat() -> None:
    first = [c.label() for c in agreement.cases(2 * len(agreement.MODELS), seed=4)]
    assert first == [c.label() for c in agreement.cases(2 * len(agreement.MODELS), seed=4)]
    assert all(any(label.startswith(f"{m} ") for label in first) for m in agreement.MODELS)
