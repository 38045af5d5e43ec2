"""Every way to name a model gives its config or one helpful line; no file, however broken, gives a traceback."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from planner.base.config_values import boolean, integer, integer_list, number, text, text_list
from planner.base.errors import InvalidInput, PlannerError, UnknownName
from planner.facts import catalog, sources
from planner.facts.sources import load_config
from planner.model.families import build_spec
from planner.model.spec import ModelSpec
from planner.plan.predict import predict
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec
from tests.helpers.header_bytes import LLAMA_GGUF, gguf_bytes, mutate, safetensors_bytes, tensor

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def folder(path: Path, config: Any = TINY, **files: bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def weights(shapes: dict[str, list[int]], dtype: str = "F32") -> bytes:
    table, end = {}, 0
    for name, shape in shapes.items():
        table[name] = {**tensor(shape, end), "dtype": dtype}
        if dtype != "F32":  # one byte per element
            table[name]["data_offsets"] = [end, end + tensor(shape)["data_offsets"][1] // 4]
        end = table[name]["data_offsets"][1]
    return safetensors_bytes(table, b"\0" * end)


# --- the catalogue --------------------------------------------------------------------------------------------------


def test_catalogue() -> None:
    loaded = load_config("qwen/qwen3-0.6b")
    assert (loaded.model_id, loaded.origin, loaded.warnings) == ("Qwen/Qwen3-0.6B", "catalogue", ())
    assert loaded.record is not None and loaded.text_config["hidden_size"] == 1024


def test_alias_and_text_part_are_said() -> None:
    assert "shares its sizes" in load_config("meta-llama/Llama-3.1-8B-Instruct").warnings[0]
    assert "vision tower not included" in load_config("google/gemma-3-4b-it").warnings[0]


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "mistral7b", "Qwen/Qwen3-8", "nobody/nothing-9b", "a b", "\x1b[2J", "x" * 4000]
)
def test_unknown_names_say_what_to_pass(name: str) -> None:
    with pytest.raises(UnknownName, match=r"pass a model folder, a config\.json or a GGUF file") as error:
        load_config(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_unknown_names_suggest_and_say_that_the_hub_was_not_asked() -> None:
    with pytest.raises(UnknownName, match=r"not asked \(HF_HUB_OFFLINE\).*meta-llama/Meta-Llama-3-8B"):
        load_config("llama-3-8b")


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000])
def test_no_model_at_all(name: str) -> None:
    with pytest.raises(InvalidInput):
        load_config(name)


# --- files and folders ----------------------------------------------------------------------------------------------


def test_folder_file_and_relative_path_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "my-model")
    loaded = load_config(str(path))
    assert loaded.model_id == "my-model" and loaded.config == TINY and loaded.origin.startswith("folder ")
    assert load_config(str(path / "config.json")).model_id == "my-model"
    monkeypatch.chdir(tmp_path)
    assert load_config("./my-model").config == load_config("my-model").config == TINY


def test_an_output_folder_does_not_hide_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("gpt2").origin == "catalogue"
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        load_config("./gpt2")


CONFIG_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "not json": (b"{'a': 1}", "not valid JSON"),
    "binary": (b"\x80\x02}q\x00.", "not text"),
    "a list": (b"[1]", "holds a list"),
    "null": (b"null", "holds null"),
    "a number": (b"3", "holds a number"),
    "NaN": (b'{"model_type": "llama", "rope_theta": NaN}', "NaN"),
    "infinite": (b'{"model_type": "llama", "rope_theta": 1e999}', "out of range"),
    "long integer": (b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}", "5000 digits"),
    "nested lists": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
    "nested objects": (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper"),
    "large": (b'{"model_type": "llama", "x": "' + b"x" * 1_100_000 + b'"}', "at most 1048576"),
    "no model_type": (b'{"hidden_size": 8}', "no model_type"),
    "model_type not text": (b'{"model_type": 3}', "no model_type"),
    "text_config not an object": (b'{"model_type": "llava", "text_config": 3}', "text_config"),
    "adapter": (b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}', "org/base"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_fault(tmp_path: Path, fault: str) -> None:
    data, message = CONFIG_FAULTS[fault]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InvalidInput, match=message) as error:
        load_config(str(tmp_path / "config.json"))
    assert "config.json" in str(error.value) and str(error.value).isprintable()


def test_duplicate_keys_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    body = json.dumps(TINY)[:-1] + ', "hidden_size": 16}'
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + body.encode())
    assert load_config(str(tmp_path / "c.json")).config["hidden_size"] == 16


def test_folders_that_are_not_models(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    for source in (adapter, adapter / "adapter_config.json"):
        with pytest.raises(InvalidInput, match=r"LoRA adapter, not a model.*org/base.*pass the base model"):
            load_config(str(source))
    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    (ggufs / "m.Q4_K.gguf").write_bytes(LLAMA_GGUF)
    with pytest.raises(InvalidInput, match=r"pass its GGUF file 'm\.Q4_K\.gguf'"):
        load_config(str(ggufs))
    with pytest.raises(InvalidInput, match="holds weights"):
        load_config(str(tmp_path / "model.safetensors"))


def test_devices_and_pipes_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (str(tmp_path / "pipe.json"), "/dev/zero", str(tmp_path / "missing.json")):
        with pytest.raises(InvalidInput):
            load_config(path)


def test_multimodal_config_gives_the_text_part(tmp_path: Path) -> None:
    outer = {"model_type": "llava", "torch_dtype": "bfloat16", "text_config": TINY, "vision_config": {"hidden_size": 3}}
    loaded = load_config(str(folder(tmp_path / "m", outer)))
    assert loaded.config["model_type"] == "llava" and loaded.text_config["model_type"] == "llama"
    assert loaded.text_config["torch_dtype"] == "bfloat16"
    assert loaded.warnings == ("vision tower not included: only the language model is planned",)


# --- weight headers -------------------------------------------------------------------------------------------------


def test_parameters_are_counted_without_buffers_and_second_copies(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": [32, 8],
        "lm_head.weight": [32, 8],  # tied: stored twice
        "model.layers.0.self_attn.q_proj.bias": [8],
        "model.layers.0.self_attn.rotary_emb.inv_freq": [4],
        "h.0.attn.bias": [1, 1, 16, 16],
        "h.0.attn.masked_bias": [],
    }
    path = folder(tmp_path / "m", model__safetensors=weights(shapes))
    loaded = load_config(str(path))
    assert loaded.exact_parameters == 32 * 8 + 8 and len(loaded.tensors) == 6
    folder(path, {**TINY, "tie_word_embeddings": False})
    assert load_config(str(path)).exact_parameters == 2 * 32 * 8 + 8


def test_other_towers_are_not_counted(tmp_path: Path) -> None:
    shapes = {"language_model.x": [5], "vision_tower.y": [7], "model.visual.z": [9], "multi_modal_projector.w": [2]}
    config = {"model_type": "llava", "text_config": TINY, "vision_config": {"a": 1}}
    path = folder(tmp_path / "m", config, model__safetensors=weights(shapes))
    assert load_config(str(path)).exact_parameters == 5


def test_quantized_weights_are_not_a_parameter_count(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", model__safetensors=weights({"a.qweight": [4]}, "U8"))
    loaded = load_config(str(path))
    assert loaded.exact_parameters == 0 and "stored quantized (U8)" in loaded.warnings[0]


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    names = ("m-1.safetensors", "m-2.safetensors")
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / names[0]).write_bytes(weights({"a": [3]}))
    loaded = load_config(str(path))
    assert loaded.exact_parameters == 0 and "1 of 2 weight files" in loaded.warnings[0]
    (path / names[1]).write_bytes(weights({"b": [4]}))
    assert load_config(str(path)).exact_parameters == 7


def test_broken_weights_cost_the_cross_check_only(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", model__safetensors=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    loaded = load_config(str(path))
    assert loaded.config == TINY and "computed from the config, not read" in loaded.warnings[0]


# --- GGUF -----------------------------------------------------------------------------------------------------------


def test_gguf_gives_a_config(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(LLAMA_GGUF)
    loaded = load_config(str(tmp_path / "m.gguf"))
    assert loaded.model_id == "tiny"
    assert loaded.config == {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert loaded.exact_parameters == 256 * 64 + 64 * 64 + 64
    assert "not the size of a QLoRA base" in loaded.warnings[0]


def gguf_of(config: dict[str, Any], arch: str) -> bytes:
    """Encode the header that a converter writes for a llama-like model."""
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head, width = config.get("head_dim") or hidden // heads, config["intermediate_size"]
    tensors = {"token_embd.weight": ([hidden, config["vocab_size"]], 12), "output_norm.weight": ([hidden], 0)}
    if not config["tie_word_embeddings"]:
        tensors["output.weight"] = ([hidden, config["vocab_size"]], 14)
    for i in range(config["num_hidden_layers"]):
        out = {"attn_q": heads * head, "attn_k": kv * head, "attn_v": kv * head, "ffn_gate": width, "ffn_up": width}
        tensors |= {f"blk.{i}.{n}.weight": ([hidden, size], 12) for n, size in out.items()}
        if arch == "qwen2":
            tensors |= {f"blk.{i}.{n}.bias": ([out[n]], 0) for n in ("attn_q", "attn_k", "attn_v")}
        if arch == "qwen3":
            tensors |= {f"blk.{i}.attn_{n}_norm.weight": ([head], 0) for n in "qk"}
        tensors |= {f"blk.{i}.attn_output.weight": ([heads * head, hidden], 12)}
        tensors |= {f"blk.{i}.ffn_down.weight": ([width, hidden], 14)}
        tensors |= {f"blk.{i}.{n}.weight": ([hidden], 0) for n in ("attn_norm", "ffn_norm")}
    metadata = {
        "general.architecture": arch,
        f"{arch}.embedding_length": hidden,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv,
        f"{arch}.attention.key_length": head,
        f"{arch}.feed_forward_length": width,
        f"{arch}.context_length": 4096,
    }
    return gguf_bytes(metadata, tensors)


@pytest.mark.parametrize(
    ("model_id", "arch"),
    [
        ("meta-llama/Llama-3.1-8B", "llama"),
        ("meta-llama/Llama-3.2-1B", "llama"),
        ("mistralai/Mistral-7B-v0.1", "llama"),
        ("Qwen/Qwen2.5-0.5B", "qwen2"),
        ("Qwen/Qwen3-0.6B", "qwen3"),
    ],
)
def test_gguf_and_config_describe_the_same_model(tmp_path: Path, model_id: str, arch: str) -> None:
    """The derived config, the tensors of the header and the published config count the same parameters."""
    record = catalog.model_record(model_id)
    assert record is not None
    config = {"tie_word_embeddings": False, **record.config}
    (tmp_path / "m.gguf").write_bytes(gguf_of(config, arch))
    loaded = load_config(str(tmp_path / "m.gguf"))
    spec = build_spec(loaded.text_config, model_id=loaded.model_id)
    assert spec.num_parameters == loaded.exact_parameters == record.counted_parameters


def test_gguf_experts_become_mixtral(tmp_path: Path) -> None:
    head = {"general.architecture": "llama", "llama.embedding_length": 8, "llama.block_count": 1}
    head |= {
        "llama.attention.head_count": 2,
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.vocab_size": 9,
    }
    (tmp_path / "m.gguf").write_bytes(gguf_bytes({**head, "llama.feed_forward_length": 16}, {}))
    config = load_config(str(tmp_path / "m.gguf")).config
    expected = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
    assert expected.items() <= config.items() and config["vocab_size"] == 9


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "unknown GGUF architecture ''"),
        ({"general.architecture": "mamba"}, "unknown GGUF architecture 'mamba'"),
        ({"general.architecture": "llama"}, "does not state hidden_size"),
        ({"general.architecture": "llama", "llama.attention.head_count_kv": [8, 4]}, "layers that differ"),
    ],
)
def test_gguf_that_is_not_enough(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata, {}))
    with pytest.raises(PlannerError, match=message):
        load_config(str(tmp_path / "m.gguf"))


# --- the hub --------------------------------------------------------------------------------------------------------


def cache(tmp_path: Path, ref: bool = True) -> Path:
    """Lay out one repository as huggingface_hub does: blobs, refs and snapshots that link to the blobs."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "abc").write_text(json.dumps(TINY))
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    if ref:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
    return repo


@pytest.mark.parametrize("ref", [True, False])
def test_hub_cache(tmp_path: Path, ref: bool) -> None:
    cache(tmp_path, ref)
    loaded = load_config("org/name")
    assert (loaded.model_id, loaded.config) == ("org/name", TINY)
    assert loaded.origin == f"hub cache @{COMMIT[:12]}"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sources._cache_root() == expected


def test_links_out_of_the_cache_are_refused(tmp_path: Path) -> None:
    repo = cache(tmp_path)
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({**TINY, "secret": 1}))
    link = repo / "snapshots" / COMMIT / "config.json"
    link.unlink()
    link.symlink_to(secret)
    with pytest.raises(InvalidInput, match="outside its cache folder"):
        load_config("org/name")
    link.unlink()
    link.symlink_to("../../blobs/abc")
    (link.parent / "model.safetensors").symlink_to(secret)
    assert "outside its cache folder" in load_config("org/name").warnings[0]
    (repo / "refs" / "main").unlink()
    (repo / "refs" / "main").symlink_to(secret)
    with pytest.raises(InvalidInput, match="outside its cache folder"):
        load_config("org/name")


@pytest.mark.parametrize("ref", ["../../../../secret", "", "main", "A" * 40, "\0" * 40])
def test_a_reference_that_is_no_commit_is_not_followed(tmp_path: Path, ref: str) -> None:
    (cache(tmp_path) / "refs" / "main").write_text(ref)
    with pytest.raises(UnknownName):
        load_config("org/name")


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, path: Path | None, size: int = 100, error: Exception | None = None
) -> None:
    """Put a stand-in for huggingface_hub in its place: what it hands out, or the error it raises."""

    def download(repo: str, name: str, **_: Any) -> str:
        if error:
            raise error
        assert (repo, name) == ("org/online", "config.json")
        return str(path)

    hub = types.ModuleType("huggingface_hub")
    hub.__dict__.update(
        hf_hub_download=download,
        hf_hub_url=lambda repo, name: f"{repo}/{name}",
        get_hf_file_metadata=lambda url, timeout: types.SimpleNamespace(size=size),
    )
    bars = types.ModuleType("huggingface_hub.utils.tqdm")
    bars.__dict__.update(disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", types.ModuleType("huggingface_hub.utils"))
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils.tqdm", bars)
    monkeypatch.delenv("HF_HUB_OFFLINE")


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, folder(tmp_path / "snapshots" / COMMIT) / "config.json")
    loaded = load_config("org/online")
    assert (loaded.model_id, loaded.origin, loaded.config) == ("org/online", f"hub @{COMMIT[:12]}", TINY)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "org/online is gated: accept its licence at https://huggingface.co/org/online"),
        ("RepositoryNotFoundError", "no such public model"),
        ("RemoteEntryNotFoundError", r"no config\.json on the hub"),
        ("LocalEntryNotFoundError", "could not be asked"),
        ("ConnectError", r"could not be asked \(ConnectError\)"),
    ],
)
def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    fake_hub(monkeypatch, None, error=type(kind, (Exception,), {})("several\nlines \x1b[0m"))
    with pytest.raises(PlannerError, match=message) as error:
        load_config("org/online")
    assert str(error.value).isprintable()


def test_a_large_config_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, None, size=2**30, error=AssertionError("downloaded"))
    with pytest.raises(InvalidInput, match="1073741824 bytes"):
        load_config("org/online")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", ""])
def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    fake_hub(monkeypatch, None, error=AssertionError("asked"))
    if variable:
        monkeypatch.setenv(variable, "yes")
    with pytest.raises(UnknownName, match="the hub was not asked"):
        load_config("org/online", offline=not variable)


def test_without_the_hub_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnknownName, match=r"pip install 'loraplan\[hub\]'"):
        load_config("org/online")


# --- single values --------------------------------------------------------------------------------------------------


def test_config_values_take_the_first_present_key() -> None:
    config = {"a": None, "b": 3, "c": 4, "s": "x", "f": 0.5, "t": True, "l": [1, 2], "w": ["p", "q"]}
    assert integer(config, "a", "b", "c") == 3
    assert integer(config, "z", default=7) == integer(config, "a", default=7) == 7
    assert number(config, "b") == 3.0 and number(config, "f") == 0.5
    assert boolean(config, "t") is True and text(config, "s", allowed=("x", "y")) == "x"
    assert integer_list(config, "l", length=2) == (1, 2) and text_list(config, "w") == ("p", "q")


@pytest.mark.parametrize(
    ("reader", "value"),
    [
        (integer, True),
        (integer, 1.0),
        (integer, "8"),
        (integer, 0),
        (integer, -1),
        (integer, 2**31 + 1),
        pytest.param(integer, 10**5000, id="5000-digits"),
        (integer, [1]),
        (number, True),
        (number, "1"),
        (number, float("nan")),
        (number, float("inf")),
        (boolean, 1),
        (boolean, "true"),
        (text, 3),
        (integer_list, 3),
        (integer_list, [1, True]),
        (integer_list, [0]),
        pytest.param(integer_list, [1] * 70_000, id="long-list"),
        (text_list, "abc"),
        (text_list, [1]),
    ],
)
def test_config_values_refuse_what_only_looks_right(reader: Any, value: Any) -> None:
    with pytest.raises(InvalidInput, match="config key k") as error:
        reader({"k": value}, "k")
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_a_missing_value_names_every_spelling() -> None:
    with pytest.raises(InvalidInput, match="model_type 'gpt2' has no n_embd or hidden_size"):
        integer({"model_type": "gpt2"}, "n_embd", "hidden_size")


# --- fuzz -----------------------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**16, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 0.3, 1e300, "",
    "x", "8", "\x1b[2J", "\ud800", "bfloat16", [], [1], [0] * 40, ["full_attention"], [None], [[]], {},
    {"type": "yarn"}, {"rope_type": "llama3", "factor": 8.0}, {"a": {"b": {}}},
]  # fmt: skip


def mutated(rng: random.Random, configs: list[dict[str, Any]], keys: list[str]) -> dict[str, Any]:
    config = copy.deepcopy(rng.choice(configs))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        key = rng.choice(list(config) or keys) if rng.random() < 0.8 else rng.choice(keys)
        match rng.randrange(5):
            case 0:
                config.pop(key, None)
            case 1 | 2:
                config[key] = copy.deepcopy(rng.choice(JUNK))
            case 3:
                config[key] = copy.deepcopy(rng.choice(configs).get(key))
            case _:
                config["model_type"] = rng.choice(configs)["model_type"]
    return {"model_type": "x", "text_config": config, "vision_config": {}} if rng.random() < 0.05 else config


def _predicted(spec: ModelSpec, config: dict[str, Any]) -> None:
    training = TrainingSpec(lora=LoraSpec(), quantization=QuantizationSpec(kind="nf4"), seq_len=512)
    try:
        found = predict(spec, training, catalog.gpu("t4"))
    except PlannerError as error:
        assert str(error).isprintable()
        return
    assert 0 < found.allocated.low <= found.allocated.expected <= found.reserved.high, config


def test_fuzz_configs() -> None:
    """20,000 mutated published configs through the families: a model or a PlannerError, fast, in bounded memory.

    Every hundredth model goes all the way to a prediction.
    """
    records = [catalog.model_record(name) for name in catalog.model_ids()]
    configs = [dict(r.config) for r in records if r is not None]
    keys = sorted({key for config in configs for key in config})
    rng = random.Random(7)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    models = 0
    for turn in range(20_000):
        config = mutated(rng, configs, keys)
        start = time.perf_counter()
        spec = None
        try:
            spec = build_spec(config, model_id="fuzz")
            models += 1
            assert spec.num_parameters > 0, config
        except PlannerError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, turn
        except Exception as error:
            raise AssertionError(f"turn {turn}: {type(error).__name__}: {error} for {config!r}") from error
        assert time.perf_counter() - start < 2, f"turn {turn} hangs: {config!r}"
        if spec is not None and models % 100 == 0:
            _predicted(spec, config)
    assert 2_000 < models < 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_fuzz_config_files(tmp_path: Path) -> None:
    """3,000 byte-level mutations of config.json files, through the whole reader."""
    seeds = [json.dumps(TINY).encode(), json.dumps({"model_type": "llava", "text_config": TINY}).encode()]
    rng = random.Random(11)
    path = tmp_path / "config.json"
    answers = 0
    for _ in range(3_000):
        path.write_bytes(mutate(rng, rng.choice(seeds)))
        try:
            loaded = load_config(str(path))
            build_spec(loaded.text_config, model_id=loaded.model_id)
            answers += 1
        except PlannerError as error:
            assert str(error).isprintable()
    assert 0 < answers < 3_000
