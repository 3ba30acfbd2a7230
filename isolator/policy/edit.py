"""Edit a policy file for an operator: a list of ``[grant]`` gains or loses values, approved lines come in.

Everything else stays: comments, order, the form of other lines, a byte order mark. The result is not checked here: read
it with ``parse.load``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from isolator.errors import UsageError, translated

if TYPE_CHECKING:
    from isolator.policy.meet.proposal import Line
Value = str | int
"""One value of a list: text, or the uid of a caller."""
LISTS = {"egress": "egress", "hook": "hooks", "permission": "permissions", "tool": "tools", "caller": "callers"}
"""Keys of ``[grant]`` by what operators call one value of them."""
_MARK = "\ufeff"
"""A byte order mark, with which some editors begin a file; it is no TOML (and ``parse`` passes it over)."""


def granted(text: str, kind: str, value: Value, *, in_force: Sequence[Value]) -> str:
    """The file with ``value`` in the list of ``kind``, or the same text if it is in it.

    A file that has no such list gets one with what is ``in_force`` besides: a list says what is granted and that
    nothing else is, so a new one of one value would take away the rest. Raises UsageError for a file that is no TOML.
    """
    document, table = _opened(text)
    key = LISTS[kind]
    found = table.get(key)
    if found is None:
        table[key] = [*in_force, *([] if value in in_force else [value])]
    elif value in found:
        return text
    else:
        _append(found, value)
    return _written(document, text)


def approved(text: str, lines: Sequence[Line]) -> str:
    """The file with what each pending line asks for: a value more in its list, or its number in place of another."""
    import tomllib

    for line in lines:
        document, table = _opened(text, line.section)
        ((key, value),) = tomllib.loads(line.add).items()
        found = table.get(key)
        if isinstance(value, list) and found is not None:
            wanted = value[-1] if key == "listen" else line.requested
            if wanted not in found:
                _append(found, wanted)
        else:
            table[key] = value
        text = _written(document, text)
    return text


def _append(found: Any, value: Any) -> None:
    """Add a value to a list, in the form in which it is written."""
    if len(text := found.as_string().splitlines()) > 1:
        indent = text[1][: len(text[1]) - len(text[1].lstrip())]
        found.add_line(value, indent=indent)
    else:
        found.append(value)


def revoked(text: str, kind: str, value: Value, *, in_force: Sequence[Value]) -> str:
    """The file without ``value`` in the list of ``kind``; raises UsageError when it is not there to be removed."""
    document, table = _opened(text)
    key = LISTS[kind]
    found = table.get(key)
    if found is None:
        if value not in in_force:
            raise UsageError(f"{kind} {value}", "is not granted", "see 'isolator plugin explain'")
        table[key] = [other for other in in_force if other != value]
    elif value not in found:
        if not found:
            raise UsageError(f"{kind} {value}", "is not in the file's list, which is empty")
        covering = f"the file lists {', '.join(map(str, found))}"
        raise UsageError(f"{kind} {value}", f"is not in the file's list; {covering}", "name one as it stands there")
    else:
        found.remove(value)
    return _written(document, text)


def _opened(text: str, section: str = "grant") -> tuple[Any, Any]:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    with translated(TOMLKitError, UsageError, "policy", "", "see 'isolator policy check'"):
        document = tomlkit.parse(text.removeprefix(_MARK))
    table = document.get(section)
    if table is None:
        document[section] = tomlkit.table()
        table = document[section]
    if not hasattr(table, "add"):
        raise UsageError("policy", f"{section} is no table", "see 'isolator policy check'")
    return document, table


def _written(document: Any, before: str) -> str:
    return (_MARK if before.startswith(_MARK) else "") + str(document.as_string())
