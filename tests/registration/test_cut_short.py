"""A daemon that is killed at any step of a change finds, at its next start, either the old state or the new one.

The step is not chosen by hand: in a child process every call that is about to change a file, a folder or the user list
is counted (``sys.addaudithook``), and the child kills itself before the n-th, for every n until the change completes.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isolator.layers.user import user_name
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.registration.registrar import Registrar
from isolator.registration.staging import Source
from isolator.registration.store import Registration
from tests.support.offers import offered
from tests.system.daemon import write_plugin

NAME = "cut-short"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EFFECTS = frozenset(
    "os.rename os.remove os.mkdir os.rmdir os.symlink os.link os.chmod os.truncate subprocess.Popen".split()
)


class Site:
    """One root with one registrar, and the plugin's folders to register from."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths.of(root / "root")
        for folder in (self.paths.policies, self.paths.plugins, self.paths.state):
            folder.mkdir(parents=True)
        self.one = write_plugin(root / "one" / NAME, version="1.0.0", sandbox={"network": {"egress": []}})
        self.two = write_plugin(root / "two" / NAME, version="2.0.0", sandbox={"network": {"egress": []}})
        wide = {"network": {"egress": [{"host": "api.example.com"}]}}
        self.more = write_plugin(root / "more" / NAME, version="3.0.0", sandbox=wide)
        self.registrar = Registrar(self.paths, HostConfig())

    def start(self) -> Registrar:
        """As a daemon does when it starts."""
        self.registrar = Registrar(self.paths, HostConfig())
        self.registrar.recover(self.forget_state)
        return self.registrar

    def forget_state(self, name: str) -> None:
        shutil.rmtree(self.paths.state / name, ignore_errors=True)

    def token(self, folder: Path, update: str | None = None) -> str:
        return self.registrar.stage(Source(path=str(folder)), offered(folder), update=update).staged.token

    def now(self) -> Registration:
        return self.registrar.store.load(NAME)

    def wipe(self) -> None:
        if NAME in self.registrar.names():
            self.registrar.remove(self.now(), self.forget_state)

    def snapshot(self) -> dict[str, Any]:
        """Everything there is of the plugin, but for numbers that differ from one time to the next."""
        files = {
            str(path.relative_to(self.paths.root)): _content(path)
            for folder in (self.paths.plugins, self.paths.policies, self.paths.state)
            for path in sorted(folder.rglob("*"))
        }
        users = {entry.pw_name for entry in pwd.getpwall()}
        return {"files": files, "user": user_name(NAME, self.paths.instance) in users}


def _content(path: Path) -> Any:
    if not path.is_file():
        return "folder"
    if path.name == "plugin.state":
        state = json.loads(path.read_text())
        return state | {"uid": 0, "serial": 0}
    return path.read_bytes()


def added(site: Site) -> None:
    site.wipe()
    site.registrar.add(site.token(site.one))
    (site.paths.state / NAME).mkdir()
    (site.paths.state / NAME / "image").write_text("precious")


def updated(site: Site) -> None:
    added(site)
    update(site)


def held(site: Site) -> None:
    added(site)
    site.registrar.hold(site.token(site.more, NAME))


def approved(site: Site) -> None:
    held(site)
    approve(site)


def add(site: Site) -> None:
    site.registrar.add(site.token(site.one))


def hold(site: Site) -> None:
    site.registrar.hold(site.token(site.more, NAME))


def update(site: Site) -> None:
    now = site.now()
    release, source = site.registrar.accept(site.token(site.two, NAME))
    site.registrar.prune(site.registrar.use(now, release, source=source))


def approve(site: Site) -> None:
    now = site.now()
    assert now.pending is not None
    text = site.registrar.proposed_policy(now)
    assert text is not None and "api.example.com" in text
    site.registrar.use(now, now.pending, policy_text=text)


def roll_back(site: Site) -> None:
    site.registrar.roll_back(site.now(), site.now().previous[0])


def put_back(site: Site) -> None:
    """The approved version did not come up: the one before, with its policy."""
    now = site.now()
    before = replace(now, release=now.previous[0], previous=(), pending=now.release)
    text = site.registrar.policy_text(NAME)
    assert text is not None and "api.example.com" in text
    site.registrar.prune(site.registrar.put_back(before, now, text.replace('["api.example.com:443"]', "[]")))


def remove(site: Site) -> None:
    site.registrar.remove(site.now(), site.forget_state)


CHANGES: dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]] = {
    "add": (Site.wipe, add),
    "update": (added, update),
    "hold": (added, hold),
    "approve": (held, approve),
    "roll_back": (updated, roll_back),
    "put_back": (approved, put_back),
    "remove": (added, remove),
}


def _killed_before(step: int, change: Callable[[], None]) -> bool:
    """Do ``change`` in a child that is killed before its ``step``-th effect; False when it completed before that."""
    child = os.fork()
    if child == 0:
        left = step

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in EFFECTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            change()
            os._exit(0)
        except BaseException as error:  # whatever it is must not run on in the copy of the test process
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"step {step}: the change failed by itself"
    return code != 0


@pytest.mark.parametrize("kind", CHANGES)
def test_killed_change_leaves_the_old_state_or_the_new_one(kind: str, shared_dir: Path) -> None:
    site = Site(shared_dir)
    prepare, change = CHANGES[kind]
    try:
        prepare(site)
        site.start()
        old = site.snapshot()
        change(site)
        site.start()
        new = site.snapshot()
        assert old != new
        prepare(site)
        outcomes = []
        for step in range(1, 500):
            killed = _killed_before(step, lambda: change(site))
            site.start()
            found = site.snapshot()
            assert found in (old, new), f"killed before step {step} of {kind}: neither the old state nor the new"
            assert not list(site.paths.plugins.glob("*/plugin.intent"))
            outcomes.append(found == new)
            if not killed:
                break
            if found == new:
                prepare(site)
        assert len(outcomes) >= 5 and outcomes[-1], "the change never completed"
        assert outcomes == sorted(outcomes), "old states after new ones: there is more than one decisive step"
        site.start()
        assert site.snapshot() in (old, new), "recovering twice is not the same as once"
    finally:
        site.start()
        site.wipe()


def test_failed_addition_leaves_nothing(shared_dir: Path) -> None:
    site = Site(shared_dir)
    before = site.snapshot()
    token = site.token(site.one)
    site.registrar._host = HostConfig(uid_range=(70000, 70000))
    taken = "isolator-test-taken"
    os.system(f"useradd --system --no-create-home --uid 70000 {taken} 2>/dev/null")
    try:
        with pytest.raises(Exception, match="no free uid"):
            site.registrar.add(token)
    finally:
        os.system(f"userdel {taken} 2>/dev/null")
    assert site.snapshot() == before
