"""Removal of everything that one root holds: groups, mounts, users, files."""

from __future__ import annotations

import contextlib
import pwd
import shutil
from pathlib import Path

from isolator.paths import Paths

SERVICES = ("audit", "net", "host")


def purge_root(paths: Paths) -> list[Path]:
    """Remove every trace of a root's daemon; returns the folders. Raises IsolatorError while a daemon runs there."""
    from isolator.layers.user import remove_group, remove_user
    from isolator.recovery import daemon as recovery
    from isolator.recovery import standalone as abandoned
    from isolator.recovery.journal import Journal
    from isolator.registration.store import Store

    with contextlib.closing(Journal(paths.journal)) as journal:  # refused while a daemon runs here
        recovery.clear(paths, journal)
        abandoned.clear(paths)
        recovery.remove_subtree(paths)
    users = [paths.named(f"isolator-{name}") for name in (*SERVICES, "console")]
    if paths.plugins.exists():
        store = Store(paths.plugins)
        users += [store.load(name).user for name in store.names()]
    if paths.instance:  # one whose registration was not finished stands in no file
        users += [entry.pw_name for entry in pwd.getpwall() if entry.pw_name.endswith(f"-{paths.instance}")]
    for user in dict.fromkeys(users):
        remove_user(user)
    remove_group(paths.named("isolator"))
    removed = [folder for folder in (paths.lib, paths.log, paths.etc, paths.run) if folder.exists()]
    for folder in removed:
        shutil.rmtree(folder)
    return removed
