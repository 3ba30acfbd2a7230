"""Structs are made, compared, hashed, shown and refused as dataclasses are."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import ClassVar

import pytest

from isolator.base.structs import field, replace, struct_class


@struct_class(frozen=True)
class Point:
    x: int
    y: int = 2
    ORIGIN: ClassVar[int] = 0


@struct_class(frozen=True)
class Named(Point):
    name: str = "n"


@struct_class()
class Box:
    things: list[int] = field(default_factory=list)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(self.things)


def test_fields_come_by_place_by_name_and_by_default() -> None:
    assert (Point(1).y, Point(1, 3).y, Point(y=4, x=1).y) == (2, 3, 4)
    assert Named(1, name="z") == Named(1, 2, "z")
    assert repr(Named(1)) == "Named(x=1, y=2, name='n')"
    assert Box() is not Box()
    assert Box().things is not Box().things
    assert Box([1, 2]).total == 3


@pytest.mark.parametrize(("values", "named"), [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"z": 1})])
def test_field_that_is_missing_unknown_or_twice_is_refused(values: tuple[int, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point"):
        Point(*values, **named)


def test_frozen_ones_never_change_and_hash_by_value() -> None:
    point = Point(1)
    with pytest.raises(FrozenInstanceError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del point.x
    assert {point, Point(1), replace(point, y=3)} == {Point(1), Point(1, 3)}
    assert Point(1) != Named(1)
    with pytest.raises(TypeError):
        hash(Box())
