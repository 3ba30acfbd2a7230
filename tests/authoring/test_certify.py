"""``isolator certify``: each fault of the protocol is found, a plugin without one is certified, and where it counts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.authoring.certify.certificate import write
from host.authoring.certify.certifier import Certifier, DeadEnd, Report
from host.authoring.certify.checks import CHECKS
from host.authoring.pack import pack_folder
from host.authoring.private_daemon import PrivateDaemon
from host.authoring.sign import _new_key, public_half, read_key
from host.authoring.trial import Plan
from isolator.errors import UsageError
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.trust import Trust
from isolator.registration.certificates import HERE, Certificate, certifier, keep
from isolator.registration.reading import ManifestReader, read_certificate
from isolator.registration.staging import Source, discard
from isolator.registration.staging import stage as staged
from tests.support.flask_libraries import bring_flask
from tests.support.new_plugins import KINDS, build, need, new_plugin
from tests.support.offers import offered
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, write_plugin

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty"
PLANTED = {
    ("oneshot", "answers twice"): "events",
    ("oneshot", "forgets the newline"): "events",
    ("oneshot", "answers without JSON"): "events",
    ("oneshot", "answers too much"): "events",
    ("oneshot", "answers another request"): "events",
    ("oneshot", "takes too long"): "events",
    ("oneshot", "answers every request as the first"): "id",
    ("oneshot", "reads once"): "bytes",
    ("oneshot", "will not wait"): "late",
    ("oneshot", "expects a request of each connection"): "empty",
    ("oneshot", "dies of what is no message"): "garbage",
    ("oneshot", "dies of a connection that ends"): "gone",
    ("oneshot", "dies of an event that it knows"): "twice",
    ("oneshot", "ignores SIGTERM"): "sigterm",
    ("oneshot", "leaves a lock"): "sigterm",
    ("oneshot", "leans on the disk"): "disk",
    ("oneshot", "leans on the host"): "down",
    ("stream", "answers twice"): "events",
    ("stream", "answers with another id"): "events",
    ("stream", "takes each piece for a message"): "bytes",
    ("stream", "takes one message of each piece"): "joined",
    ("stream", "takes one connection"): "half",
    ("stream", "answers notifications"): "note",
}
"""The check that has to find each planted fault, by mode and fault."""
EXAMPLES: dict[str, dict[str, str]] = {
    "exec-lint": {},
    "flask-notifier": {"signing_key": "whsec_c2VjcmV0"},
    "go-smoke-test": {},
    "mcp-github-like": {"api_token": "t", "repository": "o/r"},
    "node-webhook": {"webhook_url": "https://hooks.example.com/x"},
    "page-report": {},
    "python-stream-counter": {},
    "rust-deploy-stats": {},
    "sh-deploy-log": {},
    "slack-deploy-notifier": {"slack_webhook_url": "https://hooks.slack.com/x"},
}
"""The config that each example needs; but for ``hostile``, which is not made to hold."""
COMPILED = {"go-smoke-test": "go", "rust-deploy-stats": "rust"}
"""The language of those that are left out where its compiler is not there."""
ALWAYS = {("oneshot", "reads once")}


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[PrivateDaemon, DeadEnd]]:
    """A private daemon in which plugins are certified."""
    dead_end = DeadEnd()
    before, sys.argv = sys.argv, [shutil.which("isolator") or "isolator"]
    network = dead_end.network
    try:
        with PrivateDaemon("certify", None, options=["--certifying"], network=network) as made:
            yield made, dead_end
    finally:
        sys.argv = before
        dead_end.close()


def _faulty(folder: Path, mode: str, fault: str = "", **manifest: Any) -> Path:
    script = (FAULTY / f"{mode}.py").read_text()
    transport = {"transport": {"mode": mode}} if mode != "oneshot" else {}
    changes = {"args": [fault] if fault else [], "delivery": {"timeout": "3s"}, "permissions": ["kv"]}
    return write_plugin(folder, script, **{**changes, **transport, **manifest})


def _certified(stage: tuple[PrivateDaemon, DeadEnd], folder: Path, *checks: str, **config: str) -> Report:
    plan = Plan(str(folder), {}, config, None, {}, 900.0)
    try:
        return Certifier(stage[0], plan, stage[1], lambda _: None).certify(checks)
    finally:  # the next one's events are for that one alone: what is in flight elsewhere cannot be cancelled
        name = json.loads((folder / "plugin.json").read_text())["name"]
        subprocess.run(["isolator", "--root", stage[0].root, "plugin", "remove", name, "--yes"], check=True)


def _found(report: Report) -> dict[str, list[str]]:
    return {one.check.name: one.findings for one in report.results if one.findings}


def _name(mode: str, fault: str) -> str:
    return f"{mode}-{fault.lower().replace(' ', '-')}"


@pytest.mark.parametrize(
    ("mode", "fault"), [pytest.param(*one, marks=[] if one in ALWAYS else pytest.mark.wide) for one in PLANTED]
)
def test_planted_fault_is_found_by_its_check(
    stage: tuple[PrivateDaemon, DeadEnd], tmp_path: Path, mode: str, fault: str
) -> None:
    check = PLANTED[mode, fault]
    report = _certified(stage, _faulty(tmp_path / _name(mode, fault), mode, fault), check)
    assert list(_found(report)) == [check], _found(report)
    assert not report.ok and not report.whole


def test_every_check_has_a_planted_fault() -> None:
    assert {check.name for check in CHECKS} == set(PLANTED.values()) and len(PLANTED) >= 15


def test_plugin_without_a_fault_holds_against_a_few(stage: tuple[PrivateDaemon, DeadEnd], tmp_path: Path) -> None:
    report = _certified(stage, _faulty(tmp_path / "good", "oneshot"), "events", "bytes", "gone", "disk")
    assert report.ok and not report.whole, _found(report)


def test_plugin_without_events_is_told_to_name_one(stage: tuple[PrivateDaemon, DeadEnd], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plugin hookless: asks for no event"):
        _certified(stage, _faulty(tmp_path / "hookless", "oneshot", hooks=[]))


@pytest.mark.wide
@pytest.mark.parametrize("mode", ["stream", "oneshot"])
def test_plugin_without_a_fault_holds(stage: tuple[PrivateDaemon, DeadEnd], tmp_path: Path, mode: str) -> None:
    report = _certified(stage, _faulty(tmp_path / f"good-{mode}", mode))
    assert report.ok and report.whole, _found(report)
    assert [one.check.name for one in report.results] == [check.name for check in CHECKS if mode in check.modes]


# --- the certificate -------------------------------------------------------------------------------------------------


def _run(root: Path, *words: str, code: int = 0, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-n", "isolator", "--root", str(root), "certify", *words]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=cwd, timeout=seconds(240)
    )
    assert ran.returncode == code, (ran.stdout, ran.stderr)
    return ran


def _digest(folder: Path, tmp_path: Path) -> str:
    """The digest of a folder's content, as a host works it out."""
    base = tmp_path / "store"
    base.mkdir()
    found = staged(base, Source(path=str(folder)), ManifestReader(HostConfig().uid_range), offered(folder))
    discard(found)
    return found.digest


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """The key of a certifier, and that of an author."""
    made = {name: tmp_path / f"{name}.key" for name in ("lab", "author")}
    for path in made.values():
        _new_key(path)
    return made


@pytest.fixture
def demanding(keys: dict[str, Path]) -> Iterator[Daemon]:
    """A daemon whose policy for ``bell`` takes what is certified."""
    lab = public_half(read_key(keys["lab"]))
    with daemon(host_toml=f'[trust.certifiers]\nlab = "{lab}"\n', start=False) as made:
        policies = made.root / "etc/isolator/policies"
        policies.mkdir(parents=True)
        (policies / "bell.toml").write_text("[require]\ncertified = true\n[grant]\nhooks = ['*']\n")
        made.start()
        yield made


def test_policy_takes_what_a_certifier_signed_or_this_host_has_made_and_nothing_else(
    demanding: Daemon, tmp_path: Path, keys: dict[str, Path]
) -> None:
    folder = write_plugin(tmp_path / "bell", (FAULTY / "oneshot.py").read_text())
    refused = demanding.cli("plugin", "add", str(folder), "--yes", code=4)
    assert "is not certified" in refused.stderr and refused.stderr.count("\n") == 1
    digest = _digest(folder, tmp_path)
    certificate = tmp_path / "certificate.json"
    report = Report("bell", "1.0.0", "oneshot", digest, 10.0)
    for key, why in ((None, "it is not signed"), ("author", "no certifier of [trust]")):
        write(report, certificate, read_key(keys[key]) if key else None)
        ran = demanding.cli("certify", "--accept", str(certificate), code=4)
        assert why in ran.stderr and ran.stderr.count("\n") == 1
    write(report, certificate, read_key(keys["lab"]))
    assert demanding.json("certify", "--accept", str(certificate))["certifier"] == "lab"
    demanding.cli("plugin", "add", str(folder), "--yes")
    demanding.cli("event", "emit", "deploy.completed", event(1), "--wait")
    # Another content, and a certifier who is trusted no more.
    (folder / "more").touch()
    demanding.cli("plugin", "update", "bell", str(folder), "--yes", code=4)
    host_toml = demanding.root / "etc/isolator/host.toml"
    host_toml.write_text("")
    demanding.cli("reload")
    assert "is not certified" in demanding.json("plugin", "show", "bell")["error"]
    keep(Paths.of(demanding.root), Certificate("bell", "1.0.0", digest))
    demanding.cli("reload")
    assert not demanding.json("plugin", "show", "bell")["error"]


@pytest.mark.wide
def test_command_certifies_for_the_host_that_it_ran_on(tmp_path: Path) -> None:
    root, folder = tmp_path / "root", write_plugin(tmp_path / "bell", (FAULTY / "oneshot.py").read_text())
    (tmp_path / "prod.toml").write_text("[require]\ncertified = true\n[grant]\nhooks = ['deploy.completed']\n")
    ran = _run(root, str(folder), "--policy", "prod.toml", "--json", cwd=tmp_path)
    found = json.loads(ran.stdout)
    assert found["ok"] and found["certificate"] == "certificate.json"
    envelope = json.loads((tmp_path / "certificate.json").read_text())
    assert envelope["signatures"] == [] and envelope["report"]["digest"] == found["digest"]
    assert certifier(Paths.of(root), found["digest"], Trust()) == HERE
    packed = pack_folder(folder, tmp_path / "bell.isolator").path
    again = json.loads(_run(root, str(packed), "--json", "--check", "id", cwd=tmp_path).stdout)
    assert again["digest"] == found["digest"] and again["certificate"] is None


def test_certificate_is_not_written_into_the_folder_that_it_is_for(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "bell")
    ran = _run(tmp_path / "root", ".", code=2, cwd=folder)
    assert "inside the folder" in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[" * 5000, b"{}", b'{"payloadType":"x"}', b"\xff", b"x" * 300_000,
     b'{"payloadType":"application/vnd.isolator.certificate+json","payload":"e30=","signatures":[]}',
     b'{"payloadType":"application/vnd.isolator.certificate+json","payload":"!","signatures":[]}'],
)  # fmt: skip
def test_file_that_is_no_certificate_is_refused_in_one_line(text: bytes) -> None:
    with pytest.raises(UsageError, match="certificate") as caught:
        read_certificate(text, "certificate.json", HostConfig().uid_range)
    assert str(caught.value).isprintable() and "\n" not in str(caught.value)


def test_damaged_record_of_a_certificate_counts_for_nothing(tmp_path: Path) -> None:
    paths, digest = Paths.of(tmp_path), "0" * 64
    keep(paths, Certificate("bell", "1.0.0", digest))
    assert certifier(paths, digest, Trust()) == HERE
    path = paths.certificates / f"{digest}.json"
    for text in ("", "[]", "{}", path.read_text().replace(digest, "1" * 64), path.read_text().replace(": 1}", ": 2}")):
        path.write_text(text)
        assert certifier(paths, digest, Trust()) is None
    keep(paths, Certificate("bell", "1.0.0", digest))
    path.chmod(0o666)
    assert certifier(paths, digest, Trust()) is None
    assert certifier(paths, f"../certificates/{digest}", Trust()) is None


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.timeout(seconds(900))  # every connection to a network that is down takes seconds
@pytest.mark.parametrize("example", sorted(EXAMPLES))
def test_example_is_certified(stage: tuple[PrivateDaemon, DeadEnd], tmp_path: Path, example: str) -> None:
    folder = tmp_path / example
    shutil.copytree(ROOT / "examples" / example, folder)
    if example in COMPILED:
        need(COMPILED[example])
    if example == "flask-notifier":
        bring_flask(folder)
    build(folder)
    report = _certified(stage, folder, **EXAMPLES[example])
    assert report.ok and report.whole, _found(report)


@pytest.mark.wide
@pytest.mark.parametrize(("mode", "language"), KINDS)
def test_new_plugin_is_certified(
    stage: tuple[PrivateDaemon, DeadEnd], tmp_path: Path, mode: str, language: str
) -> None:  # fmt: skip
    folder = new_plugin(tmp_path / f"new-{mode}-{language}", mode, language)
    build(folder)
    report = _certified(stage, folder)
    assert report.ok and report.whole, _found(report)
