"""Models of policies refuse what their types do not allow, from whichever process it comes, and never change."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest

from isolator.base.structs import field
from isolator.policy.frozen import Frozen
from isolator.policy.host import HostConfig


class Inner(Frozen):
    text: str
    flag: bool = False


class Outer(Frozen):
    number: Annotated[int, "unit"] = 1
    time: float = 2.0
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (1, "a")
    mode: Literal["a", "b"] = "a"
    table: dict[str, int | float] = field(default_factory=dict)
    json: Any = None


class Base(Frozen):
    first: int = 1


class Derived(Base, Inner):
    last: int = 2


@pytest.mark.parametrize(
    "values",
    [
        {"number": "1"}, {"number": True}, {"number": 1.5}, {"number": None}, {"time": float("nan")}, {"time": 10**400},
        {"time": "1"}, {"inner": {"text": 1}}, {"inner": {}}, {"inner": {"text": "x", "more": 1}}, {"inner": []},
        {"many": "x"}, {"many": [None]}, {"pair": [1]}, {"pair": [1, "a", "b"]}, {"pair": ["a", 1]}, {"mode": "c"},
        {"mode": ["a"]}, {"table": {"x": "1"}}, {"table": {1: 1}}, {"table": [1]}, {"unknown": 1},
    ],
)  # fmt: skip
def test_value_of_another_type_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Outer|Inner"):
        Outer.model_validate(values)


@pytest.mark.parametrize("data", [None, [], "x", {1: 2}])
def test_what_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="is an object"):
        Outer.model_validate(data)


def test_json_of_a_model_gives_an_equal_model() -> None:
    made = Outer(number=3, time=4, inner=Inner(text="ä", flag=True), many=(Inner(text="x"),), mode="b", table={"a": 1})
    again = Outer.model_validate(json.loads(made.model_dump_json()))
    assert again == made
    assert isinstance(made.time, float)
    assert made.model_dump()["many"] == ({"text": "x", "flag": False},)
    assert made.model_dump(mode="json", exclude={"inner"})["pair"] == [1, "a"]
    assert Inner(text="x") != Outer()


def test_model_never_changes_and_hashes_by_value() -> None:
    one = Inner(text="x")
    with pytest.raises(AttributeError):
        one.text = "y"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del one.text
    assert {one, Inner(text="x"), one.model_copy(update={"text": "y"})} == {one, Inner(text="y")}
    assert Outer().table is not Outer().table


def test_fields_of_the_last_base_come_first() -> None:
    assert Derived.model_fields == ("text", "flag", "first", "last")


def test_root_reads_its_settings_without_pydantic() -> None:
    code = (
        "import sys, isolator.policy.parse.load, isolator.policy.meet.effective, isolator.registration.reading\n"
        "print([name for name in sys.modules if name.startswith(('pydantic', 'annotated_types'))])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert HostConfig.model_validate({}) == HostConfig()
