"""TrainingStep: one optimizer step of the genuine libraries as a training loop runs it, on any device.

`calibrate.measure.burst` times it as it is; `calibrate.oracle.step` adds the labels that the trace needs.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from calibrate.model.optimizers import make_optimizer
from planner.training.losses import LOSSES
from planner.training.spec import TrainingSpec

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStep:
    """Runs forward, loss, backward, clipping, optimizer; every call of `run` is one optimizer step."""

    def __init__(self, model: Any, training: TrainingSpec, *, device: str = "cpu", real: bool = True) -> None:
        self.model = model
        self.training = training
        self.device = torch.device(device)
        self.real = real
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.vocab_size = int(self.base.config.get_text_config().vocab_size)
        if training.gradient_checkpointing != "none":
            self._enable_checkpointing()
        self._prepare()
        self.base.loss_function = self._loss
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._make_optimizer()

    # --- what a subclass adds ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Called when the model is complete, before the optimizer exists."""

    def _enter(self, phase: str, segment: str) -> None:
        """Called where a phase of the step begins."""

    def _make_optimizer(self) -> Any:
        return make_optimizer(self.training, self.trainable)

    def _enable_checkpointing(self) -> None:
        settings = {"use_reentrant": self.training.use_reentrant}
        if hasattr(self.base, "activation_checkpointing_enable"):
            self.base.activation_checkpointing_enable(settings)
        else:  # transformers before 5.18
            self.base.gradient_checkpointing_enable(settings)

    @property
    def micro_steps(self) -> int:
        """Micro batches run per optimizer step."""
        return self.training.gradient_accumulation_steps

    # --- the step ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run one optimizer step."""
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

    def _forward(self, batch: dict[str, torch.Tensor]) -> Any:
        with ExitStack() as stack:
            if self.training.autocast != "none":
                self._autocast(stack, AUTOCAST[self.training.autocast])
            return self.model(**batch)

    def _micro_step(self) -> None:
        training = self.training
        self._enter("forward", "embedding")
        batch = self._batch()
        outputs = self._forward(batch)
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

    def _autocast(self, stack: ExitStack, dtype: torch.dtype) -> None:
        stack.enter_context(torch.autocast(self.device.type, dtype))
        if self.device.type != "cuda":  # PEFT's bitsandbytes layers ask for the CUDA flag
            stack.callback(torch.set_autocast_enabled, "cuda", torch.is_autocast_enabled("cuda"))
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)

    def _batch(self) -> dict[str, torch.Tensor]:
        shape = (self.training.micro_batch_size, self.training.seq_len)
        where = {"device": self.device}
        if self.real:
            ids = torch.randint(0, self.vocab_size, shape, **where)
        else:
            ids = torch.empty(shape, dtype=torch.int64, **where)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.training.padded:
            mask = torch.ones(shape, dtype=torch.int64, **where)
            if self.real:
                mask[0, -1:].zero_()
            batch["attention_mask"] = mask
        return batch

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        from transformers.loss.loss_utils import ForCausalLMLoss

        self._enter("loss", "loss")
        how = LOSSES[self.training.loss]
        if how.traced and how.upcasts:
            return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)
        if not how.traced:
            raise NotImplementedError(f"real and traced steps have no {self.training.loss} loss")
        labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), ignore_index=-100)
