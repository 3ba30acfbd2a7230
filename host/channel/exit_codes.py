"""How a program that ran for one event has ended, and the outcome that this means."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from host.channel.reply import Outcome, interpret
from host.wire.strict_json import WireError, parse_object
from isolator.ipc.messages import InvocationEnded, Origin

OK, RETRY = os.EX_OK, os.EX_TEMPFAIL
PERMANENT = (os.EX_USAGE, os.EX_DATAERR, os.EX_CONFIG)
"""Exit codes (sysexits.h) after which a repetition would be in vain."""
RESULT = 64 * 1024
"""Bytes of a result; a longer last line is none."""


def outcome_of(ended: InvocationEnded, line: bytes, last_words: str = "") -> Outcome:
    """The outcome of an attempt, by how its invocation ended; ``line``: the last of its standard output."""
    result = _result(line)
    text, size = (line.decode("utf-8", "replace"), len(line)) if result is not None else ("", 0)
    sha256 = hashlib.sha256(line).hexdigest() if result is not None else None
    _, status, message, retry_after = interpret({"result": result})
    if ended.origin != Origin.PLUGIN or (ended.exit_code is None and ended.signal is None):
        return Outcome("unknown", None, ended.cause, text, size, sha256)
    if ended.cause not in ("exit", "signal"):
        return Outcome("failed", "ended", ended.cause, text, size, sha256)
    if ended.exit_code == OK:
        return Outcome("ok", status, message, text, size, sha256)
    how = f"signal {ended.signal}" if ended.signal is not None else f"exit code {ended.exit_code}"
    detail = f"{how}: {message or last_words}" if message or last_words else how
    if ended.exit_code == RETRY:
        return Outcome("retry", "retry", detail, text, size, sha256, retry_after)
    if ended.exit_code in PERMANENT:
        return Outcome("rejected", "rejected", detail, text, size, sha256)
    return Outcome("failed", "exit_code" if ended.signal is None else "signal", detail, text, size, sha256)


def _result(line: bytes) -> dict[str, Any] | None:
    """The result in the last line of an invocation's output, if it is one."""
    if not line.startswith(b"{") or len(line) > RESULT:
        return None
    try:
        return parse_object(line)
    except WireError:
        return None
