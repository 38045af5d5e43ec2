"""`record`: frozen keyword-only dataclasses that cost little to define.

dataclasses.dataclass(frozen=True) compiles several functions per class, which was a third of the start-up time of
`loraplan fits`. A record is a dataclass (fields, replace and type checkers treat it as one) whose methods are shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from planner.errors import unknown

T = TypeVar("T")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:  # the decorator only speaks to type checkers

    def dataclass_transform(**_: object):
        return lambda decorator: decorator


_REQUIRED = object()


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass; `__post_init__` validates as usual."""
    made = dataclasses.dataclass(init=False, repr=False, eq=False, match_args=False, kw_only=True)(cls)
    plain: dict[str, Any] = {}
    factories: dict[str, Any] = {}
    for item in dataclasses.fields(made):  # type: ignore[arg-type]
        if item.default_factory is not dataclasses.MISSING:
            factories[item.name] = item.default_factory
        plain[item.name] = _REQUIRED if item.default is dataclasses.MISSING else item.default
    setattr(made, "_plain", plain)  # noqa: B010 - a class attribute type checkers need not see
    setattr(made, "_factories", factories)  # noqa: B010
    for name, method in _METHODS.items():
        setattr(made, name, method)
    return made


def _init(self: Any, **values: Any) -> None:
    held = {**self._plain, **values}
    if len(held) != len(self._plain):
        extra = sorted(set(values) - set(self._plain))
        raise TypeError(f"{type(self).__name__} has no field {', '.join(extra)}")
    for name, factory in self._factories.items():
        if name not in values:
            held[name] = factory()
    missing = [name for name, value in held.items() if value is _REQUIRED]
    if missing:
        raise TypeError(f"{type(self).__name__} needs {', '.join(missing)}")
    self.__dict__.update(held)
    check = getattr(self, "__post_init__", None)
    if check is not None:
        check()


def _setattr(self: object, name: str, value: object) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: object, name: str) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _eq(self: object, other: object) -> bool:
    if type(self) is not type(other):
        return False
    return bool(self.__dict__ == other.__dict__)


def _hash(self: object) -> int:
    return hash((type(self), tuple(self.__dict__.values())))


def _repr(self: object) -> str:
    inside = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
    return f"{type(self).__qualname__}({inside})"


_METHODS: dict[str, Any] = {
    "__init__": _init,
    "__setattr__": _setattr,
    "__delattr__": _delattr,
    "__eq__": _eq,
    "__hash__": _hash,
    "__repr__": _repr,
}


class Rows(dict[str, T]):
    """One row per thing, by its name. A row that does not exist is an error with the known names, never a default."""

    def __init__(self, what: str, names: Iterable[str], rows: Iterable[tuple[str, T]]) -> None:
        """`names`: those that must have a row, in the order they are offered.

        Raises:
            TypeError: a name without a row, a row without a name, or two rows of one name.
        """
        found = list(rows)
        wanted = list(names)
        made = dict(found)
        missing, extra = [n for n in wanted if n not in made], [n for n in made if n not in wanted]
        if missing or extra or len(made) != len(found):
            wrong = f"no row for {', '.join(missing)}" if missing else f"rows without a name: {', '.join(extra)}"
            raise TypeError(f"{what}: {wrong if missing or extra else 'two rows of one name'}")
        super().__init__((name, made[name]) for name in wanted)
        self.what = what

    def __missing__(self, name: str) -> NoReturn:
        raise unknown(self.what, name, self)

    def where(self, holds: Callable[[T], bool]) -> tuple[str, ...]:
        """Names of the rows for which `holds` is true."""
        return tuple(name for name, row in self.items() if holds(row))
