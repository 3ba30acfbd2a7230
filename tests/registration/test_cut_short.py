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
from tests.system.daemon import write_plugin

NAME = "cut-short"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EFFECTS = frozenset(
    "os.rename os.remove os.mkdir os.rmdir os.symlink os.link os.chmod os.truncate subprocess.Popen".split()
)


class World:
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
        return self.registrar.stage(Source(path=str(folder)), update=update).staged.token

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


def added(world: World) -> None:
    world.wipe()
    world.registrar.add(world.token(world.one))
    (world.paths.state / NAME).mkdir()
    (world.paths.state / NAME / "image").write_text("precious")


def updated(world: World) -> None:
    added(world)
    update(world)


def held(world: World) -> None:
    added(world)
    world.registrar.hold(world.token(world.more, NAME))


def approved(world: World) -> None:
    held(world)
    approve(world)


def add(world: World) -> None:
    world.registrar.add(world.token(world.one))


def hold(world: World) -> None:
    world.registrar.hold(world.token(world.more, NAME))


def update(world: World) -> None:
    now = world.now()
    release, source = world.registrar.accept(world.token(world.two, NAME))
    world.registrar.prune(world.registrar.use(now, release, source=source))


def approve(world: World) -> None:
    now = world.now()
    assert now.pending is not None
    text = world.registrar.proposed_policy(now)
    assert text is not None and "api.example.com" in text
    world.registrar.use(now, now.pending, policy_text=text)


def roll_back(world: World) -> None:
    world.registrar.roll_back(world.now())


def put_back(world: World) -> None:
    """The approved version did not come up: the one before, with its policy."""
    now = world.now()
    before = replace(now, release=now.previous[0], previous=(), pending=now.release)
    text = world.registrar.policy_text(NAME)
    assert text is not None and "api.example.com" in text
    world.registrar.prune(world.registrar.put_back(before, now, text.replace('["api.example.com:443"]', "[]")))


def remove(world: World) -> None:
    world.registrar.remove(world.now(), world.forget_state)


CHANGES: dict[str, tuple[Callable[[World], None], Callable[[World], None]]] = {
    "add": (World.wipe, add),
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
def test_either_the_old_state_or_the_new_one(kind: str, shared_dir: Path) -> None:
    world = World(shared_dir)
    prepare, change = CHANGES[kind]
    try:
        prepare(world)
        world.start()
        old = world.snapshot()
        change(world)
        world.start()
        new = world.snapshot()
        assert old != new
        prepare(world)
        outcomes = []
        for step in range(1, 500):
            killed = _killed_before(step, lambda: change(world))
            world.start()
            found = world.snapshot()
            assert found in (old, new), f"killed before step {step} of {kind}: neither the old state nor the new"
            assert not list(world.paths.plugins.glob("*/plugin.intent"))
            outcomes.append(found == new)
            if not killed:
                break
            if found == new:
                prepare(world)
        assert len(outcomes) >= 5 and outcomes[-1], "the change never completed"
        assert outcomes == sorted(outcomes), "old states after new ones: there is more than one decisive step"
        world.start()
        assert world.snapshot() in (old, new), "recovering twice is not the same as once"
    finally:
        world.start()
        world.wipe()


def test_a_failed_addition_leaves_nothing(shared_dir: Path) -> None:
    world = World(shared_dir)
    before = world.snapshot()
    token = world.token(world.one)
    world.registrar._host = HostConfig(uid_range=(70000, 70000))
    taken = "isolator-test-taken"
    os.system(f"useradd --system --no-create-home --uid 70000 {taken} 2>/dev/null")
    try:
        with pytest.raises(Exception, match="no free uid"):
            world.registrar.add(token)
    finally:
        os.system(f"userdel {taken} 2>/dev/null")
    assert world.snapshot() == before
