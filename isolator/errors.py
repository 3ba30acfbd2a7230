"""Errors a person can act on: what failed, why, and what to do.

Raised where the cause is known, turned into one line at the edge (the command line prints
``isolator: WHAT: WHY; REMEDY``). The exit codes are the contract of the command line.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    _Types = type[Exception] | tuple[type[Exception], ...]


_RIGHT_TO_LEFT = {"R", "AL", "AN", "RLE", "RLO", "RLI", "LRE", "LRO", "LRI", "FSI", "PDF", "PDI", "BN"}
# Letters and symbols that are printed as nothing: Hangul fillers, Mongolian separators, Braille blank.
_INVISIBLE = {"\u115f", "\u1160", "\u3164", "\uffa0", "\u17b4", "\u17b5", "\u2800", "\u034f"}


def visible(c: str) -> bool:
    """Whether a character is plainly visible: no control, no mark, and nothing that reorders the rest of the line."""
    if c.isascii():
        return c.isprintable()
    import unicodedata

    return (
        c.isprintable()
        and c not in _INVISIBLE
        and not unicodedata.category(c).startswith("M")
        and unicodedata.bidirectional(c) not in _RIGHT_TO_LEFT
    )


def printable(text: str) -> str:
    """The text on one line of a terminal or a log: a stranger's names end up in errors, with whatever is in them."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if visible(c) else c.encode("unicode_escape").decode() for c in text)


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The known word that a misspelt one resembles most, or an empty text."""
    import difflib  # takes longer than all else of most processes that never get here

    return next(iter(difflib.get_close_matches(word, [*known], 1, cutoff)), "")


class IsolatorError(Exception):
    """A failure with a cause; ``what`` names the object, ``why`` the reason, ``remedy`` the next step."""

    code = "failed"
    exit_code = 1

    def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = printable(what), printable(why), printable(remedy)
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.what}: {self.why}" if self.why else self.what
        return f"{line}; {self.remedy}" if self.remedy else line

    def to_json(self) -> dict[str, Any]:
        """The error as it crosses a process border; ``from_json`` restores the same class."""
        return {"code": self.code, "what": self.what, "why": self.why, "remedy": self.remedy}

    @staticmethod
    def from_json(data: dict[str, Any]) -> IsolatorError:
        """Rebuild an error that another process raised; an unknown code becomes a plain failure."""
        cls = _BY_CODE.get(str(data.get("code")), IsolatorError)
        return cls(str(data.get("what", "failed")), str(data.get("why", "")), str(data.get("remedy", "")))


class UsageError(IsolatorError):
    """The request itself is wrong: a bad value, an unknown key, an impossible combination."""

    code, exit_code = "usage", 2


class NotFoundError(IsolatorError):
    """The named plugin, event or file does not exist."""

    code, exit_code = "not_found", 3


class DeniedError(IsolatorError):
    """Policy, role or ceiling forbids it."""

    code, exit_code = "denied", 4


class NotApprovedError(DeniedError):
    """Something else is there than what was approved: no further attempt helps before an operator has agreed."""


class NeedsApprovalError(IsolatorError):
    """An operator has to agree first."""

    code, exit_code = "needs_approval", 5


class ConfinementError(IsolatorError):
    """A cage could not be built or confirmed; nothing ran."""

    code, exit_code = "confinement", 125


class ExecError(ConfinementError):
    """A cage was built and confirmed, and its program could not be executed: a fault of the program's files."""


class UnavailableError(IsolatorError):
    """Another process of the daemon is away for the moment; trying again is right."""

    code, exit_code = "unavailable", 1


class translated:
    """Context in which an error of these types becomes one of ours; without ``why`` with its own reason.

    ``what``, ``why`` and ``remedy`` are those of IsolatorError. The reason of an OSError is the system's text.
    """

    def __init__(
        self, raised: _Types, kind: type[IsolatorError], what: str, why: str = "", remedy: str = ""
    ) -> None:  # fmt: skip
        self._raised, self._kind, self._what, self._why, self._remedy = raised, kind, what, why, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, self._raised):
            why = self._why or getattr(error, "strerror", None) or str(error)
            raise self._kind(self._what, why, self._remedy) from None


_BY_CODE: dict[str, type[IsolatorError]] = {
    c.code: c
    for c in (
        IsolatorError,
        UsageError,
        NotFoundError,
        DeniedError,
        NeedsApprovalError,
        ConfinementError,
        UnavailableError,
    )
}
