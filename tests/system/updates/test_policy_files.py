"""Policy files that are edited, broken, opened to others or deleted while their plugins run."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.support.sidecars import oneshot
from tests.system.daemon import Daemon, daemon, event, wait_for
from tests.system.updates.plugins import add, make, of_type, shown


def test_policy_is_read_again_when_it_is_edited(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    good, before = policy.read_text(), shown(running, name)

    policy.write_text(good + "\n# a remark\n")
    policy.write_text(good.replace('memory = "256M"', 'memory = "128M"'))
    now = wait_for(lambda: (e := shown(running, name))["state"] == "running" and e["run"] != before["run"] and e)
    cage = Path(of_type(running, name, "plugin.started")[-1]["data"]["cgroup"])
    limits = [*cage.glob("memory.max"), *Path("/sys/fs/cgroup/memory").rglob(f"{cage.name}/memory.limit_in_bytes")]
    assert [int(path.read_text()) for path in limits] == [128 << 20]
    (record,) = of_type(running, name, "config.changed")
    assert record["data"]["old_policy_sha256"] == before["effective_digest"]
    assert record["data"]["policy_sha256"] == now["effective_digest"]

    # The same policy in other words: nothing happens. The next change, a mistake, comes after it in order.
    policy.write_text(policy.read_text() + "\n# a remark\n")
    policy.write_text(policy.read_text().replace("128M", "129 apples"))
    broken = wait_for(lambda: (e := shown(running, name))["error"] and e)
    assert f"{name}.toml:" in broken["error"] and "last good policy" in broken["error"]
    assert (broken["state"], broken["run"], broken["effective_digest"]) == (
        "running", now["run"], now["effective_digest"],
    )  # fmt: skip
    assert of_type(running, name, "plugin.rejected")[0]["data"]["what"] == "policy"
    running.cli("plugin", "restart", name)
    assert shown(running, name)["effective_digest"] == now["effective_digest"]
    assert "apples" in running.cli("plugin", "list").stdout
    assert f"failing:   {name}" in running.cli("status", code=1).stdout

    # A newer version is not taken under a policy that cannot be read.
    running.cli("plugin", "update", name, str(make(tmp_path / "second" / name, "1.1.0")), code=2)
    assert shown(running, name)["version"] == "1.0.0"

    policy.write_text(good)
    wait_for(lambda: not (e := shown(running, name))["error"] and e["effective_digest"] == before["effective_digest"])


FILLER = oneshot("""
fd = os.open("/state/full", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
try:
    while True:
        os.write(fd, bytes(16384))
        os.fsync(fd)
except OSError as error:
    reason = error.errno
stored = os.fstat(fd).st_size
os.close(fd)
return {"status": "ok", "stored": stored, "errno": reason}
""")


def test_the_state_folder_follows_the_policy(running: Daemon, tmp_path: Path, name: str) -> None:
    """What is granted is what the plugin can store, after a change too; and it is never made to fit by force."""

    def stored() -> int:
        emitted = running.json("event", "emit", "deploy.completed", event(f"fill-{time.monotonic_ns()}"), "--wait")
        (reply,) = [
            json.loads(r["data"]["response"])["result"]
            for r in running.records()
            if r["type"] == "event.response" and r["plugin"] == name and r["event_id"] == emitted["id"]
        ]
        assert reply["errno"] == 28, reply
        return int(reply["stored"])

    def restarted_after(change: str, to: str) -> None:
        digest = shown(running, name)["effective_digest"]
        policy.write_text(policy.read_text().replace(change, to))
        wait_for(lambda: shown(running, name)["effective_digest"] != digest)

    add(running, make(tmp_path / name, "1.0.0", FILLER, sandbox={"filesystem": {"state": "16M"}}))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    restarted_after('state = "16M"', 'state = "1M"')
    assert 0.9 * (1 << 20) < stored() <= 1 << 20
    restarted_after('state = "1M"', 'state = "4M"')
    assert 0.97 * (4 << 20) < stored() <= 4 << 20
    restarted_after('state = "4M"', 'state = "2M"')
    failing = wait_for(lambda: (e := shown(running, name))["error"] and e)
    assert "KiB are stored, 2048 KiB are granted now" in failing["error"]
    restarted_after('state = "2M"', 'state = "8M"')
    running.cli("plugin", "start", name)
    assert 0.97 * (8 << 20) < stored() <= 8 << 20


def test_a_policy_that_others_can_write_is_not_believed(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    policy.chmod(0o666)
    broken = wait_for(lambda: (e := shown(running, name))["error"] and e)
    assert "others can write it" in broken["error"] and broken["state"] == "running"
    policy.chmod(0o644)
    wait_for(lambda: not shown(running, name)["error"])


def test_a_policy_file_that_is_gone(tmp_path: Path) -> None:
    with daemon() as d:
        name = "orphan"
        add(d, make(tmp_path / name, "1.0.0"))
        policy = d.root / f"etc/isolator/policies/{name}.toml"
        policy.unlink()
        gone = wait_for(lambda: (e := shown(d, name))["error"] and e)
        assert gone["state"] == "running" and "the file is gone" in gone["error"]
        would = f"{name}.toml is not there; this is what 'isolator plugin approve {name}' would grant:"
        assert would in d.cli("plugin", "explain", name).stdout
        d.cli("plugin", "restart", name)
        d.stop()
        d.start()
        assert shown(d, name)["state"] == "rejected"
        assert "the file is gone" in d.cli("plugin", "start", name, code=4).stderr
        d.cli("plugin", "approve", name, "--yes")
        assert policy.exists()
        d.cli("plugin", "start", name)
        # A file of the operator's own does as well.
        policy.unlink()
        d.stop()
        d.start()
        policy.write_text('[grant]\nhooks = ["deploy.completed"]\n')
        wait_for(lambda: shown(d, name)["state"] == "stopped")
        d.cli("plugin", "start", name)


def test_host_toml_is_read_at_the_start_only(running: Daemon) -> None:
    (running.root / "etc/isolator/host.toml").write_text("nonsense\n")
    try:
        wait_for(lambda: "takes effect with 'isolator reload'" in running.log.read_text())
        running.cli("plugin", "list")
    finally:
        (running.root / "etc/isolator/host.toml").unlink()


SHOWS_ENVIRONMENT = oneshot("""
shown = {key: os.environ.get(key) for key in ("TZ", "NODE_EXTRA_CA_CERTS", "LANG", "PATH", "region", "REGION")}
return {"status": "ok", "env": shown}
""")


def test_policy_sets_variables_and_an_edit_of_them_restarts_the_plugin(
    running: Daemon, tmp_path: Path, name: str
) -> None:
    def environment(number: str) -> dict[str, str | None]:
        emitted = running.json("event", "emit", "deploy.completed", event(f"env-{number}"), "--wait")
        (reply,) = [
            json.loads(r["data"]["response"])["result"]["env"]
            for r in of_type(running, name, "event.response")
            if r["event_id"] == emitted["id"]
        ]
        return dict(reply)

    schema = {"region": {"type": "string", "default": "author's"}}
    add(running, make(tmp_path / name, "1.0.0", SHOWS_ENVIRONMENT, config_schema=schema))
    before = environment("before")
    assert (before["TZ"], before["LANG"], before["REGION"]) == ("UTC", "C.UTF-8", "author's")
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    digest = shown(running, name)["effective_digest"]
    policy.write_text(
        policy.read_text()
        + """
[env]
TZ = "Europe/Berlin"
NODE_EXTRA_CA_CERTS = "/etc/ssl/company.pem"
REGION = "operator's"
"""
    )
    wait_for(lambda: shown(running, name)["effective_digest"] != digest)
    assert environment("after") == before | {
        "TZ": "Europe/Berlin", "NODE_EXTRA_CA_CERTS": "/etc/ssl/company.pem", "REGION": "operator's",
    }  # fmt: skip
    assert "TZ=Europe/Berlin" in running.cli("plugin", "explain", name).stdout
    assert len(of_type(running, name, "config.changed")) == 1
