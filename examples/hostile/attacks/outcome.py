"""What an attack reports, and the little that all attacks need."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Known = Mapping[str, Any]
T = TypeVar("T")

SECONDS = 8.0
"""No attack goes on longer than this."""

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Outcome:
    """``succeeded`` is true only if the attacker holds what it came for; ``detail`` names the errno."""

    succeeded: bool
    detail: str
    how_far: str = ""

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["detail"] = fields["detail"][:1200]
        return fields


def said(error: BaseException) -> str:
    """What stopped it, errno first: ``EPERM (Operation not permitted)``."""
    if isinstance(error, socket.gaierror):
        names = {getattr(socket, name): name for name in dir(socket) if name.startswith("EAI_")}
        return f"{names.get(error.errno or 0, error.errno)} ({error.strerror})"
    if isinstance(error, TimeoutError) and error.errno is None:
        return "no answer in time"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{errno.errorcode.get(error.errno, error.errno)} ({os.strerror(error.errno)})"
    return f"{type(error).__name__}: {error}"


def checked(result: int) -> int:
    """The result of a libc call, or its errno as OSError."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def each(targets: Iterable[T], attack: Callable[[T], str], name: Callable[[T], str] = str) -> Outcome:
    """Try every target; one success is a success. Details are grouped by what was said."""
    outcomes: dict[str, list[str]] = {}
    succeeded = False
    for target in targets:
        try:
            text = attack(target)
            succeeded = True
        except Exception as error:  # any refusal is a finding, not a failure of the plugin
            text = said(error)
        outcomes.setdefault(text, []).append(name(target))
    detail = "; ".join(f"{text}: {', '.join(names)}" for text, names in outcomes.items())
    tried = sum(map(len, outcomes.values()))
    return Outcome(succeeded, detail or "nothing to try", f"{tried} tried")


def deadline() -> Callable[[], float]:
    """Seconds left, from now; never negative."""
    end = time.monotonic() + SECONDS
    return lambda: max(0.0, end - time.monotonic())


def in_child(attack: Callable[[], str]) -> str:
    """Run ``attack`` in a forked child, because it changes the process for good; its text or its OSError."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            report: dict[str, Any] = {"text": attack()}
        except OSError as error:
            report = {"errno": error.errno or 0}
        except BaseException as error:  # the child must never return into the parent's code
            report = {"text": None, "other": said(error)}
        os.write(writer, json.dumps(report).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        number = os.waitstatus_to_exitcode(status)
        raise RuntimeError(f"killed by {signal.Signals(-number).name}" if number < 0 else f"exit {number}")
    report = json.loads(answer)
    if "errno" in report:
        raise OSError(report["errno"], os.strerror(report["errno"]))
    if report["text"] is None:
        raise RuntimeError(report["other"])
    return str(report["text"])
