"""Training steps of old releases of transformers, traced once and kept, for tests/step/test_old_releases.py.

An old transformers cannot lie beside the one that the project is tested with, so each has an environment of its own:

    python3.11 -m venv /tmp/old && /tmp/old/bin/pip install torch==2.13.0 "numpy<2" transformers==4.44.2 peft==0.12.0 \\
        accelerate bitsandbytes==0.50.2
    PYTHONPATH=. /tmp/old/bin/python -m benchmarks.old_release_traces

records every case of tests/traces/cases.json that the release has a class for in tests/traces/transformers-4.44.json
(`--only NAME` prints instead). `calibrate.oracle.trace` runs the genuine classes under fake tensors; what is adapted
here is how it calls them, never what they do: names of arguments, where a list lies, a check that reads data. One thing
is undone: code that asks for a CUDA device is taken (`_CUDA_BRANCHES`), because the tensors stand for a GPU's.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

FOLDER = Path(__file__).parents[1] / "tests" / "traces"
TIE = 0.999
"""A segment that reaches this share of the peak may be the peak's in the program."""

_CUDA_BRANCHES = re.compile(r"""device\.type (?:== "cuda"|in \["cuda", "xpu"(?:, "[a-z]+")*\])""")
"""Python that a CUDA tensor runs and a CPU tensor does not: contiguous copies for a masked attention kernel, rows of a
mask that hold no token."""


class _OnDevice(importlib.machinery.SourceFileLoader):
    """Load a module of transformers as if the tensors that stand for a GPU's said so."""

    def get_data(self, path: str) -> bytes:
        data = super().get_data(path)
        if not path.endswith(".py"):
            raise OSError("no byte code: the source is changed")
        return _CUDA_BRANCHES.sub("device.type in ('cuda', 'cpu')", data.decode()).encode()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(("transformers.models.", "transformers.modeling_attn")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin and spec.submodule_search_locations is None:
            spec.loader = _OnDevice(fullname, spec.origin)
        return spec


# --- what the tracer calls by today's names -------------------------------------------------------------------------


def _old_names(stack: ExitStack) -> None:
    """Give an old transformers the names that the tracer uses."""
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedModel, integrations
    from transformers.quantizers import base

    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if not hasattr(PreTrainedModel, name):
            setattr(PreTrainedModel, name, None)
    if isinstance(vars(PreTrainedModel).get("loss_function"), property):  # since 4.46, later with a setter
        PreTrainedModel.loss_function = None
    if not hasattr(transformers.PretrainedConfig, "get_text_config"):
        transformers.PretrainedConfig.get_text_config = lambda self, *a, **k: self
    if not hasattr(base.HfQuantizer, "get_modules_to_not_convert"):
        base.HfQuantizer.get_modules_to_not_convert = staticmethod(
            lambda model, skip, kept: [*integrations.get_keys_to_not_convert(model), *(kept or [])]
        )
    # it only warns, of a padding token among the ids
    stack.enter_context(
        patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *a: None, create=True)
    )
    original = AutoModelForCausalLM.from_config

    def from_config(config: Any, *, dtype: Any, attn_implementation: str) -> Any:
        return original(config, torch_dtype=dtype, attn_implementation=attn_implementation)

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56):
        stack.enter_context(patch.object(AutoModelForCausalLM, "from_config", from_config))


def _data_that_fake_tensors_do_not_have(stack: ExitStack, *, padded: bool) -> None:
    """Answers to questions about values: whether a mask masks anything, which tokens an expert gets."""
    import torch

    try:
        from transformers import modeling_attn_mask_utils as masks
    except ImportError:
        return
    real = torch.all

    def every(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        real(tensor, *args, **kwargs)
        return not padded

    stand_in = types.SimpleNamespace(**{n: getattr(torch, n) for n in dir(torch) if not n.startswith("__")})
    stand_in.all = every
    stand_in.rand = lambda *args: 1.0  # which layers layerdrop spares: all of them
    for module in (masks, *_models()):
        if hasattr(module, "torch") and re.search(r"torch\.(all|rand)\(", Path(module.__file__).read_text()):
            stack.enter_context(patch.object(module, "torch", stand_in))


def _models() -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name and getattr(module, "__file__", None):
            yield module


@contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _old_layout(stack: ExitStack, *, padded: bool) -> None:
    """Parts of the tracer that patch modules an old release does not have."""
    from calibrate.measure import training_step
    from calibrate.model import fake_model
    from calibrate.oracle import cuda_semantics

    try:
        from transformers import masking_utils
    except ImportError:
        stack.enter_context(patch.object(cuda_semantics, "transformers_as_on_device", _nothing))
        stack.enter_context(patch.object(training_step.TrainingStep, "_batch", _batch_with_mask))
    else:
        if padded:  # it reads the mask's values; without padding there is no mask
            stack.enter_context(patch.object(masking_utils, "_ignore_causal_mask_sdpa", lambda *a, **k: False))
    try:
        from peft.tuners.lora.dora import DoraLinearLayer  # noqa: F401
    except ImportError:
        stack.enter_context(patch.object(fake_model, "_dora_on_meta", nullcontext))
        stack.enter_context(patch.object(fake_model, "quantized_parameters", nullcontext))
    stack.enter_context(patch.object(training_step.TrainingStep, "_enable_checkpointing", _checkpoints))
    _adapters_on_meta(stack)


def _batch_with_mask(self: Any) -> dict[str, Any]:
    """Token ids, labels and a mask, of ones unless the case is padded: what a collator of these releases hands on."""
    import torch

    shape = (self.training.micro_batch_size, self.training.seq_len)
    ids = torch.empty(shape, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones(shape, dtype=torch.int64)}


def _checkpoints(self: Any) -> None:
    """What TrainingStep does; adapters under checkpoints need inputs with gradients, which callers enabled themselves.

    (TRL, PEFT's prepare_model_for_kbit_training, LLaMA-Factory; transformers 5.18's activation_checkpointing_enable.)
    """
    if self.training.method != "full":
        self.base.enable_input_require_grads()
    self.base.gradient_checkpointing_enable({"use_reentrant": self.training.use_reentrant})


def _adapters_on_meta(stack: ExitStack) -> None:
    """get_peft_model(low_cpu_mem_usage=True) came with PEFT 0.13; before, adapters follow their base weight."""
    import inspect

    import peft

    original: Callable[..., Any] = peft.get_peft_model
    if "low_cpu_mem_usage" not in inspect.signature(original).parameters:

        def get_peft_model(model: Any, settings: Any, *, low_cpu_mem_usage: bool) -> Any:
            return original(model, settings)

        stack.enter_context(patch.object(peft, "get_peft_model", get_peft_model))


# --- recording ------------------------------------------------------------------------------------------------------


def record(case: dict[str, Any]) -> dict[str, Any]:
    """Trace one case -> peak bytes, its place, its owners, and the places that come as near as `TIE`."""
    from calibrate.measure import training_step
    from calibrate.model import fake_model
    from calibrate.oracle import agreement, ledger
    from calibrate.oracle.trace import trace
    from planner.training.spec import training_from_dict

    training = training_from_dict(case["training"])
    built = fake_model.model_config

    def model_config(*args: Any) -> Any:
        made = built(*args)
        made.use_cache = case.get("use_cache", False)
        return made

    with ExitStack() as stack:
        _old_names(stack)
        _old_layout(stack, padded=training.padded)
        fake_model.model_config(case["config"])
        from transformers import AutoModelForCausalLM

        kind = AutoModelForCausalLM._model_mapping[type(fake_model.model_config(case["config"]))]
        if not hasattr(sys.modules[kind.__module__], "create_causal_mask"):  # the class makes its mask itself
            stack.enter_context(patch.object(training_step.TrainingStep, "_batch", _batch_with_mask))
        _data_that_fake_tensors_do_not_have(stack, padded=training.padded)
        stack.enter_context(patch.object(fake_model, "model_config", model_config))
        result = trace(case["config"], training)
    peak = result.events[result.peak_event]
    near: dict[str, int] = {}
    for segment, bytes_ in result.segment_peaks.items():
        if bytes_ >= TIE * result.peak_bytes and segment != peak.segment:
            near.setdefault(agreement.merged(segment), result.segment_peak_events[segment])
    first = agreement.merged(peak.segment)
    moments = {first: result.peak_event, **{name: at for name, at in near.items() if name != first}}
    return {
        "peak_bytes": result.peak_bytes,
        "op": peak.op,
        "moments": {name: dict(ledger.ledger_at(result, at)) for name, at in moments.items()},
    }


def defaults() -> dict[str, Any]:
    """What the release does unless told: the reentrant checkpoint, the trainer's optimizer, dtype of the weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    checkpoint = next(m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func"))
    fields = TrainingArguments.__dataclass_fields__
    optimizer = fields["optim"].default
    return {
        "use_reentrant": checkpoint._gradient_checkpointing_func.keywords["use_reentrant"],
        "optim": getattr(optimizer, "value", optimizer) or fields["optim"].default_factory(),
        "per_device_train_batch_size": fields["per_device_train_batch_size"].default,
        "max_grad_norm": fields["max_grad_norm"].default,
    }


def classes(model_types: set[str]) -> dict[str, dict[str, bool]]:
    """What the modeling files of a release say that shows in no peak of torch 2.13, or only beside another answer."""
    import transformers

    found = {}
    for name in sorted(model_types):
        path = Path(transformers.__file__).parent / "models" / name / f"modeling_{name}.py"
        if path.exists():
            text = path.read_text()
            found[name] = {
                "sdpa": "_supports_sdpa = True" in text,
                "slices_hidden": re.search(r"(slice_indices|logits_to_keep):?, :", text) is not None,
            }
    return found


def main() -> None:
    """Record every case with the installed transformers, or print some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    sys.meta_path.insert(0, _Finder())
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    import bitsandbytes  # noqa: F401
    import torch

    with patch.object(torch.cuda, "is_available", lambda: True):  # old releases import bitsandbytes beside a GPU only
        import transformers.integrations.bitsandbytes  # noqa: F401
    from calibrate.oracle.trace import _versions
    from planner.base.errors import PlannerError

    versions = _versions()
    name = ".".join(versions["transformers"].split(".")[:2])
    found: dict[str, Any] = {}
    absent: dict[str, str] = {}
    failed: list[str] = []
    for case in json.loads((FOLDER / "cases.json").read_text())["cases"]:
        if options.only and not any(part in case["name"] for part in options.only):
            continue
        try:
            found[case["name"]] = record(case)
        except PlannerError as error:
            absent[case["name"]] = str(error).split(";")[0]
        except Exception as error:  # told here and in the record
            if options.only:
                raise
            failed.append(case["name"])
            print(f"{name} {case['name']}: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        if options.only:
            print(case["name"], json.dumps(found.get(case["name"]), indent=1))
    if options.only:
        return
    document = {"versions": versions, "defaults": defaults(), "without_the_class": sorted(absent)}
    if failed:
        document["not_traced"] = failed
    everything = json.loads((FOLDER / "cases.json").read_text())["cases"]
    document["classes"] = classes({case["config"]["model_type"] for case in everything})
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    (FOLDER / f"transformers-{name}.json").write_text(f'{{\n{head},\n "cases": {{\n{lines}\n }}\n}}\n')
    print(name, len(found), "cases; absent:", absent)


if __name__ == "__main__":
    main()
