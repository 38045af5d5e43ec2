"""A fast sample of the agreement suite: the program against the trace of the real libraries, one case a model."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")
for _library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(_library)

from calibrate.oracle import agreement  # noqa: E402
from calibrate.oracle.agreement import PEAK_PCT  # noqa: E402
from calibrate.oracle.cases import MODELS, Case, cases, draw  # noqa: E402
from planner.memory.owners import CATEGORIES  # noqa: E402
from tests.helpers.agreement_cases import DIRECTED  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("model_id", MODELS)
def test_program_agrees_with_the_trace(model_id: str) -> None:
    """Peak, moment and every category of a drawn case: method, adapter, dtypes, attention, checkpointing, optimizer."""
    found = agreement.run(draw(random.Random(f"{model_id} 7"), model_id))
    places = f"{found.case.label()}: program {found.program_segment} {found.program_op}, trace {found.trace_segment}"
    assert abs(found.error_pct) <= PEAK_PCT, f"{found.error_pct:+.3f} %, {places}"
    assert found.same_moment, places
    assert not found.components, f"{found.components}, {places}"


@pytest.mark.parametrize(("cause", "case"), DIRECTED, ids=[cause for cause, _ in DIRECTED])
def test_causes_of_old_disagreements(cause: str, case: Case) -> None:
    """One small model for each cause that was found; the tolerances are those of the suite."""
    found = agreement.run(case)
    places = f"{case.label()}: program {found.program_segment} {found.program_op}, trace {found.trace_segment}"
    assert abs(found.error_pct) <= PEAK_PCT, f"{cause}: {found.error_pct:+.3f} %, {places}"
    assert found.same_moment, places
    assert not found.components, f"{found.components}, {places}"


def test_cases_cover_every_model_and_repeat() -> None:
    first = [c.label() for c in cases(2 * len(MODELS), seed=4)]
    assert first == [c.label() for c in cases(2 * len(MODELS), seed=4)]
    assert all(any(label.startswith(f"{m} ") for label in first) for m in MODELS)


def test_cases_cover_the_settings() -> None:
    """The drawn product holds every value that the suite promises."""
    drawn = [c.training for c in cases(231, seed=2)]
    adapters = [t.lora for t in drawn if t.lora]
    assert {t.method for t in drawn} == {"qlora", "lora", "dora", "full"}
    assert {(t.quantization.kind, t.quantization.double_quant) for t in drawn} >= {
        ("nf4", False), ("nf4", True), ("int8", False)
    }  # fmt: skip
    assert {t.gradient_checkpointing for t in drawn} == {"none", "full", "offload"}
    assert {t.optimizer for t in drawn} >= {
        "adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit", "lion", "adafactor", "sgd"
    }  # fmt: skip
    assert {(t.attention, t.padded) for t in drawn} == {(a, p) for a in ("eager", "sdpa") for p in (False, True)}
    assert {t.loss for t in drawn} == {"full-logits-fp32", "full-logits"}
    assert {(t.kbit_preparation, t.autocast) for t in drawn} == {
        (k, a) for k in (False, True) for a in ("none", "bf16")
    }
    assert {lora.r for lora in adapters} == {4, 16, 64, 256}
    assert {lora.dtype for lora in adapters} == {"fp32", "bf16"}
    assert {lora.lora_dropout > 0 for lora in adapters} == {False, True}
    assert {(t.micro_batch_size, t.seq_len) for t in drawn} >= {(1, 64), (8, 4096)}


def test_a_category_disagrees_beyond_its_tolerance() -> None:
    """Within 1 % of the category or 0.1 % of the peak, whichever is more."""
    name, other = CATEGORIES[0], CATEGORIES[1]
    peak = 100_000
    assert agreement.differing(((name, 50_500),), ((name, 50_000),), peak) == ()
    assert agreement.differing(((name, 50_501),), ((name, 50_000),), peak) == ((name, 50_501, 50_000),)
    assert agreement.differing(((other, 100),), (), peak) == ()
    assert agreement.differing((), ((other, 102),), peak) == ((other, 0, 102),)
