"""Records and named tuples that cost little to define are what dataclasses and typing make."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import typing

import pytest

from planner.base import records
from planner.base.records import field, fields, record, replace


@record
class Base:
    """A record that another one extends."""

    name: str
    size: int = 2
    tags: tuple[str, ...] = ()


@record
class Extended(Base):
    """With a default that is made anew, and a check."""

    size: int = 3
    parts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size")


class Ours(records.NamedTuple):
    """Two fields."""

    first: int
    second: str = "b"

    def both(self) -> str:
        return f"{self.first}{self.second}"


class Theirs(typing.NamedTuple):
    """The same."""

    first: int
    second: str = "b"

    def both(self) -> str:
        return f"{self.first}{self.second}"


def test_a_record_is_a_dataclass_to_who_asks() -> None:
    one = Extended(name="a")
    assert dataclasses.is_dataclass(one)
    assert dataclasses.is_dataclass(Extended)
    names = ["name", "size", "tags", "parts"]
    assert [item.name for item in dataclasses.fields(Extended)] == names
    assert [item.name for item in fields(one)] == [item.name for item in fields(Extended)] == names
    assert [item.name for item in dataclasses.fields(Base)] == ["name", "size", "tags"]
    assert dataclasses.asdict(one) == {"name": "a", "size": 3, "tags": (), "parts": {}}
    assert dataclasses.replace(one, size=5) == replace(one, size=5) == Extended(name="a", size=5)
    assert one.parts is not Extended(name="a").parts
    assert repr(Base(name="x")) == "Base(name='x', size=2, tags=())"
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one


def test_a_record_refuses_what_a_frozen_dataclass_does() -> None:
    one = Extended(name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.size = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.size
    with pytest.raises(TypeError, match="needs name"):
        Base()
    with pytest.raises(TypeError, match="no field colour"):
        Base(name="a", colour=1)
    with pytest.raises(ValueError, match="size"):
        replace(one, size=-1)
    with pytest.raises(ValueError, match="mutable"):

        @record
        class Wrong:
            items: list[int] = []  # noqa: RUF012 - what is refused


def test_other_dataclasses_are_left_to_their_module() -> None:
    @dataclasses.dataclass
    class Plain:
        size: int = 1

    assert [item.name for item in fields(Plain)] == ["size"]
    assert replace(Plain(), size=2) == Plain(2)


@pytest.mark.parametrize("values", [(1,), (1, "c")])
def test_a_named_tuple_is_that_of_typing(values: tuple[typing.Any, ...]) -> None:
    ours, theirs = Ours(*values), Theirs(*values)
    assert ours == theirs == tuple(theirs)
    assert hash(ours) == hash(theirs)
    assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
    assert ours.both() == theirs.both()
    assert ours._asdict() == theirs._asdict()
    assert ours._replace(first=9) == theirs._replace(first=9)
    assert Ours._fields == Theirs._fields
    assert Ours._make((4, "d")) == Theirs._make((4, "d"))
    assert type(pickle.loads(pickle.dumps(ours))) is Ours
    assert copy.deepcopy(ours) == ours
    assert Ours(second="z", first=1) == Theirs(second="z", first=1)
    match ours:
        case Ours(first, second):
            assert (first, second) == theirs


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_a_named_tuple_refuses_what_that_of_typing_does(kind: typing.Any) -> None:
    for call in (
        lambda: kind(),
        lambda: kind(1, 2, 3),
        lambda: kind(1, first=2),
        lambda: kind(1, third=2),
        lambda: kind(1)._make((1, 2, 3)),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises((TypeError, ValueError)):
        kind(1)._replace(third=3)
    for name in ("first", "third"):
        with pytest.raises(AttributeError):
            setattr(kind(1), name, 2)
