"""Step: one optimizer step as a training loop runs it, with labels for the tracker."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from calibrate.optimizers import make_optimizer
from calibrate.tracker import Tracker
from planner.cuda_rules import Architecture, cublas_handles, cublas_workspace_bytes
from planner.training import TrainingSpec

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYER = re.compile(r"(.*\.)?(layers|h|blocks|block)\.(\d+)$")


class Step:
    """Runs forward, loss, backward, clipping, optimizer; every call is one optimizer step."""

    def __init__(self, model: Any, training: TrainingSpec, tracker: Tracker, arch: Architecture, *, real: bool) -> None:
        self.model = model
        self.training = training
        self.tracker = tracker
        self.arch = arch
        self.real = real
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.vocab_size = int(base.config.get_text_config().vocab_size)
        layers = [(m[3], module) for name, module in base.named_modules() if (m := LAYER.match(name))]
        self.num_layers = len(layers)
        if training.gradient_checkpointing != "none":
            self._enable_checkpointing(base)
        self._label_modules(base, {id(module): int(index) for index, module in layers})
        base.loss_function = self._loss
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(training, self.trainable, tracker, arch)
        if arch.blas_workspaces:
            for _ in range(cublas_handles()):
                tracker.allocate(cublas_workspace_bytes(arch.capability), "cublas workspace")

    @property
    def micro_steps(self) -> int:
        """Micro batches run per optimizer step."""
        return min(self.training.gradient_accumulation_steps, 2)

    # --- the step ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run one optimizer step (at most two micro steps: more look the same)."""
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.micro_steps):
            self._micro_step()
        self._enter("optimizer", "optimizer")
        with torch.no_grad():
            if self.training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.trainable, self.training.max_grad_norm, foreach=True)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", "end")

    def _micro_step(self) -> None:
        training = self.training
        self._enter("forward", "embedding")
        batch = self._batch()
        with ExitStack() as stack:
            if training.autocast != "none":
                dtype = AUTOCAST[training.autocast]
                stack.enter_context(torch.autocast("cpu", dtype))
                # PEFT's bitsandbytes layers ask for the CUDA flag.
                stack.callback(torch.set_autocast_enabled, "cuda", torch.is_autocast_enabled("cuda"))
                torch.set_autocast_enabled("cuda", True)
                torch.set_autocast_dtype("cuda", dtype)
            outputs = self.model(**batch)
        if training.outputs_to_fp32:
            outputs["logits"] = outputs["logits"].float()
        loss = outputs["loss"]
        if not training.keeps_outputs:
            del outputs
        if training.gradient_accumulation_steps > 1:
            loss = loss / training.gradient_accumulation_steps
        self._enter("backward", "head backward")
        loss.backward()
        self._enter("end", "end")

    def _batch(self) -> dict[str, torch.Tensor]:
        shape = (self.training.micro_batch_size, self.training.seq_len)
        ids = torch.randint(0, self.vocab_size, shape) if self.real else torch.empty(shape, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.training.padded:
            mask = torch.ones(shape, dtype=torch.int64)
            if self.real:
                mask[0, -1:].zero_()
            batch["attention_mask"] = mask
        return batch

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        from transformers.loss.loss_utils import ForCausalLMLoss

        self._enter("loss", "loss")
        if self.training.loss == "full-logits-fp32":
            return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)
        if self.training.loss != "full-logits":
            raise NotImplementedError(f"the trace has no {self.training.loss} loss")
        labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), ignore_index=-100)

    # --- labels ------------------------------------------------------------------------------------------------

    def _enter(self, phase: str, segment: str) -> None:
        labels = self.tracker.labels
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

    def _enable_checkpointing(self, base: Any) -> None:
        base.activation_checkpointing_enable({"use_reentrant": self.training.use_reentrant})
        for module in base.modules():
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
