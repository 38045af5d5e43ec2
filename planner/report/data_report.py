"""The report of `loraplan data`: lengths, truncation, what batching makes of them, and what was left out."""

from __future__ import annotations

from typing import Any, NamedTuple

from planner.base.errors import one_line
from planner.report.tables import aligned, csv_text, escape, json_text, markdown, wrapped
from planner.runs.dataset.batches import PADDINGS, Padded, padded
from planner.runs.dataset.lengths import PERCENTILES
from planner.runs.dataset.scan import Scan

SCHEMA_VERSION = 1
_BAR = 40


class DataAnswer(NamedTuple):
    """A scan with the length limit and batch it is looked at with, and what was written."""

    found: Scan
    limit: int
    batch: int
    split: tuple[int, int] | None = None
    """Training and validation rows."""
    seed: int | None = None
    written: dict[str, int] | None = None
    folder: str = ""
    warnings: tuple[str, ...] = ()
    """About the model whose vocabulary was named."""


def paddings(answer: DataAnswer) -> list[Padded]:
    """Every way of making batches, for one epoch of the training rows."""
    return [padded(answer.found.lengths, answer.batch, answer.limit, p) for p in PADDINGS]  # type: ignore[arg-type]


def render(answer: DataAnswer, style: str) -> str:
    """Return the report as table, json, csv or markdown."""
    if style == "json":
        return json_text(document(answer))
    if style == "csv":
        return csv_text(("tokens_from", "tokens_to", "rows"), answer.found.lengths.histogram())
    return _markdown(answer) if style == "markdown" else _text(answer)


def statistics(answer: DataAnswer) -> dict[str, Any]:
    """Minimum, mean, percentiles and maximum of the lengths."""
    lengths = answer.found.lengths
    return {
        "min": lengths.shortest,
        "mean": round(lengths.mean, 2),
        **{f"p{p}": lengths.percentile(p) for p in PERCENTILES},
        "max": lengths.longest,
    }


def document(answer: DataAnswer) -> dict[str, Any]:
    """Everything as plain JSON values."""
    found = answer.found
    rows, lost = found.lengths.truncated(answer.limit)
    return {
        "schema_version": SCHEMA_VERSION,
        "files": list(found.source.paths),
        "bytes": found.bytes,
        "rows": len(found.lengths),
        "shapes": dict(found.shapes),
        "template": {"name": found.template.name, "source": found.template.source},
        "tokens": {
            "total": found.lengths.total,
            "counted": found.token_label,
            "relative_error": found.token_error,
            **statistics(answer),
        },
        "characters": found.characters,
        "histogram": [{"from": a, "to": b, "rows": n} for a, b, n in found.lengths.histogram()],
        "truncation": {"limit": answer.limit, "rows": rows, "tokens_lost": lost},
        "batches": [
            {
                "padding": p.padding, "batch": answer.batch, "rows": p.rows, "batches": p.batches,
                "useful_tokens": p.useful_tokens, "computed_tokens": round(p.computed_tokens), "waste": p.waste,
            }
            for p in paddings(answer)
        ],
        "duplicates": found.duplicates,
        "left_out": {"rows": found.num_problems, "first": [p._asdict() for p in found.problems]},
        "doubts": [{"reason": reason, **doubt._asdict()} for reason, doubt in found.doubts],
        "split": {"train": answer.split[0], "validation": answer.split[1], "seed": answer.seed}
        if answer.split
        else None,
        "written": answer.written,
        "warnings": list(answer.warnings),
    }  # fmt: skip


_PADDING_WORDS = {
    "max": "to the limit", "longest": "to the longest", "grouped": "to the longest, grouped", "packed": "packed",
}  # fmt: skip


def _batch_rows(answer: DataAnswer) -> list[tuple[Any, ...]]:
    return [
        (_PADDING_WORDS[p.padding], p.rows, p.batches, round(p.computed_tokens), f"{p.waste * 100:.1f} %")
        for p in paddings(answer)
    ]


_BATCH_HEADERS = ("padding", "rows", "batches", "computed tokens", "waste")


def _text(answer: DataAnswer) -> str:
    found = answer.found
    shapes = ", ".join(f"{rows:,} {shape}" for shape, rows in found.shapes)
    blocks = [
        wrapped(
            f"{len(found.lengths):,} rows ({shapes}) as {found.template.name} ({found.template.source})", indent="  "
        )
        + "\n"
        + wrapped(f"{found.lengths.total:,} tokens; {found.token_label}", indent="  ")
        + "\n",
        aligned(tuple(statistics(answer)), [tuple(statistics(answer).values())]),
        _histogram(answer),
        _truncation(answer) + "\n",
        f"one epoch in batches of {answer.batch}, rows cut to {answer.limit:,} tokens:\n"
        + aligned(_BATCH_HEADERS, _batch_rows(answer)),
        "".join(f"{wrapped(line, indent='  ') if line.startswith('warning: ') else line}\n" for line in notes(answer)),
    ]
    return "\n".join(block for block in blocks if block)


def _truncation(answer: DataAnswer) -> str:
    rows, lost = answer.found.lengths.truncated(answer.limit)
    share = rows / len(answer.found.lengths) * 100
    return f"longer than {answer.limit:,} tokens: {rows:,} rows ({share:.2f} %), {lost:,} tokens are cut off"


def _histogram(answer: DataAnswer) -> str:
    bins = answer.found.lengths.histogram()
    most = max(rows for _, _, rows in bins)
    width = max(len(f"{a:,} to {b:,}") for a, b, _ in bins)
    lines = [
        f"{f'{a:,} to {b:,}':>{width}}  {rows:>10,}  {'#' * -(-rows * _BAR // most)}".rstrip() for a, b, rows in bins
    ]
    return f"{'tokens':>{width}}  {'rows':>10}\n" + "\n".join(lines) + "\n"


def notes(answer: DataAnswer) -> list[str]:
    """What was left out, what is odd, what was written."""
    found = answer.found
    lines = []
    if found.num_problems:
        lines.append(f"left out: {found.num_problems:,} rows")
        lines += [f"  {one_line(p.file, 60)}:{p.line}: {p.reason}" for p in found.problems]
        if found.num_problems > len(found.problems):
            lines.append(f"  and {found.num_problems - len(found.problems):,} more")
    for reason, doubt in found.doubts:
        lines.append(f"odd: {reason}: {doubt.rows:,} rows, first {one_line(doubt.file, 60)}:{doubt.line}")
    if found.duplicates:
        lines.append(f"duplicates: {found.duplicates:,} rows whose text occurred before")
    if answer.split:
        how = "in the order of the files" if answer.seed is None else f"drawn with seed {answer.seed}"
        lines.append(f"split: {answer.split[0]:,} rows to train, {answer.split[1]:,} to validate, {how}")
    if answer.written:
        files = ", ".join(f"{name} ({rows:,} rows)" for name, rows in answer.written.items())
        lines.append(f"written to {one_line(answer.folder, 100)}: {files}")
    lines += [f"warning: {one_line(note, 1000)}" for note in answer.warnings]
    return lines


def _markdown(answer: DataAnswer) -> str:
    found = answer.found
    stats = statistics(answer)
    blocks = [
        f"{len(found.lengths):,} rows as {found.template.name}; {found.lengths.total:,} tokens, "
        f"{escape(found.token_label)}.",
        markdown(tuple(stats), [tuple(stats.values())]).rstrip(),
        escape(_truncation(answer)) + ".",
        markdown(_BATCH_HEADERS, _batch_rows(answer)).rstrip(),
        "\n".join(f"- {escape(line.strip())}" for line in notes(answer)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def lab_5_1(found: Scan) -> str:
    """Return the answer of the course's lab 5.1 for a file, as JSON: rows, first text, split, lengths."""
    from planner.course import labs

    answer = {
        **labs.lab_5_1(len(found.lengths)),
        "template": found.template.name,
        "first": found.example,
        "tokens": {"counted": found.token_label, **statistics(DataAnswer(found, 512, 4))},
        "left_out": found.num_problems,
    }
    return json_text(answer)
