"""Put what was restored in the place of what is there, so that a kill at any instant leaves the one or the other.

Everything stands ready in ``.restore`` folders beside its places. Writing ``restore.intent`` is the decision: without
it they are only removed; with it every rename that is missing is made, by the command itself or by the next daemon's
start. The other content of the places is kept in ``replaced-TIME``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.layers.user import remove_user
from isolator.linux.durable import replace_file
from isolator.linux.files import read_plain, remove_tree
from isolator.paths import Paths
from isolator.registration.durable import sync_folder
from isolator.registration.store import readable

STAGED, REPLACED = ".restore", "replaced-"
_MOST = 1 << 20
USERS = "users"
"""Names of the system users that a restore makes, beside what it staged; written before the first is made."""


def staged_folders(paths: Paths) -> tuple[Path, Path, Path]:
    """Where things stand ready for the folder of settings, that of data, and that of logs."""
    return paths.etc / STAGED, paths.lib / STAGED, paths.log / STAGED


def _intent(paths: Paths) -> Path:
    return paths.lib / "restore.intent"


def _restored(paths: Paths) -> Path:
    return paths.lib / "restored"


def decide(paths: Paths, stamp: str, drop_users: list[str], note: dict[str, str]) -> None:
    """Make what stands ready the daemon's data, durably; ``note`` is for the trail."""
    content = {"stamp": stamp, "drop_users": drop_users, "note": note}
    replace_file(_intent(paths), json.dumps(content).encode(), temporary=_intent(paths).with_suffix(".new"))


def finish(paths: Paths) -> None:
    """Finish a restore that was decided, or remove what one that was not has left; no error when there is none."""
    intent = _intent(paths)
    try:
        content = json.loads(read_plain(intent, most=_MOST))
        stamp, drop_users, note = content["stamp"], content["drop_users"], content["note"]
    except FileNotFoundError:
        _discard(paths)
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IsolatorError(str(intent), f"cannot be read: {error}", "restore the backup again, or delete it") from None
    for staged in staged_folders(paths):
        if not staged.is_dir():
            continue
        before = staged.with_name(f"{REPLACED}{stamp}")
        for new in sorted(staged.iterdir()):
            if new.name == USERS:
                continue
            place = staged.parent / new.name
            if os.path.lexists(place):
                before.mkdir(mode=0o700, exist_ok=True)
                place.rename(before / new.name)
            new.rename(place)
        sync_folder(staged.parent)
    for user in drop_users:
        remove_user(user)
    for staged in staged_folders(paths):
        if staged.is_dir():
            remove_tree(staged)
    made, last = paths.host_database.exists(), any(paths.audit_log.glob("audit*.jsonl"))
    for marker, there in ((paths.database_begun, made), (paths.trail_begun, last)):
        if there:
            marker.touch()
    replace_file(_restored(paths), json.dumps(note).encode(), temporary=_restored(paths).with_suffix(".new"))
    intent.unlink()
    sync_folder(paths.lib)


def _discard(paths: Paths) -> None:
    """Remove what a restore that was killed before its decision has made."""
    users = paths.lib / STAGED / USERS
    if users.exists():
        in_use = {plugin.user for plugin in readable(paths.plugins)}
        for user in users.read_text().split():
            if user not in in_use:
                remove_user(user)
    for staged in staged_folders(paths):
        if staged.is_dir() and not staged.is_symlink():
            remove_tree(staged)


def restored(paths: Paths) -> dict[str, str] | None:
    """The note of the restore that this start is the first after, for the trail; None: there was none."""
    try:
        found = json.loads(read_plain(_restored(paths), most=_MOST))
    except (OSError, ValueError):
        return None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else None


def forget_restored(paths: Paths) -> None:
    """Forget the note: it is on record."""
    _restored(paths).unlink(missing_ok=True)
