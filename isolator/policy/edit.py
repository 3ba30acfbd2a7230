"""Edit a policy file for an operator: one list of ``[grant]`` gains or loses values, everything else stays.

Comments, order and the form of other lines are kept. The result is not checked here: read it with ``parse.load``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isolator.errors import UsageError

LISTS = {"egress": "egress", "hook": "hooks", "permission": "permissions"}
"""Keys of ``[grant]`` by what operators call one value of them."""


def granted(text: str, kind: str, value: str, *, in_force: Sequence[str]) -> str:
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
    elif len(text_of := found.as_string().splitlines()) > 1:
        indent = text_of[1][: len(text_of[1]) - len(text_of[1].lstrip())]
        found.add_line(value, indent=indent)
    else:
        found.append(value)
    return str(document.as_string())


def revoked(text: str, kind: str, value: str, *, in_force: Sequence[str]) -> str:
    """The file without ``value`` in the list of ``kind``; raises UsageError when it is not there to be removed."""
    document, table = _opened(text)
    key = LISTS[kind]
    found = table.get(key)
    if found is None:
        if value not in in_force:
            raise UsageError(f"{kind} {value}", "is not granted", "see 'isolator plugin explain'")
        table[key] = [other for other in in_force if other != value]
    elif value not in found:
        covering = f"the file lists {', '.join(map(str, found)) or 'nothing'}"
        raise UsageError(f"{kind} {value}", f"is not in the file's list; {covering}", "name one as it stands there")
    else:
        found.remove(value)
    return str(document.as_string())


def _opened(text: str) -> tuple[Any, Any]:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(text)
    except TOMLKitError as error:
        raise UsageError("policy", str(error), "see 'isolator policy check'") from None
    table = document.get("grant")
    if table is None:
        table = document["grant"] = tomlkit.table()
        table = document["grant"]
    if not hasattr(table, "add"):
        raise UsageError("policy", "grant is no table", "see 'isolator policy check'")
    return document, table
