"""Files that a plugin gets from outside: those of its config, and those that its policy shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.authoring.pack import pack_folder
from tests.support.sidecars import oneshot
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

OPERATOR = 61997
"""Nobody's uid on the host."""


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(host_toml=f'[audit]\nsnapshot_interval = "1s"\n[roles]\noperator = [{OPERATOR}]\n') as d:
        yield d


def reply(d: Daemon, number: str) -> dict[str, object]:
    emitted = d.json("event", "emit", "deploy.completed", event(number), "--wait")
    (found,) = [r for r in d.records() if r["type"] == "event.response" and r["event_id"] == emitted["id"]]
    return dict(json.loads(found["data"]["response"])["result"])


BUNDLES = oneshot("""
import hashlib
files = [os.environ["FIRST"], os.environ["SECOND"]]
return {"status": "ok", "sha256": [hashlib.sha256(open(file, "rb").read()).hexdigest() for file in files]}
""")


def test_bundles_of_certificates_fit_into_the_config(running: Daemon, tmp_path: Path) -> None:
    """More than a message between the daemon's processes holds."""
    import hashlib

    schema = {"first": {"type": "file", "required": True}, "second": {"type": "file", "required": True}}
    folder = write_plugin(tmp_path / "bundles", BUNDLES, config_schema=schema)
    digests = []
    for name in schema:
        text = f"# {name}\n" + "MIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBaMQswCQYDVQQGEwJJRTESMBAGA1UE\n" * 3000
        (tmp_path / name).write_text(text)
        digests.append(hashlib.sha256(text.encode()).hexdigest())
    values = [word for name in schema for word in ("--config", f"{name}=@{tmp_path / name}")]
    running.cli("plugin", "add", str(folder), "--yes", *values)
    assert reply(running, "bundles")["sha256"] == digests
    assert "[231009 bytes]" in running.cli("plugin", "config", "bundles").stdout
    running.cli("plugin", "remove", "bundles", "--yes")


def test_plugin_whose_config_lacks_a_value_waits_for_it_and_is_not_started(running: Daemon, tmp_path: Path) -> None:
    schema = {"token": {"type": "string", "required": True, "secret": True}}
    running.cli("plugin", "add", str(write_plugin(tmp_path / "unset", config_schema=schema)), "--yes")
    emitted = running.json("event", "emit", "deploy.completed", event("unset"))["id"]
    shown = wait_for(lambda: (one := running.json("plugin", "show", "unset"))["holding"] and one)
    assert "token is required and not set; isolator plugin config unset set token=@FILE" in shown["holding"]
    assert (shown["state"], shown["error"] or None, shown["restarts"]) == ("stopped", None, 0)
    assert "token is required and not set" in running.cli("plugin", "start", "unset", code=2).stderr
    running.cli("plugin", "config", "unset", "set", "token=s3cr3t-token")

    def states() -> list[str]:
        rows = running.json("event", "show", emitted)["deliveries"]
        return [str(one["state"]) for one in rows if one["plugin"] == "unset"]

    wait_for(lambda: states() == ["ok"])
    assert not [one for one in running.records() if one["type"] == "plugin.crashed" and one["plugin"] == "unset"]
    running.cli("plugin", "remove", "unset", "--yes")


SHOWN = oneshot('return {"status": "ok", "text": open(os.environ["SHOWN"]).read()}')


def test_plugin_whose_file_was_replaced_says_so_until_it_is_restarted(running: Daemon, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    shown = running.root / "certificate.pem"
    shown.write_text("old")
    folder = write_plugin(tmp_path / "shown", SHOWN, sandbox={"filesystem": {"read": [str(shown)]}})
    policy = running.root / "etc/isolator/policies/shown.toml"
    running.cli("plugin", "add", str(folder), "--yes")
    policy.write_text(policy.read_text().replace("read = []", f'read = ["{shown}"]') + f'\n[env]\nSHOWN = "{shown}"\n')
    wait_for(lambda: running.json("plugin", "show", "shown")["effective"]["filesystem"]["read"] == [str(shown)])
    assert reply(running, "before")["text"] == "old"

    renewed = running.root / "certificate.new"
    renewed.write_text("new")
    renewed.rename(shown)
    entry = wait_for(lambda: (e := running.json("plugin", "show", "shown"))["error"] and e)
    assert entry["error"] == f"{shown}: replaced on the host; it sees what was there until it is restarted"
    assert entry["state"] == "running"
    assert reply(running, "meanwhile")["text"] == "old"
    running.cli("plugin", "restart", "shown")
    assert not running.json("plugin", "show", "shown")["error"]
    assert reply(running, "after")["text"] == "new"


UPLOAD = """
import os, sys
from isolator_client import Client
root, place, name = sys.argv[1:]
uploaded = os.open(place, os.O_RDONLY)
with Client(root=root) as client:
    client.discard(client.stage(place))
    os.rename(place, place + ".away")
    staged = client.stage(uploaded)
    assert (staged.name, staged.registered) == (name, False), staged
    assert client.commit(staged)["name"] == name
"""


@pytest.mark.parametrize("kind", ["folder", "package"])
def test_operator_hands_an_upload_over_as_a_descriptor_whatever_its_name_is_by_then(running: Daemon, kind: str) -> None:
    """No path leads to it any more, and nobody but its owner may read it."""
    uploads = running.root / kind
    folder = write_plugin(uploads / f"a-{kind}")
    uploaded = folder if kind == "folder" else pack_folder(folder, uploads / "upload").path
    for path in (uploads, uploaded, *folder.iterdir()):
        os.chown(path, OPERATOR, OPERATOR)
    uploads.chmod(0o700)
    command = [sys.executable, "-I", "-c", UPLOAD, str(running.root), str(uploaded), f"a-{kind}"]
    done = subprocess.run(
        command, user=OPERATOR, group=OPERATOR, extra_groups=[], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    emitted = running.json("event", "emit", "deploy.completed", event(kind), "--wait", code=None)
    assert [one["state"] for one in emitted["deliveries"] if one["plugin"] == f"a-{kind}"] == ["ok"]
