"""Calibration files: reading them (older versions migrated, newer ones refused), where they lie, writing a new one.

They ship in data/calibrations, and a user's own lie in the user's data folder; a file is never overwritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from planner.base import data_files
from planner.base.bounded import parse_json, read_bounded
from planner.base.errors import InvalidInput, PlannerError, UnknownName, one_line
from planner.device.hardware import CPU, Gpu
from planner.timing.coefficients import (
    Calibration,
    Coefficient,
    Coefficients,
    Selection,
    concerns,
    describe,
    matches,
    priors,
)
from planner.timing.coefficients import select as select_from
from planner.training.spec import Versions

if TYPE_CHECKING:  # a prediction reads files by their names
    from pathlib import Path

VERSION = 1
KIND = "loraplan-calibration"
SHIPPED_CPU = "cpu-"
"""How the names of shipped calibrations of CPUs begin."""
MAX_BYTES = 4 * 2**20

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version of a file -> the function that returns its document in the next version; one per step."""


def user_folder() -> Path:
    """Where a user's own calibrations lie: LORAPLAN_DATA, else the platform's data folder."""
    from pathlib import Path

    return Path(_user_folder())


def _user_folder() -> str:
    own = os.environ.get("LORAPLAN_DATA")
    if own:
        return os.path.join(own, "calibrations")
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(base, "loraplan", "calibrations")


def paths() -> Iterator[Path]:
    """Every calibration file that predictions consider."""
    from pathlib import Path

    return map(Path, _paths())


def _paths() -> Iterator[str]:
    for folder in (data_files.data_path("calibrations"), _user_folder()):
        if os.path.isdir(folder):  # Path.is_dir raises where a folder above may not be entered
            names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
            yield from (os.path.join(folder, name) for name in names)


def known(gpu: Gpu | None = None) -> tuple[list[Calibration], list[str]]:
    """All calibrations that can be read, and a line for each that cannot, or for a folder that may not be entered.

    For a card those that ship of CPUs are left out, for a CPU the others: they lend each other nothing.
    """
    found, notes = [], []
    own = _user_folder()
    try:
        os.listdir(own)
    except PermissionError:
        notes.append(f"{own} may not be read: calibrations there are not used (LORAPLAN_DATA names another folder)")
    except OSError:
        pass  # there is none
    shipped = data_files.data_path("calibrations")
    for path in _paths():
        folder, name = os.path.split(path)
        if gpu is not None and folder == shipped and name.startswith(SHIPPED_CPU) != (gpu.vendor == CPU):
            continue
        try:
            found.append(read(path))
        except PlannerError as error:
            notes.append(str(error))
    return found, notes


def select(gpu: Gpu, choice: str | None = None, versions: Versions | None = None) -> Selection:
    """The coefficients for a card: `choice` is a file or id, "none" for priors, None for the best there is.

    Raises:
        PlannerError: the chosen file cannot be read, or belongs to another card or formula version.
    """
    if choice == "none":
        return Selection(priors(gpu), None, ())
    if choice is None:
        candidates, notes = known(gpu)
        usable = []
        for candidate in candidates:
            if not concerns(candidate, gpu):
                continue
            try:
                check_formula(candidate)
                usable.append(candidate)
            except InvalidInput as error:
                notes.append(str(error))
        found = select_from(gpu, usable, versions)
        return found._replace(notes=(*found.notes, *(f"calibration passed over: {note}" for note in notes)))
    chosen = find(choice)
    check_formula(chosen)
    if not matches(chosen, gpu):
        raise InvalidInput(
            f"{one_line(choice)} was fitted on {chosen.label}, not on {gpu.name}; "
            "choose a calibration of this card (loraplan calibrate list) or --calibration none"
        )
    return select_from(gpu, [chosen], versions)


def select_each(cards: Iterable[Gpu], choice: str | None = None) -> dict[str, Selection]:
    """The coefficients for several cards, by id: a chosen file serves the card it was fitted on.

    Raises:
        PlannerError: the chosen file cannot be read, or belongs to none of the cards.
    """
    listed = list(cards)
    if choice is None or choice == "none":
        return {card.gpu_id: select(card, choice) for card in listed}
    chosen = find(choice)
    check_formula(chosen)
    if not any(matches(chosen, card) for card in listed):
        raise InvalidInput(
            f"{one_line(choice)} was fitted on {chosen.label}, which is none of the cards; "
            "choose a calibration of one of them (loraplan calibrate list) or --calibration none"
        )
    return {card.gpu_id: select_from(card, [chosen]) if matches(chosen, card) else select(card) for card in listed}


def check_formula(calibration: Calibration) -> None:
    """Refuse coefficients of other formulas.

    Raises:
        InvalidInput: naming the file, both formula versions and the remedy.
    """
    from planner.timing.formulas import fingerprint  # prices toy kernels: no use without a calibration

    if calibration.formula_version != fingerprint():
        raise InvalidInput(
            f"{calibration.path} has coefficients of formula version {calibration.formula_version}, this loraplan "
            f"has {fingerprint()}; fit its measurements again (loraplan calibrate fit)"
        )


def find(name: str) -> Calibration:
    """Read the calibration that a path, or the file name of a known one without .json, names."""
    if os.path.exists(name):
        return read(name)
    stems = {path.stem: path for path in paths()}
    if name in stems:
        return read(stems[name])
    listed = ", ".join(stems) or "none yet"
    raise UnknownName(f"no calibration {one_line(name)!r}: neither a file nor one of: {one_line(listed, 300)}")


def read(path: str | Path) -> Calibration:
    """Read one file.

    Raises:
        InvalidInput: not a calibration, damaged, or newer than this loraplan knows.
    """
    document = migrated(load_json(path), KIND, VERSION, MIGRATIONS, path)
    try:
        return _parse(document, str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"{path} is damaged ({type(error).__name__}: {one_line(str(error))}); fit it again"
        ) from None


def load_json(path: str | Path) -> Any:
    """Parse a JSON object in a file of bounded size.

    Raises:
        InvalidInput: too large, or not JSON.
    """
    return parse_json(read_bounded(str(path), MAX_BYTES * 16, "file of loraplan"), str(path), "file of loraplan")


def migrated(
    document: Any,
    kind: str,
    newest: int,
    steps: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]],
    path: str | Path,
) -> dict[str, Any]:
    """Bring a versioned document to the newest version, one step at a time.

    Raises:
        InvalidInput: another kind of file, or a version that is newer than known.
    """
    if not isinstance(document, dict) or document.get("kind") != kind or not isinstance(document.get("version"), int):
        raise InvalidInput(f"{path} is not a {kind} file; see loraplan calibrate --help")
    while document["version"] < newest:
        step = steps.get(document["version"])
        if step is None:
            raise InvalidInput(f"{path} has version {document['version']}, which cannot be brought to {newest}")
        document = step(dict(document))
    if document["version"] > newest:
        raise InvalidInput(
            f"{path} has version {document['version']}, this loraplan knows up to {newest}; upgrade loraplan"
        )
    return dict(document)


def _parse(document: dict[str, Any], path: str) -> Calibration:
    items = {
        row["name"]: Coefficient(
            name=row["name"], value=float(row["value"]), standard_error=float(row["standard_error"]), unit=row["unit"],
            low=float(row["low"]), high=float(row["high"]), origin=row["origin"], source=row["source"],
        )
        for row in document["coefficients"]
    }  # fmt: skip
    label = describe(document["gpu_id"], document["device"], int(document["bursts"]), str(document["created"]))
    return Calibration(
        gpu_id=document["gpu_id"],
        device=document["device"],
        formula_version=str(document["formula_version"]),
        created=str(document["created"]),
        versions=document["versions"],
        coefficients=Coefficients(items, float(document["formula_error"]), f"calibrated on {label}"),
        repeatability=float(document["repeatability"]),
        context_bytes=_triple(document["context_bytes"]),
        bursts=int(document["bursts"]),
        report=document["report"],
        path=path,
    )


def _triple(values: Any) -> tuple[int, int, int] | None:
    if values is None:
        return None
    low, middle, high = (int(value) for value in values)
    return low, middle, high


def to_document(calibration: Calibration) -> dict[str, Any]:
    """The file's content as plain JSON values."""
    return {
        "kind": KIND,
        "version": VERSION,
        "formula_version": calibration.formula_version,
        "created": calibration.created,
        "gpu_id": calibration.gpu_id,
        "device": dict(calibration.device),
        "versions": dict(calibration.versions),
        "formula_error": calibration.coefficients.formula_error,
        "repeatability": calibration.repeatability,
        "context_bytes": list(calibration.context_bytes) if calibration.context_bytes else None,
        "bursts": calibration.bursts,
        "coefficients": [
            {
                "name": c.name, "value": c.value, "standard_error": c.standard_error, "unit": c.unit, "low": c.low,
                "high": c.high, "origin": c.origin, "source": c.source,
            }
            for c in calibration.coefficients.values()
        ],
        "report": dict(calibration.report),
    }  # fmt: skip


def write(calibration: Calibration, target: Path | None = None) -> Path:
    """Write a new file, by default `<gpu>-<day>[-n].json` in the user's folder; an existing one is never replaced.

    Raises:
        InvalidInput: `target` exists, or there is no home folder for a user's own.
    """
    text = json.dumps(to_document(calibration), indent=1, allow_nan=False) + "\n"
    if target is not None:
        return _create(target, text)
    folder = user_folder()
    if folder.parts[0] == "~":
        raise InvalidInput("this user has no home folder: name a file, or a folder in LORAPLAN_DATA")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{calibration.gpu_id}-{calibration.created[:10]}"
    for number in range(1, 1000):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            return _create(path, text)
    raise InvalidInput(f"{folder} has 999 calibrations of {stem}; remove old ones")


def refuse_existing(path: Path) -> None:
    """Raise InvalidInput if there is a file already."""
    if path.exists():
        raise InvalidInput(f"{path} exists and is not overwritten; name another file")


def _create(path: Path, text: str) -> Path:
    """Write beside the target, then link it into place: whole or not at all, and never over another file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        raise InvalidInput(f"{path} exists and is not overwritten; name another file") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path
