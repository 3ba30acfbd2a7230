"""Errors of the published client as this project's own, and back: by their code, with the same text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from isolator.errors import IsolatorError
from isolator_client import errors as published


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Raise what the published client raises as an error of ``isolator.errors``."""
    try:
        yield
    except published.IsolatorError as error:
        data = {"code": error.code, "what": error.what, "why": error.why, "remedy": error.remedy}
        raise IsolatorError.from_json(data) from None


def published_error(error: IsolatorError) -> published.IsolatorError:
    """The same error as the published client knows it."""
    return published.make(error.code, error.what, error.why, error.remedy)
