"""What a module is, on toy modules: its releases, its dtype, adapters on experts, copies of saved modules."""

from __future__ import annotations

from planner.base.records import replace
from planner.model import lora, storage
from planner.model.spec import KeptInFp32, Linear
from planner.training.spec import LoraSpec, QuantizationSpec
from tests.helpers.step_toy import toy


def test_groups_are_rounded_up() -> None:
    """auto_gptq qlinear: 300 columns in groups of 128 are three."""
    spec = Linear(name="x", in_features=300, out_features=512)
    found = dict(storage.quantized_bytes(spec, QuantizationSpec(kind="gptq4", group_size=128)))
    assert found == {"qweight": 76_800, "qzeros": 768, "scales": 3072, "g_idx": 1200}


def test_a_path_for_attention_exists_from_its_release_on() -> None:
    attention = replace(toy("llama").layers[0].attention, sdpa_since=(4, 48))
    assert [attention.has_sdpa(release) for release in ((4, 47), (4, 48), (4, 49))] == [False, True, True]


def test_what_is_kept_in_fp32_only_in_fp16() -> None:
    """transformers _keep_in_fp32_modules holds for fp16, its strict list for bf16 too (modeling_utils.py)."""
    rules = (
        KeptInFp32(name="norm", fp16_only=True, since=(4, 50)),
        KeptInFp32(name="gate", fp16_only=False, since=(5, 0)),
    )
    model = replace(toy("llama"), keep_in_fp32=rules)
    for parameter, dtype, release, stored in (
        ("norm", "fp16", (4, 50), "fp32"), ("norm", "fp16", (4, 49), "fp16"), ("norm", "bf16", (4, 50), "bf16"),
        ("gate", "bf16", (5, 0), "fp32"), ("gate", "bf16", (4, 57), "bf16"), ("norm", "fp32", (5, 0), "fp32"),
    ):  # fmt: skip
        assert model.stored_as(parameter, dtype, release) == stored


def test_a_copy_of_every_saved_module() -> None:
    """peft modules_to_save: gate_proj of both layers, 2 x 128 x 256."""
    assert lora.saved_module_parameters(toy("llama"), LoraSpec(modules_to_save=("gate_proj",))) == 65_536
