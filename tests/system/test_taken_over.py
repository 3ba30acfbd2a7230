"""Each thing that docs/architecture.md says a taken-over process cannot make the supervisor do."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from isolator.errors import UsageError
from isolator_client import errors as published
from isolator_client import tickets
from tests.system.daemon import wait_for, write_plugin
from tests.system.taken_over import TakenOver, taken_over

OPERATOR, STRANGER = 64993, 64994
HOST_TOML = f"""
    plugin_dirs = ["{{found}}"]
    [roles]
    operator = [{OPERATOR}]
"""
QUIET = {"network": {"egress": []}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = Path("/run") / f"isolator-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[TakenOver]:
    (place / "found").mkdir()
    with taken_over(HOST_TOML.format(found=place / "found")) as d:
        d.cli("plugin", "add", str(write_plugin(place / "good", sandbox=QUIET)), "--yes")
        yield d


def code(answer: dict[str, Any]) -> str:
    return str(answer.get("error", {}).get("code", "none: it was done"))


def as_user(d: TakenOver, uid: int, *words: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from host.cli.main import main; sys.exit(main())"
    return subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", sys.executable, "-I", "-c", program,
         "--root", str(d.root), *words],
        capture_output=True, text=True, check=False, cwd="/", stdin=subprocess.DEVNULL,
    )  # fmt: skip


def ticket(d: TakenOver, verb: str = "", *, descriptors: tuple[int, ...] = (), **params: Any) -> str:
    """A ticket that an operator fetches for a verb, or to hand descriptors over."""
    about = tickets.purpose(verb, params) if verb else b""
    made = tickets._ask(str(d.root / "run/isolator" / tickets.SOCKET), descriptors, about)
    assert made is not None
    return made


def names(d: TakenOver) -> set[str]:
    return {plugin["name"] for plugin in d.json("plugin", "list")}


# --- the host process ----------------------------------------------------------------------------------------------


def test_host_cannot_have_root_open_a_file(running: TakenOver, place: Path) -> None:
    secret = write_plugin(place / "secret", sandbox=QUIET)
    for fields in (
        {"path": str(secret)},
        {"name": "secret", "binary": str(secret / "main"), "hooks": ["deploy.completed"]},
        {"name": "secret", "binary": "/usr/bin/true", "hooks": ["deploy.completed"], "files": str(secret)},
        {"path": str(place / "found")},
        {"path": f"{place}/found/../secret"},
        {"path": "/"},
        {"update": "good"},
    ):
        assert code(running.ask_as_host("plugin.stage", **fields)) == "usage", fields
    assert not list((running.root / "var/lib/isolator/plugins").glob(".staging-*"))


def test_host_cannot_make_or_repeat_a_ticket(running: TakenOver, place: Path) -> None:
    folder = os.open(write_plugin(place / "again", sandbox=QUIET), os.O_RDONLY)
    real = ticket(running, descriptors=(folder,))
    os.close(folder)
    assert code(running.order("host.service", connect=str(running.root / "run/isolator/ticket.sock"))) in (
        "PermissionError",
    )
    assert code(running.ask_as_host("plugin.stage", path="/x", ticket="0" * 32)) == "denied"
    staged = running.ask_as_host("plugin.stage", path=str(place / "again"), ticket=real)
    assert staged["name"] == "again"
    assert code(running.ask_as_host("plugin.stage", path=str(place / "again"), ticket=real)) == "denied"
    assert code(running.ask_as_host("plugin.commit", token=staged["token"], ticket=real)) == "denied"
    running.ask_as_host("plugin.discard", token=staged["token"])


def test_host_cannot_register_or_exchange_what_no_operator_agreed_to(running: TakenOver, place: Path) -> None:
    """An operator is shown a plugin and does not agree."""
    with Client(running.root) as client:
        staged = client.call("plugin.stage", path=str(write_plugin(place / "refused", sandbox=QUIET)))
        version = write_plugin(place / "good", version="2.0.0", sandbox=QUIET)
        newer = client.call("plugin.stage", path=str(version), update="good")
        for more in ({}, {"ticket": ticket(running, "plugin.commit", token=newer["token"])}):
            assert code(running.ask_as_host("plugin.commit", token=staged["token"], **more)) == "denied"
        for more in ({}, {"ticket": ticket(running, "plugin.update", token=newer["token"])}):
            fields = {"token": newer["token"], "approve": True, **more}
            assert code(running.ask_as_host("plugin.update", **fields)) == "denied"
        assert names(running) == {"good"}
        # Control: with the operator's word it is done.
        assert client.call("plugin.commit", token=staged["token"])["plugin"]["name"] == "refused"
    running.cli("plugin", "remove", "refused", "--yes")


def test_host_cannot_pass_a_found_folder_off_as_a_newer_version(running: TakenOver, place: Path) -> None:
    """Whoever may write to ``plugin_dirs`` gives a folder the name of a plugin that is registered."""
    body = write_plugin(place / "found/imposter", version="9.0.0", sandbox=QUIET) / "plugin.json"
    body.write_text(body.read_text().replace("imposter", "good"))
    wait_for(lambda: any(plugin.get("found") for plugin in running.json("plugin", "list")))
    for more in ({"update": "good"}, {}):
        assert code(running.ask_as_host("plugin.stage", path=str(body.parent), **more)) == "usage"
    subprocess.run(["rm", "-rf", str(body.parent)], check=True)
    wait_for(lambda: names(running) == {"good"})


def test_host_cannot_change_a_plugin_that_nobody_asked_to_change(running: TakenOver, place: Path) -> None:
    """One with an older version, one that is disabled, and one that waits for approval in a folder."""
    for version in ("1.0.0", "2.0.0"):
        words = ("add",) if version == "1.0.0" else ("update", "older")
        running.cli("plugin", *words, str(write_plugin(place / "older", version=version, sandbox=QUIET)), "--yes")
    running.cli("plugin", "add", str(write_plugin(place / "off", sandbox=QUIET)), "--yes")
    running.cli("plugin", "disable", "off")
    folder = write_plugin(place / "found/lies-there", sandbox=QUIET)
    wait_for(lambda: "lies-there" in names(running))
    staged = running.ask_as_host("plugin.stage", path=str(folder))
    tries: list[tuple[str, dict[str, Any]]] = [
        ("plugin.remove", {"name": "older"}),
        ("plugin.rollback", {"name": "older"}),
        ("plugin.reject", {"name": "older"}),
        ("plugin.approve", {"name": "older"}),
        ("plugin.enable", {"name": "off"}),
        ("plugin.commit", {"token": staged["token"]}),
    ]
    before = {plugin["name"]: (plugin["version"], plugin["state"]) for plugin in running.json("plugin", "list")}
    for op, fields in tries:
        for forged in ({}, {"ticket": ""}, {"ticket": "0" * 32}):
            assert code(running.ask_as_host(op, **fields, **forged)) == "denied", (op, forged)
    assert {plugin["name"]: (plugin["version"], plugin["state"]) for plugin in running.json("plugin", "list")} == before
    # Control: with the operator's word each of them is done, and on record as theirs.
    running.cli("plugin", "rollback", "older")
    running.cli("plugin", "enable", "off")
    running.cli("plugin", "approve", "lies-there", "--yes")
    for name in ("older", "off", "lies-there"):
        running.cli("plugin", "remove", name, "--yes")
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    who = [
        record["data"]["who"] for record in running.records() if record["plugin"] in before if "who" in record["data"]
    ]
    assert set(who) == {"uid:0"}


def test_host_cannot_use_a_ticket_for_anything_but_its_purpose(running: TakenOver, place: Path) -> None:
    for name in ("first", "second"):
        running.cli("plugin", "add", str(write_plugin(place / name, sandbox=QUIET)), "--yes")
    for op, fields in (
        ("plugin.remove", {"name": "second"}),
        ("plugin.rollback", {"name": "first"}),
        ("plugin.approve", {"name": "first"}),
        ("plugin.stage", {"path": str(place / "first")}),
    ):
        stolen = ticket(running, "plugin.remove", name="first")
        assert not code(running.ask_as_host(op, **fields, ticket=stolen)).startswith("none"), op
        assert code(running.ask_as_host("plugin.remove", name="first", ticket=stolen)) == "denied", "used up"
    seen = ticket(running, "plugin.approve", name="first", digest="of what was shown")
    assert code(running.ask_as_host("plugin.approve", name="first", ticket=seen)) == "denied"
    folder = os.open(place / "first", os.O_RDONLY)
    handed_over = ticket(running, descriptors=(folder,))
    os.close(folder)
    assert code(running.ask_as_host("plugin.remove", name="first", ticket=handed_over)) == "denied"
    assert names(running) == {"good", "first", "second"}
    # What is left to whoever steals one: to do what its caller wants.
    asked = ticket(running, "plugin.remove", name="first")
    assert code(running.ask_as_host("plugin.remove", name="first", ticket=asked)).startswith("none")
    running.cli("plugin", "remove", "second", "--yes")


def test_host_cannot_read_what_is_roots_or_another_service_of_its_own(running: TakenOver) -> None:
    root = running.root
    packages = [path for path in (root / "var/lib/isolator/plugins/good").rglob("plugin.json")]
    keys = list((root / "var/lib/isolator/audit").iterdir())
    assert packages and keys
    for path in (*packages, *keys, "/etc/shadow"):
        assert code(running.order("host.service", open=str(path))) == "PermissionError", path


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("run.connect", {"name": "good", "run": "../../../../run/docker.sock"}),
        ("run.connect", {"name": "../good", "run": "x"}),
        ("run.socket", {"name": "good", "run": "../../../../run/docker.sock"}),
        ("run.socket", {"name": "../good", "run": "x"}),
        ("run.ensure", {"name": "../../etc"}),
        ("plugin.remove", {"name": "../../../etc"}),
        ("plugin.approve", {"name": "good", "digest": "../../../etc"}),
        ("policy.explain", {"name": "../../../../etc/passwd"}),
        ("plugin.commit", {"token": "../../etc"}),
        ("cage.sockets", {"run": "x", "count": 1, "version": 4}),
        ("hello", {"root": "/", "config": {}}),
        ("source", {"name": "supervisor"}),
        ("plugin.enable", {"name": ["good"]}),
        ("plugin.enable", {"name": "good", "uid": 0}),
    ],
)  # fmt: skip
def test_host_cannot_name_what_is_not_its_own(running: TakenOver, op: str, fields: dict[str, Any]) -> None:
    before = sorted(str(path) for path in (running.root / "var/lib/isolator/plugins").rglob("*"))
    assert not code(running.ask_as_host(op, **fields)).startswith("none")
    assert sorted(str(path) for path in (running.root / "var/lib/isolator/plugins").rglob("*")) == before
    assert names(running) == {"good"}


def test_host_cannot_have_many_connections_to_what_is_not_its_own(running: TakenOver) -> None:
    runs = [{"name": "good", "run": "../../../../run/docker.sock"}, {"name": "../good", "run": "x"}]
    found, refused = running.ask_as_host("run.connect_many", runs=runs)["answers"]
    assert found is False and refused["code"] == "not_found"
    assert code(running.ask_as_host("run.connect_many", runs=runs * 33)) == "usage"


def test_host_cannot_hand_an_invocation_a_way_out_of_its_cage(running: TakenOver, place: Path) -> None:
    script = "#!/bin/sh\nls /proc/self/fd/0/ >&2\n"
    manifest = {"transport": {"mode": "exec"}, "sandbox": QUIET, "hooks": ["project.created"]}
    running.cli("plugin", "add", str(write_plugin(place / "invocation", script, **manifest)), "--yes")
    fields = {"name": "invocation", "run": "0123456789", "event": "e", "type": "t", "attempt": 1}
    refused = running.order("host.service", op="invocation.start", fields=fields, folder="/")
    assert "no sealed file" in str(refused), refused
    assert code(running.ask_as_host("invocation.start", **fields)) == "usage"
    for wrong in ({"run": "../../0"}, {"run": ""}, {"name": "good"}, {"name": "../good"}):
        answer = running.order("host.service", op="invocation.start", fields=fields | wrong, folder="/")
        assert not code(answer).startswith("none"), answer
    assert not [one for one in running.records() if one["type"] == "exec.started"]
    running.cli("plugin", "remove", "invocation", "--yes")


# --- the audit process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["plugin.remove", "plugin.stage", "run.stop", "cage.sockets", "hello", "ledger"])
def test_audit_process_cannot_ask_for_anything(running: TakenOver, op: str) -> None:
    answer = running.order("isolator.audit.service", op=op, fields={"name": "good"})
    assert not code(answer).startswith("none")
    assert names(running) == {"good"}


# --- operators -----------------------------------------------------------------------------------------------------


def test_operator_cannot_have_files_read_that_are_not_theirs(running: TakenOver, place: Path) -> None:
    """Neither behind a closed folder nor beside their own; with their own rights it is done, and on record as theirs.

    The copy can be read by the plugin's user and by nobody else.
    """
    closed = write_plugin(place / "closed/secret", sandbox=QUIET)
    closed.parent.chmod(0o700)
    refused = as_user(running, OPERATOR, "plugin", "add", str(closed), "--yes")
    assert (refused.returncode, "Permission denied" in refused.stderr) == (4, True), refused
    mine = write_plugin(place / "mine", sandbox=QUIET)
    (mine / "key").write_text("root's")
    (mine / "key").chmod(0o600)
    refused = as_user(running, OPERATOR, "plugin", "add", str(mine), "--yes")
    assert (refused.returncode, f"mine/key: uid {OPERATOR} may not read it" in refused.stderr) == (2, True), refused
    os.chown(mine / "key", OPERATOR, OPERATOR)
    done = as_user(running, OPERATOR, "plugin", "add", str(mine), "--yes")
    assert done.returncode == 0, done
    added = [r for r in running.records() if r["type"] == "plugin.added" and r["plugin"] == "mine"]
    assert [r["data"]["who"] for r in added] == [f"uid:{OPERATOR}"]
    copies = list((running.root / "var/lib/isolator/plugins/mine").glob("*/key"))
    assert len(copies) == 1
    user = subprocess.run(["id", "-g", user_of(running, "mine")], capture_output=True, text=True, check=True)
    for folder in (copies[0].parent, copies[0].parent.parent):
        info = folder.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, int(user.stdout), 0o750)
    reads = {uid: readable_by(uid, int(user.stdout), copies[0]) for uid in (STRANGER, uid_of(running, "mine"))}
    assert reads == {STRANGER: False, uid_of(running, "mine"): True}
    running.cli("plugin", "remove", "mine", "--yes")


def uid_of(d: TakenOver, name: str) -> int:
    return int(d.json("plugin", "show", name)["uid"])


def user_of(d: TakenOver, name: str) -> str:
    found = subprocess.run(["getent", "passwd", str(uid_of(d, name))], capture_output=True, text=True, check=True)
    return found.stdout.split(":")[0]


def readable_by(uid: int, gid: int, path: Path) -> bool:
    group = gid if uid != STRANGER else uid
    command = ["setpriv", f"--reuid={uid}", f"--regid={group}", "--clear-groups", "--", "cat", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_stranger_gets_no_ticket_and_no_plugin(running: TakenOver, place: Path) -> None:
    folder = write_plugin(place / "strange", sandbox=QUIET)
    refused = as_user(running, STRANGER, "plugin", "add", str(folder), "--yes")
    assert (refused.returncode, "has the role none" in refused.stderr) == (4, True), refused
    path = running.root / "run/isolator" / tickets.SOCKET
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
    as_stranger = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--"]
    command = [*as_stranger, sys.executable, "-I", "-c", program]
    assert "PermissionError" in subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_found_folder_is_read_with_the_rights_of_its_owner(running: TakenOver, place: Path) -> None:
    folder = write_plugin(place / "found/offered", sandbox=QUIET)
    (folder / "linked").write_text("root's")
    (folder / "linked").chmod(0o600)
    os.chown(folder, STRANGER, STRANGER)
    (folder / "plugin.json").write_text((folder / "plugin.json").read_text() + " ")
    wait_for(lambda: "offered" in names(running))
    with Client(running.root) as client:
        with pytest.raises(UsageError, match=f"offered/linked: uid {STRANGER} may not read it"):
            client.call("plugin.approve", name="offered")
        os.chown(folder / "linked", STRANGER, STRANGER)
        assert client.call("plugin.approve", name="offered")["plugin"]["name"] == "offered"
    added = [r for r in running.records() if r["type"] == "plugin.added" and r["plugin"] == "offered"]
    assert [r["data"]["who"] for r in added] == ["uid:0"]
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    running.cli("plugin", "remove", "offered", "--yes")


def test_request_of_an_older_client_is_refused_with_the_remedy(running: TakenOver, place: Path) -> None:
    folder = write_plugin(place / "older", sandbox=QUIET)
    with Client(running.root) as client, pytest.raises(published.UsageError, match="of this release"):
        client._client._ask("plugin.stage", {"path": str(folder)}, 60)
    with Client(running.root) as client:
        staged = client.call("plugin.stage", path=str(folder))
        with pytest.raises(published.DeniedError, match="nobody agrees"):
            client._client._ask("plugin.commit", {"token": staged["token"]}, 60)
    assert json.dumps(sorted(names(running))) == '["good"]'
