"""Users of the servers, one for each host: the servers' part (``users.conf``), and each host's own file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from host.cluster.access import permissions
from isolator.errors import IsolatorError, UsageError

CONF = "users.conf"
_NOTICE = """\
# A machine that is gone without a word is noticed within seconds, not minutes: until then
# the other servers pass on to it half of what hosts read, and nobody answers.
ping_interval: "1s"
ping_max: 2
"""
_LIST = re.compile(r"\busers\s*[:=]?\s*\[")


def write(folder: Path, hosts: Sequence[str]) -> list[Path]:
    """Write ``users.conf`` for these hosts and an administrator, and each one's file; no file is replaced.

    Raises UsageError, IsolatorError.
    """
    passwords = {name: secrets.token_urlsafe(32) for name in (*hosts, "admin")}
    entries = [_entry(name, passwords[name]) for name in hosts]
    entries.append({"user": "admin", "password": passwords["admin"]})
    # JSON is read by the servers as what their own notation says.
    conf = f"{_NOTICE}authorization {{ users: {json.dumps(entries, indent=1)} }}\n"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _failed(folder, error) from None
    return _write_new(folder, {CONF: conf, **_secrets(passwords)}, "to add a host to these, say --add")


def add(folder: Path, hosts: Sequence[str]) -> list[Path]:
    """Put users of further hosts into a ``users.conf`` that is there, and write each one's file.

    The users in it stay as they are, and so do its owner, group and mode. Raises UsageError, IsolatorError.
    """
    path = folder / CONF
    try:
        text, before = path.read_text(), path.stat()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        remedy = "--dir has the users.conf that the servers use"
        raise IsolatorError(str(path), f"cannot be read: {why}", remedy) from None
    lists = [*_LIST.finditer(text)]
    if len(lists) != 1:
        raise UsageError(str(path), "has no list of users, or several", "take the one of 'isolator cluster users'")
    for name in hosts:
        if re.search(rf"""\buser["']?\s*[:=]?\s*["']?{re.escape(name)}["']?\s*[,;}}\n]""", text):
            raise UsageError(str(path), f"has a user {name} already", "take another name, or the file that it has")
    passwords = {name: secrets.token_urlsafe(32) for name in hosts}
    new = "".join(f"\n{json.dumps(_entry(name, passwords[name]))}," for name in hosts)
    at = lists[0].end()
    made = _write_new(folder, _secrets(passwords), "remove it, if no host uses it")
    draft = path.with_name(f".{CONF}.new")
    try:
        draft.unlink(missing_ok=True)
        _write_new(folder, {draft.name: text[:at] + new + text[at:]}, "try again")
        os.chown(draft, before.st_uid, before.st_gid)  # the servers' user may read it by its group
        draft.chmod(before.st_mode & 0o777)
        draft.replace(path)
    except BaseException as error:
        for file in (*made, draft):
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _failed(path, error) from None
        raise
    return [path, *made]


def _entry(name: str, password: str) -> dict[str, Any]:
    return {"user": name, "password": password, "permissions": permissions(name)}


def _secrets(passwords: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}.secret": f"{name}:{password}\n" for name, password in passwords.items()}


def _write_new(folder: Path, files: Mapping[str, str], remedy: str) -> list[Path]:
    """Write files that only their owner reads; none of them if one is there already, or cannot be written."""
    made: list[Path] = []
    for path in (folder / name for name in files):
        if path.exists():
            raise UsageError(str(path), "is there already, and no password is changed", remedy)
    try:
        for name, text in files.items():
            path = folder / name
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                made.append(path)
                file.write(text)
    except OSError as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise _failed(folder, error) from None
    return made


def _failed(path: Path, error: OSError) -> IsolatorError:
    return IsolatorError(str(path), f"cannot be written: {error.strerror}")
