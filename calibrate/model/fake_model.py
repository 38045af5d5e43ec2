"""Build the genuine model (transformers, bitsandbytes, PEFT) without weights, then give it fake or random tensors.

Construction happens on the meta device with the real quantizer and adapter code; only afterwards is every parameter
replaced, because neither bitsandbytes' parameter classes nor PEFT's injection accept fake tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from calibrate.model.layer_paths import IN_LAYER
from planner.base.errors import Contradiction, InvalidInput, UnknownName, one_line
from planner.device import cuda_rules
from planner.model.depth import first_layers
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import BNB, QUANTIZATIONS
from planner.training.spec import LoraSpec, TrainingSpec

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_CONFIG = ("torch_dtype", "dtype", "quantization_config", "architectures", "auto_map", "transformers_version")
MARKS = {"attention": r"attn|attention", "mlp": r"mlp|ffn|feed_forward|fc\d", "all-linear": r"layers|blocks|\.h\."}
"""How module paths show what a target keyword means."""


def model_config(config: dict[str, Any], layers: int | None = None, added_tokens: int = 0) -> Any:
    """Return the transformers config object, optionally with the first `layers` decoder layers only, or more tokens."""
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {k: v for k, v in config.items() if not k.startswith("_") and k not in NOT_CONFIG}
    if "text_config" in values and "hidden_size" not in values:
        values = {k: v for k, v in values["text_config"].items() if k not in NOT_CONFIG}
    model_type = values.pop("model_type", None)
    if not model_type:
        raise InvalidInput("the config has no model_type; pass a Hugging Face config.json")
    if model_type not in CONFIG_MAPPING:
        raise UnknownName(
            f"model_type {one_line(model_type)!r} is unknown to the installed transformers {transformers.__version__}; "
            "install a release that has it (code that comes with a model is not run)"
        )
    values = first_layers(values, layers)
    if "vocab_size" in values:
        values["vocab_size"] += added_tokens
    built = AutoConfig.for_model(model_type, **values)
    built.use_cache = False
    return built


def build(config: dict[str, Any], training: TrainingSpec, layers: int | None = None) -> tuple[nn.Module, list[str]]:
    """Return the prepared model on the meta device and notes about substitutions made.

    Order as a user's script has it: load (quantized), prepare for k-bit training, adapters, checkpointing.
    """
    notes: list[str] = []
    cfg = model_config(config, layers, training.added_tokens)
    model = _load(cfg, training, notes)
    if training.quantization.kind != "none":
        _quantize(model, training)
    if training.fp32_norms_only:
        for name, module in model.named_modules():
            if "norm" in name.rsplit(".", 1)[-1].lower() or "ln_" in name.rsplit(".", 1)[-1]:
                module.float()
    if training.kbit_preparation:
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=training.gradient_checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": training.use_reentrant},
        )
    if training.method != "full":
        assert training.lora is not None
        model = _adapt(model, training.lora, dora=training.method == "dora" or training.lora.use_dora)
    model.train()
    return model, notes


def causal_model(cfg: Any, implementation: str, dtype: torch.dtype) -> tuple[Any, str]:
    """Return the causal language model of a config and the attention implementation that its class has.

    Raises:
        UnknownName: the installed transformers has no decoder-only language model for it.
    """
    from transformers import AutoModelForCausalLM

    if type(cfg) not in AutoModelForCausalLM._model_mapping or cfg.is_encoder_decoder:
        raise UnknownName(
            f"transformers has no decoder-only language model for model_type {one_line(cfg.model_type)!r}; "
            "only such models are planned"
        )
    try:
        return AutoModelForCausalLM.from_config(cfg, dtype=dtype, attn_implementation=implementation), implementation
    except ValueError as error:
        if implementation == "eager" or "attention implementation" not in str(error):
            raise
        return AutoModelForCausalLM.from_config(cfg, dtype=dtype, attn_implementation="eager"), "eager"


def _load(cfg: Any, training: TrainingSpec, notes: list[str]) -> nn.Module:
    implementation = "eager" if training.attention == "eager" else "sdpa"
    dtype = DTYPES[training.base_dtype]
    with torch.device("meta"):
        model, taken = causal_model(cfg, implementation, dtype)
    if taken != implementation:
        notes.append("this class has no scaled_dot_product_attention path; eager attention instead")
    _keep_in_fp32(model, dtype)
    model.tie_weights()
    if cfg.tie_word_embeddings and not OWN_MODULES[training.own_modules].ties_head:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    return model


def _keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Modules that from_pretrained keeps in fp32 (modeling_utils.py: one list for fp16, one for any 16-bit dtype)."""
    if dtype == torch.float32:
        return
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(mark in name for mark in kept):  # core_model_loading.py build_glob_alternation: anywhere in the name
            tensor.data = tensor.data.float()


def _quantize(model: Any, training: TrainingSpec) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    quant = training.quantization
    if not QUANTIZATIONS[quant.kind].by_bitsandbytes:
        raise Contradiction(f"the trace runs {', '.join(BNB[:-1])} and {BNB[-1]} bases, not {quant.kind}")
    skip = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    skip = sorted({*skip, *quant.skip_modules})
    if QUANTIZATIONS[quant.kind].by_rows:
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        model.is_loaded_in_8bit = True
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=QUANTIZATIONS[quant.kind].bnb_4bit_type,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=DTYPES[quant.compute_dtype],
        )
        model.is_loaded_in_4bit = True
    model.quantization_method = settings.quant_method
    replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=settings)


def _adapt(model: Any, lora: LoraSpec, *, dora: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(model, lora.target_modules),
        modules_to_save=list(lora.modules_to_save) or None,
        use_dora=dora,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    with _dora_on_meta():
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(DTYPES[lora.dtype])
    return adapted


@contextmanager
def _dora_on_meta() -> Iterator[None]:
    """DoRA's magnitude starts as a norm of the weight, which PEFT copies and dequantizes; here its shape is enough."""
    from peft.tuners.lora.dora import DoraLinearLayer

    def update_layer(layer: Any, *, base_layer: Any, lora_B: torch.Tensor, **rest: Any) -> None:
        layer.weight = nn.Parameter(torch.empty(lora_B.shape[0], dtype=lora_B.dtype, device="meta"))

    original = DoraLinearLayer.update_layer
    DoraLinearLayer.update_layer = update_layer
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = original


@contextmanager
def quantized_parameters() -> Iterator[None]:
    """Let PEFT's DoRA find quantized weights although they are plain parameters here, not Params4bit or Int8Params."""
    from peft.tuners.lora import dora

    original = dora.dequantize_module_weight

    def dequantize(module: Any) -> torch.Tensor:
        weight, state = module.weight, getattr(module.weight, "quant_state", None)
        if state is not None:
            return bnb.functional.dequantize_4bit(weight.data, state)
        if isinstance(module, bnb.nn.Linear8bitLt):
            return bnb.functional.int8_vectorwise_dequant(weight.data, module.state.SCB)
        return original(module)

    dora.dequantize_module_weight = dequantize
    try:
        yield
    finally:
        dora.dequantize_module_weight = original


def _targets(model: nn.Module, names: tuple[str, ...]) -> str | list[str]:
    """Expand the keywords attention and mlp into module names."""
    if names == ("all-linear",):
        return "all-linear"
    found: set[str] = set()
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, Conv1D)
    for wanted in names:
        if wanted not in ("attention", "mlp", "all-linear"):
            found.add(wanted)
            continue
        for path, module in model.named_modules():
            if isinstance(module, kinds) and "lm_head" not in path and re.search(MARKS[wanted], path):
                found.add(IN_LAYER.sub("", path))
    return sorted(found)


# --- tensors -------------------------------------------------------------------------------------------------------

ADDED = re.compile(r"\.(lora_\w+|modules_to_save)\.")
"""In the path of a module that PEFT added."""
Maker = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def fake_maker(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the current (fake) mode."""
    return torch.empty(shape, dtype=dtype)


class RandomMaker:
    """Small random tensors for real runs, made on the device: never zeros, on which multipliers draw less power.

    Vectors are norms' weights, about one.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:  # in place: a loaded checkpoint leaves no larger temporary in the cache either
            return torch.empty(shape, dtype=dtype, device=self.device).normal_(float(len(shape) == 1), 0.02)
        least, most = (-127, 128) if dtype == torch.int8 else (0, 2)
        return torch.randint(least, most, shape, dtype=dtype, device=self.device)


def materialise(model: nn.Module, training: TrainingSpec, make: Maker) -> Iterator[tuple[str, torch.Tensor]]:
    """Replace every meta parameter and buffer by tensors from `make`; yield each new storage with its name.

    The base model first, then what PEFT added, as a script makes them.
    """
    shared: dict[int, nn.Parameter] = {}
    modules = list(model.named_modules())
    for path, module in sorted(modules, key=lambda item: ADDED.search(item[0]) is not None):
        if isinstance(module, bnb.nn.Linear4bit):
            yield from _materialise_4bit(path, module, training, make)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            yield from _materialise_int8(path, module, make)
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in shared:
                data = make(tuple(parameter.shape), parameter.dtype)
                shared[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                yield f"{path}.{name}", data
            module._parameters[name] = shared[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = data = make(tuple(buffer.shape), buffer.dtype)
                yield f"{path}.{name}", data
        _plain_meta_tensors(module, make)


def _plain_meta_tensors(module: nn.Module, make: Maker) -> None:
    """Replace tensors kept as ordinary attributes (original_inv_freq is an alias of the buffer where it exists)."""
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor) and value.is_meta:
            buffer = module._buffers.get(name.removeprefix("original_"))
            setattr(module, name, buffer if buffer is not None else make(tuple(value.shape), value.dtype))


def _materialise_4bit(
    path: str, module: Any, training: TrainingSpec, make: Maker
) -> Iterator[tuple[str, torch.Tensor]]:
    quant = training.quantization
    n, k = module.out_features, module.in_features
    if isinstance(make, RandomMaker):
        weight, state = bnb.functional.quantize_4bit(
            make((n, k), DTYPES[training.base_dtype]),
            blocksize=cuda_rules.BLOCKSIZE_4BIT,
            compress_statistics=quant.double_quant,
            quant_type=quant.kind,
        )
    else:
        weight, state = _fake_4bit(n, k, training, make)
    parameter = nn.Parameter(weight, requires_grad=False)
    for name, value in {
        "quant_state": state, "bnb_quantized": True, "compress_statistics": quant.double_quant,
        "quant_type": quant.kind, "quant_storage": torch.uint8, "blocksize": cuda_rules.BLOCKSIZE_4BIT,
    }.items():  # fmt: skip
        setattr(parameter, name, value)
    module.weight = parameter
    module.quant_state = state
    yield f"{path}.weight", weight
    yield f"{path}.absmax", state.absmax
    yield f"{path}.code", state.code
    if state.nested:
        yield f"{path}.state2.absmax", state.state2.absmax
        yield f"{path}.state2.code", state.state2.code
        yield f"{path}.offset", state.offset


def _fake_4bit(n: int, k: int, training: TrainingSpec, make: Maker) -> tuple[torch.Tensor, Any]:
    quant = training.quantization
    dtype = DTYPES[training.base_dtype]
    blocks = cuda_rules.absmax_blocks(n * k)
    state2, offset = None, None
    if quant.double_quant:
        groups = -(-blocks // cuda_rules.NESTED_BLOCKSIZE)
        state2 = bnb.functional.QuantState(
            absmax=make((groups,), torch.float32),
            code=make((256,), torch.float32),
            blocksize=cuda_rules.NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        offset = make((), torch.float32)
    state = bnb.functional.QuantState(
        absmax=make((blocks,), torch.uint8 if quant.double_quant else torch.float32),
        shape=torch.Size((n, k)),
        code=make((16,), torch.float32),
        blocksize=cuda_rules.BLOCKSIZE_4BIT,
        quant_type=quant.kind,
        dtype=dtype,
        offset=offset,
        state2=state2,
    )
    return make((-(-n * k // 2), 1), torch.uint8), state


def _materialise_int8(path: str, module: Any, make: Maker) -> Iterator[tuple[str, torch.Tensor]]:
    n, k = module.out_features, module.in_features
    weight = make((n, k), torch.int8)
    scale = make((n,), torch.float32)
    if isinstance(make, RandomMaker):
        scale = scale * (0.02 * 3.0 / 127)  # int8 rows whose largest entry is about three standard deviations
    parameter = nn.Parameter(weight, requires_grad=False)
    parameter.CB = parameter.SCB = None
    module.weight = parameter
    module.state.CB, module.state.SCB = weight, scale
    yield f"{path}.weight", weight
    yield f"{path}.SCB", scale
