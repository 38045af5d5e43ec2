"""A model's config from what a user names: catalogue id, folder, config.json, GGUF file or hub id.

Nothing is executed and no weights are read. The network is asked last, only for config.json, only when
huggingface_hub is installed and not switched off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from planner.base.bounded import parse_json, read_bounded
from planner.base.errors import InvalidInput, UnknownName, one_line
from planner.base.records import field, record
from planner.base.units import MiB
from planner.facts import catalog
from planner.facts.catalog import ModelRecord
from planner.model.families import text_part

if TYPE_CHECKING:  # a model of the catalogue needs no headers
    from planner.facts.headers import TensorInfo

MAX_CONFIG_BYTES: Final = 1 * MiB
"""The largest published config.json (long rotary factor lists) is below 100 kB."""

MAX_TENSORS_READ: Final = 2_000_000
"""Over all shards of a model."""

# compiled where they are used: a model of the catalogue needs none of them
_HUB_ID: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
_COMMIT: Final = r"[0-9a-f]{40}"
_FLOATS: Final = ("F64", "F32", "F16", "BF16")

_BUFFER: Final = r"(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias)$"
_CAUSAL_MASK: Final = r"(attn|attention)\.bias$"  # four dimensions; a bias vector has one
_OTHER_TOWER: Final = (
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|mm_projector|embed_vision|audio_tower"
    r"|embed_audio)\b"
)
_GGUF_WARNING: Final = (
    "shapes read from a GGUF file, an inference format: training starts from the original 16-bit weights, "
    "so the size of this file is not the size of a QLoRA base"
)
_MODALITIES: Final = {"vision_config": "vision tower", "audio_config": "audio tower"}


@record
class LoadedConfig:
    """A model's config and where it was read."""

    model_id: str
    config: Mapping[str, Any]
    """The whole config, with its vision part if it has one."""
    origin: str
    """For reports: catalogue, file <path>, hub cache @<commit>, hub @<commit>."""
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Shapes read from weight headers; empty when there were none."""
    exact_parameters: int = 0
    """Parameters of the language model counted in those headers; 0: not read, or stored quantized."""
    warnings: tuple[str, ...] = ()
    record: ModelRecord | None = None
    """Provenance, when the catalogue answered."""

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config."""
        return text_part(self.config)


def load_config(source: str, *, offline: bool = False) -> LoadedConfig:
    """Return the config of the model that `source` names.

    Tried in order: an existing file or folder, the catalogue, the local hub cache, the hub (not with `offline`).

    Raises:
        InvalidInput: the file or folder cannot be read as a model.
        UnknownName: nothing of that name anywhere; the message says where was looked and what to pass.
    """
    if not source or len(source) > 4096 or "\0" in source:
        raise InvalidInput(
            f"{one_line(source)!r} is not a model; pass a hub id, a folder, a config.json or a GGUF file"
        )
    path = os.path.expanduser(source)
    if _is_local(path):
        return _from_path(path)
    record = catalog.model_record(source)
    if record is not None:
        return _from_record(record)
    if not re.fullmatch(_HUB_ID, source):
        raise _not_found(source, "no such file or folder, and not a hub id")
    return _from_cache(source) or _from_hub(source, offline)


def given_config(config: Mapping[str, Any]) -> LoadedConfig:
    """Take a config that a program holds, as transformers' `to_dict` gives it; a quoted name is not looked up.

    Raises:
        InvalidInput: it is no config of a model.
    """
    name = config.get("_name_or_path")
    named = name if isinstance(name, str) and name else str(text_part(config).get("model_type") or "a config")
    return _loaded(named, dict(config), "the config given")


# --- the catalogue ------------------------------------------------------------------------------------------------


def _from_record(record: ModelRecord) -> LoadedConfig:
    warnings = []
    if record.is_alias:
        warnings.append(
            f"{record.requested} shares its sizes with {record.model_id}, whose config is used; "
            "context length and stored dtype may differ"
        )
    if record.text_part_only:
        warnings.append("vision tower not included: only the language model is planned")
    if record.confidence == "unverified":
        warnings.append(f"sizes of {record.model_id} are unverified: {record.note}")
    return LoadedConfig(
        model_id=record.model_id,
        config=record.config,
        origin="catalogue",
        warnings=tuple(warnings),
        record=record,
    )


# --- files and folders --------------------------------------------------------------------------------------------


def _is_local(path: str) -> bool:
    """Return True for a path that is meant as one: a file, a model folder, or something that can only be a path."""
    if os.path.isdir(path):
        explicit = path.startswith((".", os.sep)) or path.endswith(os.sep)
        return explicit or any(os.path.exists(os.path.join(path, f)) for f in ("config.json", "adapter_config.json"))
    return os.path.exists(path) or path.startswith((".", os.sep)) or path.endswith((".json", ".gguf", ".safetensors"))


def _from_path(path: str) -> LoadedConfig:
    name = os.path.basename(os.path.abspath(path))
    if os.path.isdir(path):
        return _from_folder(path, name)
    if path.lower().endswith(".gguf"):
        return _from_gguf(path, name)
    if path.lower().endswith((".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json")):
        raise InvalidInput(f"{_quote(path)} holds weights, not a config; pass the folder it lies in")
    config = _read_config(path)
    if name == "adapter_config.json" or "peft_type" in config:
        raise _is_adapter(path, config)
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    model_id = folder if name == "config.json" and folder else name
    return _loaded(model_id, config, f"file {one_line(path, 200)}")


def _from_folder(folder: str, name: str, inside: str = "", origin: str = "") -> LoadedConfig:
    """Read config.json and the weight headers beside it; files must not lead out of `inside` when that is given."""
    path = os.path.join(folder, "config.json")
    if not os.path.lexists(path):
        raise _no_config(folder)
    _check_inside(path, inside)
    config = _read_config(path)
    tensors, warnings = _weight_headers(folder, inside)
    return _loaded(name, config, origin or f"folder {one_line(folder, 200)}", tensors, warnings)


def _no_config(folder: str) -> InvalidInput:
    adapter = os.path.join(folder, "adapter_config.json")
    if os.path.isfile(adapter):
        return _is_adapter(folder, _read_config(adapter))
    try:
        gguf = sorted(f for f in os.listdir(folder) if f.lower().endswith(".gguf"))
    except OSError as error:
        return InvalidInput(f"cannot read {_quote(folder)}: {error.strerror}; pass a readable model folder")
    if gguf:
        return InvalidInput(f"{_quote(folder)} has no config.json; pass its GGUF file {one_line(gguf[0])!r} by name")
    return InvalidInput(f"{_quote(folder)} has no config.json; pass a model folder, a config.json or a hub id")


def _is_adapter(path: str, config: Mapping[str, Any]) -> InvalidInput:
    base = config.get("base_model_name_or_path")
    which = f" (its base is {one_line(base)!r})" if isinstance(base, str) and base else ""
    return InvalidInput(f"{_quote(path)} is a LoRA adapter, not a model{which}; pass the base model as the model")


def _from_gguf(path: str, name: str) -> LoadedConfig:
    from planner.facts.gguf_config import config_from_gguf, gguf_parameters
    from planner.facts.headers import read_gguf

    header = read_gguf(path)
    config = config_from_gguf(header, path)
    warnings = [_GGUF_WARNING]
    parameters = gguf_parameters(header)
    if header.tensors and not parameters:
        warnings.append("one part of a split GGUF file: its tensors are not the whole model")
    title = header.metadata.get("general.name")
    model_id = one_line(title) if isinstance(title, str) and title else name
    return LoadedConfig(
        model_id=model_id,
        config=config,
        origin=f"file {one_line(path, 200)}",
        tensors=header.tensors,
        exact_parameters=parameters,
        warnings=tuple(warnings),
    )


def _read_config(path: str) -> dict[str, Any]:
    return parse_json(read_bounded(path, MAX_CONFIG_BYTES, "config.json"), path, "config.json")


def _loaded(
    model_id: str,
    config: dict[str, Any],
    origin: str,
    tensors: Mapping[str, TensorInfo] | None = None,
    warnings: list[str] | None = None,
) -> LoadedConfig:
    """Put the pieces together: check the text part, count parameters, say what is left out."""
    notes = list(warnings or ())
    text = text_part(config)
    if not any(isinstance(c.get("model_type"), str) for c in (text, config)):
        raise InvalidInput(
            f"{origin} has no model_type, so it is not a transformers config; pass the config.json of a model"
        )
    others = [what for key, what in _MODALITIES.items() if config.get(key)]
    if others:
        notes.append(f"{' and '.join(others)} not included: only the language model is planned")
    exact = _count_parameters(tensors, text, bool(others), notes) if tensors else 0
    return LoadedConfig(
        model_id=one_line(model_id, 200),
        config=config,
        origin=origin,
        tensors=tensors or {},
        exact_parameters=exact,
        warnings=tuple(notes),
    )


# --- weight headers -----------------------------------------------------------------------------------------------


def _weight_headers(folder: str, inside: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors of a folder's safetensors files; none, with a warning, when they cannot all be read.

    The config is enough for a plan, so a pointer file or a missing shard costs the cross-check, not the answer.
    """
    from planner.facts.headers import read_safetensors

    try:
        shards = _shards(folder, inside)
        missing = [s for s in shards if not os.path.exists(os.path.join(folder, s))]
        if missing:
            raise InvalidInput(f"{len(missing)} of {len(shards)} weight files are not in the folder")
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            path = os.path.join(folder, shard)
            _check_inside(path, inside)
            tensors.update(read_safetensors(path).tensors)
            if len(tensors) > MAX_TENSORS_READ:
                raise InvalidInput(f"over {MAX_TENSORS_READ} tensors")
    except InvalidInput as error:
        return {}, [f"parameters are computed from the config, not read from the weights: {error}"]
    return tensors, []


def _shards(folder: str, inside: str) -> tuple[str, ...]:
    from planner.facts.headers import read_safetensors_index

    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return ("model.safetensors",)
    if not os.path.exists(index):
        return ()
    _check_inside(index, inside)
    return read_safetensors_index(index).shards


def _count_parameters(
    tensors: Mapping[str, TensorInfo], text: Mapping[str, Any], multimodal: bool, notes: list[str]
) -> int:
    """Return the unique parameters of the language model, or 0 with a note when the weights are stored quantized."""
    from planner.facts.headers import SAFETENSORS_BITS

    total = 0
    quantized: set[str] = set()
    for name, info in tensors.items():
        mask = re.search(_CAUSAL_MASK, name) and len(info.shape) == 4
        if mask or re.search(_BUFFER, name) or (multimodal and re.match(_OTHER_TOWER, name)):
            continue
        if info.dtype not in _FLOATS:
            quantized.add(info.dtype)
        total += info.elements
    if quantized:
        kinds = ", ".join(sorted(quantized & SAFETENSORS_BITS.keys()))
        notes.append(f"weights are stored quantized ({kinds}): parameters are computed from the config, not read")
        return 0
    return total - _second_head_copy(tensors, text)


def _second_head_copy(tensors: Mapping[str, TensorInfo], text: Mapping[str, Any]) -> int:
    """Return the elements of a head that the config ties but the file stores again."""
    if text.get("tie_word_embeddings") is not True:
        return 0
    head = next((i for n, i in tensors.items() if n.endswith("lm_head.weight")), None)
    table = next((i for n, i in tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    return head.elements if head and table and head.shape == table.shape else 0


# --- the hub ------------------------------------------------------------------------------------------------------


def _from_cache(repo: str) -> LoadedConfig | None:
    """Return the config in the local hub cache, or None when the cache has none for this id."""
    folder = os.path.join(_cache_root(), "models--" + repo.replace("/", "--"))
    commit = _cached_commit(folder)
    snapshot = os.path.join(folder, "snapshots", commit)
    if not commit or not os.path.lexists(os.path.join(snapshot, "config.json")):
        return None
    return _from_folder(snapshot, repo, inside=folder, origin=f"hub cache @{commit[:12]}")


def _cached_commit(folder: str) -> str:
    """Return the commit that refs/main of a cached repository names, else its only snapshot; empty: neither."""
    ref = os.path.join(folder, "refs", "main")
    if os.path.isfile(ref):
        _check_inside(ref, folder)
        commit = read_bounded(ref, 4096, "hub cache reference").decode("ascii", "replace").strip()
        return commit if re.fullmatch(_COMMIT, commit) else ""
    try:
        found = [name for name in os.listdir(os.path.join(folder, "snapshots")) if re.fullmatch(_COMMIT, name)]
    except OSError:
        return ""
    return found[0] if len(found) == 1 else ""


def _cache_root() -> str:
    """Return the hub cache folder by the environment variables that huggingface_hub reads."""
    env = os.environ.get
    explicit = env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return os.path.expanduser(explicit)
    base = os.path.join(env("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    return os.path.join(os.path.expanduser(env("HF_HOME") or base), "hub")


def _from_hub(repo: str, offline: bool) -> LoadedConfig:
    """Fetch config.json through huggingface_hub and read it from the cache; every failure is one line."""
    switch = next((v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_true(os.environ.get(v))), "")
    if offline or switch:
        raise _not_found(repo, f"the hub was not asked ({switch or 'offline'})")
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise _not_found(repo, "the hub was not asked (pip install 'loraplan[hub]' to ask it)") from None
    try:
        disable_progress_bars()
        size = get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=10).size
        if size is not None and size > MAX_CONFIG_BYTES:
            raise InvalidInput(f"config.json of {repo} has {size} bytes; limit {MAX_CONFIG_BYTES}; pass a local copy")
        path = hf_hub_download(repo, "config.json", etag_timeout=10)
    except InvalidInput:
        raise
    except Exception as error:  # noqa: BLE001 - huggingface_hub, httpx and ssl raise dozens of unrelated types
        raise _hub_failure(repo, error) from None
    commit = os.path.basename(os.path.dirname(path))
    return _loaded(repo, _read_config(path), f"hub @{commit[:12]}")


def _hub_failure(repo: str, error: Exception) -> UnknownName | InvalidInput:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return InvalidInput(f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then hf auth login")
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return _not_found(repo, "the hub has no such public model (a private one needs hf auth login)")
    if "EntryNotFoundError" in kind and kind != "LocalEntryNotFoundError":
        return InvalidInput(f"{repo} has no config.json on the hub; pass the original transformers model")
    return _not_found(repo, f"the hub could not be asked ({kind})")


def _not_found(source: str, where: str) -> UnknownName:
    """Build the error for a name nothing knows, with the catalogue's closest names."""
    import difflib  # only needed on the error path

    ids = {i: i for i in catalog.model_ids()}
    names = {
        _letters(key): i for n, i in {**catalog.model_aliases(), **ids}.items() for key in (n, n.rpartition("/")[2])
    }
    wanted = _letters(source[:200])
    close = sorted((key for key in names if len(wanted) > 3 and wanted in key), key=len)
    close += difflib.get_close_matches(wanted, names, n=6, cutoff=0.6)
    unique = list(dict.fromkeys(names[key] for key in close))[:3]
    hint = f"did you mean {', '.join(unique)}?" if unique else f"none of the catalogue's {len(ids)} models is close."
    return UnknownName(
        f"unknown model {one_line(source)!r}: {where}; {hint} Or pass a model folder, a config.json or a GGUF file"
    )


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def _check_inside(path: str, folder: str) -> None:
    """Refuse a link that leads out of `folder` (the hub cache links snapshots to its own blobs, nowhere else)."""
    if not folder:
        return
    root = os.path.realpath(folder)
    if not os.path.realpath(path).startswith(root + os.sep):
        raise InvalidInput(f"{_quote(path)} links to a place outside its cache folder; delete that cache entry")


def _quote(path: str) -> str:
    return repr(one_line(path, 160))
