"""Write what the commands print now into README.md and docs/: `python .ci/readme.py` (`make readme`).

Every figure that changes is printed with its change in per cent. A change of more than 0.5 % is not written unless
`--because "..."` says why; the reason goes into CHANGELOG.md. `--against REF` asks git instead of running anything:
whether figures differ by more than that from a revision whose CHANGELOG.md is the same; `--against changelog` takes the
last revision that touched CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache as cache_once
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README, CHANGELOG, ACCURACY = ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "docs" / "accuracy.md"
FACTS = ROOT / "tests" / "facts" / "accuracy.csv"
WORTH_A_REASON = 0.5
"""Per cent."""
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SUMMARY = re.compile(r"(<!-- accuracy: .*? -->\n).*?(<!-- /accuracy -->)", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
UNRELEASED = "## Unreleased\n"


class Change(NamedTuple):
    """A figure that is not what it was."""

    before: str
    after: str
    per_cent: float
    where: str

    def __str__(self) -> str:
        return f"{self.before} -> {self.after} ({self.per_cent:+.2f} %): {self.where}"


# --- running commands ---------------------------------------------------------------------------------------------


@cache_once
def cache() -> str:
    """A cache folder for this process: a trace shown twice is made once, and none comes from before."""
    folder = tempfile.mkdtemp(prefix="loraplan-docs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def loraplan(line: str) -> tuple[int, str]:
    """Run `loraplan ...` as a reader in the checkout would; return the exit code and all it printed."""
    program, *words = shlex.split(line.replace("\\\n", " "))
    assert program == "loraplan", line
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": cache(),
        "LORAPLAN_DATA": cache(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli.main", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout


def sessions(block: str) -> list[tuple[str, str]]:
    """(command, output) pairs of a console block."""
    parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", block, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def tidy(output: str) -> str:
    """Output as it stands in the README: no blanks at the ends of lines, no empty lines at its end."""
    return "\n".join(line.rstrip() for line in output.rstrip().splitlines()) + "\n"


# --- what is written ----------------------------------------------------------------------------------------------


def renewed(text: str) -> str:
    """A document with what its commands print now."""

    def block(found: re.Match[str]) -> str:
        return "```console\n" + "\n".join(f"$ {c}\n{tidy(loraplan(c)[1])}" for c, _ in sessions(found[1])) + "```"

    return CONSOLE.sub(block, text)


def accuracy_page(printed: str) -> str:
    """docs/accuracy.md around what `loraplan validate --format markdown` prints."""
    return (
        "# How accurate\n\nWritten by `make readme` with what `loraplan validate --format markdown` prints: every "
        "published run of\n`data/measurements/published.csv` on one GPU, predicted with nothing fitted to these rows. "
        "Percents are signed: below\nzero the prediction is too low.\n\n" + tidy(printed)
    )


def summary(page: str) -> str:
    """What the README shows of docs/accuracy.md: the means over sources and the sentence about verdicts."""
    lines = page.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    head = table[:1] + [line for line in lines if line.startswith(("|-", "| -"))][:1]
    means = [line for line in table if line.startswith(("| * |", "| \\* |"))]
    (sentence,) = [line for line in lines if line.startswith("Of ") and "the verdict is right for" in line]
    return "\n".join((*head, *means, "", sentence)) + "\n"


def with_summary(text: str, page: str) -> str:
    """The README with its block about accuracy."""
    return SUMMARY.sub(lambda found: found[1] + summary(page) + found[2], text)


# --- what changed -------------------------------------------------------------------------------------------------


def changes(before: str, after: str) -> Iterator[Change]:
    """Figures of two versions of a text that differ; new and gone lines with figures count as changed wholly."""
    old, new = (re.findall(r"\S+", text) for text in (before, after))
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "replace":
            continue
        left, right = (NUMBER.findall(" ".join(words)) for words in (old[a:b], new[c:d]))
        where = " ".join(new[max(c - 6, 0) : d])
        if len(left) == len(right):
            yield from (Change(x, y, percent(x, y), where) for x, y in zip(left, right, strict=True) if x != y)
        elif left and right:
            yield Change(" ".join(left), " ".join(right), float("inf"), where)


def percent(before: str, after: str) -> float:
    """The change in per cent of the figure before; infinite from zero."""
    x, y = (float(text.replace(",", "")) for text in (before, after))
    return 0.0 if x == y else float("inf") if x == 0 else 100 * (y - x) / abs(x)


def with_reason(changelog: str, reason: str) -> str:
    """CHANGELOG.md with a reason under "Unreleased", "Changed figures"."""
    heading = "### Changed figures\n"
    start, found, rest = changelog.partition(UNRELEASED)
    if not found:
        raise SystemExit("CHANGELOG.md has no heading 'Unreleased'")
    own, next_release, older = rest.partition("\n## ")
    above, _, listed = own.partition(heading)
    reasons, next_part, below = listed.partition("\n### ")
    lines = [*reasons.strip().splitlines(), f"- {reason.strip()}"]
    own = f"{above.rstrip()}\n\n{heading}\n" + "\n".join(lines) + "\n"
    return start + found + own + next_part + below + next_release + older


def against(reference: str) -> int:
    """Say which figures differ from a git revision; 1 if one does by more than allowed and CHANGELOG.md does not."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    if reference == "changelog":
        reference = git("log", "-1", "--format=%H", "--", "CHANGELOG.md").strip()

    def at(name: str) -> str:
        return git("show", f"{reference}:{name}")

    names = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    large = [
        change
        for name in names
        for change in changes(at(name), (ROOT / name).read_text(encoding="utf-8"))
        if abs(change.per_cent) > WORTH_A_REASON
    ]
    for change in large:
        print(change)
    told = at("CHANGELOG.md") != CHANGELOG.read_text(encoding="utf-8")
    if large and not told:
        print(f"{len(large)} figures changed by more than {WORTH_A_REASON} %; CHANGELOG.md must say why")
    return 1 if large and not told else 0


def main() -> int:
    """Write the documents, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--because", metavar="TEXT", help="why figures change; written into CHANGELOG.md")
    parser.add_argument("--against", metavar="REF", help="compare with a git revision, run nothing")
    options = parser.parse_args()
    if options.against:
        return against(options.against)
    page = accuracy_page(loraplan("loraplan validate --format markdown")[1])
    written = {
        README: with_summary(renewed(README.read_text(encoding="utf-8")), page),
        ACCURACY: page,
        FACTS: loraplan("loraplan validate --format csv")[1],
    }
    found = []
    for path, text in written.items():
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        found += list(changes(before, text)) if path.suffix == ".md" else []
    for change in found:
        print(change)
    large = [change for change in found if abs(change.per_cent) > WORTH_A_REASON]
    if large and not options.because:
        print(f"{len(large)} figures change by more than {WORTH_A_REASON} %: nothing written; say why with --because")
        return 1
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if large:
        CHANGELOG.write_text(with_reason(CHANGELOG.read_text(encoding="utf-8"), options.because), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
