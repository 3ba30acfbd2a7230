# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""Tickets: proof for the daemon's root process of who asks for a change, and the files that it is about.

The control socket belongs to a process without privilege, which root does not have to believe. So a request that adds
or changes a plugin goes along with a ticket, from a socket of root's own beside the control socket: the kernel tells
root who connects to it, and the files of a plugin are handed over there as descriptors that this process has opened. No
file is read that the caller could not have read.

A ticket counts once, for a minute, only for the user who got it, and only for its purpose: files to be staged, or one
change of one plugin, of which a digest is sent as the ticket is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from isolator_client import address
from isolator_client.errors import UsageError
from isolator_client.protocol import TICKETED, error_of, request

SOCKET = "ticket.sock"
"""Name of the socket, in the folder of the control socket."""

PATIENCE = 30
"""Seconds for a place in the socket's backlog, and again for the answer."""

_MANIFEST = "plugin.json"
_PACKAGE = (257, b"ustar")
"""Place and value of bytes that every package has (a tar archive, POSIX ustar), and no program."""
_ANSWER = 1 << 16


def updated(method: str, params: Mapping[str, Any]) -> str | None:
    """Return the plugin whose present source has to be known for the ticket: a new version from where the last was."""
    if method == "plugin.stage" and not any(params.get(key) for key in ("ticket", "path", "binary")):
        name = params.get("update")
        return name if isinstance(name, str) else None
    return None


def handed(source: address.StrPath | int) -> tuple[dict[str, str], list[int]]:
    """Parameters of ``plugin.stage`` for a plugin's folder, package or binary, and its descriptor if it is open.

    A descriptor says what it is by the name that it was opened by, which is all that the daemon makes of a path.
    """
    if not isinstance(source, int):
        path = os.fspath(source)
        return {"path" if os.path.isdir(path) or _is_package(path) else "binary": path}, []
    try:
        folder, name = stat.S_ISDIR(os.fstat(source).st_mode), os.readlink(f"/proc/self/fd/{source}")
        return {"path" if folder or _is_package(source) else "binary": name}, [os.dup(source)]
    except OSError as error:
        raise UsageError(f"descriptor {source}", error.strerror or "is not open", "open a plugin's folder") from None


def _is_package(source: str | int) -> bool:
    """Whether a file, by its path or an open descriptor, is one that ``isolator pack`` has made."""
    place, mark = _PACKAGE
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        opened = os.dup(source) if isinstance(source, int) else os.open(source, flags)
    except (OSError, ValueError):
        return False  # whoever opens it in earnest says why
    try:
        return os.pread(opened, len(mark), place) == mark
    except OSError:
        return False  # a pipe, a folder
    finally:
        os.close(opened)


def with_ticket(
    control: str,
    method: str,
    params: Mapping[str, Any],
    shown: Mapping[str, Any] | None = None,
    opened: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the parameters of a ticketed verb with a ticket, and absolute paths. May wait.

    ``shown`` describes the plugin that ``updated`` named; ``opened`` are the descriptors that ``handed`` made for these
    parameters, which are closed. Raises UsageError for files that cannot be handed over. Without a ticket, for want of
    the role or from a daemon that has none, the daemon's own answer tells why.
    """
    made = dict(params)
    about, descriptors = b"", list(opened)
    if not opened:
        if made.get("ticket") or not _can_be_sent(method, params):
            return made
        if method == "plugin.stage":
            files, descriptors = _opened(made if shown is None else _source(shown))
            if shown is None:
                made |= files
        else:
            about = purpose(method, params)
    try:
        ticket = _ask(os.path.join(os.path.dirname(control), SOCKET), descriptors, about)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return made if ticket is None else made | {"ticket": ticket}


def purpose(method: str, params: Mapping[str, Any]) -> bytes:
    """Return the digest of what a change is about: the SHA-256 of its verb and its words, with NUL between them.

    A word is a parameter, "" when it is missing; ``approve`` is its own name when it is set.
    """
    words = [method]
    for key in TICKETED[method]:
        value = params.get(key)
        words.append(key if value is True else str(value or ""))
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).digest()


def _can_be_sent(method: str, params: Mapping[str, Any]) -> bool:
    try:
        return bool(request(0, method, params))
    except UsageError:
        return False


def _source(shown: Mapping[str, Any]) -> dict[str, Any]:
    source, files = str(shown.get("source") or ""), str(shown.get("source_files") or "")
    if shown.get("source_packaged") or (os.path.isdir(source) and not files):
        return {"path": source}
    return {"binary": source, "files": files}


def _opened(params: Mapping[str, Any]) -> tuple[dict[str, str], list[int]]:
    """Open what the parameters name; returns it with its real paths, and the descriptors, which are the caller's."""
    path, binary, files = (str(params.get(key) or "") for key in ("path", "binary", "files"))
    if path:
        path = os.path.abspath(path)
        return {"path": path}, [_open(path, os.O_NONBLOCK, "name a folder that has a plugin.json, or a package")]
    if not binary:
        return {}, []
    real = _resolve(binary)
    if not files:
        folder = os.path.dirname(real)
        if os.path.lexists(os.path.join(folder, _MANIFEST)):
            return {"binary": real}, [_open(folder, os.O_DIRECTORY, "check the path")]
        return {"binary": real}, [_open(real, os.O_NONBLOCK, "check the path")]
    beside = _resolve(files)
    descriptors = [_open(beside, os.O_DIRECTORY, "name a folder")]
    if not real.startswith(beside.rstrip("/") + "/"):
        try:
            descriptors.append(_open(real, os.O_NONBLOCK, "check the path"))
        except BaseException:
            os.close(descriptors[0])
            raise
    return {"binary": real, "files": beside}, descriptors


def _open(path: str, flags: int, remedy: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise UsageError(path, error.strerror or "cannot be opened", remedy) from None
    except ValueError:
        raise UsageError(ascii(path)[:80], "has characters that no path can have", "check the path") from None


def _resolve(path: str) -> str:
    try:
        return os.path.realpath(path, strict=True)
    except OSError as error:
        raise UsageError(path, error.strerror or "cannot be found", "check the path") from None
    except ValueError:
        raise UsageError(ascii(path)[:80], "has characters that no path can have", "check the path") from None


def _ask(path: str, descriptors: Sequence[int], about: bytes = b"") -> str | None:
    """Get a ticket; None where there are none for this user. Raises the error that the daemon answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        # The kernel's own limits: with one of Python's, connecting to a full backlog would fail at once.
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", PATIENCE, 0))
        try:
            with address.short_name(path) as name:
                sock.connect(name)
        except (PermissionError, FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise address.refusal(error, path) from None
        answer = b""
        with contextlib.suppress(OSError):  # a daemon that refuses has said why before it closed
            if descriptors:
                socket.send_fds(sock, [b"\0"], descriptors)
            elif about:
                sock.sendall(about)
        with contextlib.suppress(OSError):
            while len(answer) < _ANSWER and (data := sock.recv(_ANSWER)):
                answer += data
    try:
        made = json.loads(answer)
        if "error" in made:
            raise error_of({"data": made["error"]})
        return str(made["ticket"])
    except (ValueError, KeyError, TypeError):
        return None
