"""The one way from a user's words to a plan: `Request` (all that was said) -> `resolve` -> `Plan` (all that follows).

A plan carries every note that its user must see: what a config asks for and the estimate lacks, what was read of the
model, what the card's name leaves open, what the calibration is. Commands print `Plan.notes` or `Prediction.warnings`.
`planner.plan.answering` makes an answer of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planner.base.errors import InvalidInput, UnknownName
from planner.base.records import NamedTuple, record, replace
from planner.device.hardware import Gpu
from planner.facts import calibration_files
from planner.facts.sources import LoadedConfig
from planner.model.spec import ModelSpec
from planner.plan.cards import card_of, percent_of, with_margin
from planner.plan.configure import configure, with_stated_releases
from planner.plan.given import Settings
from planner.plan.jobs import Files, job_of
from planner.plan.models import LoadedModel, load_config, load_model, read_model
from planner.plan.notes import training_warnings
from planner.plan.predict import Prediction, predict
from planner.timing.coefficients import Selection
from planner.training import stacks
from planner.training.settings import Resolved
from planner.training.spec import TrainingSpec, Versions

if TYPE_CHECKING:  # a run without data or config reads neither
    from planner.importers import Job
    from planner.plan.datarun import DataRun
    from planner.runs.dataset.batches import Padding
    from planner.runs.dataset.orders import Orders
    from planner.runs.dataset.scan import Scan, Source


class Data(NamedTuple):
    """Training data that decides a run's length, and how it is read."""

    files: tuple[str, ...]
    template: str | None = None
    tokenizer: str | None = None
    padding: str | None = None


class Cost(NamedTuple):
    """How much is trained and what an hour costs; None: not said."""

    tokens: str | float | None = None
    """A number, or a text such as "10M"."""
    rows: int | None = None
    epochs: float | None = None
    mean_tokens: float | None = None
    """Useful tokens per row, where rows are padded to the length."""
    price: float | None = None
    """USD per hour."""
    dbu_table: str | None = None
    """A JSON file of Databricks units per hour of each node type."""
    dbu_rate: float | None = None
    """USD per Databricks unit."""


class Tracing(NamedTuple):
    """Ask the real libraries under fake tensors: how long, and whether an answer of an earlier trace will do."""

    time_limit_s: float = 600.0
    use_cache: bool = True


@record
class Request:
    """Everything that can be said about one run."""

    model: str | Mapping[str, Any] | None = None
    """An id, a path, or the config of a model; None: the job names it."""
    settings: Settings = Settings()
    job: Job | Files | None = None
    """Training configs of other frameworks, or what was read of them: settings hold before what they say."""
    gpu: str | Gpu | None = None
    """A card by name (`planner.plan.cards.card_of`), or one at hand."""
    vram: str | None = None
    """Memory of a card of the user's own, in place of `gpu`."""
    margin: str | float = 0.0
    """Percent of the card that must stay free."""
    calibration: str | Selection | None = None
    """A file or id, "none" for priors, None for the best there is; or one that was chosen already."""
    data: Data | None = None
    cost: Cost = Cost()
    tracing: Tracing | None = None
    """None: loraplan's own program answers."""
    changes: bool = False
    """Search for what would fit where the run does not."""
    lenient: bool = False
    """Accept settings that the run has no use for (`configure`)."""
    keeps_dtypes: bool = False
    """Look at bf16 as it is written, on a card without it too."""
    remarks: tuple[str, ...] = ()
    """What the way in left out, as notes of the plan."""


class Known:
    """What several requests of one call share: models, scans of data and what they make of a batch, read once each.

    Args:
        read: how data are scanned (a command hands in one that shows a bar).
        tell: is told in a line what was read of config files.
        offline: never ask the hub for a model.
    """

    def __init__(
        self,
        read: Callable[[Source], Scan] | None = None,
        *,
        tell: Callable[[str], None] | None = None,
        offline: bool = False,
    ) -> None:
        self.read, self.tell, self.offline = read, tell, offline
        self.models: dict[str, LoadedModel] = {}
        self.scans: dict[Source, Scan] = {}
        self.runs: dict[tuple[Source, int, int, str], DataRun] = {}

    def model(self, model: str | Mapping[str, Any]) -> LoadedModel:
        """Read a model, once if it has a name.

        Raises:
            PlannerError: as `load_model`.
        """
        if not isinstance(model, str):
            return load_model(model)
        if model not in self.models:
            self.models[model] = load_model(model, offline=self.offline)
        return self.models[model]

    def job(self, said: Job | Files | None, settings: Settings) -> Job | None:
        """What config files say, read and told unless that was done before.

        Raises:
            PlannerError: the files cannot be read, or their job is not planned.
        """
        if not isinstance(said, Files):
            return said
        job = job_of(said, settings)
        if self.tell is not None:
            self.tell(job.summary)
        return job

    def run(self, what: Source, batch: int, limit: int, padding: Padding) -> DataRun:
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


@record
class Plan:
    """A request with everything resolved, and every note that belongs to it."""

    request: Request
    config: LoadedConfig
    """The model's, with where it was read."""
    model: ModelSpec | None
    """None: no family describes it, and only a trace can answer."""
    stack: str | None
    stack_origin: str
    resolved: Resolved
    training: TrainingSpec
    card: Gpu | None
    """With its measured context, where there is one."""
    margin_bytes: int
    """Memory of the card that the user wants kept free."""
    chosen: Selection | None
    data: DataRun | None
    notes: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        """The model.

        Raises:
            UnknownName: no family describes it.
        """
        if self.model is None:
            raise UnknownName("loraplan's program does not know this family")
        return self.model

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes and what the settings cost unnoticed: what `predict` warns of, before it is asked."""
        return tuple(dict.fromkeys((*self.notes, *training_warnings(self.spec, self.training, self.card))))

    def on(self, card: Gpu, choice: str | Selection | None) -> Plan:
        """The same settings on another card, which has bf16 where this one has."""
        chosen = _calibration(card, choice, self.training.versions)
        own = notes_of((), self.card, self.chosen)
        kept = tuple(note for note in self.notes if note not in own)
        return replace(
            self,
            card=chosen.card(card) if chosen is not None else card,
            chosen=chosen,
            notes=notes_of(kept, card, chosen),
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


def resolve(request: Request, shared: Known | None = None) -> Plan:
    """Read the model and the data, settle every setting, choose the calibration, and collect what to tell the user.

    A request for a trace takes a model that no family describes, and no calibration: the trace has no times.

    Args:
        request: what was said; it is not changed.
        shared: what requests of the same call have read already.

    Raises:
        PlannerError: unknown names, unreadable files, or settings that exclude each other.
    """
    shared, said = shared or Known(), request.settings
    job = shared.job(request.job, said)
    named = request.model if request.model is not None else job.model if job is not None else None
    if named is None:
        raise InvalidInput("no model; name one, or give a config that names one")
    card, kept = with_margin(card_of(request.gpu, request.vram), percent_of(request.margin))
    said.options()  # refuses releases that are none before anything is read
    stack = said.stack or (job.stack if job is not None else None)
    config, model, warnings = _read(request, named, shared)
    run = None
    if request.data is not None and request.data.files and model is not None:
        run, said = data_run(request.data, model, stack or stacks.CUSTOM, said, job, shared)
    resolved, training = configure(
        model, stack or stacks.CUSTOM, said.options(), job, lenient=request.lenient,
        card=None if request.keeps_dtypes else card,
    )  # fmt: skip
    chosen = None if request.tracing else _calibration(card, request.calibration, training.versions)
    return Plan(
        request=request,
        config=config,
        model=model,
        stack=stack,
        stack_origin=stack_origin(job, stack),
        resolved=resolved if request.tracing else with_stated_releases(resolved, tuple(said.releases)),
        training=training,
        card=chosen.card(card) if chosen is not None and card is not None else card,
        margin_bytes=kept,
        chosen=chosen,
        data=run,
        notes=notes_of((*request.remarks, *job_notes(job), *warnings), card, chosen),
    )


def _read(
    request: Request, named: str | Mapping[str, Any], shared: Known
) -> tuple[LoadedConfig, ModelSpec | None, tuple[str, ...]]:
    """The model's config, what it is made of, and what to tell of both; a trace does without the second."""
    if request.tracing is None:
        found = shared.model(named)
        return found.loaded, found.spec, found.warnings
    config = load_config(named, offline=shared.offline)
    try:
        found = read_model(config, derive=False)
    except UnknownName:  # not a family of the registry: transformers may know it
        return config, None, config.warnings
    return found.loaded, found.spec, found.warnings


def notes_of(said: Sequence[str], card: Gpu | None, chosen: Selection | None = None) -> tuple[str, ...]:
    """What every answer must say: of config and model (`said`), of the card's name, of the calibration."""
    named = (card.notes,) if card is not None and card.notes.startswith("'") else ()
    return tuple(dict.fromkeys((*said, *named, *(chosen.notes if chosen else ()))))


def job_notes(job: Job | None) -> tuple[str, ...]:
    """Return what config files ask for and the estimate lacks, as warnings."""
    return tuple(str(missing) for missing in job.missing) if job is not None else ()


def stack_origin(job: Job | None, stack: str | None) -> str:
    """Say where the choice of the framework comes from."""
    if job is not None and stack == job.stack:
        return job.stack_origin
    return "given" if stack else "loraplan default"


def _calibration(card: Gpu | None, choice: str | Selection | None, versions: Versions) -> Selection | None:
    """Choose the coefficients for a card; one that was chosen before is told the releases."""
    if card is None:
        return None
    if not isinstance(choice, Selection):
        return calibration_files.select(card, choice, versions)
    return choice.planned_with(versions)


def data_run(
    wanted: Data, model: ModelSpec, stack: str, said: Settings, job: Job | None, shared: Known
) -> tuple[DataRun, Settings]:
    """Read the data; return the run on it and the settings with the length (and padding mask) its longest batch needs.

    The length that was said, or the stack's own, is where rows are cut.

    Raises:
        PlannerError: data that cannot be read, or a setting that is none.
    """
    from planner.base.errors import unknown
    from planner.plan.datarun import needs_mask
    from planner.runs.dataset.scan import Source
    from planner.runs.dataset.templates import NAMES
    from planner.runs.dataset.tokens import family_of

    template = wanted.template or "auto"
    if template not in NAMES:
        raise unknown("template", template, NAMES)
    _, training = configure(model, stack, said.options(), job, lenient=True)
    what = Source(
        paths=tuple(wanted.files), template=template, tokenizer=wanted.tokenizer,
        family=family_of(model.model_type, model.vocab_size),
    )  # fmt: skip
    padding: Any = wanted.padding or "longest"
    run = shared.run(what, training.micro_batch_size, training.seq_len, padding)
    masked = said.get("padded") is None and needs_mask(run)
    return run, said.but({"seq_len": run.longest, **({"padded": True} if masked else {})})


def counted(notes: Iterable[tuple[tuple[str, ...], int]]) -> tuple[tuple[str, int], ...]:
    """Distinct notes of many rows, with the number of rows that each concerns."""
    found: dict[str, int] = {}
    for of_rows, rows in notes:
        for note in of_rows:
            found[note] = found.get(note, 0) + rows
    return tuple(found.items())
