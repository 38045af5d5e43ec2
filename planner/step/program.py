"""Compose the phases of one training step: load, forward, loss, backward (with recomputation), optimizer.

The step that is written down is the second one: the optimizer state exists, gradients do not (or, with gradient
accumulation, exist from the first micro batch on). Runs of equal layers are emulated by four of them; the third
stands for the rest, so the size of the program does not grow with depth.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from planner.device import cuda_rules
from planner.model import storage
from planner.model.lora import Adapted, resolve_targets
from planner.model.spec import Attention, Layer, Linear, ModelSpec, Norm
from planner.step import checkpoints, layers, loading, ops
from planner.step.classes import registry
from planner.step.context import Step
from planner.step.engine import FP32, INT64, LayerForward, Record, Tensor
from planner.step.modules import linears, losses, positions
from planner.step.modules import weights as modules_weights
from planner.step.modules.attention import (
    always_masks,
    hands_on_mask,
    needs_window_mask,
    runs_eager,
    takes_boolean_mask,
)
from planner.step.modules.eager import DROPOUT, adds_mask
from planner.step.modules.mixers import MIXERS
from planner.step.modules.norms import norm
from planner.step.modules.weights import LayerWeights
from planner.step.optimizers import OptimizerState
from planner.step.scopes import OUTSIDE, Unit
from planner.training.losses import LOSSES
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec

EMULATED_RUN = 4
"""Layers emulated of a run of equal ones: first, second, third (which stands for the middle) and last."""


LONGEST_PATTERN = 12
"""Layers of the longest repeating pattern that is looked for (sliding, ..., full: 2 to 8 in published models)."""


class Program:
    """What a step did: the record of allocations and kernels, and the emulated layers with their multiplicity."""

    def __init__(self, record: Record, trainable_parameters: Any, layer_names: dict[int, int]) -> None:
        self.record = record
        self.trainable_parameters = trainable_parameters
        self.layer_names = layer_names
        """Unit of the record -> the layer of the model that it, or the last unit it stands for, begins with."""


class Stack:
    """The layers to emulate. A unit is a layer, or a pattern of unlike layers in a row; equal units repeat."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.units: list[Unit] = []
        """Unit of each emulated layer."""
        self.repeats: dict[int, int] = {}
        """Units that stand for several, with how many."""
        self.first: dict[int, int] = {}
        """Unit -> the model's layer that the last unit it stands for begins with."""

    def add(self, pattern: Sequence[Layer], times: int, first: int) -> None:
        """Append one unit that stands for `times`; `first` is the model's layer it begins with."""
        unit = len(self.first)
        self.layers += pattern
        self.units += [Unit(unit, place) for place in range(len(pattern))]
        self.first[unit] = first + (times - 1) * len(pattern)
        if times > 1:
            self.repeats[unit] = times


def plan_layers(model: ModelSpec, full_depth: bool = False) -> Stack:
    """Return the layers to emulate: of a run of equal units the first, second, third (for the middle) and last."""
    stack = Stack()
    start = 0
    while start < model.num_layers:
        period, count = (1, 1) if full_depth else _pattern(model.layers, start)
        pattern = model.layers[start : start + period]
        for times in (1, 1, count - EMULATED_RUN + 1, 1) if count > EMULATED_RUN else (1,) * count:
            stack.add(pattern, times, start)
            start += period * times
    return stack


def _pattern(layers: Sequence[Layer], start: int) -> tuple[int, int]:
    """(length, repetitions) of the pattern beginning at `start` that spares the most layers; (1, 1) if none does."""
    best, spared = (1, 1), 0
    for period in range(1, LONGEST_PATTERN + 1):
        same = start + period
        while same < len(layers) and layers[same] is layers[same - period]:
            same += 1
        count = (same - start) // period
        if (count - EMULATED_RUN) * period > spared:
            best, spared = (period, count), (count - EMULATED_RUN) * period
    return best


def run(
    model: ModelSpec,
    train: TrainingSpec,
    arch: cuda_rules.Architecture,
    *,
    full_depth: bool = False,
    accumulates_in_place: bool = True,
) -> Program:
    """Run one training step of `train` on `model` symbolically and return everything that happened."""
    model = model.with_tokens(train.added_tokens)
    habits = registry.habits_of(model.model_type, train.own_modules)
    if habits.rebuild is not None:
        model, train = habits.rebuild(model, train)
    step = Step(model, train, arch, habits, accumulates_in_place)
    stack = plan_layers(model, full_depth)
    step.eng.repeats = stack.repeats
    step.handle(checkpoints.handlers(step))
    collecting = gc.isenabled()
    gc.disable()  # lifetimes are reference counts; the collector only costs time
    try:
        return _Run(step, stack).all()
    finally:
        if collecting:
            gc.enable()


class _Run:
    """The state that outlives one phase."""

    def __init__(self, step: Step, stack: Stack) -> None:
        self.step = step
        self.eng = step.eng
        self.stack = stack
        self.weights: list[LayerWeights] = []
        self.embedding: Tensor | None = None
        self.head: modules_weights.LinearWeights | None = None
        self.position_ids: Tensor | None = None
        self.window_mask: Tensor | None = None
        self.rotary: dict[bool, tuple[Tensor, Tensor]] = {}
        """Rotary tables; of layers with a window (True) apart where the class has two sets."""
        self.masks: dict[bool, Tensor] = {}
        """4-D masks: of layers that see everything (False), of those with a window (True)."""
        self.input_leaf: Tensor | None = None
        self.buffers: list[Tensor] = []
        self.stable: list[Tensor] = []
        """A StableEmbedding's table, and its norm's weight and bias."""

    def all(self) -> Program:
        self._load()
        state = OptimizerState(self.step)
        if self.step.train.gradient_accumulation_steps_exceed_one:
            state.hold_gradients()
        loss, kept = self._forward()
        self.eng.layer = -2  # the backward begins its own segments
        self.eng.backward(loss, self.eng.empty(1, loss.dtype, "loss_grad"))
        del loss
        if not kept:
            self._drop_input_leaf()
        self._drop_positions()
        state.run_step()
        del kept
        self._drop_input_leaf()
        record = self.eng.record
        record.close()
        total = state.parameter_count()
        return Program(record, total, self.stack.first)

    def _drop_input_leaf(self) -> None:
        """The embeddings made a leaf, and their gradient, die with the graph: a leaf and its node hold each other."""
        if self.input_leaf is not None:
            self.input_leaf.node = self.input_leaf.grad = None
            self.input_leaf = None

    # --- load -------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        step, model, train = self.step, self.step.model, self.step.train
        trainable = train.method == "full"
        adapted = {(id(a.layer), a.name): a for a in resolve_targets(model, train.lora)} if train.lora else {}
        self._load_unit(OUTSIDE)
        loading.warm_up(step, adapted)
        self.eng.record.readers = loading.readers(step)
        if loading.by_name(step) and not model.tied:
            self.head = self._load_head(trainable)
        table = model.token_embedding
        tables = [table] + ([model.position_embedding] if model.position_embedding else [])
        loaded = [step.base(f"{t.name}.weight", (t.rows, t.width), step.embedding_dtype) for t in tables]
        self.embedding = loaded[0]
        self.tables = loaded
        self.outer_norms = {n.name: self._norm(n) for n in (model.embedding_norm,) if n is not None}
        self.projections = [linears.load_base(step, p, False) for p in model.embedding_projections]
        if step.habits.makes_buffers is not None:
            self.buffers = step.habits.makes_buffers(step)
        for unit, layer in zip(self.stack.units, self.stack.layers, strict=True):
            self._load_unit(unit)
            self.weights.append(self._load_layer(layer, {name for where, name in adapted if where == id(layer)}))
        self._load_unit(OUTSIDE)
        if model.final_norm is not None:
            self.outer_norms[model.final_norm.name] = self._norm(model.final_norm)
        if self.head is None:
            self.head = self._load_head(trainable)
        if step.habits.makes_own_state is not None:
            buffers, self.stable = step.habits.makes_own_state(step, self.embedding)
            self.buffers += buffers
        self._resize()
        self._prepare()
        if train.lora:
            self._load_adapters(adapted)
        if step.arch.blas_workspaces:
            workspace = cuda_rules.cublas_workspace_bytes(step.arch.capability)
            self.workspaces = [self.eng.workspace(workspace, "cublas") for _ in range(cuda_rules.cublas_handles())]
            self.workspaces += [
                self.eng.workspace(cuda_rules.CUBLASLT_WORKSPACE_BYTES, "cublas") for _ in range(self._biased_threads())
            ]

    def _biased_threads(self) -> int:
        """Threads with a cuBLASLt workspace: those that run a linear with a bias, quantized to 8 bit or not at all."""
        held = [*([self.head] if self.head else []), *(w for layer in self.weights for w in layer.linears.values())]
        biased = any(
            linear.bias is not None
            and QUANTIZATIONS[linear.kind].storing != "rows-of-8-bit"
            and linear.spec.cls != "subclass"
            for linear in held
        )
        recomputes = self.step.train.gradient_checkpointing != "none"
        return cuda_rules.cublaslt_handles(biased=biased, recomputes=recomputes)

    def _resize(self) -> None:
        """resize_token_embeddings: the longer table exists before the old one goes, then so with the head.

        A model that is not quantized is still on the CPU.
        """
        train, eng = self.step.train, self.eng
        if not train.added_tokens or train.quantization.kind == "none":
            return
        assert self.embedding is not None and self.head is not None
        head = self.head.weight
        for held in (self.embedding, *([head] if head is not None and head is not self.embedding else [])):
            held.storage = eng.empty(held.numel, held.dtype, "weight").storage

    def _prepare(self) -> None:
        """prepare_model_for_kbit_training: one parameter after the other (peft utils/other.py)."""
        before: Unit | None = None
        for held in self.step.widened:
            assert held.owner is not None
            if before is None or held.owner.unit.layer != before.layer:
                self._load_unit(held.owner.unit)
            before = held.owner.unit
            self.step.widen(held)
        if self.step.widened:
            self._load_unit(OUTSIDE)

    def _load_unit(self, unit: Unit) -> None:
        """What is loaded from here on belongs to `unit`."""
        self.eng.enter("load", unit.layer)
        self.step.here = unit

    def _norm(self, spec: Norm) -> tuple[Tensor | None, Tensor | None]:
        step, dtype = self.step, self.step.norm_dtype
        shape = (spec.weight_elements or spec.size,)

        def make(wanted: bool, part: str) -> Tensor | None:
            return step.base(f"{spec.name}.{part}", shape, dtype) if wanted else None

        return make(spec.weight, "weight"), make(spec.bias, "bias")

    def _load_layer(self, layer: Layer, adapted: set[str]) -> LayerWeights:
        held = LayerWeights(layer)
        habits = self.step.habits
        if habits.makes_layer_buffer is not None and habits.layer_buffer_first:
            held.buffer = habits.makes_layer_buffer(self.step)
        specs = {spec.name: spec for spec in layer.linears}
        norms = {spec.name: spec for spec in (*layer.mixer.norms, *layer.norms)}
        weights = {spec.name: spec for spec in layer.mixer.weights}
        names = [*specs, *norms, *weights]
        for name in sorted(names) if loading.by_name(self.step) else names:
            if name in specs:
                held.linears[name] = linears.load_base(self.step, specs[name], name in adapted)
            elif name in norms:
                held.norms[name] = self._norm(norms[name])
            else:
                held.mixing[name] = self.step.weight(name, weights[name].shape)
        held.linears = {name: held.linears[name] for name in specs}  # in the order of the modules again
        if layer.experts is not None:
            self._load_experts(held)
        if habits.makes_layer_buffer is not None and not habits.layer_buffer_first:
            held.buffer = habits.makes_layer_buffer(self.step)
        if layer.attention is not None:
            held.tables = positions.load_tables(self.step, layer.attention)
        return held

    def _load_experts(self, held: LayerWeights) -> None:
        spec = held.spec.experts
        assert spec is not None
        weight, number, name = self.step.weight, spec.num_experts, spec.name
        wide, narrow, hidden = 2 * spec.intermediate_size, spec.intermediate_size, spec.hidden_size
        held.experts = [
            weight(f"{name}.{spec.gate_up_name}", (number, wide, hidden)),
            weight(f"{name}.{spec.down_name}", (number, hidden, narrow)),
        ]
        if spec.bias:
            held.experts.append(weight(f"{name}.biases", (number * (wide + hidden),)))
        if not spec.router_is_linear:
            router = spec.router
            columns = router.in_features + int(router.bias)  # a bias as one more of them
            held.router = weight(f"{router.name}.weight", (router.out_features, columns))

    def _load_head(self, trainable: bool) -> modules_weights.LinearWeights:
        model, step = self.step.model, self.step
        held = modules_weights.LinearWeights(model.head)
        if model.tied and OWN_MODULES[step.train.own_modules].ties_head:
            held.weight = self.embedding
        elif not trainable and self._quantizes_head():
            held = linears.load_base(step, model.head, False)
        else:
            shape = model.head.out_features, model.head.in_features
            held.weight = step.base(f"{model.head.name}.weight", shape, step.embedding_dtype)
        if model.head.bias and held.bias is None:
            held.bias = step.base(f"{model.head.name}.bias", (model.head.out_features,), step.embedding_dtype)
        return held

    def _quantizes_head(self) -> bool:
        """bitsandbytes skips the output embedding whatever its name; "lm_head" in skip_modules means that."""
        train = self.step.train
        skipped = "lm_head" in train.quantization.skip_modules
        return not skipped and storage.is_quantized(self.step.model.head, train, False)

    def _load_adapters(self, adapted: dict[tuple[int, str], Adapted]) -> None:
        lora = self.step.train.lora
        assert lora is not None
        parameters = [a for a in adapted.values() if a.kind == "parameter"]
        for unit, held in zip(self.stack.units, self.weights, strict=True):
            self._load_unit(unit)
            for name, weights in held.linears.items():
                if (id(held.spec), name) in adapted:
                    self._load_adapter(weights)
            for a in parameters:
                if a.layer is held.spec:
                    stacked = a.rank * a.experts
                    down = self.step.trainable(f"{a.name}.lora_A", (stacked, a.in_features), lora.dtype, "adapter")
                    up = self.step.trainable(f"{a.name}.lora_B", (a.out_features, stacked), lora.dtype, "adapter")
                    held.expert_adapters[a.name] = (down, up)
        self._load_unit(OUTSIDE)
        if self.head is not None and (id(None), self.step.model.head.name) in adapted:
            self._load_adapter(self.head)
        for name in lora.modules_to_save:
            self._save_module(name)

    def _load_adapter(self, held: modules_weights.LinearWeights) -> None:
        lora = self.step.train.lora
        assert lora is not None
        if self.step.habits.load_adapter is not None:
            self.step.habits.load_adapter(self.step, held, lora)
        else:
            linears.load_adapter(self.step, held, lora)

    def _save_module(self, name: str) -> None:
        """modules_to_save: a trainable copy takes the place of the module; the original stays loaded."""
        model, step = self.step.model, self.step
        assert step.train.lora is not None and self.head is not None
        dtype = step.train.lora.dtype
        head, table = model.head, model.token_embedding
        if head.name.endswith(name):
            shape = head.out_features, head.in_features
            self.head.weight = step.trainable(f"{head.name}.weight", shape, dtype, "adapter")
        elif table.name.endswith(name):
            self.embedding = step.trainable(f"{table.name}.weight", (table.rows, table.width), dtype, "adapter")

    # --- forward ----------------------------------------------------------------------------------------------

    def _forward(self) -> tuple[Tensor, list[Tensor]]:
        """Forward and loss; returns the loss and the tensors the caller keeps until after the backward."""
        step, eng = self.step, self.eng
        eng.enter("inputs")
        self.inputs = [eng.empty(step.tokens, INT64, "input_ids") for _ in range(3 if step.train.padded else 2)]
        with eng.autocasting(step.autocast):
            hidden = self._decode()
            eng.enter("loss")
            assert self.head is not None
            own = step.habits.head_and_loss if LOSSES[step.train.loss].logits == "chunks" else None
            loss, logits = (own or losses.head_and_loss)(step, self.head, hidden)
            del hidden
        if step.train.outputs_to_fp32 and own is None:  # accelerate converts the outputs when the forward returns
            logits = [ops.cast(eng, part.view(), FP32, "outputs_to_fp32") for part in logits]
        self._drop_cache()
        step.backward_began = True
        return loss, logits if step.train.keeps_outputs else []

    def _drop_cache(self) -> None:
        """Cached keys and values die with the outputs, layer by layer in the record."""
        cache, self.step.cache = self.step.cache, []
        while cache:
            layer, tensor = cache.pop(0)
            self.eng.enter("forward", layer)
            del tensor
        self.eng.enter("loss")

    def _decode(self) -> Tensor:
        step, eng, model = self.step, self.eng, self.step.model
        eng.enter("embedding")
        hidden, names = self._embed()
        self._positions(hidden.dtype)
        outputs: tuple[Tensor, Tensor | None] = (hidden, None)
        for unit, held in zip(self.stack.units, self.weights, strict=True):
            if unit.layer != eng.layer:
                eng.enter("forward", unit.layer)
            eng.record.sublayer = unit.sublayer
            # the frame holds a layer's whole result until the next one returns
            outputs = self._layer(unit, held, hidden)
            hidden = outputs[0]
        eng.record.sublayer = 0
        eng.enter("loss")
        if model.final_norm is not None:
            spec = model.final_norm
            hidden = (step.habits.norm or norm)(step, spec, self.outer_norms[spec.name], hidden)
        del names, outputs
        if not self._reenters():
            self._drop_positions()
        return hidden

    def _layer(self, unit: Unit, held: LayerWeights, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        step = self.step
        arguments = self._arguments(held.spec.attention)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            with step.unit(unit, x):
                step.cos_sin, step.mask, step.alibi = arguments[:3]
                try:
                    return layers.decoder_layer(step, held, x), step.probabilities
                finally:  # also when a recomputation stops early
                    step.probabilities = None
                    if step.backward_began:
                        step.cos_sin = step.mask = step.alibi = None

        run: LayerForward = forward
        for handler in step.handlers:
            run = handler.wrap(step, run)
        return run(hidden)

    def _arguments(
        self, spec: Attention | None
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Rotary tables, 4-D mask and ALiBi that a layer's attention reads; what else its call is given."""
        step = self.step
        if spec is None:
            return None, None, None, self.position_ids, None
        window = self.window_mask if always_masks(step) or needs_window_mask(step, spec) else None
        mask = self.masks.get(self._masks_window(spec))
        tables = self.rotary.get(step.habits.tables_by_window and bool(spec.sliding_window))
        return tables, mask, step.alibi, self.position_ids, window

    def _embed(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The first layer's input, and what the model's frame names until the last layer: embeddings as looked up."""
        step, eng, model = self.step, self.eng, self.step.model
        assert self.embedding is not None
        width = model.token_embedding.width
        out = eng.empty((step.tokens, width), self.embedding.dtype, "embedding")
        eng.kernel("elementwise", out.dtype, 2 * out.nbytes)
        self._link_table(out, self.embedding)
        if self.stable:
            out = ops.layer_norm(eng, out, self.stable[1], self.stable[2], out.rows(width))
        in_module = step.train.versions.transformers >= step.habits.scales_in_embedding_since
        if model.embedding_scale and in_module:
            out = ops.scale(eng, out, "embedding")
        if not out.requires_grad and step.train.method != "full" and step.train.gradient_checkpointing != "none":
            self.input_leaf = eng.leaf(out)  # enable_input_require_grads: a hook on the embedding module's output
        if model.embedding_scale and not in_module:
            out = ops.scale(eng, out, "embedding")
        names = [out]
        for projection in self.projections[:1]:
            out = linears.forward(step, projection, out)
        if model.position_embedding is not None:
            every_row = step.train.versions.transformers < step.habits.positions_of_rows_before
            shape = (step.batch, step.seq, model.hidden_size) if every_row else (step.seq, model.hidden_size)
            places = eng.empty(shape, self.embedding.dtype, "embedding")
            self._link_table(places, self.tables[1])
            out = ops.add(eng, out, places, "embedding")
            names.append(places)
        if model.embedding_dropout:
            out = ops.dropout(eng, out, DROPOUT, "embedding_dropout")
        if model.embedding_norm is not None:
            spec = model.embedding_norm
            out = norm(step, spec, self.outer_norms[spec.name], out)
        return out, tuple(names)

    def _link_table(self, out: Tensor, table: Tensor) -> None:
        """The gradient of a trainable table is as large as the table (embedding_dense_backward)."""
        eng, numel, dtype = self.eng, table.numel, table.dtype
        eng.link(out, (table,), lambda node, grads: [eng.empty(numel, dtype, "embedding_grad")])

    def _reenters(self) -> bool:
        """Whether the checkpoints are nodes of the graph, which keep their arguments until the loss is gone."""
        return self.step.train.gradient_checkpointing != "none" and self.step.train.use_reentrant

    def _drop_positions(self) -> None:
        """Rotary tables and masks live in the model's forward frame, or with the checkpoints that need them again."""
        self.step.cos_sin = self.step.mask = self.step.alibi = None
        self.position_ids = self.window_mask = None
        self.masks.clear()
        self.rotary.clear()

    def _positions(self, dtype: str) -> None:
        """Rotary tables (shared by all layers) and the 4-D masks that the attention of any layer needs."""
        step, eng, habits = self.step, self.step.eng, self.step.habits
        attentions = step.model.attentions()
        if not attentions:
            return
        own = not habits.own_mixers_only or all(MIXERS[spec.kind].in_own_modules for spec in attentions)
        if habits.gives_tables is not None and own:
            if habits.counts_positions:
                self.position_ids = eng.empty(step.seq, INT64, "positions")
            given = habits.gives_tables(step, self.buffers)
            if given is not None:
                self.rotary[False] = self.rotary[True] = given
            return
        rotated, biased = step.model.positions("rope"), step.model.positions("alibi")
        if rotated is None and habits.tables_beside_alibi:
            rotated = biased
        if rotated is not None:
            self.position_ids = eng.empty(step.seq, INT64, "positions")
            windows = {bool(spec.sliding_window) for spec in attentions}
            if not positions.tables_per_layer(step):
                for windowed in windows if habits.tables_by_window else {False}:
                    self.rotary[windowed] = positions.tables(step, rotated, dtype)
        assert self.embedding is not None
        eager, entries = any(runs_eager(step, spec) for spec in attentions), step.batch * step.seq * step.seq
        if biased is not None:
            self._alibi(biased, dtype)
        if biased is not None and habits.alibi_in_mask:
            self.masks[False] = eng.empty(entries * biased.num_heads, self.embedding.dtype, "attention_mask")
        elif (
            (eager and adds_mask(step)) or hands_on_mask(step) or (step.train.padded and step.train.attention == "sdpa")
        ):
            # made from the embedding's output; later norms and projections may have another dtype
            adds = (eager or not takes_boolean_mask(step)) and not habits.boolean_mask
            kind = self.embedding.dtype if adds else "int8"
            for windowed in {self._masks_window(spec) for spec in attentions}:
                self.masks[windowed] = eng.empty(entries, kind, "attention_mask")
        elif always_masks(step) or any(needs_window_mask(step, spec) for spec in attentions):
            self.window_mask = eng.empty(step.seq * step.seq, "int8", "attention_mask")

    def _masks_window(self, spec: Attention) -> bool:
        """Whether a layer takes the mask of a window."""
        return bool(spec.sliding_window) and self.step.habits.masks_by_window

    def _alibi(self, spec: Attention, dtype: str) -> None:
        """The bias of every head and key: of the longest row in fp32, or of every row of the batch."""
        step, model = self.step, self.step.model
        if step.habits.alibi_of_longest:
            step.alibi = self.eng.empty(spec.num_heads * model.max_position_embeddings, FP32, "alibi")
        else:
            step.alibi = self.eng.empty(step.batch * spec.num_heads * step.seq, dtype, "alibi")


__all__ = ["EMULATED_RUN", "Linear", "Program", "plan_layers", "run"]
