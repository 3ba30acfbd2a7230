"""Errors of the published client as this project's own, and back: by their code, with the same text."""

from __future__ import annotations

from types import TracebackType

from isolator.errors import IsolatorError
from isolator_client import errors as published


class _OurErrors:
    """A class, as a generator takes ten times as long, and each call goes through one."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, published.IsolatorError):
            data = {"code": error.code, "what": error.what, "why": error.why, "remedy": error.remedy}
            raise IsolatorError.from_json(data) from None


_OURS = _OurErrors()


def our_errors() -> _OurErrors:
    """Raise what the published client raises as an error of ``isolator.errors``."""
    return _OURS


def published_error(error: IsolatorError) -> published.IsolatorError:
    """The same error as the published client knows it."""
    return published.make(error.code, error.what, error.why, error.remedy)
