"""Read the example configs that frameworks publish, and print which share is read without a gap that changes memory.

    python benchmarks/real_configs.py [--mirrors FOLDER] [--list] [--limit SHARE]

The examples are fetched with git (a shallow bare clone of each public repository into FOLDER/<owner>+<name>/repo, kept
for the next run) and read from it; none of their text is kept in this project. `--list` prints every file with its
outcome. Counted in the share: configs that fine-tune a LoRA or QLoRA adapter on given rows, on one GPU, of a model
family that is known here. Refused kinds (reinforcement learning, preference pairs, several GPUs, ...) and unknown
families are counted apart and listed. The exit code is 1 when a file crashes, fewer than 150 are read, or the share is
below --limit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from planner.base.errors import NotPlanned, PlannerError
from planner.facts import catalog
from planner.importers import Job, read_job
from planner.importers.model_names import stand_ins

SOURCES = {
    "axolotl-ai-cloud/axolotl": r"examples/.*\.ya?ml",
    "hiyouga/LLaMA-Factory": r"examples/.*\.(ya?ml|json)",
    "huggingface/trl": r"(examples|trl/accelerate_configs)/.*\.(ya?ml|ipynb|py)",
    "pytorch/torchtune": r"recipes/configs/.*\.yaml",
    "Lightning-AI/litgpt": r"config_hub/finetune/.*\.yaml",
    "huggingface/peft": r"(examples/.*\.(ya?ml|ipynb|py|json)|method_comparison/.*adapter_config\.json)",
    "huggingface/accelerate": r"examples/.*\.(ya?ml|json)",
    "unslothai/unsloth": r"studio/backend/assets/configs/.*\.yaml",
}
"""Public repositories and the paths of their examples."""

CHANGES_MEMORY = ("more", "less", "unknown")
_SIZE = re.compile(r"^(.*?)[-_]?v?\d+(\.\d+)?[bm]([-_.].*)?$", re.IGNORECASE)


class Outcome(NamedTuple):
    """What became of one file."""

    path: str
    kind: str
    """read, gap, refused, no config, unreadable, crash."""
    detail: str
    job: Job | None = None

    @property
    def adapts(self) -> bool:
        """Whether the job trains a LoRA or QLoRA adapter."""
        method = self.job.values.get("method") if self.job else None
        return method is not None and method.value in ("lora", "qlora")


def repository(name: str, mirrors: Path) -> Path:
    """Return the git directory of a repository, cloned if it is not there."""
    folder = mirrors / name.replace("/", "+") / "repo"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        clone = ["git", "clone", "--quiet", "--depth", "1", "--bare", f"https://github.com/{name}", str(folder)]
        subprocess.run(clone, check=True)
    return folder


def examples(folder: Path, pattern: str, into: Path) -> Iterator[Path]:
    """Write the files of a repository that match a pattern, beside all config files they may name; yield them."""
    git = ["git", f"--git-dir={folder}"]
    names = subprocess.run([*git, "ls-tree", "-r", "--name-only", "HEAD"], capture_output=True, text=True, check=True)
    wanted = [name for name in names.stdout.splitlines() if re.fullmatch(pattern, name)]
    for name in wanted:
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(subprocess.run([*git, "show", f"HEAD:{name}"], capture_output=True, check=True).stdout)
    yield from (into / name for name in wanted)


def read(path: Path, shown: str) -> Outcome:
    """Read one file as a job of its own."""
    try:
        job = read_job([str(path)])
    except NotPlanned as error:
        return Outcome(shown, "refused", str(error).partition(": ")[2])
    except PlannerError as error:
        kind = "no config" if "known formats" in str(error) or "holds" in str(error) else "unreadable"
        return Outcome(shown, kind, str(error))
    except Exception as error:  # noqa: BLE001 - a crash is what this script looks for
        return Outcome(shown, "crash", f"{type(error).__name__}: {error}")
    gaps = [missing.text for missing in job.missing if missing.effect in CHANGES_MEMORY]
    return Outcome(shown, "gap" if gaps else "read", "; ".join(gaps), job)


def is_known_family(model: str | None, series: set[str]) -> bool:
    """Whether the catalogue has the model, one of its name, or another size of its series."""
    if not model:
        return False
    if catalog.model_record(model) is not None or next(stand_ins(model), None) is not None:
        return True
    match = _SIZE.match(model.rpartition("/")[2])
    return match is not None and match.group(1).lower() in series


def known_series() -> set[str]:
    """Return the names of the catalogue's models up to their size: qwen3, llama-3.1, gemma-2, ..."""
    names = [name.rpartition("/")[2] for name in [*catalog.model_ids(), *catalog.model_aliases()]]
    return {match.group(1).lower() for name in names if (match := _SIZE.match(name)) and match.group(1)}


def report(outcomes: list[Outcome], show: bool) -> float:
    """Print the counts and return the share."""
    series = known_series()
    print(
        f"{len(outcomes)} files: " + ", ".join(f"{n} {kind}" for kind, n in Counter(o.kind for o in outcomes).items())
    )
    adapting = [o for o in outcomes if o.adapts]
    counted = [o for o in adapting if is_known_family(o.job.model if o.job else None, series)]
    clean = [o for o in counted if o.kind == "read"]
    share = len(clean) / len(counted) if counted else 0.0
    print(f"LoRA and QLoRA jobs on one GPU: {len(adapting)}, of known model families {len(counted)}")
    print(f"read without a gap that changes memory: {len(clean)} of {len(counted)}, {100 * share:.1f} %")
    everywhere = [o for o in adapting if o.kind == "read"]
    print(f"of all families: {len(everywhere)} of {len(adapting)}, {100 * len(everywhere) / len(adapting):.1f} %")
    for title, kind in (("refused", "refused"), ("not read", "unreadable")):
        print(f"\n{title}:")
        for reason, number in Counter(
            re.sub(r"'.*?'", "...", o.detail)[:110] for o in outcomes if o.kind == kind
        ).most_common():
            print(f"  {number:4} {reason}")
    print("\ngaps in counted jobs:")
    for o in counted:
        if o.kind == "gap":
            print(f"  {o.path}: {o.detail}")
    if show:
        print()
        for o in outcomes:
            print(f"{o.kind:10} {o.path} {o.detail}")
    return share


def main() -> int:
    """Fetch, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirrors", type=Path, default=Path(".mirrors"), help="where the clones are kept")
    parser.add_argument("--list", action="store_true", help="print every file")
    parser.add_argument("--limit", type=float, default=0.95, help="least share that passes")
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, pattern in SOURCES.items():
            root = Path(folder, name.replace("/", "+"))
            for path in examples(repository(name, options.mirrors), pattern, root):
                outcomes.append(read(path, f"{name}/{path.relative_to(root)}"))
    share = report(outcomes, options.list)
    crashed = [o for o in outcomes if o.kind == "crash"]
    for o in crashed:
        print(f"CRASH {o.path}: {o.detail}")
    readable = sum(o.kind in ("read", "gap", "refused") for o in outcomes)
    return int(bool(crashed) or readable < 150 or share < options.limit)


if __name__ == "__main__":
    sys.exit(main())
