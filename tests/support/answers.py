"""Answers of the control socket against the types of their verbs."""

from __future__ import annotations

from typing import Any

from host.control.verbs import result_keys, verbs


def checked(verb: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer; fails when it has other keys than the verb declares."""
    check_keys(answer, verbs()[verb].spec.result)
    return answer


def check_keys(value: dict[str, Any], declared: type[Any]) -> None:
    """Fail when an object has other keys than its TypedDict."""
    keys = result_keys(declared)
    missing = {key for key, always in keys.items() if always} - value.keys()
    assert not missing and value.keys() <= keys.keys(), (declared, missing, value.keys() - keys.keys())
