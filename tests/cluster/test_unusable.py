"""A daemon whose [cluster] is of no use when it starts: it is cut off, and runs nothing that may be another host's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

SETTINGS = """\
[cluster]
name = "h1"
servers = ["127.0.0.1:4222"]
credentials = "{root}/etc/isolator/cluster.secret"
ca = "{root}/etc/isolator/cluster-ca.pem"
"""


def _with_plugin(d: Daemon, folder: Path) -> None:
    """Have a daemon run a plugin that is eager, and stop it."""
    d.start()
    d.cli("plugin", "add", str(write_plugin(folder / "echo", activation={"start": "eager"})), "--yes")
    wait_for(lambda: _shown(d)["state"] == "running", what="eager")
    assert d.stop() == 0


def _shown(d: Daemon) -> dict[str, object]:
    shown: dict[str, object] = d.json("plugin", "show", "echo")
    return shown


def _settings(d: Daemon, *, secret: str, ca: str) -> None:
    etc = d.root / "etc/isolator"
    (etc / "host.toml").write_text(SETTINGS.format(root=d.root))
    (etc / "cluster.secret").write_text(secret)
    (etc / "cluster.secret").chmod(0o600)
    if ca:
        (etc / "cluster-ca.pem").write_text(ca)


@pytest.mark.parametrize(
    ("secret", "ca", "line"),
    [
        ("h1:guess\n", "", "cluster-ca.pem: cannot be used: No such file or directory"),
        ("h1:guess\n", "no certificate", "cluster-ca.pem: cannot be used: it holds no certificate"),
        ("admin:guess\n", "", "cluster.secret: is of the user 'admin', and this host is h1"),
        ("h1 guess\n", "", "cluster.secret: cannot be used"),
    ],
    ids=["no ca", "no certificate", "another's credentials", "no credentials"],
)
def test_host_whose_settings_are_of_no_use_runs_nothing_before_it_knows_whose_it_is(
    tmp_path: Path, secret: str, ca: str, line: str
) -> None:
    with daemon(host_toml="# none yet", start=False) as d:
        _with_plugin(d, tmp_path)
        starts = len(_started(d))
        _settings(d, secret=secret, ca=ca)
        d.start()
        found = wait_for(
            lambda: next((one for one in d.json("cluster", "status", code=1)["problems"]), None), what="a problem"
        )
        assert found["kind"] == "refused" and line in found["line"] and "isolator reload" in found["line"]
        assert any(line in alarm for alarm in d.json("status", code=None)["alarms"])
        d.cli("event", "emit", "deploy.completed", event(1))
        shown = _shown(d)
        assert (shown["state"], shown["lease"]) == ("stopped", "waits for its lease")
        assert len(_started(d)) == starts
        problems = [one["data"] for one in d.records() if one["type"] == "cluster.problem"]
        assert [(one["kind"], line in one["why"]) for one in problems] == [("refused", True)]

        d.cli("cluster", "leave", "--force")
        wait_for(lambda: _shown(d)["state"] == "running", what="its own once it has left")


def _started(d: Daemon) -> list[dict[str, object]]:
    return [one for one in d.records() if one["type"] == "plugin.started"]
