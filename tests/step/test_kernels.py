"""KERNELS: every row is complete and is run by some step; a made-up row works everywhere; nobody looks at names."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from calibrate.fit.points import MEASURED, compressed
from calibrate.measure import burst
from planner.base.errors import UnknownName
from planner.base.records import Rows, fields, replace
from planner.device.hardware import CPU, Gpu
from planner.facts import catalog, sources
from planner.model import families
from planner.plan import predict
from planner.step import architecture, program
from planner.step.engine import Engine
from planner.step.kernels import COMPILED, KERNELS, LEDGER, LINK_CLASS, PROFILED, UNMARKED, KernelKind
from planner.timing import prices, step_time
from planner.timing.coefficients import priors
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec
from tests.helpers import timing_toy

ROOT = Path(__file__).parent.parent.parent
A100, H100 = catalog.gpu("a100-sxm4-80gb"), catalog.gpu("h100-sxm5-80gb")
PROCESSOR = replace(A100, gpu_id="cpu", vendor=CPU, architecture="avx2", compute_capability=None)


@cache
def model(name: str = "meta-llama/Llama-3.2-1B") -> Any:
    return families.build_spec(sources.load_config(name).config, model_id=name)


def training(**settings: Any) -> TrainingSpec:
    method = settings.get("method", "lora")
    given = {"method": method, "lora": None if method == "full" else LoraSpec(r=8), "seq_len": 256}
    return TrainingSpec(**{**given, **settings})


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [item.name for item in fields(KernelKind)])
def test_a_row_that_forgets_a_field_fails_by_name(name: str) -> None:
    values = {item.name: getattr(KERNELS["norm"], item.name) for item in fields(KernelKind)}
    del values[name]
    with pytest.raises(TypeError, match=f"KernelKind needs {name}"):
        KernelKind(**values)


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("norm", {"ledger": "plumbing"}, "unknown class of kernels 'plumbing'"),
        ("norm", {"ledger_outside": "plumbing"}, "unknown class of kernels 'plumbing'"),
        ("norm", {"price": "guess"}, "unknown way of pricing 'guess'"),
        ("norm", {"compiled": "maybe"}, "unknown way of torch.compile 'maybe'"),
        ("norm", {"lane": "communication"}, "unknown lane of kernel norm 'communication'"),
        ("norm", {"lane": "copy"}, "norm: lane"),
        ("norm", {"only_without_room": True}, "norm: only_without_room"),
        ("norm", {"coefficient": None}, "norm: coefficient"),
        ("norm", {"attention": KERNELS["flash_attention"].attention}, "norm: attention"),
        ("norm", {"profiled": "plumbing"}, "norm: profiled"),
        ("norm", {"marks": ("norm",)}, "norm: marks"),
        ("flash_attention", {"marks": ()}, "flash_attention: marks"),
        ("flash_attention", {"attention": None}, "flash_attention: attention"),
        ("flash_attention", {"gpu_passes": 2.0}, "flash_attention: gpu_passes"),
        ("matmul", {"coefficient": "matmul"}, "matmul: coefficient"),
        ("matmul", {"bandwidth_share": 0.5}, "matmul: bandwidth_share"),
        ("matmul", {"compiled": "merged"}, "matmul: compiled"),
        ("host_transfer", {"ledger": "element-wise"}, "host_transfer: ledger"),
    ],
)
def test_a_row_whose_fields_exclude_each_other_is_refused(op: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, UnknownName), match=said):
        replace(KERNELS[op], **changes)


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("norm", {"coefficient": "luck"}, "norm: there is no coefficient luck"),
        ("norm", {"call_cost": "luck"}, "norm: there is no coefficient luck"),
        ("indexed", {"coefficient": "bandwidth"}, "indexed: the way index of pricing does not read bandwidth"),
        ("host_transfer", {"coefficient": "bandwidth"}, "host_transfer: the way link of pricing does not read"),
    ],
)
def test_a_row_with_a_coefficient_that_nobody_reads_is_refused(op: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        prices.check([replace(KERNELS[op], **changes)])


def test_two_rows_of_one_name_are_refused() -> None:
    rows = [("norm", KERNELS["norm"]), ("norm", KERNELS["copy"])]
    with pytest.raises(TypeError, match="two rows of one name"):
        Rows("kind of kernel", ["norm"], rows)


def test_rows_are_called_what_they_say() -> None:
    assert all(kind.name == name for name, kind in KERNELS.items())


def test_an_unknown_kind_is_refused_where_it_is_recorded() -> None:
    with pytest.raises(UnknownName, match="unknown kind of kernel 'nrom'; did you mean norm"):
        Engine().kernel("nrom", "bf16", 2)


def test_what_a_fit_compares() -> None:
    """Profiles tell apart no more; no burst that is fitted copies to the host."""
    assert MEASURED == {
        "matrix products": ("matrix products", "adapters"),
        "attention": ("attention",),
        "dequantization": ("dequantization",),
        "the rest": ("element-wise", "loss", "optimizer"),
    }
    assert {name for name, row in LEDGER.items() if row.compared_as is None} == {LINK_CLASS}
    assert {*PROFILED, UNMARKED} <= set(LEDGER)
    assert tuple(LEDGER) == step_time.CLASSES


@pytest.mark.parametrize(
    ("name", "kind"),
    [  # names of kernels and operations in profiles of torch and bitsandbytes
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn", "matrix products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_TNT", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k128_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantization"),
        ("kdequant_mm_int32_fp16<4, 512>", "dequantization"),
        ("bitsandbytes::quantize_blockwise", "dequantization"),
        ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>>", "optimizer"),
        ("aten::_foreach_addcmul_", "optimizer"),
        ("void cunn_SoftMaxForward<4, float>", "loss"),
        ("aten::nll_loss_backward", "loss"),
        ("void vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "element-wise"),
        ("Memcpy HtoD (Pinned -> Device)", "element-wise"),
    ],
)
def test_profiles_are_sorted_by_parts_of_names(name: str, kind: str) -> None:
    assert burst.class_of(name) == kind


LLAMA, GPT2 = "meta-llama/Llama-3.2-1B", "openai-community/gpt2"
SOMEWHERE: tuple[tuple[str, Gpu, dict[str, Any]], ...] = (
    (LLAMA, A100, {"attention": "sdpa", "gradient_checkpointing": "offload", "padded": False}),
    (LLAMA, A100, {"attention": "sdpa", "padded": True, "gradient_checkpointing": "offload", "kernels": "unsloth"}),
    (LLAMA, A100, {"attention": "eager", "lora": LoraSpec(r=8, lora_dropout=0.1), "optimizer": "paged-adamw"}),
    (LLAMA, H100, {"attention": "sdpa", "padded": False}),
    (LLAMA, A100, {"method": "qlora", "quantization": QuantizationSpec(kind="nf4")}),
    (LLAMA, A100, {"method": "qlora", "quantization": QuantizationSpec(kind="int8"), "padded": True}),
    (GPT2, A100, {"method": "full", "autocast": "bf16", "base_dtype": "fp32"}),
)


def test_every_kind_is_run_by_some_step() -> None:
    """A price that nobody pays is a fact that nobody reads. A copy is the engine's, of a gradient with two holders."""
    run = {"copy"}
    for name, card, settings in SOMEWHERE:
        made = training(**settings)
        found = program.run(model(name), made, architecture.architecture(card, made)).record
        run |= {kernel.op for kernel in found.kernels}
    assert set(KERNELS) == run


# --- a made-up row ---------------------------------------------------------------------------------------------------

MADE_UP = replace(
    KERNELS["int8_quantize"], name="made_up", coefficient="dequantize", bandwidth_share=0.25, gpu_passes=3.0,
    compiled="merged", ledger="dequantization", ledger_outside="adapters", profiled="attention", marks=("kmadeup",),
)  # fmt: skip
"""Unlike any other kind."""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Add a row, and let the program run it wherever it runs an element-wise kernel."""

    def add(kind: KernelKind) -> None:
        prices.check([kind])
        monkeypatch.setitem(KERNELS, kind.name, kind)
        real = Engine.kernel

        def kernel(self: Engine, op: str, dtype: str, nbytes: Any, *arguments: Any, **named: Any) -> None:
            if op == "elementwise":
                op, named = kind.name, {**named, "elements": nbytes}
            real(self, op, dtype, nbytes, *arguments, **named)

        monkeypatch.setattr(Engine, "kernel", kernel)

    return add


def test_a_made_up_kind_is_priced_by_its_fields(made_up: Callable[..., None]) -> None:
    """1 MB at 0.5 GB/s * 0.5 * 0.25, three times: 48 ms; compiled, 0.4 of it and 0.3 of the launches."""
    made_up(MADE_UP)
    kernel = timing_toy.kernel("made_up", count=2)
    assert timing_toy.rates().price(kernel, 300) == pytest.approx((0.0, 48e-3, 2e-6))
    assert timing_toy.rates(compile=True).price(kernel, 300) == pytest.approx((0.0, 0.4 * 48e-3, 0.6e-6))
    on_a_cpu = replace(timing_toy.CARD, vendor=CPU, compute_capability=None)
    assert timing_toy.rates(on_a_cpu).price(kernel, 300).memory == pytest.approx(16e-3)
    assert timing_toy.rates().host_s(MADE_UP, "forward", 10, 3) == pytest.approx(10e-6 + 3 * 5e-6)
    assert step_time.shares_of(timing_toy.rates(), kernel, 0.0) == (("dequantize", 1.0),)


def test_a_made_up_kind_is_in_the_ledger_the_profile_and_the_fit(made_up: Callable[..., None]) -> None:
    settings = training(gradient_checkpointing="none", autocast="none", base_dtype="bf16")
    before = predict.predict(model(), settings, A100).time
    made_up(MADE_UP)
    found = predict.predict(model(), settings, A100).time
    assert before is not None and found is not None
    assert "dequantization" not in {line.name for line in before.ledger}
    lines = {line.name: line for line in found.ledger}
    assert lines["dequantization"].launches > 0
    assert lines["dequantization"].bytes > 0
    assert lines["adapters"].launches > {line.name: line for line in before.ledger}["adapters"].launches
    assert "dequantize" in dict(found.uncertainty)
    assert burst.class_of("void kMadeUp<bf16>(int)") == "attention"
    run = program.run(model(), settings, architecture.architecture(A100, settings)).record
    whole = step_time.phase_seconds(run, settings, A100, priors(A100))
    sooner = step_time.phase_seconds(compressed(run), settings, A100, priors(A100))
    assert sooner[1] == pytest.approx(whole[1], rel=1e-9)
    assert sooner[2] == pytest.approx(whole[2], rel=1e-9)
    assert whole[2]["dequantization"] == pytest.approx(lines["dequantization"].seconds, rel=0.2)


LIKE = {
    "traffic": MADE_UP,
    "index": replace(KERNELS["indexed"], name="made_up", ledger="adapters", gpu_passes=2.0),
    "attention": replace(KERNELS["efficient_attention"], name="made_up", coefficient="cudnn_forward"),
    "link": replace(KERNELS["host_transfer"], name="made_up"),
    "beside": replace(KERNELS["overlapped_transfer"], name="made_up", call_cost="launch_quantized"),
    "without room": replace(KERNELS["paged_transfer"], name="made_up"),
}
"""A kind for each way of pricing that may be made up alone, in each lane."""


@pytest.mark.extra
@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("compiled", [False, True])
def test_swept_cells_of_a_made_up_kind_are_those_of_a_prediction(
    name: str, compiled: bool, made_up: Callable[..., None]
) -> None:
    from planner.plan import sweep

    made_up(LIKE[name])
    base = training(method="full", compile=compiled, gradient_checkpointing="full")
    small = catalog.gpu("rtx-3060-12gb")
    axes = sweep.Axes(micro_batch_size=(1, 6), seq_len=(64, 1000), r=(8,), gradient_accumulation_steps=(1, 3))
    cells = sweep.Sweeper(model(), axes).cells(base, (A100, small, PROCESSOR))
    for place in ((0, 0, 0, 0, 0), (1, 1, 1, 0, 1), (1, 0, 1, 0, 0), (2, 1, 0, 0, 1), (0, 1, 1, 0, 1)):
        found = predict.predict(model(), sweep.at(cells, place[1:]), cells.cards[place[0]]).time
        assert found is not None
        assert cells.step_s[place] == pytest.approx(found.step_s.expected, rel=1e-9)
        high = cells.step_s[place] * (1 + cells.step_spread[place])
        assert high == pytest.approx(found.step_s.high, rel=1e-9)


# --- nobody looks at names -------------------------------------------------------------------------------------------

ROOMS = ("planner/timing", "planner/sweep", "planner/plan", "planner/report", "calibrate/fit", "calibrate/measure")


BY_PARTS = ("startswith", "endswith", "partition", "rpartition", "get", "removesuffix", "removeprefix", "find")


def looks_at_names(tree: ast.AST) -> Iterator[int]:
    """Lines that compare the name of a kernel or storage, look for parts of it, or use it as a key of a table."""

    def names_op(node: ast.AST) -> bool:
        return (isinstance(node, ast.Attribute) and node.attr == "op") or (
            isinstance(node, ast.Name) and node.id == "op"
        )

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            looked: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            by_name = (
                "startswith",
                "endswith",
                "partition",
                "rpartition",
                "get",
                "removesuffix",
                "removeprefix",
                "find",
            )
            looked = [node.func.value, *node.args] if node.func.attr in by_name else []
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) not in ("KERNELS", "kernels.KERNELS"):
            looked = [node.slice]
        elif isinstance(node, ast.Match):
            looked = [node.subject]
        else:
            continue
        if any(names_op(item) for item in looked):
            yield getattr(node, "lineno", 0)


@pytest.mark.parametrize("room", ROOMS)
def test_nobody_looks_at_the_name_of_a_kernel(room: str) -> None:
    paths = sorted((ROOT / room).rglob("*.py"))
    assert paths
    found = {str(p.relative_to(ROOT)): list(looks_at_names(ast.parse(p.read_text(encoding="utf-8")))) for p in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        'kernel.op == "norm"', 'kernel.op in ("norm", "copy")', "kernel.op.startswith(FUSED)", "PASSES[kernel.op]",
        "PASSES.get(op, 1.0)", '"norm" in kernel.op', "match kernel.op:\n    case _:\n        pass",
    ],
)  # fmt: skip
def test_what_looks_at_names_is_found(line: str) -> None:
    assert list(looks_at_names(ast.parse(line))) == [1]
    assert not list(looks_at_names(ast.parse("kernel.kind.price == 'link' and KERNELS[kernel.op]")))


def test_ways_of_torch_compile_leave_no_more_than_there_was() -> None:
    for name, way in COMPILED.items():
        assert 0 < way.launched_share <= way.latency_share <= 1, name
        assert (way.traffic is not None) == (way.latency_share < 1), name
