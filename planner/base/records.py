"""`record`: frozen keyword-only dataclasses that cost little to define.

dataclasses.dataclass(frozen=True) compiles several functions per class, which was a third of the start-up time of
`loraplan fits`. A record is a dataclass to whoever asks (dataclasses.fields, replace and asdict, type checkers), but
its methods are shared and its `__dataclass_fields__` are made when somebody asks for them. `field`, `fields` and
`replace` do for records what their namesakes in dataclasses do, without that module; `NamedTuple` is that of typing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from planner.base.errors import unknown

T = TypeVar("T")

if TYPE_CHECKING:
    from dataclasses import field as field
    from dataclasses import fields as fields
    from dataclasses import replace as replace
    from typing import NamedTuple as NamedTuple

    from typing_extensions import dataclass_transform
else:  # the decorator only speaks to type checkers

    def dataclass_transform(**_: object):
        return lambda decorator: decorator

    class _TupleType(type):
        """Makes the classes of `NamedTuple`: a property for every annotated name."""

        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
            if not bases or bases == (tuple,):
                return super().__new__(cls, name, bases, body)
            fields = tuple(body.get("__annotations__", ()))
            body["_field_defaults"] = {field: body[field] for field in fields if field in body}
            body.update((field, property(itemgetter(place))) for place, field in enumerate(fields))
            body["_fields"] = body["__match_args__"] = fields
            body["__slots__"] = ()
            return super().__new__(cls, name, bases, body)

    class NamedTuple(tuple, metaclass=_TupleType):
        """typing.NamedTuple, made in a tenth of its time: that compiles a function for every class."""

        __slots__ = ()

        def __new__(cls, *values: Any, **named: Any):
            fields = cls._fields
            if named or len(values) != len(fields):
                held = {**cls._field_defaults, **dict(zip(fields, values, strict=False)), **named}
                twice = named.keys() & set(fields[: len(values)])
                if len(values) > len(fields) or len(held) != len(fields) or twice or named.keys() - set(fields):
                    raise TypeError(f"{cls.__name__} takes {', '.join(fields)}")
                values = tuple(held[field] for field in fields)
            return tuple.__new__(cls, values)

        @classmethod
        def _make(cls, values: Any):
            return cls(*values)

        def _replace(self, **named: Any):
            return type(self)(**{**self._asdict(), **named})

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self) -> tuple[Any, ...]:
            return tuple(self)

        def __repr__(self) -> str:
            inside = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
            return f"{type(self).__name__}({inside})"

    def field(*, default_factory: Callable[[], Any]) -> _Factory:
        """A field whose default is made anew for every record."""
        return _Factory(default_factory)

    def fields(kind: Any) -> tuple[Any, ...]:
        """The fields of a record or of its class, each with its `name`; any other dataclass has its own."""
        plain = getattr(kind, "_plain", None)
        if plain is None:
            import dataclasses

            return dataclasses.fields(kind)
        return tuple(_Named(name) for name in plain)

    def replace(held: T, /, **changes: Any) -> T:
        """Return a copy with these fields changed, checked as a new one is."""
        plain = getattr(held, "_plain", None)
        if plain is None:
            import dataclasses

            return dataclasses.replace(held, **changes)
        values = held.__dict__
        return type(held)(**{**{name: values[name] for name in plain}, **changes})


_REQUIRED = object()


class _Factory:
    """What `field` leaves on a class until `record` takes it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class _Named:
    """One of `fields`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Fields:
    """`__dataclass_fields__` of a record: made by dataclasses when they are asked for, and kept."""

    __slots__ = ("kind",)

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind

    def __get__(self, held: object, owner: type[Any]) -> Any:
        import dataclasses

        kind = self.kind
        for name, make in kind._factories.items():
            if name in kind.__annotations__:
                setattr(kind, name, dataclasses.field(default_factory=make))
        del kind.__dataclass_fields__
        dataclasses.dataclass(init=False, repr=False, eq=False, match_args=False, kw_only=True)(kind)
        return kind.__dataclass_fields__


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass; `__post_init__` validates as usual."""
    plain: dict[str, Any] = {}
    factories: dict[str, Any] = {}
    for base in cls.__mro__[-2:0:-1]:
        plain.update(base.__dict__.get("_plain", {}))
        factories.update(base.__dict__.get("_factories", {}))
    own = cls.__dict__
    for name, annotation in cls.__annotations__.items():
        if "ClassVar" in str(annotation):
            continue
        value = plain[name] = own.get(name, _REQUIRED)
        factories.pop(name, None)
        if isinstance(value, _Factory):
            plain[name] = _REQUIRED
            factories[name] = value.make
            delattr(cls, name)
        elif type(value).__hash__ is None:
            raise ValueError(f"the default of {cls.__name__}.{name} is mutable: use field(default_factory=...)")
    made: Any = cls
    made._plain, made._factories = plain, factories
    made.__dataclass_fields__ = _Fields(cls)
    for name, method in _METHODS.items():
        setattr(made, name, method)
    return cls


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
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: object, name: str) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


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
        wanted = dict.fromkeys(names)
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
