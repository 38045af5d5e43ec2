"""Step: one optimizer step as a training loop runs it, with labels for the tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from calibrate.measure.training_step import TrainingStep
from calibrate.model.layer_paths import LAYER
from calibrate.model.optimizers import make_optimizer
from calibrate.oracle.tracker import Tracker
from planner.device.cuda_rules import (
    CUBLASLT_WORKSPACE_BYTES,
    Architecture,
    cublas_handles,
    cublas_workspace_bytes,
    cublaslt_handles,
)
from planner.training.spec import TrainingSpec


class Step(TrainingStep):
    """A training step whose phases and modules the tracker knows; fake tensors unless `real`."""

    def __init__(self, model: Any, training: TrainingSpec, tracker: Tracker, arch: Architecture, *, real: bool) -> None:
        self.tracker = tracker
        super().__init__(model, training, real=real)
        if arch.blas_workspaces:
            for _ in range(cublas_handles()):
                tracker.allocate(cublas_workspace_bytes(arch.capability), "cublas workspace")
            for _ in range(self._biased_threads()):
                tracker.allocate(CUBLASLT_WORKSPACE_BYTES, "cublas workspace")

    def _prepare(self) -> None:
        layers = [(m[3], module) for name, module in self.base.named_modules() if (m := LAYER.match(name))]
        self.num_layers = len(layers)
        self._label_modules(self.base, {id(module): int(index) for index, module in layers})

    def _biased_threads(self) -> int:
        """Threads with a cuBLASLt workspace (planner.device.cuda_rules.cublaslt_handles)."""
        kinds = (nn.Linear, Conv1D, Linear4bit)
        biased = any(type(m) in kinds and m.bias is not None for m in self.base.modules())
        return cublaslt_handles(biased=biased, recomputes=self.training.gradient_checkpointing != "none")

    def _make_optimizer(self) -> Any:
        return make_optimizer(self.training, self.trainable, self.tracker)

    @property
    def micro_steps(self) -> int:
        """At most two: more look the same."""
        return min(self.training.gradient_accumulation_steps, 2)

    # --- the first step ----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Leave what a first step leaves, in much less time: the optimizer's state, from gradients of zeros.

        Whether that was right shows after the next step (`stands_for_the_first`).
        """
        with torch.no_grad():
            self._enter("backward", "head backward")
            for parameter in self.trainable:
                parameter.grad = torch.zeros_like(parameter)
            self._enter("optimizer", "optimizer")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", "end")
        self.prepared = self.tracker.next_block

    def stands_for_the_first(self) -> bool:
        """Whether the preparation left what a first step leaves.

        Every parameter gets a gradient, hence a state, and no module made anything that stays when it first ran.
        """
        return self.all_have_gradients and not self.tracker.alive_since(self.prepared)

    # --- labels ------------------------------------------------------------------------------------------------

    def _enter(self, phase: str, segment: str) -> None:
        labels = self.tracker.labels
        if phase == "optimizer":
            self.all_have_gradients = all(p.grad is not None for p in self.trainable)
        labels.phase, labels.segment = phase, segment
        labels.modules.clear()
        labels.backward_module = ""

    def _label_modules(self, base: nn.Module, layers: dict[int, int]) -> None:
        for name, module in base.named_modules():
            if not name or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            layer = layers.get(id(module))
            module.register_forward_pre_hook(self._before(name, layer))
            module.register_forward_hook(self._after(name, layer))

    def _before(self, name: str, layer: int | None) -> Callable[..., None]:
        labels = self.tracker.labels

        def hook(module: nn.Module, args: Any) -> None:
            labels.modules.append(name)
            if layer is None:
                return
            if labels.phase == "forward":
                labels.segment = f"layer.{layer} forward"
            elif labels.phase == "recompute":  # a reentrant checkpoint reruns the layer before any of its nodes
                labels.segment = f"layer.{layer} backward"

        return hook

    def _after(self, name: str, layer: int | None) -> Callable[..., None]:
        labels = self.tracker.labels
        last = self.num_layers - 1

        def entering_backward(*grads: Any) -> None:
            labels.backward_module = name
            if layer is not None:
                labels.segment = f"layer.{layer} backward"

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if labels.modules:
                labels.modules.pop()
            if layer == last and labels.phase == "forward":
                labels.segment = "head"
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor) and first.grad_fn is not None:
                first.grad_fn.register_prehook(entering_backward)

        return hook

    # --- checkpointing -----------------------------------------------------------------------------------------

    def _enable_checkpointing(self) -> None:
        super()._enable_checkpointing()
        for module in self.base.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                checkpoint = module._gradient_checkpointing_func
                if self.training.gradient_checkpointing == "offload":
                    checkpoint = self._offloading(checkpoint)
                module._gradient_checkpointing_func = self._labelled_checkpoint(checkpoint)

    def _labelled_checkpoint(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        labels = self.tracker.labels
        offloads = self.training.gradient_checkpointing == "offload"

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            flag = torch.is_autocast_enabled("cuda")
            if not offloads and args and isinstance(args[0], torch.Tensor):
                self.tracker.mark_checkpoint(args[0])

            def labelled(*inner: Any, **named: Any) -> Any:
                if labels.phase != "backward":
                    return function(*inner, **named)
                depth = len(labels.modules)
                before = torch.is_autocast_enabled("cuda")
                labels.phase = "recompute"
                torch.set_autocast_enabled("cuda", flag)
                try:
                    return function(*inner, **named)
                finally:  # the recomputation may stop early by an exception, without the modules' hooks
                    labels.phase = "backward"
                    del labels.modules[depth:]
                    torch.set_autocast_enabled("cuda", before)

            return checkpoint(labelled, *args, **kwargs)

        return run

    def _offloading(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Checkpoints in pinned host memory, as transformers' activation_checkpointing_enable(offload=True)."""
        tracker = self.tracker

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            with tracker.ignore():
                return tensor.detach().clone()

        def to_device(tensor: torch.Tensor) -> torch.Tensor:
            loaded = tensor.clone()
            tracker.mark_checkpoint(loaded)
            return loaded

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
                return checkpoint(function, *args, **kwargs)

        return run
