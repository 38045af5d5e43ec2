"""Compose the phases of one training step: load, forward, loss, backward (with recomputation), optimizer.

The step that is written down is the second one: the optimizer state exists, gradients do not (or, with gradient
accumulation, exist from the first micro batch on). Runs of equal layers are emulated by four of them; the third
stands for the rest, so the size of the program does not grow with depth.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from planner import cuda_rules
from planner.lora import Adapted, resolve_targets
from planner.model import Attention, Layer, Linear, ModelSpec, Norm
from planner.step import layers, linears, loading, losses, ops, positions
from planner.step.attention import always_masks, needs_window_mask, runs_eager
from planner.step.context import Step
from planner.step.eager import BOOLEAN_MASKS, DROPOUT, ROTATES_TOKENS_FIRST
from planner.step.engine import FP32, INT64, Record, Tensor
from planner.step.linears import LayerWeights
from planner.step.norms import norm
from planner.step.optimizers import OptimizerState
from planner.training import TrainingSpec

EMULATED_RUN = 4
"""Layers emulated of a run of equal ones: first, second, third (which stands for the middle) and last."""


SCALES_IN_MODULE = ("gemma", "gemma2", "gemma3", "gemma3_text")
"""Model types whose embedding module multiplies its output itself (classes *TextScaledWordEmbedding)."""

MASK_BUFFERS = ("gpt_bigcode",)
"""Model types that keep a causal mask [positions, positions] of bools as a buffer (modeling_gpt_bigcode.py)."""

TABLES_BY_WINDOW = ("gemma3_text", "olmo3")
"""Model types with rotary tables of their own for layers with a window (modeling_gemma3.py)."""

LAYER_BUFFERS = ("gpt_neo",)
"""Model types that keep such a mask in every layer (modeling_gpt_neo.py)."""


LOGN_POSITIONS = 32767
"""Elements of the logn_tensor buffer that every attention of first-generation Qwen holds (modeling_qwen.py)."""

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
        self.units: list[int] = []
        """Unit of each emulated layer."""
        self.repeats: dict[int, int] = {}
        """Units that stand for several, with how many."""
        self.first: dict[int, int] = {}
        """Unit -> the model's layer that the last unit it stands for begins with."""

    def add(self, pattern: Sequence[Layer], times: int, first: int) -> None:
        """Append one unit that stands for `times`; `first` is the model's layer it begins with."""
        unit = len(self.first)
        self.layers += pattern
        self.units += [unit] * len(pattern)
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
    if train.uses_own_modules:
        from planner.step import litgpt

        model, train = litgpt.own_modules(model, train)
    step = Step(model, train, arch, accumulates_in_place)
    stack = plan_layers(model, full_depth)
    step.eng.repeats = stack.repeats
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
        self.owners: list[tuple[int, int]] = []
        """Per layer (-1 outside): how many of step.parameters belong to it, in creation order."""
        self.embedding: Tensor | None = None
        self.head: linears.LinearWeights | None = None
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
        state = OptimizerState(self.step, self.owners)
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
        self._begin("load", -1)
        loading.warm_up(step, adapted)
        self.eng.record.readers = loading.readers(step)
        if loading.by_name(step) and not model.tied:
            self.head = self._load_head(trainable)
        table = model.token_embedding
        tables = [table] + ([model.position_embedding] if model.position_embedding else [])
        loaded = [self._table(t.num_parameters, trainable, t.rows + t.width) for t in tables]
        self.embedding = loaded[0]
        self.tables = loaded
        self.outer_norms = {n.name: self._norm(n) for n in (model.embedding_norm,) if n is not None}
        self.projections = [linears.load_base(step, p, False) for p in model.embedding_projections]
        if model.model_type in ROTATES_TOKENS_FIRST:  # GPTJRotaryEmbedding.embed_positions
            spec = model.layers[0].attention
            entries = model.max_position_embeddings * (spec.rotary_dim or spec.head_dim)
            self.buffers = [self.eng.empty(entries, FP32, "weight")]
        if model.model_type in MASK_BUFFERS:
            self.buffers = [self.eng.empty(model.max_position_embeddings**2, "int8", "weight")]
        if model.model_type == positions.OWN_CODE:  # RotaryEmbedding caches cos and sin of twice the longest row so far
            width = model.layers[0].attention.head_dim
            self.buffers = [self.eng.empty(2 * step.seq * width, FP32, "rotary_tables") for _ in range(2)]
        self._count(-1)
        for unit, layer in zip(self.stack.units, self.stack.layers, strict=True):
            self._begin("load", unit)
            self.weights.append(self._load_layer(layer, {name for where, name in adapted if where == id(layer)}))
            self._count(unit)
        self._begin("load", -1)
        if model.final_norm is not None:
            self.outer_norms[model.final_norm.name] = self._norm(model.final_norm)
        if self.head is None:
            self.head = self._load_head(trainable)
        self._count(-1)
        self._own_buffers()
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
            linear.bias is not None and linear.kind != "int8" and linear.spec.cls != "subclass" for linear in held
        )
        recomputes = self.step.train.gradient_checkpointing != "none"
        return cuda_rules.cublaslt_handles(biased=biased, recomputes=recomputes)

    def _own_buffers(self) -> None:
        """What litgpt keeps on the card beside the model: rotary tables; in a quantized run a second embedding.

        That is a StableEmbedding, which no optimizer knows: its gradient is never set to zero, and `main` still names
        the embedding whose place it took (finetune/lora.py).
        """
        step, eng = self.step, self.eng
        if not step.train.uses_own_modules:
            return
        from planner.step import litgpt

        spec = step.model.layers[0].attention
        if spec.position == "rope":
            width = spec.rotary_dim or spec.head_dim
            self.buffers += [eng.empty(step.seq * width, FP32, "rotary_tables") for _ in range(2)]
        bnb = step.train.quantization.kind in ("nf4", "fp4", "int8")
        if not bnb or step.train.versions.bitsandbytes < litgpt.STABLE_EMBEDDING:
            return
        assert self.embedding is not None
        self.buffers.append(eng.empty(self.embedding.numel, self.embedding.dtype, "weight"))
        norm = [eng.empty(step.model.hidden_size, step.embedding_dtype, "weight") for _ in range(2)]
        self.stable = [self.embedding, *norm]
        for held in self.stable:
            eng.leaf(held).grad = eng.empty(held.numel, held.dtype, "gradient")

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
        before = -2
        for layer, held in self.step.widened:
            if layer != before:
                self._begin("load", layer)
            before = layer
            self.step.widen(held)
        if self.step.widened:
            self._begin("load", -1)

    def _begin(self, phase: str, layer: int) -> None:
        self.eng.enter(phase, layer)
        self._before = len(self.step.parameters)

    def _count(self, layer: int) -> None:
        self.owners.append((layer, len(self.step.parameters) - self._before))

    def _table(self, elements: int, trainable: bool, factors: int) -> Tensor:
        dtype = self.step.embedding_dtype
        if trainable:
            return self.step.trainable(elements, dtype, "weight", factors)
        return self.step.frozen(elements, dtype)

    def _norm(self, spec: Norm) -> tuple[Tensor | None, Tensor | None]:
        step, dtype = self.step, self.step.norm_dtype
        trainable = step.train.method == "full"
        elements = spec.weight_elements or spec.size

        def make(wanted: bool) -> Tensor | None:
            if not wanted:
                return None
            return step.trainable(elements, dtype, "weight") if trainable else step.frozen(elements, dtype)

        return make(spec.weight), make(spec.bias)

    def _load_layer(self, layer: Layer, adapted: set[str]) -> LayerWeights:
        held = LayerWeights(layer)
        if self.step.model.model_type == positions.OWN_CODE:
            held.buffer = self.eng.empty(LOGN_POSITIONS, self.step.train.base_dtype, "weight")
        specs = {spec.name: spec for spec in layer.linears}
        norms = {spec.name: spec for spec in (*layer.attention.norms, *layer.norms)}
        names = [*specs, *norms]
        for name in sorted(names) if loading.by_name(self.step) else names:
            if name in specs:
                held.linears[name] = linears.load_base(self.step, specs[name], name in adapted)
            else:
                held.norms[name] = self._norm(norms[name])
        held.linears = {name: held.linears[name] for name in specs}  # in the order of the modules again
        if layer.experts is not None:
            self._load_experts(held)
        if self.step.model.model_type in LAYER_BUFFERS:
            held.buffer = self.eng.empty(self.step.model.max_position_embeddings**2, "int8", "weight")
        return held

    def _load_experts(self, held: LayerWeights) -> None:
        spec = held.spec.experts
        assert spec is not None
        weight, number = self.step.weight, spec.num_experts
        each = number * spec.hidden_size * spec.intermediate_size
        wide, narrow, hidden = 2 * spec.intermediate_size, spec.intermediate_size, spec.hidden_size
        held.experts = [weight(2 * each, number * (wide + hidden)), weight(each, number * (narrow + hidden))]
        if spec.bias:
            weight(number * (2 * spec.intermediate_size + spec.hidden_size))
        if not spec.router_is_linear:
            held.router = weight(spec.router.num_parameters, spec.router.in_features + spec.router.out_features)

    def _load_head(self, trainable: bool) -> linears.LinearWeights:
        model, step = self.step.model, self.step
        held = linears.LinearWeights(model.head)
        if model.tied and not step.train.untied_head:
            held.weight = self.embedding
        elif trainable:
            held.weight = step.trainable(
                model.head.weight_elements, step.embedding_dtype, "weight", model.vocab_size + model.hidden_size
            )
        elif self._quantizes_head():
            held = linears.load_base(step, model.head, False)
        else:
            held.weight = step.frozen(model.head.weight_elements, step.embedding_dtype)
        if model.head.bias and held.bias is None:
            elements, dtype = model.head.out_features, step.embedding_dtype
            held.bias = step.trainable(elements, dtype, "weight") if trainable else step.frozen(elements, dtype)
        return held

    def _quantizes_head(self) -> bool:
        """bitsandbytes skips the output embedding whatever its name; "lm_head" in skip_modules means that."""
        quant = self.step.train.quantization
        return "lm_head" not in quant.skip_modules and linears.is_quantized(self.step.model.head, quant, False)

    def _load_adapters(self, adapted: dict[tuple[int, str], Adapted]) -> None:
        lora = self.step.train.lora
        assert lora is not None
        parameters = [a for a in adapted.values() if a.kind == "parameter"]
        for unit, held in zip(self.stack.units, self.weights, strict=True):
            self._begin("load", unit)
            for name, weights in held.linears.items():
                if (id(held.spec), name) in adapted:
                    self._load_adapter(weights)
            for a in parameters:
                if a.layer is held.spec:
                    stacked = a.rank * a.experts
                    down = self.step.trainable(a.a_elements, lora.dtype, "adapter", stacked + a.in_features)
                    up = self.step.trainable(a.b_elements, lora.dtype, "adapter", a.out_features + stacked)
                    held.expert_adapters[a.name] = (down, up)
            self._count(unit)
        self._begin("load", -1)
        if self.head is not None and (id(None), self.step.model.head.name) in adapted:
            self._load_adapter(self.head)
        for name in lora.modules_to_save:
            self._save_module(name)
        self._count(-1)

    def _load_adapter(self, held: linears.LinearWeights) -> None:
        lora = self.step.train.lora
        assert lora is not None
        if self.step.train.uses_own_modules:
            from planner.step import litgpt

            litgpt.load_adapter(self.step, held, lora.target_slices, lora.r, lora.dtype)
        else:
            linears.load_adapter(self.step, held, lora)

    def _save_module(self, name: str) -> None:
        """modules_to_save: a trainable copy takes the place of the module; the original stays loaded."""
        model, step = self.step.model, self.step
        assert step.train.lora is not None and self.head is not None
        dtype = step.train.lora.dtype
        if model.head.name.endswith(name):
            self.head.weight = step.trainable(model.head.weight_elements, dtype, "adapter")
        elif model.token_embedding.name.endswith(name):
            self.embedding = step.trainable(model.token_embedding.num_parameters, dtype, "adapter")

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
            own = step.train.uses_own_modules and step.train.loss == "chunked"
            if own:
                from planner.step import litgpt

                loss, logits = litgpt.head_and_loss(step, self.head, hidden)
            else:
                loss, logits = losses.head_and_loss(step, self.head, hidden)
            del hidden
        if step.train.outputs_to_fp32 and not own:  # accelerate converts the outputs when the forward returns
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
            if unit != eng.layer:
                eng.enter("forward", unit)
                eng.record.sublayer = -1
            eng.record.sublayer += 1
            outputs = self._layer(held, hidden)  # the frame holds a layer's whole result until the next one returns
            hidden = outputs[0]
        eng.record.sublayer = 0
        eng.enter("loss")
        if model.final_norm is not None:
            spec = model.final_norm
            weights = self.outer_norms[spec.name]
            if step.train.uses_own_modules:
                from planner.step import litgpt

                hidden = litgpt.norm(step, spec, weights, hidden, step.tokens)
            else:
                hidden = norm(step, spec, weights, hidden, step.tokens)
        del names, outputs
        if not self._reenters():
            self._drop_positions()
        return hidden

    def _layer(self, held: LayerWeights, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        step, eng, model, mode = self.step, self.eng, self.step.model, self.step.train.gradient_checkpointing
        spec = held.spec.attention
        window = self.window_mask if always_masks(step) or needs_window_mask(step, spec) else None
        mask = self.masks.get(self._masks_window(held))
        tables = self.rotary.get(model.model_type in TABLES_BY_WINDOW and bool(spec.sliding_window))
        arguments = (tables, mask, step.alibi, self.position_ids, window)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            step.cos_sin, step.mask, step.alibi = arguments[:3]
            try:
                return layers.decoder_layer(step, held, x), step.probabilities
            finally:  # also when a recomputation stops early
                step.probabilities = None
                if step.backward_began:
                    step.cos_sin = step.mask = step.alibi = None

        if mode == "none":
            return forward(hidden)
        if self._reenters() and hidden.requires_grad:
            return eng.checkpoint_reentrant(forward, hidden, mode == "offload")
        return eng.checkpoint(forward, hidden, mode == "offload")

    def _embed(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The first layer's input, and what the model's frame names until the last layer: embeddings as looked up."""
        step, eng, model = self.step, self.eng, self.step.model
        assert self.embedding is not None
        width = model.token_embedding.width
        out = eng.empty(step.tokens * width, self.embedding.dtype, "embedding")
        eng.kernel("elementwise", out.dtype, 2 * out.nbytes)
        self._link_table(out, self.embedding)
        if self.stable:
            out = ops.layer_norm(eng, out, self.stable[1], self.stable[2], step.tokens)
        if model.embedding_scale and model.model_type in SCALES_IN_MODULE:
            out = ops.scale(eng, out, "embedding")
        if not out.requires_grad and step.train.method != "full" and step.train.gradient_checkpointing != "none":
            self.input_leaf = eng.leaf(out)  # enable_input_require_grads: a hook on the embedding module's output
        if model.embedding_scale and model.model_type not in SCALES_IN_MODULE:
            out = ops.scale(eng, out, "embedding")
        names = [out]
        for projection in self.projections[:1]:
            out = linears.base_forward(step, projection, out)
        if model.position_embedding is not None:
            places = eng.empty(step.seq * model.hidden_size, self.embedding.dtype, "embedding")
            self._link_table(places, self.tables[1])
            out = ops.add(eng, out, places, "embedding", step.tokens * model.hidden_size)
            names.append(places)
        if model.embedding_dropout:
            out = ops.dropout(eng, out, DROPOUT, "embedding_dropout")
        if model.embedding_norm is not None:
            spec = model.embedding_norm
            out = norm(step, spec, self.outer_norms[spec.name], out, step.tokens)
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
        """Rotary tables (shared by all layers) and the 4-D mask where the attention needs one."""
        step, eng, model = self.step, self.eng, self.step.model
        spec = model.layers[0].attention
        if step.train.uses_own_modules and spec.kind == "standard":
            if spec.position == "rope":
                self.rotary[False] = self.rotary[True] = (self.buffers[0].view(), self.buffers[1].view())
            return
        if model.model_type == positions.OWN_CODE:
            self.position_ids = eng.empty(step.seq, INT64, "positions")
            self.rotary[False] = (
                self.buffers[0].view(step.seq * spec.head_dim),
                self.buffers[1].view(step.seq * spec.head_dim),
            )
            return
        if spec.position == "rope" or model.model_type == "falcon":  # falcon makes them beside ALiBi too
            self.position_ids = eng.empty(step.seq, INT64, "positions")
            windows = {bool(held.spec.attention.sliding_window) for held in self.weights}
            if not positions.tables_per_layer(step):
                for windowed in windows if model.model_type in TABLES_BY_WINDOW else {False}:
                    self.rotary[windowed] = positions.tables(step, spec, dtype)
        assert self.embedding is not None
        eager, entries = runs_eager(step, spec), step.batch * step.seq * step.seq
        if spec.position == "alibi":
            self._alibi(spec, dtype)
        if spec.position == "alibi" and model.model_type == "falcon" and not step.train.uses_own_modules:
            # ALiBi is written into the mask (modeling_falcon.py), one for every head
            self.masks[False] = eng.empty(entries * spec.num_heads, self.embedding.dtype, "attention_mask")
        elif eager or (step.train.padded and step.train.attention == "sdpa"):
            # made from the embedding's output; later norms and projections may have another dtype
            kind = self.embedding.dtype if eager and model.model_type not in BOOLEAN_MASKS else "int8"
            for windowed in {self._masks_window(held) for held in self.weights}:
                self.masks[windowed] = eng.empty(entries, kind, "attention_mask")
        elif always_masks(step) or any(needs_window_mask(step, held.spec.attention) for held in self.weights):
            self.window_mask = eng.empty(step.seq * step.seq, "int8", "attention_mask")

    def _masks_window(self, held: LayerWeights) -> bool:
        """Whether a layer takes the mask of a window; gpt_neo's local layers add their own buffer to the common one."""
        return bool(held.spec.attention.sliding_window) and self.step.model.model_type != "gpt_neo"

    def _alibi(self, spec: Attention, dtype: str) -> None:
        """The bias of every head and key: of the longest row in fp32 (mpt), or of every row of the batch."""
        step, model = self.step, self.step.model
        if model.model_type == "mpt":
            step.alibi = self.eng.empty(spec.num_heads * model.max_position_embeddings, FP32, "alibi")
        else:
            step.alibi = self.eng.empty(step.batch * spec.num_heads * step.seq, dtype, "alibi")


__all__ = ["EMULATED_RUN", "Linear", "Program", "plan_layers", "run"]
