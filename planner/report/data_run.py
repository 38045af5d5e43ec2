"""What training data makes of a run, as a block of the report of `loraplan fits` and as JSON."""

from __future__ import annotations

from typing import Any

from planner.base.errors import one_line
from planner.plan.datarun import DataRun
from planner.report.tables import wrapped

_WORDS = {
    "max": "padded to the limit", "longest": "padded to the longest of the batch",
    "grouped": "grouped by length and padded", "packed": "packed",
}  # fmt: skip


def data_block(run: DataRun) -> str:
    """Lines about rows, lengths, padding and useful tokens per second."""
    found, how = run.found, run.batching
    names = ", ".join(one_line(path.rpartition("/")[2], 40) for path in found.source.paths[:3])
    cut, _ = found.lengths.truncated(how.limit)
    lines = [
        f"{'data':<23}{names}: {len(found.lengths):,} rows as {found.template.name}",
        f"  {found.lengths.total:,} tokens; {found.token_label}",
        f"  {_WORDS[how.padding]}: longest batch {run.longest:,} tokens (rows are cut at {how.limit:,}: {cut:,} are)",
    ]
    if run.totals:
        lines.append(
            f"  {run.waste * 100:.1f} % of the computed positions are padding: "
            f"{run.totals.useful_tokens_per_s:,.0f} useful tokens/s over {run.epochs:g} epochs"
        )
    if found.num_problems:
        first = found.problems[0]
        where = f"{one_line(first.file, 40)}:{first.line}: {first.reason}"
        lines.append(f"  {found.num_problems:,} rows are left out (first: {where})")
    return "".join(f"{wrapped(line, 78, '    ')}\n" for line in lines)


def data_document(run: DataRun | None) -> dict[str, Any] | None:
    """The same as plain JSON values."""
    if run is None:
        return None
    found, how, totals = run.found, run.batching, run.totals
    return {
        "files": list(found.source.paths),
        "rows": len(found.lengths),
        "left_out": found.num_problems,
        "template": found.template.name,
        "tokens": found.lengths.total,
        "tokens_counted": found.token_label,
        "tokens_relative_error": found.token_error,
        "limit": how.limit,
        "longest_batch": run.longest,
        "padding": how.padding,
        "padding_share": run.waste if totals else None,
        "epochs": run.epochs,
        "useful_tokens_per_s": totals.useful_tokens_per_s if totals else None,
        "computed_tokens": totals.tokens if totals else None,
    }
