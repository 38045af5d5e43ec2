"""The catalogue: every row is usable and sourced, names resolve to the safe card, hostile names stay names."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from planner.base import data_files
from planner.base.errors import UnknownName
from planner.base.units import GB, MiB
from planner.facts import catalog


def load(*parts: str) -> Any:
    with open(data_files.data_path(*parts), encoding="utf-8") as file:
        return json.load(file)


GPU_DATA = load("gpus.json")
GPU_ROWS: dict[str, dict[str, Any]] = GPU_DATA["gpus"]


def test_every_gpu_row_becomes_a_gpu_with_a_source() -> None:
    cards = catalog.gpus()
    assert len(cards) == len(GPU_ROWS) >= 83
    for card in cards:
        assert card.sources and card.gpu_id in GPU_ROWS
        assert 5 * GB < card.memory_bytes < 400 * GB
        assert card.memory_basis in ("reported", "cloud-api", "marketing")
        for rate in (card.fp32_flops_per_s, card.fp16_flops_per_s, card.bf16_flops_per_s):
            assert rate == 0 or 1e12 < rate < 1e16
        assert card.bandwidth_bytes_per_s == 0 or 1e11 < card.bandwidth_bytes_per_s < 1e13


def test_gb_on_the_box_read_as_10_to_the_9_is_never_more_than_hosts_report() -> None:
    known = [row for row in GPU_ROWS.values() if "memory_mib_reported" in row]
    assert len(known) > 25
    for row in known:
        assert row["memory_gb"] * GB <= row["memory_mib_reported"] * MiB, row["name"]
    gib = [row["memory_gb"] * 1024 * MiB <= row["memory_mib_reported"] * MiB for row in known]
    assert not all(gib), "read as GiB the box promises more than some hosts report"


@pytest.mark.parametrize(
    ("name", "memory_bytes", "basis"),
    [
        ("rtx-4090", 24564 * MiB, "reported"),
        ("t4", 15360 * MiB, "reported"),
        ("a10g", 23028 * MiB, "reported"),
        ("h100-sxm5-80gb", 81559 * MiB, "reported"),
        ("b300-sxm-288gb", 275040 * MiB, "cloud-api"),
        ("v100-sxm2-32gb", 32 * GB, "marketing"),  # the API says 32768 MiB, which is the box's number again
        ("mi250", 64 * GB, "marketing"),  # a process sees one of the two dies
    ],
)
def test_memory_and_its_basis(name: str, memory_bytes: int, basis: str) -> None:
    card = catalog.gpu(name)
    assert (card.memory_bytes, card.memory_basis) == (memory_bytes, basis)


@pytest.mark.parametrize(
    ("name", "gpu_id"),
    [
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("l40s", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm5-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-sxm-141gb"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-server"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_names_users_and_drivers_use(name: str, gpu_id: str) -> None:
    assert catalog.gpu(name).gpu_id == gpu_id


@pytest.mark.parametrize(
    ("name", "gpu_id"),
    [
        ("a100", "a100-pcie-40gb"),
        ("A100 80GB", "a100-pcie-80gb"),
        ("a100-80gb", "a100-pcie-80gb"),
        ("h100", "h100-pcie-80gb"),
        ("v100", "v100-pcie-16gb"),
        ("rtx 3080", "rtx-3080-10gb"),
        ("RTX 6000", "quadro-rtx-6000"),
    ],
)
def test_a_shared_name_gives_the_smallest_card_and_says_so(name: str, gpu_id: str) -> None:
    card = catalog.gpu(name)
    assert card.gpu_id == gpu_id
    assert "names several cards" in card.notes
    assert GPU_ROWS[gpu_id].get("note", "") in card.notes


@pytest.mark.parametrize("family", sorted(GPU_DATA["families"]))
def test_no_member_of_a_family_is_smaller_than_the_card_taken(family: str) -> None:
    taken = catalog.gpu(family)
    for member in GPU_DATA["families"][family]:
        assert taken.memory_bytes <= catalog.gpu(member).memory_bytes


@pytest.mark.parametrize("name", ["rtx 3060", "NVIDIA GeForce RTX 4060 Ti", "5060ti", "gb300"])
def test_a_name_that_also_means_a_smaller_card_is_refused(name: str) -> None:
    with pytest.raises(UnknownName, match="not clear"):
        catalog.gpu(name)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "RTX 4090 D",
        "gtx-9999",
        "",
        "-",
        "nvidia",
        "\x1b[2J\n",
        "../gpus",
        "x" * 10_000,
    ],
)
def test_an_unknown_card_is_one_line_without_control_characters(name: str) -> None:
    with pytest.raises(UnknownName) as error:
        catalog.gpu(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 700


def test_a_laptop_card_suggests_but_never_becomes_the_desktop_card() -> None:
    with pytest.raises(UnknownName, match="did you mean rtx-4090"):
        catalog.gpu("NVIDIA GeForce RTX 4090 Laptop GPU")


def test_no_two_cards_share_a_name() -> None:
    owner: dict[str, str] = {}
    for gpu_id, row in GPU_ROWS.items():
        for name in (gpu_id, row["name"], *row.get("aliases", ())):
            key = catalog._gpu_key(name)
            assert owner.setdefault(key, gpu_id) == gpu_id, name
    for name in (*GPU_DATA["families"], *GPU_DATA["unclear"]):
        assert catalog._gpu_key(name) not in owner, name


def test_instances_name_known_gpus_and_dated_prices() -> None:
    rows = catalog.instances()
    assert len(rows) >= 110
    for row in rows:
        assert row.gpu_id in GPU_ROWS and row.gpu_count >= 1
        assert 0.05 < row.usd_per_hour < 500
        assert date(2025, 1, 1) < date.fromisoformat(row.price_date)
        assert row.source


def test_instance_rows_that_cannot_be_priced_are_kept_in_the_file_only() -> None:
    raw = load("instances.json")["instances"]
    assert len(raw) == 147
    offered = {(i.provider, i.instance_type, i.region) for i in catalog.instances()}
    assert ("aws", "g5.xlarge", "us-east-1") in offered
    assert not any(
        kind in ("g6f.large", "Standard_NV6ads_A10_v5", "g5g.xlarge", "gr6.4xlarge") for _, kind, _ in offered
    )


MODEL_IDS = catalog.model_ids()


def test_the_catalogue_has_its_models() -> None:
    assert len(MODEL_IDS) == len(set(map(str.lower, MODEL_IDS))) >= 159


@pytest.mark.parametrize("model_id", MODEL_IDS)
def test_model_record(model_id: str) -> None:
    record = catalog.model_record(model_id)
    assert record is not None and record.model_id == model_id and not record.is_alias
    assert isinstance(record.config["model_type"], str)
    assert not any(key.startswith("_") for key in record.config)
    assert record.confidence in ("verified", "sourced", "unverified")
    assert record.source and record.counted_parameters > 0 and record.counted_how
    published = record.published_parameters
    if published is None:
        assert record.confidence != "verified"
    elif published != record.counted_parameters:
        assert record.difference or published == with_vision(record.model_id)


def with_vision(model_id: str) -> object:
    """Parameters of the vision tower and the language model, as the data file counts them."""
    path = Path(data_files.data_path("models", f"{model_id.replace('/', '--')}.json"))
    return json.loads(path.read_text(encoding="utf-8"))["counted_parameters_with_vision"]


def test_every_alias_leads_to_a_record() -> None:
    aliases = catalog.model_aliases()
    assert len(aliases) > 100
    for alias, target in aliases.items():
        record = catalog.model_record(alias)
        assert record is not None and record.model_id == target and record.is_alias


def test_model_names_ignore_case_and_may_omit_the_organisation() -> None:
    for name in ("meta-llama/llama-3.1-8b", "LLAMA-3.1-8B", "gpt2"):
        record = catalog.model_record(name)
        assert record is not None and not record.is_alias
    record = catalog.model_record("mistral-7b-instruct-v0.2")
    assert record is not None and record.is_alias


@pytest.mark.parametrize(
    "name", ["", "nope", "../gpus", "a/../b", "org--name", "/etc/passwd", "a\0b", "x" * 5000, "aliases"]
)
def test_a_name_that_is_no_model_is_none(name: str) -> None:
    assert catalog.model_record(name) is None


def test_importing_the_catalogue_loads_no_heavy_library() -> None:
    code = "import sys, planner.facts.catalog as c; c.gpu('4090'); c.model_record('gpt2'); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"numpy", "torch", "yaml", "csv", "click", "huggingface_hub"} & set(run.stdout.split())


def test_a_first_look_up_takes_milliseconds() -> None:
    best = 1.0
    for _ in range(5):
        catalog._gpu_tables.cache_clear()
        catalog._model_index.cache_clear()
        start = time.perf_counter()
        catalog.gpu("rtx-4090")
        catalog.model_record("Qwen/Qwen3-8B")
        best = min(best, time.perf_counter() - start)
    assert best < 0.02  # about 0.0015 on an idle machine
