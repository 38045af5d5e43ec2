"""Stream a million rows through `loraplan data`: `python benchmarks/data.py [ROWS] [TOKENIZER]`.

Rows are about 1 kB of words drawn with a seed (1 GB for a million). The second argument is a tokenizer's folder: then a
tenth of the rows is counted with it. Each measurement is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
BROKEN_EVERY = 100_000


def generate(path: Path, rows: int) -> None:
    """Write rows of Alpaca data, a broken line among every 100,000."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            if number % BROKEN_EVERY == BROKEN_EVERY - 1:
                file.write("{broken\n")
                continue
            length = rng.randrange(20, 220)
            start = rng.randrange(len(WORDS) - length)
            text = " ".join(WORDS[start : start + length])
            row = {"instruction": f"Summarize text {number}", "input": text, "output": text[: len(text) // 3]}
            file.write(json.dumps(row) + "\n")


def measure(path: str, tokenizer: str | None) -> None:
    """Scan one file in this process and print what it took."""
    from planner.runs.dataset.scan import Source, scan

    start, cpu = time.perf_counter(), time.process_time()
    found = scan(Source(paths=(path,), tokenizer=tokenizer))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{len(found.lengths):,} rows, {found.num_problems} left out, {found.bytes / 1e6:,.0f} MB in {seconds:.1f} s: "
        f"{found.bytes / 1e6 / seconds:.1f} MB/s, {cpu / seconds:.2f} cores "
        f"({found.bytes / 1e6 / cpu:.1f} MB per second of CPU), "
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )


def main() -> None:
    """Generate, measure, clean up."""
    if len(sys.argv) > 1 and sys.argv[1] == "--measure":
        measure(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder, "whole.jsonl"), Path(folder, "part.jsonl")
        generate(whole, rows)
        command = [sys.executable, __file__, "--measure"]
        subprocess.run([*command, str(whole)], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
        if len(sys.argv) > 2:
            generate(part, rows // 10)
            subprocess.run([*command, str(part), sys.argv[2]], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    main()
