"""OPTIONS: what can be said about a training run, by name: every setting, the framework, a release of each library."""

from __future__ import annotations

from planner.base.records import NamedTuple
from planner.training.kinds import Kind, Text
from planner.training.settings import LIBRARIES, SECTIONS, SETTINGS
from planner.training.stacks import CUSTOM, LISTED


class Option(NamedTuple):
    """One option: the name of its parameter, its section of the help, its flags, what it takes and its help."""

    key: str
    section: str
    flags: tuple[str, ...]
    kind: Kind
    help: str

    @property
    def flag(self) -> str:
        """The flag that names it in messages."""
        return self.flags[-1].partition("/")[0]

    @property
    def words(self) -> str:
        """What it is called in a sentence."""
        return self.flag.removeprefix("--").replace("-", " ")


_FRAMEWORK = "Framework and releases"
_STACK = Option(
    "stack", _FRAMEWORK, ("--stack",), Text(),
    f"The framework whose unasked defaults apply: {', '.join(LISTED)} or {CUSTOM} "
    "(the default).",
)  # fmt: skip


def _options() -> list[Option]:
    """In the order of the help."""
    shown = [(key, row) for key, row in SETTINGS.items() if row.section]
    shown.sort(key=lambda item: (SECTIONS.index(item[1].section), item[1].place))
    settings = [Option(key, row.section, row.flags, row.kind, row.help) for key, row in shown]
    releases = [Option(name, _FRAMEWORK, (f"--{name}",), Text(), text) for name, text in LIBRARIES.items()]
    return [*settings, _STACK, *releases]


OPTIONS: dict[str, Option] = {option.key: option for option in _options()}
"""By the name of the parameter, in the order of the help."""


def flag_of(key: str) -> str:
    """Return the flag that sets an option, as messages name it; `versions`: that of the first library."""
    return OPTIONS[key].flag
