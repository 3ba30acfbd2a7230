"""Patterns that are compiled later."""

from __future__ import annotations

import re

import pytest

from isolator.base.patterns import pattern


def test_pattern_is_compiled_at_its_first_use_and_then_as_re_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    compile_now = re.compile

    def noted(text: str, flags: int = 0) -> re.Pattern[str]:
        made.append(text)
        return compile_now(text, flags)

    monkeypatch.setattr(re, "compile", noted)
    digits = pattern("([0-9]+)a", re.IGNORECASE)
    assert digits.pattern == "([0-9]+)a" and not made
    for _ in range(2):
        found = digits.fullmatch("12A")
        assert found is not None and found[1] == "12" and digits.match("a") is None
    assert made == ["([0-9]+)a"] * 2  # once for each method


def test_text_that_is_no_pattern_is_noticed_at_its_first_use() -> None:
    with pytest.raises(re.error):
        pattern("(").fullmatch("")
