"""Target `databricks-cluster`: a single-node GPU cluster of the classic compute plane, on the cheapest node that fits.

Node families: docs.databricks.com "GPU-enabled compute" (AWS) and learn.microsoft.com (Azure). Body: databricks-sdk
0.162.0 service/compute.py ClusterSpec. Prices are those of the machine alone: Databricks units come on top.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput, PlannerError, one_line, unknown
from planner.base.records import replace
from planner.base.units import GiB
from planner.device.hardware import Gpu, Instance
from planner.exporters import script
from planner.exporters.recipe import Artifact, Export, Recipe
from planner.exporters.text import json_file
from planner.facts import catalog
from planner.plan.notes import lacks_bf16
from planner.plan.predict import Prediction, predict
from planner.plan.verdict import FITS

RUNTIME = "15.4.x-gpu-ml-scala2.12"
"""A GPU ML runtime; Photon does not run on GPU nodes."""
CLOUDS = ("aws", "azure")

_FAMILIES = {
    "aws": r"(p5|p4d|p4de|g6e|g6|g5|g4dn)\.[a-z0-9]+",
    "azure": r"Standard_(NC\d+ad(s|is)_H100_v5|ND96isr_H100_v5|NC\d+ads_A100_v4|ND96as?r_v4|ND96amsr_A100_v4"
    r"|NV\d+ad(s|ms)_A10_v5|NC\d+as_T4_v3)",
}  # fmt: skip
"""Node types that Databricks offers with GPUs; P3 and NC v3 are being withdrawn."""

# MicrosoftDocs/azure-docs articles/virtual-machines/nva10v5-series.md: GPUs and GiB of each size
_A10_SLICES = {6: (1 / 6, 4), 12: (1 / 3, 8), 18: (1 / 2, 12), 36: (1, 24), 72: (2, 24)}


class Node(NamedTuple):
    """A node type with the card that one process sees."""

    name: str
    cloud: str
    gpu: Gpu
    gpus: float
    """GPUs of the node; below 1: a slice of one."""
    usd_per_hour: float
    """0: not known."""
    price_date: str = ""


def node(name: str) -> Node:
    """Return a node type by name; the small NVads A10 v5 sizes as the part of an A10 that they are.

    Raises:
        UnknownName: not in the instance table.
    """
    sliced = re.fullmatch(r"Standard_NV(\d+)ad(?:s|ms)_A10_v5", name)
    if sliced and int(sliced[1]) in _A10_SLICES:
        return _a10(name, int(sliced[1]))
    known = {item.instance_type: item for item in catalog.instances() if item.provider in CLOUDS}
    if name not in known:
        raise unknown("node type", name, known)
    return _node(known[name])


def _a10(name: str, size: int) -> Node:
    gpus, gib = _A10_SLICES[size]
    whole = catalog.gpu("a10")
    share = min(gpus, 1.0)
    card = whole
    if share < 1:
        card = replace(
            whole,
            name=f"{whole.name} (1/{round(1 / share)})",
            memory_bytes=min(gib * GiB, int(whole.memory_bytes * share)),
            memory_basis="marketing",
            **{
                field: getattr(whole, field) * share
                for field in ("bandwidth_bytes_per_s", "fp32_flops_per_s", "fp16_flops_per_s", "bf16_flops_per_s",
                              "tf32_flops_per_s")
            },
        )  # fmt: skip
    price = next((i for i in catalog.instances() if i.instance_type == name), None)
    return Node(name, "azure", card, gpus, price.usd_per_hour if price else 0.0, price.price_date if price else "")


def _node(item: Instance) -> Node:
    return Node(
        item.instance_type, item.provider, catalog.gpu(item.gpu_id), item.gpu_count, item.usd_per_hour, item.price_date
    )


def nodes(cloud: str) -> list[Node]:
    """The priced node types of a cloud that Databricks offers, cheapest first.

    Raises:
        UnknownName: another cloud.
    """
    if cloud not in CLOUDS:
        raise unknown("cloud", cloud, CLOUDS)
    found = [
        _node(item)
        for item in catalog.instances()
        if item.provider == cloud and re.fullmatch(_FAMILIES[cloud], item.instance_type)
    ]
    return sorted(found, key=lambda n: (n.usd_per_hour, n.name))


class Choice(NamedTuple):
    """The node a run is placed on, and the prediction there."""

    node: Node
    prediction: Prediction


def choose(recipe: Recipe, cloud: str, name: str | None) -> Choice:
    """Return the node that was named, or the cheapest on which the run fits.

    Raises:
        PlannerError: unknown names, or no node on which it fits; the message has the reason for each card.
    """
    if name is not None:
        found = node(name)
        return Choice(found, predict(recipe.model, recipe.training, found.gpu))
    tried: dict[str, Prediction] = {}
    reasons: dict[str, str] = {}
    for candidate in nodes(cloud):
        key = candidate.gpu.gpu_id
        if lacks_bf16(candidate.gpu) and "bf16" in (recipe.training.autocast, recipe.training.base_dtype):
            reasons[key] = f"{candidate.gpu.name} has no bf16 (plan with --autocast fp16 --base-dtype fp16)"
            continue
        if key not in tried:
            tried[key] = predict(recipe.model, recipe.training, candidate.gpu)
            reasons[key] = f"{candidate.gpu.name} {_need(tried[key])}"
        if tried[key].verdict == FITS:
            return Choice(candidate, tried[key])
    raise PlannerError(
        f"the run fits no GPU node of {cloud}: {'; '.join(reasons.values())}; several GPUs are not planned"
    )


def _need(prediction: Prediction) -> str:
    have = prediction.capacity_bytes / GiB
    return f"needs {prediction.device.expected / GiB:.1f} of {have:.1f} GiB"


def export(recipe: Recipe, choice: Choice, *, name: str = "loraplan", user: str = "") -> Export:
    """Write the cluster and the training script.

    Raises:
        InvalidInput: a cluster name that is none.
    """
    if not name.strip() or not name.isprintable() or len(name) > 100:
        raise InvalidInput(f"the cluster name is {one_line(name)!r}; must be 1 to 100 printable characters")
    found, prediction = choice
    errors = []
    if prediction.verdict != FITS:
        errors.append(f"{found.name}: {prediction.verdict}, {_need(prediction)}")
    return Export(
        artifacts=(
            Artifact("cluster.json", json_file(cluster(found, name, user))),
            Artifact(script.NAME, script.script(recipe)),
        ),
        notes=(*_notes(found, prediction), *script.notes(recipe)),
        errors=tuple(errors),
    )


def _notes(found: Node, prediction: Prediction) -> list[str]:
    gpu = found.gpu
    notes = [f"{found.name} ({gpu.name}, {gpu.memory_bytes / GiB:.2f} GiB): {prediction.verdict}, {_need(prediction)}"]
    if found.usd_per_hour:
        notes.append(
            f"the machine costs {found.usd_per_hour:.3f} USD an hour on demand ({found.price_date}); Databricks units "
            "come on top and are not in this table"
        )
    if found.gpus < 1:
        notes.append(
            f"{found.name} has 1/{round(1 / found.gpus)} of a card, not a whole one: {gpu.memory_bytes / GiB:.0f} GiB"
        )
    if found.gpus > 1:
        notes.append(f"{found.name} has {found.gpus:g} cards; the plan uses one and pays for all")
    if lacks_bf16(gpu):
        notes.append(f"{gpu.name} has no bf16: the exported script uses what was planned, plan with --autocast fp16")
    return notes


def cluster(found: Node, name: str, user: str = "") -> dict[str, Any]:
    """The body of a clusters/create request for one GPU node.

    Single-node mode by its Spark settings, dedicated access: standard access mode has no GPU support.
    """
    body: dict[str, Any] = {
        "cluster_name": name,
        "spark_version": RUNTIME,
        "node_type_id": found.name,
        "driver_node_type_id": found.name,
        "num_workers": 0,
        "runtime_engine": "STANDARD",
        "data_security_mode": "SINGLE_USER",
        "spark_conf": {"spark.databricks.cluster.profile": "singleNode", "spark.master": "local[*]"},
        "custom_tags": {"ResourceClass": "SingleNode"},
        "autotermination_minutes": 60,
    }
    if user:
        body["single_user_name"] = user
    if found.cloud == "aws":
        body["aws_attributes"] = {"availability": "ON_DEMAND", "first_on_demand": 1}
    return body
