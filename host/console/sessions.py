"""Sessions of browsers: a token that works once, then a cookie.

A cookie belongs to a host name and not to a port, so that of ``127.0.0.1`` goes to every program that listens there, a
plugin with a forwarded port among them. Each session has a name below ``localhost`` of its own, which browsers resolve
to this machine; its cookie is worth nothing under another name.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import TypeVar

from isolator.ipc.body import Body

TOKEN_SECONDS = 300.0
SESSION_SECONDS = 12 * 3600.0
MOST = 16
"""Tokens of one user, and sessions; the oldest of the same user makes room."""
COOKIE = "isolator"


class Session(Body):
    """A browser that was let in."""

    uid: int
    """Whose rights it has."""
    host: str
    """The name under which it was let in, without the port."""
    until: float
    """Unix time of its end."""


@dataclass(frozen=True)
class _Token:
    """A token that opens a session once."""

    uid: int
    until: float


T = TypeVar("T", Session, _Token)


class Sessions:
    """The tokens and sessions of one console. Of each secret only the hash is kept."""

    def __init__(self) -> None:
        self._tokens: dict[str, _Token] = {}
        self._sessions: dict[str, Session] = {}

    def token(self, uid: int) -> str:
        """A token for this user that can be used once."""
        return _put(self._tokens, _Token(uid, time.time() + TOKEN_SECONDS))

    def enter(self, token: str, host: str) -> str | None:
        """Exchange a token for a cookie that is valid at ``host``; None when the token is not, or was used."""
        found = self._tokens.pop(_hash(token), None)
        if found is None or found.until < time.time():
            return None
        return _put(self._sessions, Session(uid=found.uid, host=host, until=time.time() + SESSION_SECONDS))

    def of(self, cookie: str, host: str) -> Session | None:
        """The session of a cookie that came with a request for ``host``."""
        found = self._sessions.get(_hash(cookie))
        return found if found is not None and found.host == host and found.until >= time.time() else None

    def end(self, cookie: str) -> None:
        self._sessions.pop(_hash(cookie), None)

    def pass_on(self) -> dict[str, Session]:
        """The sessions, for a process that takes this one's place."""
        return dict(self._sessions)

    def take_over(self, sessions: dict[str, Session]) -> None:
        """Go on with the sessions of another process."""
        self._sessions.update(sessions)


def new_host(port: int) -> str:
    """A name of this machine that no other program's page has, with the port."""
    return f"i{secrets.token_hex(8)}.localhost:{port}"


def _put(kept: dict[str, T], value: T) -> str:
    for over in [secret for secret, one in kept.items() if one.until < time.time()]:
        del kept[over]
    own = [secret for secret, one in kept.items() if one.uid == value.uid]
    for oldest in own[: max(0, len(own) - MOST + 1)]:
        del kept[oldest]
    secret = secrets.token_urlsafe(32)
    kept[_hash(secret)] = value
    return secret


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
