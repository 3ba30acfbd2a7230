"""Tables of the messages between processes, from isolator/ipc/messages/."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator

from isolator.ipc import messages
from isolator.ipc.body import Body

_BESIDE = ("Descriptors: ", "Reply's descriptors: ")


def direction(name: str) -> str:
    """Return the table of one direction of ``messages.DIRECTIONS``."""
    rows = ["| op | meaning | fields | reply | descriptors |", "|---|---|---|---|---|"]
    for request in messages.DIRECTIONS[name]:
        meaning, descriptors = _meaning(request)
        reply = _fields(request.reply) if request.reply is not None else ""
        rows.append(_row(f"`{request.op}`", meaning, _fields(request), reply, descriptors))
    return "\n".join(rows)


def entries() -> str:
    """Return the table of the bodies that stand for a plugin."""
    rows = ["| type | meaning | fields |", "|---|---|---|"]
    for body in (messages.PluginEntry, messages.RegisteredEntry, messages.FoundEntry, messages.PendingVersion):
        rows.append(_row(f"`{body.__name__}`", _meaning(body)[0], _own_fields(body)))
    states = ", ".join(f"`{state}`" for state in messages.PluginState)
    rows.append(_row("`PluginState`", _document(messages.PluginState).replace("``", "`"), states))
    return "\n".join(rows)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _meaning(body: type[Body]) -> tuple[str, str]:
    """The meaning of a body, and the descriptors that travel beside it."""
    meaning: list[str] = []
    beside: list[str] = []
    for paragraph in _document(body).split("\n\n"):
        text = " ".join(paragraph.split())
        (beside if text.startswith(_BESIDE) else meaning).append(text)
    return " ".join(meaning).replace("``", "`"), "; ".join(
        text.removeprefix(_BESIDE[0]).replace(_BESIDE[1], "→ ") for text in beside
    )


def _document(cls: type) -> str:
    text = ast.get_docstring(_classes()[cls.__name__])
    assert text is not None, f"{cls.__name__} has no docstring"
    return text


def _fields(body: type[Body]) -> str:
    """Every field with its type and its text, those of the base classes first."""
    bases = [base for base in reversed(body.__mro__) if base.__name__ in _classes()]
    return ", ".join(text for text in map(_own_fields, bases) if text)


def _own_fields(body: type[Body]) -> str:
    return ", ".join(_own(body))


def _own(body: type[Body]) -> Iterator[str]:
    statements = _classes()[body.__name__].body
    for number, statement in enumerate(statements):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            optional = "?" if statement.value is not None else ""
            text = f"`{statement.target.id}{optional}: {ast.unparse(statement.annotation)}`"
            following = statements[number + 1] if number + 1 < len(statements) else None
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text += f" ({' '.join(str(following.value.value).split())})"
            yield text


@functools.cache
def _classes() -> dict[str, ast.ClassDef]:
    modules = [module for module in vars(messages).values() if inspect.ismodule(module)]
    trees = [ast.parse(inspect.getsource(module)) for module in modules]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
