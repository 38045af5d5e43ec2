"""PlannerCallback: records a real Trainer run's step times and peaks beside the prediction; never disturbs it.

    trainer = Trainer(..., callbacks=[calibrate.PlannerCallback()])

Works with transformers' Trainer and TRL's trainers. Nothing is synchronised and nothing is moved; any failure inside
is a warning and switches the callback off.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from calibrate.fit.measurements import device_gpu, write_json
from calibrate.fit.measurements import to_document as _document
from calibrate.measure.device import Device, open_device
from calibrate.model.layer_paths import IN_LAYER
from planner.base.errors import one_line
from planner.base.units import gib, seconds
from planner.facts import calibration_files
from planner.model import families
from planner.plan.predict import Prediction, predict
from planner.training.optimizers import by_transformers_name
from planner.training.quantizations import EIGHT_BIT, by_bnb_type
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

WARMUP = 3
"""First steps that do not count: kernels are loaded, the optimizer makes its state."""
KEPT = 500
"""Step times that are stored."""
OPTIMIZERS = by_transformers_name()
"""TrainingArguments.optim -> loraplan's name."""


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Whatever goes wrong in here must not reach the training loop."""

    @functools.wraps(method)
    def guarded(self: Any, *arguments: Any, **named: Any) -> None:
        if self.broken:
            return
        try:
            method(self, *arguments, **named)
        except Exception as error:  # noqa: BLE001 - a planner's fault must never stop a training run
            self.broken = True
            warnings.warn(f"loraplan's callback stops: {type(error).__name__}: {error}", stacklevel=2)
            self.release()

    return guarded


class PlannerCallback(TrainerCallback):
    """Measures a training run and prints predicted against measured at its end.

    Args:
        output: the measurement file; by default a new one in the user's data folder. It can be given to
            `loraplan calibrate fit` with others.
    """

    def __init__(self, output: str | Path | None = None) -> None:
        self.output = Path(output) if output is not None else None
        self.broken = False
        self.times: list[float] = []
        self.longest = (0, 0)
        self.hook: Any = None
        self.device: Device | None = None
        self.request: dict[str, Any] = {}

    def release(self) -> None:
        """Take the hook off the model."""
        hook, self.hook = self.hook, None
        if hook is not None:
            hook.remove()

    @_harmless
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if not state.is_world_process_zero or args.world_size > 1:
            self.broken = True  # several GPUs are not modelled
            return
        parameter = next(model.parameters())
        on_gpu = parameter.device.type == "cuda"
        self.device = open_device(str(parameter.device) if on_gpu else "cpu", torch.get_num_threads())
        self.request = describe(args, model)
        self.hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        """Note the largest batch; the shape alone is looked at."""
        ids = named.get("input_ids")
        if ids is not None and ids.ndim == 2 and ids.numel() > self.longest[0] * self.longest[1]:
            self.longest = (int(ids.shape[0]), int(ids.shape[1]))

    @_harmless
    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.times.append(time.perf_counter())

    @_harmless
    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.release()
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)][WARMUP:]
        if not steps or self.device is None or not self.longest[1]:
            return
        identity = self.device.identity()
        identity.setdefault("kind", self.device.kind)
        training = {**self.request["training"], "micro_batch_size": self.longest[0], "seq_len": self.longest[1]}
        request = {**self.request, "training": training, "device_kind": self.device.kind}
        result = {
            "status": "ok", "steps_s": steps[:KEPT], "memory": {"steady step": self.device.peak()},
            "versions": _versions(),
        }  # fmt: skip
        path = self._store(identity, request, result)
        self._print(identity, request, steps, path)

    def _store(self, identity: dict[str, Any], request: dict[str, Any], result: dict[str, Any]) -> Path:
        created = datetime.now(timezone.utc)
        path = self.output
        if path is None:
            folder = calibration_files.user_folder().parent / "runs"
            path = folder / f"trainer-{created.strftime('%Y%m%d-%H%M%S')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        document = _document([])
        document["runs"] = [
            {
                "device": identity, "created": created.isoformat(timespec="seconds"),
                "bursts": [{"request": request, "result": result}],
            }
        ]  # fmt: skip
        write_json(path, document)
        return path

    def _print(self, identity: dict[str, Any], request: dict[str, Any], steps: list[float], path: Path) -> None:
        from planner.training.spec import training_from_dict

        middle = sorted(steps)[len(steps) // 2]
        spec = families.build_spec(request["config"], model_id=request["model"])
        gpu = device_gpu(identity)
        chosen = calibration_files.select(gpu)
        found = predict(spec, training_from_dict(request["training"]), gpu, coefficients=chosen.coefficients)
        lines = [f"loraplan: {len(steps)} steps measured, stored in {path}"]
        if found.step_s is not None:
            low, high = seconds(found.step_s.low), seconds(found.step_s.high)
            predicted = f"predicted {seconds(found.step_s.expected)} ({low} to {high})"
            lines.append(f"  step       measured {seconds(middle)}, {predicted}")
        lines += self._memory_lines(found)
        print("\n".join(lines), file=sys.stderr)

    def _memory_lines(self, found: Prediction) -> list[str]:
        assert self.device is not None
        peak = self.device.peak()
        return [
            f"  {name:<10} measured {gib(peak[name])} GiB, predicted {gib(getattr(found, name).expected)} GiB"
            for name in ("allocated", "reserved")
            if name in peak
        ]


def describe(args: Any, model: Any) -> dict[str, Any]:
    """Model and settings of a Trainer run as a burst's request (batch and length are seen later).

    Raises:
        ValueError: an optimizer or a quantization that loraplan does not model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.to_dict()
    optimizer = OPTIMIZERS.get(str(getattr(args.optim, "value", args.optim)))
    if optimizer is None:
        raise ValueError(f"optimizer {one_line(str(args.optim))} is not modelled")
    lora = _lora(model)
    quantization = _quantization(config.get("quantization_config"))
    method: Any = ("qlora" if quantization.kind != "none" else "lora") if lora else "full"
    autocast: Any = "bf16" if args.bf16 else "fp16" if args.fp16 else "none"
    training = TrainingSpec(
        method=method,
        lora=lora,
        quantization=quantization,
        gradient_accumulation_steps=int(args.gradient_accumulation_steps),
        gradient_checkpointing="full" if args.gradient_checkpointing else "none",
        attention="eager" if getattr(base.config, "_attn_implementation", "sdpa") == "eager" else "sdpa",
        optimizer=optimizer,  # type: ignore[arg-type]
        autocast=autocast,
        base_dtype=_base_dtype(base),
        max_grad_norm=float(args.max_grad_norm or 0.0),
        outputs_to_fp32=autocast != "none",
        device_map=quantization.kind != "none",
    )
    name = str(getattr(base.config, "_name_or_path", "") or config.get("model_type", "model"))
    return {
        "model": Path(name).name, "config": _plain(config), "layers": None, "training": training.describe(),
        "source": "trainer",
    }  # fmt: skip


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config's plain values (a quantization_config holds objects)."""
    kinds = (str, int, float, bool, list, type(None), dict)
    return {k: v for k, v in config.items() if isinstance(v, kinds) and k != "quantization_config" and k[0] != "_"}


def _lora(model: Any) -> LoraSpec | None:
    found = getattr(model, "peft_config", None)
    if not found:
        return None
    config = found[getattr(model, "active_adapter", "default")]
    targets = config.target_modules
    dtypes = {str(p.dtype) for name, p in model.named_parameters() if "lora_A" in name}
    return LoraSpec(
        r=int(config.r),
        lora_alpha=float(config.lora_alpha),
        lora_dropout=float(config.lora_dropout),
        target_modules=(targets,) if isinstance(targets, str) else _targets(sorted(targets), _depth(model)),
        use_dora=bool(config.use_dora),
        dtype="fp32" if dtypes <= {"torch.float32"} else "bf16",
    )


def _depth(model: Any) -> int:
    return int(getattr(model.config, "num_hidden_layers", 0))


def _targets(names: list[str], depth: int) -> tuple[str, ...]:
    """Module names as a user gives them: PEFT writes "all-linear" out as the full names of all layers' modules.

    Raises:
        ValueError: layers with different adapters, which loraplan does not model.
    """
    layers: dict[str, set[str]] = {}
    short = set()
    for name in names:
        found = IN_LAYER.match(name)
        if found is None:
            short.add(name)
        else:
            layers.setdefault(found[1], set()).add(name[found.end() :])
    different = {frozenset(members) for members in layers.values()}
    if len(different) > 1 or (layers and depth and len(layers) != depth):
        raise ValueError("adapters that differ between layers are not modelled")
    return tuple(sorted(short.union(*different)))


def _quantization(found: Any) -> QuantizationSpec:
    if not found:
        return QuantizationSpec()
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_8bit"):
        eight: Any = EIGHT_BIT
        return QuantizationSpec(kind=eight)
    if not values.get("load_in_4bit"):
        raise ValueError(f"quantization {values.get('quant_method')} is not modelled here")
    dtypes: dict[str, Any] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    compute = str(values.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    kind: Any = by_bnb_type()[values["bnb_4bit_quant_type"]]
    return QuantizationSpec(
        kind=kind, double_quant=bool(values.get("bnb_4bit_use_double_quant")),
        compute_dtype=dtypes.get(compute, "fp32"),
    )  # fmt: skip


def _base_dtype(model: Any) -> Any:
    dtypes: dict[str, Any] = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
    return dtypes.get(str(model.get_input_embeddings().weight.dtype), "fp32")


def _versions() -> dict[str, str]:
    from calibrate.measure.burst import versions

    return versions()
