"""Check exports with the frameworks' own classes: `python .ci/check_exports.py` (network; a few minutes).

Downloads the wheels named below into a temporary folder without their dependencies (their pins exclude each other and
this project's), imports the classes that read a config, and lets them read what `planner.exporters` writes. Also writes
tests/exporters/framework_fields.json, against which the test suite checks keys on every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AXOLOTL = ("axolotl==0.19.0",), ("addict", "pydantic")
LLAMA_FACTORY = ("llamafactory==0.9.5",), ("omegaconf", "transformers==5.6.0")
FIELDS = ROOT / "tests" / "exporters" / "framework_fields.json"

CHECK_AXOLOTL = """
import json, sys, yaml
from axolotl.utils.schemas.config import AxolotlInputConfig
for path in sys.argv[1:]:
    with open(path) as file:
        AxolotlInputConfig(**yaml.safe_load(file))
names = {name for name in AxolotlInputConfig.model_fields}
names |= {f.alias for f in AxolotlInputConfig.model_fields.values() if f.alias}
# keys of the Liger plugin, which its own class reads
names |= {"liger_fused_linear_cross_entropy"}
print("FIELDS", json.dumps(sorted(names)))
"""
CHECK_LLAMA_FACTORY = """
import dataclasses, json, sys, yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from llamafactory.hparams.data_args import DataArguments
from llamafactory.hparams.finetuning_args import FinetuningArguments
from llamafactory.hparams.generating_args import GeneratingArguments
from llamafactory.hparams.model_args import ModelArguments
classes = (ModelArguments, DataArguments, Seq2SeqTrainingArguments, FinetuningArguments, GeneratingArguments)
for path in sys.argv[1:]:
    with open(path) as file:
        HfArgumentParser(classes).parse_dict({**yaml.safe_load(file), "use_cpu": True, "bf16": False})
print("FIELDS", json.dumps(sorted({f.name for c in classes for f in dataclasses.fields(c)})))
"""
CHECK_TRL = """
import dataclasses, json, sys
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
classes = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
for path in sys.argv[1:]:
    TrlParser(classes).parse_args_and_config(["--config", path])
print("FIELDS", json.dumps(sorted({f.name for c in classes for f in dataclasses.fields(c)})))
"""


def install(folder: Path, what: tuple[tuple[str, ...], tuple[str, ...]]) -> dict[str, str]:
    """Put a framework (alone) and what its config classes import into `folder`; return the environment for it."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
    subprocess.run([*pip, "--no-deps", *what[0]], check=True)
    subprocess.run([*pip, *what[1]], check=True)
    return {**os.environ, "PYTHONPATH": str(folder), "DISABLE_VERSION_CHECK": "1"}


def configs(folder: Path) -> dict[str, list[str]]:
    """Write the YAML of every method and padding for every framework."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.export_cases import TRAININGS, recipe
    from planner.exporters import frameworks

    exporters = {"axolotl": frameworks.axolotl, "llama-factory": frameworks.llama_factory, "trl": frameworks.trl}
    found: dict[str, list[str]] = {target: [] for target in exporters}
    for name, training in TRAININGS.items():
        for padding in ("longest", "grouped", "packed"):
            for shape in ("alpaca", "messages", "sharegpt", "prompt", "text"):
                made = recipe(training, padding=padding, data_shape=shape, output_dir=str(folder / "out"))
                for target, export in exporters.items():
                    path = folder / f"{target}-{name}-{padding}-{shape}.yaml"
                    text = export(made).artifacts[0].text
                    # bf16 asks for a GPU while the arguments are built
                    path.write_text(text + ("use_cpu: true\n" if target == "trl" else ""), encoding="utf-8")
                    found[target].append(str(path))
    return found


def main() -> int:
    """Validate every config; return 0 only if all were accepted."""
    failed = []
    recorded = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = configs(folder)
        trl = {**os.environ, "ACCELERATE_USE_CPU": "1"}
        for target, code, environment, version in (
            ("trl", CHECK_TRL, trl, "1.16.0"),
            ("axolotl", CHECK_AXOLOTL, install(folder / "axolotl", AXOLOTL), "0.19.0"),
            ("llama-factory", CHECK_LLAMA_FACTORY, install(folder / "factory", LLAMA_FACTORY), "0.9.5"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", code, *written[target]], env=environment, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            print(f"{target} {version}: {len(written[target])} configs, {'accepted' if not done.returncode else 'NOT'}")
            if done.returncode:
                failed.append(f"{target}:\n{done.stderr[-3000:]}")
                continue
            line = next(line for line in done.stdout.splitlines() if line.startswith("FIELDS "))
            recorded[target] = {"version": version, "fields": json.loads(line.removeprefix("FIELDS "))}
    if failed:
        print(*failed, sep="\n")
        return 1
    FIELDS.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
