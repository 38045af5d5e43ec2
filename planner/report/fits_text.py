"""The table that `loraplan fits` prints: verdict, where the memory goes, what was assumed, what to change."""

from __future__ import annotations

from collections.abc import Iterator

from planner.base.errors import one_line
from planner.base.units import gib
from planner.device.hardware import CPU
from planner.plan.answer import Answer, components
from planner.plan.intervals import Range
from planner.plan.verdict import ANSWERS, CLOSE, FITS, NO
from planner.report.answer import card_words, peak_words, run_words, value_words, via_words
from planner.report.tables import aligned, wrapped
from planner.report.time_text import ledger_block, step_block

_TOTALS = {
    "allocated": "max_memory_allocated",
    "reserved": "max_memory_reserved",
    "device": "what nvidia-smi shows",
}
_CPU_TOTALS = {"allocated": "live tensors", "reserved": "the same: no cache", "device": "the whole process"}
"""What the three numbers are on a CPU, whose memory is malloc's."""
_ASSUMED = (
    "gradient_checkpointing", "optimizer", "loss", "attention", "autocast", "base_dtype", "kbit_preparation",
    "quantization", "double_quant", "r", "target_modules", "seq_len", "micro_batch_size",
)  # fmt: skip
"""Settings named in the short report when the user left them open; --explain prints all."""


SMALL = 5 * 2**20
"""Components below this share one line."""


def render(answer: Answer) -> str:
    """Return the whole report."""
    blocks = [_headline(answer), _ledger(answer), _peak(answer), step_block(answer), _data(answer)]
    if answer.changes:
        blocks.append(_changes(answer))
    elif answer.prediction.via == "trace" and answer.prediction.verdict not in (FITS, None):
        blocks.append("what would fit is searched by loraplan's own program only: leave out --via trace\n")
    elif answer.prediction.verdict in (NO, CLOSE):
        blocks.append("no single change or combination that was tried makes it fit\n")
    if answer.explain_time and not answer.explain and answer.prediction.time is not None:
        blocks.append(ledger_block(answer.prediction.time))
    if answer.explain:
        blocks += _explanation(answer)
    else:
        blocks.append(_assumed(answer))
    blocks.append("".join(f"{_paragraph('warning: ', note)}\n" for note in _warnings(answer)))
    return "\n".join(block for block in blocks if block)


def _data(answer: Answer) -> str:
    if answer.data is None:
        return ""
    from planner.report.data_run import data_block

    return data_block(answer.data)


def _warnings(answer: Answer) -> tuple[str, ...]:
    return (*answer.prediction.warnings, *answer.notes)


def _paragraph(label: str, text: str) -> str:
    return wrapped(f"{label}{one_line(text, 1000)}", indent="  ")


def _headline(answer: Answer) -> str:
    p = answer.prediction
    word, card = ANSWERS[p.verdict], card_words(answer)
    body = wrapped(f"{run_words(answer)}{f', on {card}' if card else ''}", 73).replace("\n", "\n       ")
    need = f"peak {gib(p.device.expected)} GiB ({gib(p.device.low)} to {gib(p.device.high)})"
    if p.gpu is not None:
        left = f"{gib(abs(p.headroom_bytes))} {'left over' if p.headroom_bytes >= 0 else 'missing'}"
        need += f" of {gib(p.capacity_bytes)}: {left}"
    return f"{word:<7}{body}\n       {need}\n"


def _ledger(answer: Answer) -> str:
    """Components by the total they enter, each total with its interval, then what the card cannot give."""
    lines = []
    parts = components(answer)
    small = [part.name for part in parts if part.counter == "allocated" and part.nbytes < SMALL]
    on_cpu = answer.prediction.gpu is not None and answer.prediction.gpu.vendor == CPU
    for counter, meaning in (_CPU_TOTALS if on_cpu else _TOTALS).items():
        total: Range = getattr(answer.prediction, counter)
        for part in parts:
            if part.counter == counter and part.name not in small:
                note = "  assumed" if part.origin == "assumed" else ""
                lines.append(f"  {part.name:<21}{gib(part.nbytes):>9}{note}")
        if small and counter == "allocated":
            rest = sum(part.nbytes for part in parts if part.name in small)
            lines.append(f"  {'other':<21}{gib(rest):>9}  {', '.join(small)}")
        interval = f"{gib(total.low)} to {gib(total.high)}"
        lines.append(f"{counter:<23}{gib(total.expected):>9} GiB  {interval:<18} {meaning}".rstrip())
    return "\n".join([*lines, *_card_lines(answer)]) + "\n"


def _card_lines(answer: Answer) -> Iterator[str]:
    """The card's own size, where the run may not use all of it or the size is not a measured one."""
    gpu = answer.prediction.gpu
    if gpu is None:
        return
    others = gpu.used_by_others_bytes - answer.margin_bytes
    marketed = gpu.memory_basis == "marketing"
    if not (others or answer.margin_bytes or marketed):
        return
    yield f"{'card':<23}{gib(gpu.memory_bytes):>9} GiB{'  marketed size: real cards may have less' if marketed else ''}"
    if others:
        yield f"  {'used by others now':<21}{gib(others):>9}"
    if answer.margin_bytes:
        yield f"  {'kept free (--margin)':<21}{gib(answer.margin_bytes):>9}"


def _peak(answer: Answer) -> str:
    text = f"peak {peak_words(answer)} (operation {answer.prediction.breakdown.moment.op})"
    lines = [wrapped(text, indent="  ")]
    if answer.prediction.via != "program":
        lines.append(wrapped(via_words(answer), indent="  "))
    return "\n".join(lines) + "\n"


def _changes(answer: Answer) -> str:
    """What would make it fit, each with the memory it then takes on the device."""
    lines = ["what would fit, with its peak (up to):"]
    for change in answer.changes:
        peak = f"{gib(change.device.expected):>8} GiB ({gib(change.device.high)})"
        lines.append(wrapped(f"{peak:<24}{change.text}", 80, " " * 24))
        lines.append(f"{'':<24}{change.option}")
    return "\n".join(lines) + "\n"


def _assumed(answer: Answer) -> str:
    p = answer.prediction
    used = answer.resolved.defaults_used()
    settings = [f"{key} {value_words(used[key].value)}" for key in _ASSUMED if key in used]
    text = f"assumed ({answer.resolved.stack}): {'; '.join(settings)}. --explain lists every setting."
    known = f"trains {p.trainable_parameters:,} of {p.model.num_parameters:,} parameters"
    return f"{wrapped(text, indent='  ')}\n{known}\n"


def _explanation(answer: Answer) -> Iterator[str]:
    yield _settings(answer)
    yield _model_facts(answer)
    yield _segments(answer)
    if answer.prediction.time is not None:
        yield ledger_block(answer.prediction.time)
    yield _reasons(answer)


def _settings(answer: Answer) -> str:
    lines = [f"settings (stack {answer.resolved.stack}):"]
    for key, setting in answer.resolved.describe().items():
        idle = "" if answer.resolved.applies(key) else " (not used by this run)"
        text = f"{key} = {value_words(setting['value'])}  [{setting['origin']}]{idle}"
        lines.append(f"  {wrapped(text, 78, '      ')}")
    lines += [_paragraph("  note: ", note) for note in answer.resolved.notes]
    return "\n".join(lines) + "\n"


def _model_facts(answer: Answer) -> str:
    p, loaded = answer.prediction, answer.loaded
    facts = [
        ("id", p.model.model_id),
        ("model_type", p.model.model_type),
        ("read from", loaded.origin),
        ("parameters", f"{p.model.num_parameters:,} (computed from the config's shapes)"),
        ("trained", f"{p.trainable_parameters:,}"),
        ("layers", f"{p.model.num_layers}, hidden {p.model.hidden_size}, vocabulary {p.model.vocab_size}"),
    ]
    if p.model.exact_parameters:
        facts.append(("in the weight files", f"{p.model.exact_parameters:,} (known: read from tensor headers)"))
    if loaded.record is not None:
        facts += [("config from", loaded.record.source), ("confidence", loaded.record.confidence)]
    if p.gpu is not None:
        facts.append(("card", f"{p.gpu.name}: memory {p.gpu.memory_basis}"))
        facts += [("card's source", source) for source in p.gpu.sources]
        facts += [("card's note", p.gpu.notes)] if p.gpu.notes else []
    lines = [wrapped(f"{name}: {one_line(text, 300)}", 78, "      ") for name, text in facts]
    return "model and card:\n" + "".join(f"  {line}\n" for line in lines)


def _segments(answer: Answer) -> str:
    p = answer.prediction
    rows = [
        (segment.phase, segment.layer if segment.layer >= 0 else None, segment.bytes / 2**30)
        for segment in p.breakdown.segments
    ]
    title = "highest level in each part of the step (GiB; runs of equal layers are shown by four of them):\n"
    return title + aligned(("phase", "layer", "GiB"), rows)


def _reasons(answer: Answer) -> str:
    p = answer.prediction
    lines = ["why the interval is as wide as it is (share of allocated):"]
    lines += [f"  +/- {share * 100:.1f} %  {reason}" for reason, share in p.uncertainty]
    return "\n".join(lines) + "\n"
