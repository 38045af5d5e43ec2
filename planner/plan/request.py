"""The one way from a user's words to a plan: `Request` (all that was said) -> `resolve` -> `Plan` (all that follows).

A plan carries every note that its user must see: what a config asks for and the estimate lacks, what was read of the
model, what the card's name leaves open, what the calibration is. Commands print `Plan.notes` or `Prediction.warnings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planner.base.errors import Contradiction, InvalidInput, UnknownFamily, UnknownName, one_line
from planner.base.records import NamedTuple, replace
from planner.device.hardware import Gpu
from planner.facts import calibration_files, sources
from planner.facts.sources import LoadedConfig
from planner.model import families, lora
from planner.model.spec import ModelSpec
from planner.plan.notes import lacks_bf16, training_warnings
from planner.plan.predict import Prediction, predict
from planner.plan.settled import NOTHING, Settled, settle, without_idle
from planner.timing.coefficients import Selection
from planner.training import stacks
from planner.training import versions as training_versions
from planner.training.options import flag_of
from planner.training.settings import LIBRARIES, SETTINGS, Resolved, Setting
from planner.training.spec import LoraSpec, TrainingSpec, Versions

if TYPE_CHECKING:  # a run without data or config reads neither
    from planner.plan.datarun import DataRun
    from planner.runs.dataset.orders import Orders
    from planner.runs.dataset.scan import Scan, Source


class Data(NamedTuple):
    """Training data that decides a run's length, and how it is read."""

    files: tuple[str, ...]
    template: str | None = None
    tokenizer: str | None = None
    padding: str | None = None


class Known:
    """What several requests of one call share: models, scans of data and what they make of a batch, read once each."""

    def __init__(self, read: Callable[[Source], Scan] | None = None, *, offline: bool = False) -> None:
        self.read, self.offline = read, offline
        self.models: dict[str, LoadedModel] = {}
        self.scans: dict[Source, Scan] = {}
        self.runs: dict[tuple[Source, int, int, str], DataRun] = {}

    def model(self, name: str) -> LoadedModel:
        """Read a model, once.

        Raises:
            PlannerError: as `load_model`.
        """
        if name not in self.models:
            self.models[name] = load_model(name, offline=self.offline)
        return self.models[name]

    def run(self, what: Source, batch: int, limit: int, padding: Any) -> DataRun:
        """Read data and batch its rows, once.

        Raises:
            PlannerError: data that cannot be read.
        """
        from planner.plan.datarun import on_data
        from planner.runs.dataset.scan import scan

        key = (what, batch, limit, padding)
        if what not in self.scans:
            self.scans[what] = (self.read or scan)(what)
        if key not in self.runs:
            self.runs[key] = on_data(self.scans[what], batch, limit, padding)
        return self.runs[key]


class Request(NamedTuple):
    """Everything that can be said about one run."""

    model: str
    settings: Mapping[str, Any]
    """Keys of `planner.training.stacks` (None: not given); `job` holds what config files say."""
    stack: str | None = None
    card: Gpu | None = None
    calibration: str | Selection | None = None
    """A file or id, "none" for priors, None for the best there is; or one that was chosen already."""
    data: Data | None = None
    lenient: bool = False
    """Accept settings that the run has no use for (`configure`)."""
    keeps_dtypes: bool = False
    """Look at bf16 as it is written, on a card without it too."""


class Plan(NamedTuple):
    """A request with everything resolved, and every note that belongs to it."""

    loaded: LoadedModel
    stack: str | None
    stack_origin: str
    resolved: Resolved
    training: TrainingSpec
    card: Gpu | None
    """With its measured context, where there is one."""
    chosen: Selection | None
    data: DataRun | None
    notes: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.loaded.spec

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes and what the settings cost unnoticed: what `predict` warns of, before it is asked."""
        return tuple(dict.fromkeys((*self.notes, *training_warnings(self.spec, self.training, self.card))))

    def on(self, card: Gpu, choice: str | Selection | None) -> Plan:
        """The same settings on another card, which has bf16 where this one has."""
        chosen = _calibration(card, choice, self.training.versions)
        own = notes_of({}, (), self.card, self.chosen)
        kept = tuple(note for note in self.notes if note not in own)
        return self._replace(
            card=chosen.card(card) if chosen is not None else card,
            chosen=chosen,
            notes=notes_of({}, kept, card, chosen),
        )

    @property
    def common_warnings(self) -> tuple[str, ...]:
        """The warnings without that of a borrowed calibration, which `calibration.time_words` says for many cards."""
        own = self.chosen.notes[:1] if self.chosen is not None and self.chosen.borrowed else ()
        return tuple(note for note in self.warnings if note not in own)

    def predict(self, orders: Orders | None = None) -> Prediction:
        """Predict the run; its warnings hold the plan's notes.

        Args:
            orders: in which rows of unequal length come, where that is known without data.

        Raises:
            PlannerError: settings that exclude each other or that the model does not have.
        """
        return predict(
            self.spec,
            self.training,
            self.card,
            warnings=self.notes,
            coefficients=self.chosen.coefficients if self.chosen else None,
            orders=self.data.orders() if self.data else orders,
        )


def resolve(request: Request, known: Known | None = None) -> Plan:
    """Read the model and the data, settle every setting, choose the calibration, and collect what to tell the user.

    `request.settings` is not changed.

    Raises:
        PlannerError: unknown names, unreadable files, or settings that exclude each other.
    """
    known, given = known or Known(), dict(request.settings)
    stated = [name for name in LIBRARIES if given.get(name)]
    stack = (training_settings(given) if "stack" in given else None) or request.stack
    loaded = known.model(request.model)
    run = data_run(request.data, loaded.spec, stack or stacks.CUSTOM, given, known)
    card = request.card
    resolved, training = configure(
        loaded.spec, stack or stacks.CUSTOM, given, lenient=request.lenient, card=None if request.keeps_dtypes else card
    )
    chosen = _calibration(card, request.calibration, training.versions)
    return Plan(
        loaded=loaded,
        stack=stack,
        stack_origin=stack_origin(given, stack),
        resolved=with_stated_releases(resolved, stated),
        training=training,
        card=chosen.card(card) if chosen is not None and card is not None else card,
        chosen=chosen,
        data=run,
        notes=notes_of(given, loaded.warnings, card, chosen),
    )


def notes_of(
    given: Mapping[str, Any], model: Sequence[str], card: Gpu | None, chosen: Selection | None = None
) -> tuple[str, ...]:
    """What every answer about a run must say: of its config, its model, its card's name, its calibration."""
    named = (card.notes,) if card is not None and card.notes.startswith("'") else ()
    return tuple(dict.fromkeys((*file_notes(given), *model, *named, *(chosen.notes if chosen else ()))))


def _calibration(card: Gpu | None, choice: str | Selection | None, versions: Versions) -> Selection | None:
    """Choose the coefficients for a card; one that was chosen before is told the releases."""
    if card is None:
        return None
    if not isinstance(choice, Selection):
        return calibration_files.select(card, choice, versions)
    return choice.planned_with(versions)


def data_run(wanted: Data | None, model: ModelSpec, stack: str, given: dict[str, Any], known: Known) -> DataRun | None:
    """Read the data and set `seq_len` (and the padding mask) in `given` to what its longest batch needs.

    `given` holds keys of `planner.training.stacks`; its seq_len, or the stack's own, is where rows are cut. Returns
    None when no data was named.

    Raises:
        PlannerError: data that cannot be read, or a setting that is none.
    """
    if wanted is None or not wanted.files:
        return None
    from planner.base.errors import unknown
    from planner.plan.datarun import needs_mask
    from planner.runs.dataset.scan import Source
    from planner.runs.dataset.templates import NAMES
    from planner.runs.dataset.tokens import family_of

    template = wanted.template or "auto"
    if template not in NAMES:
        raise unknown("template", template, NAMES)
    _, training = configure(model, stack, given, lenient=True)
    what = Source(
        paths=tuple(wanted.files), template=template, tokenizer=wanted.tokenizer,
        family=family_of(model.model_type, model.vocab_size),
    )  # fmt: skip
    run = known.run(what, training.micro_batch_size, training.seq_len, wanted.padding or "longest")
    given["seq_len"] = run.longest
    if given.get("padded") is None and needs_mask(run):
        given["padded"] = True
    return run


def counted(notes: Iterable[tuple[tuple[str, ...], int]]) -> tuple[tuple[str, int], ...]:
    """Distinct notes of many rows, with the number of rows that each concerns."""
    found: dict[str, int] = {}
    for of_rows, rows in notes:
        for note in of_rows:
            found[note] = found.get(note, 0) + rows
    return tuple(found.items())


class LoadedModel(NamedTuple):
    """A model with where its facts come from, and what to tell the user about it."""

    spec: ModelSpec
    loaded: LoadedConfig
    warnings: tuple[str, ...]


def load_model(source: str, *, offline: bool = False) -> LoadedModel:
    """Read the model that `source` names and build what it is made of.

    Raises:
        PlannerError: no such model, an unreadable file, or a family that is not known.
    """
    return read_model(sources.load_config(source, offline=offline))


def read_model(loaded: LoadedConfig, *, derive: bool = True) -> LoadedModel:
    """Build what the model of a config is made of; `derive`: from its transformers class if no family describes it.

    Raises:
        PlannerError: a family that is not known, or an impossible value.
    """
    try:
        spec = families.build_spec(loaded.config, model_id=loaded.model_id)
    except UnknownFamily as error:
        if not derive:
            raise
        spec = _from_class(loaded, error)
    warnings = [*loaded.warnings, *spec.notes]
    if loaded.exact_parameters:
        spec = replace(spec, exact_parameters=loaded.exact_parameters)
        if spec.num_parameters != loaded.exact_parameters:
            warnings.append(
                f"the weight files hold {loaded.exact_parameters:,} parameters, the config implies "
                f"{spec.num_parameters:,}; the config's shapes are used"
            )
    if spec.stored_quantization:
        warnings.append(
            f"the published checkpoint is stored as {one_line(spec.stored_quantization, 20)}: "
            "planned as if loaded from 16-bit weights"
        )
    return LoadedModel(spec, loaded, tuple(dict.fromkeys(warnings)))


def _from_class(loaded: LoadedConfig, error: UnknownFamily) -> ModelSpec:
    """Read a model outside the registry from transformers' class; without transformers, the error stands."""
    try:
        from calibrate.model.meta_spec import spec_from_class
    except (ImportError, OSError):  # OSError: a torch whose libraries do not load
        raise error from None
    return spec_from_class(loaded.config, model_id=loaded.model_id)


def infer_method(given: Mapping[str, Any]) -> str:
    """Return the method given, else the one that the quantization implies; qlora by default."""
    if given.get("method"):
        return str(given["method"])
    return "lora" if given.get("quantization") == "none" else "qlora"


def training_settings(given: dict[str, Any]) -> str | None:
    """Turn what the training options gave into the keys of `planner.training.stacks`, in place; return the stack named.

    Raises:
        InvalidInput: a release or part number that is none.
    """
    releases = {name: given.pop(name) for name in LIBRARIES}
    if any(releases.values()):
        given["versions"] = training_versions.parse_versions({name: text for name, text in releases.items() if text})
    given["target_slices"] = parse_slices(given["target_slices"])
    if given["skip_modules"] == "none":
        given["skip_modules"] = ()
    stack: str | None = given.pop("stack")
    return stack


def file_notes(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the config files of `given` ask for and the estimate lacks, as warnings."""
    job = given.get("job")
    return tuple(str(missing) for missing in job.missing) if job else ()


def stack_origin(given: Mapping[str, Any], stack: str | None) -> str:
    """Say where the choice of the framework comes from."""
    job = given.get("job")
    if job is not None and stack == job.stack:
        return str(job.stack_origin)
    return "given" if stack else "loraplan default"


def configure(
    model: ModelSpec | None, stack: str, given: Mapping[str, Any], *, lenient: bool = False, card: Gpu | None = None
) -> tuple[Resolved, TrainingSpec]:
    """Resolve the given options with the framework's defaults, for this model.

    The option `job` holds what config files say: it yields to options the user typed.

    `lenient` accepts settings that the run has no use for: tables fill columns that do not apply. On a `card` without
    bf16 the defaults become fp16. Of a model that no family describes (None) module names are not checked here.

    Raises:
        PlannerError: unknown values, settings that exclude each other or that the model does not have.
    """
    user = {key: value for key, value in given.items() if key != "job" and value is not None}
    settled = settle(given.get("job"), user, stack, model)
    resolved = _resolved(stack, settled, user)
    if not lenient:
        _refuse_idle(resolved, user)
    if settled is not NOTHING:
        settled = without_idle(settled, resolved)
        resolved = _resolved(stack, settled, user)
    hard = {**settled.stated, **user}
    if model is not None and resolved["method"] != "full" and "target_modules" not in hard:
        resolved = _with_known_targets(model, resolved, {**settled.unasked, **hard})
    if card is not None and lacks_bf16(card):
        resolved = _in_fp16(resolved, hard, card)
    training = stacks.to_training_spec(resolved)
    if model is None:
        return resolved, training
    if training.lora is not None:
        lora.saved_module_parameters(model, training.lora)  # refuses a module that the model does not have
    if user.get("skip_modules"):
        _check_skipped(model, training.quantization.skip_modules)
    return resolved, training


def _resolved(stack: str, settled: Settled, user: Mapping[str, Any]) -> Resolved:
    """Resolve the options of user, files and frameworks, and say where each came from."""
    merged = {**settled.unasked, **settled.stated, **user}
    method = infer_method(merged)
    resolved = stacks.resolve(stack, method=method, given=merged)
    settings = dict(resolved.settings)
    for key, origin in settled.origins.items():
        if key not in user and key in merged:
            settings[key] = settings[key]._replace(origin=origin)
    if "method" not in merged:
        implied = "--quantization none" if merged.get("quantization") == "none" else ""
        settings["method"] = Setting(method, f"implied by {implied}" if implied else "loraplan default")
    return replace(resolved, settings=settings)


def with_stated_releases(resolved: Resolved, stated: Sequence[str]) -> Resolved:
    """Say which releases the user gave, and that the others are of the same time (planner.training.releases)."""
    if not 0 < len(stated) < len(LIBRARIES):
        return resolved
    origin = f"given: {', '.join(stated)}; the others as they were then"
    found = Setting(resolved["versions"], origin)
    return replace(resolved, settings={**resolved.settings, "versions": found})


_DTYPE_KEYS = ("base_dtype", "autocast", "compute_dtype", "adapter_dtype")


def _in_fp16(resolved: Resolved, given: Mapping[str, Any], card: Gpu) -> Resolved:
    """Replace bf16 defaults by fp16; what the user gave stays (and is warned about)."""
    settings = dict(resolved.settings)
    for key in _DTYPE_KEYS:
        if given.get(key) is None and settings[key].value == "bf16":
            settings[key] = Setting("fp16", f"{one_line(card.name, 40)} has no bf16 ({settings[key].origin} says bf16)")
    return replace(resolved, settings=settings)


def _refuse_idle(resolved: Resolved, given: Mapping[str, Any]) -> None:
    """Refuse a given setting that the run has no use for: its user expects something else to be planned."""
    for key, value in given.items():
        why = None if value is None or value is False else SETTINGS[key].why_idle(resolved)
        if why is not None:
            raise Contradiction(f"{flag_of(key)} has no effect: {why}")


def _with_known_targets(model: ModelSpec, resolved: Resolved, given: Mapping[str, Any]) -> Resolved:
    """Replace a framework's default targets that this model does not have; the origin says so."""
    spec = stacks.to_training_spec(resolved).lora
    if spec is None or _has_targets(model, spec):
        return resolved
    missing = ", ".join(spec.target_modules)
    peft = lora.PEFT_DEFAULT_TARGETS.get(model.model_type)
    for targets, name in ((peft, f"PEFT's default for {model.model_type}"), ((lora.ALL_LINEAR,), "loraplan default")):
        if targets is None or not _has_targets(model, replace(spec, target_modules=targets, target_slices=())):
            continue
        found = stacks.resolve(resolved.stack, method=resolved["method"], given={**given, "target_modules": targets})
        origin = f"{name}: {model.model_type} has no {missing} ({resolved.settings['target_modules'].origin})"
        changed = {"target_modules": Setting(targets, origin), "target_slices": found.settings["target_slices"]}
        return replace(resolved, settings={**resolved.settings, **changed})
    return resolved


def _has_targets(model: ModelSpec, spec: LoraSpec) -> bool:
    try:
        lora.resolve_targets(model, spec)
    except UnknownName:
        return False
    return True


def _check_skipped(model: ModelSpec, skipped: tuple[str, ...]) -> None:
    """Refuse a module to skip that no module of the model is."""
    known = {linear.name for layer, _ in model.distinct_layers() for linear in layer.linears}
    known |= {linear.name for linear in (*model.embedding_projections, model.head)}
    for name in skipped:
        if name != "lm_head" and not any(path == name or path.endswith(f".{name}") for path in known):
            raise UnknownName(
                f"--skip-modules {one_line(name)!r} is no module of {one_line(model.model_id)}; "
                f"its modules are {', '.join(lora.module_names(model))}"
            )


def parse_slices(text: str | None) -> list[int] | None:
    """Parse part numbers such as `0,2`.

    Raises:
        InvalidInput: for anything but part numbers.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 3 for part in parts):
        raise InvalidInput(f"--target-slices is {one_line(text)!r}; write part numbers, for example 0,2")
    return [int(part) for part in parts]
