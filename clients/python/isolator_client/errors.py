# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""Exceptions of this package: one class for each error code that the daemon sends.

Every error of a call is an ``IsolatorError``, and ``code`` tells the kinds apart across languages and releases. A code
that this release does not know becomes a plain ``IsolatorError`` which keeps that code.
"""

from __future__ import annotations


class IsolatorError(Exception):
    """A call that failed: ``what`` names the object, ``why`` the cause, ``remedy`` the next step; both may be empty."""

    code = "failed"

    def __init__(self, what: str, why: str = "", remedy: str = "", *, code: str | None = None) -> None:
        super().__init__(what, why, remedy)
        self.what = what
        self.why = why
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        cause = ": ".join(part for part in (self.what, self.why) if part)
        return "; ".join(part for part in (cause, self.remedy) if part)


class UsageError(IsolatorError):
    """A request that can never succeed as it is: repeating it is useless."""

    code = "usage"


class NotFoundError(IsolatorError):
    """A plugin, an event or a file that does not exist."""

    code = "not_found"


class DeniedError(IsolatorError):
    """A role, a policy or a file's permissions that forbid the request to this user."""

    code = "denied"


class NeedsApprovalError(IsolatorError):
    """A change that waits for an operator's consent."""

    code = "needs_approval"


class ConfinementError(IsolatorError):
    """A cage that could not be built; nothing was run."""

    code = "confinement"


class UnavailableError(IsolatorError):
    """A daemon, or a part of it, that is away, full or silent: repeat the request later.

    Nobody knows whether a request that was under way was carried out.
    """

    code = "unavailable"


CLASSES: dict[str, type[IsolatorError]] = {
    kind.code: kind
    for kind in (
        IsolatorError,
        UsageError,
        NotFoundError,
        DeniedError,
        NeedsApprovalError,
        ConfinementError,
        UnavailableError,
    )
}
"""Class by error code."""


def make(code: str, what: str, why: str = "", remedy: str = "") -> IsolatorError:
    """Build the error of a code, whether this release knows it or not."""
    return CLASSES.get(code, IsolatorError)(what, why, remedy, code=code)
