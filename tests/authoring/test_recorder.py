"""The recorder: answers of granted names recorded once and played from then on; hostile plugins gain nothing by it."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import textwrap
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from host.authoring.recorder.recorder import Recorder
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from tests.authoring.dev_process import DevProcess, answering
from tests.support.internet_servers import METADATA, OTHER, WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for, write_plugin

EGRESS = [
    {"host": name, "ports": [80, 443, 7]}
    for name in ("hooks.example.com", "private.example.com", "metadata.example.com", "loopback.example.com")
]
ALONE = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""In a namespace of which nothing leads out."""
HOST_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
HELPERS = """\
    import ssl, urllib.error, urllib.request
    def get(url, data=None, **more):
        request = urllib.request.Request(url, data, **more)
        try:
            return urllib.request.urlopen(request, timeout=10).read().decode()
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"
        except OSError as error:
            return f"{type(error).__name__} {error}"
"""


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        yield made


@pytest.fixture
def scene(pretend: PretendInternet, tmp_path: Path) -> Scene:
    return Scene(pretend, tmp_path)


class Scene:
    """A plugin that evaluates one expression for each event, and a host on the pretend internet."""

    def __init__(self, pretend: PretendInternet, folder: Path) -> None:
        self.pretend, self.folder = pretend, folder
        self.recording = folder / "answers.jsonl"
        etc = folder / "root/etc/isolator"
        etc.mkdir(parents=True)
        (etc / "host.toml").write_text(f'[network]\nresolvers = ["{WEB}"]\n')

    def dev(self, work: str, *words: str, online: bool = True, **manifest: Any) -> DevProcess:
        """``isolator dev`` with one event sent; offline it is in a namespace of which nothing leads out."""
        folder = self.write(work, **manifest)
        enter = ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self.pretend.host_fd}") if online else ALONE
        environment = {**os.environ, "SSL_CERT_FILE": str(self.pretend.directory / "ca.pem")}
        return DevProcess(
            folder, "--recording", str(self.recording), "--event", "deploy.completed", *words, enter=enter,
            before=("--root", str(self.folder / "root")), env=environment,
        )  # fmt: skip

    def write(self, work: str, **manifest: Any) -> Path:
        """The plugin's folder."""
        sandbox = {"network": {"egress": EGRESS}}
        folder = write_plugin(self.folder / "plugin", "", sandbox=sandbox, **manifest)
        text = textwrap.dedent(answering(work)).replace("server =", f"{textwrap.dedent(HELPERS)}\nserver =", 1)
        (folder / "main").write_text(text)
        return folder

    def message(self, dev: DevProcess) -> Any:
        """The value of the expression."""
        answer = dev.next("answer")
        assert answer["outcome"] == "ok", (answer, dev.seen)
        return json.loads(answer["reply"])["result"]["message"]


def notes(dev: DevProcess) -> str:
    return " / ".join(one["text"] for one in dev.seen if one["kind"] == "note")


BOTH = '[get("https://hooks.example.com/path?token=abc"), get("http://hooks.example.com/plain", b"body")]'


def test_answers_are_recorded_once_and_played_where_nothing_leads_out(scene: Scene) -> None:
    with scene.dev(BOTH) as dev:
        first = scene.message(dev)
        assert [text.split()[0] for text in first] == ["host=hooks.example.com", "501"], first
        dev.end()
        assert "throw-away authority that only this cage trusts" in notes(dev)
    lines = [json.loads(line) for line in scene.recording.read_text().splitlines()]
    assert [line["request"]["url"] for line in lines[1:]] == [
        "https://hooks.example.com/path?token=[redacted]", "http://hooks.example.com/plain",
    ]  # fmt: skip
    assert scene.recording.stat().st_uid == int(os.environ.get("SUDO_UID", "0"))
    with scene.dev(BOTH.replace("abc", "xyz"), online=False) as dev:
        assert scene.message(dev) == first
        before = scene.recording.read_bytes()
        dev.end()
    assert scene.recording.read_bytes() == before


@pytest.mark.wide
def test_request_without_an_answer_is_said_and_connects_nowhere(scene: Scene) -> None:
    scene.recording.write_text('{"isolator_recording": 1}\n')
    asked = len(scene.pretend.internet.dns.queries)
    with scene.dev('get("https://hooks.example.com/new")') as dev:
        assert scene.message(dev).startswith(
            "504 isolator: no answer is recorded for GET https://hooks.example.com/new"
        )
        dev.end()
        assert "no answer is recorded for GET https://hooks.example.com/new" in notes(dev)
    assert len(scene.pretend.internet.dns.queries) == asked
    assert scene.recording.read_text() == '{"isolator_recording": 1}\n'


@pytest.mark.parametrize(
    "client",
    [
        pytest.param("curl -sS https://hooks.example.com/x", marks=pytest.mark.wide),
        pytest.param(
            "node -e \"fetch('https://hooks.example.com/x').then(r => r.text()).then(console.log)\"",
            marks=pytest.mark.wide,
        ),
        pytest.param("openssl s_client -verify_return_error -brief -connect hooks.example.com:443 </dev/null",
                     marks=pytest.mark.wide),
    ],
)  # fmt: skip
def test_client_trusts_the_authority_without_being_changed(scene: Scene, client: str) -> None:
    if shutil.which(client.split(maxsplit=1)[0]) is None:
        pytest.skip(f"{client.split(maxsplit=1)[0]} is not installed")
    with scene.dev(f"__import__('os').popen({client!r} + ' 2>&1; echo =$?').read()") as dev:
        said = scene.message(dev)
        assert said.endswith("=0\n"), (said, notes(dev))


@pytest.mark.wide
def test_program_that_pins_its_certificates_is_told_so(scene: Scene) -> None:
    pinning = "curl -sS --capath /nowhere --cacert /plugin/own.pem https://hooks.example.com/ 2>&1"
    work = f"__import__('os').popen({pinning!r}).read()"
    (scene.folder / "plugin").mkdir()
    shutil.copy(scene.pretend.directory / "ca.pem", scene.folder / "plugin/own.pem")
    with scene.dev(work) as dev:
        assert "certificate" in scene.message(dev)
        dev.have("note", lambda note: "pins the certificates of this server" in note["text"])
    assert not scene.recording.exists()


HOSTILE = {
    "a private address behind a granted name": 'get("http://private.example.com/")',
    "the metadata service behind a granted name": 'get("http://metadata.example.com/")',
    "the recorder's host by a granted name": 'get("http://loopback.example.com/")',
    "a name that was not granted": 'get("http://other.example.com/")',
    "an address that was not granted": f'get("http://{OTHER}/")',
    "the metadata service": f'get("http://{METADATA}/")',
    "a name in Host that was not granted": 'get("http://hooks.example.com/", headers={"Host": "other.example.com"})',
}


def test_hostile_plugin_reaches_records_and_reads_no_more_than_without_the_recorder(scene: Scene) -> None:
    """Every attempt at once: what is not granted is not reached and not on record, and no key can be found."""
    keys = """__import__("subprocess").run(["grep", "-rlsI", "PRIVATE[ ]KEY", "/etc", "/plugin", "/run", "/tmp",
        "/state", "/dev/shm"], capture_output=True, text=True).stdout"""
    work = f"[{', '.join(HOSTILE.values())}, {keys}, sorted(__import__('os').environ)]"
    host = HOST_BUNDLE.read_bytes()
    with scene.dev(" ".join(work.split())) as dev:
        *reached, found, _ = scene.message(dev)
        for what, answer in zip(HOSTILE, reached, strict=True):
            assert not answer.startswith(("host=", "row")), (what, answer)
        assert found == ""
        root = Path(dev.have("ready")["root"])
        ours = (root / "certificates" / HOST_BUNDLE.name).read_bytes()
        # Nothing of the key is on the host's disk either, and only the private root has the certificate.
        grep = ["grep", "-rlI", "--exclude=seal.key", "PRIVATE[ ]KEY", str(root)]  # the trail's own
        assert subprocess.run(grep, capture_output=True, text=True, check=False).stdout == ""
        dev.end()
    assert not scene.recording.exists(), scene.recording.read_text()
    assert HOST_BUNDLE.read_bytes() == host and ours.startswith(host) and len(ours) > len(host)


@pytest.mark.wide
def test_trial_takes_pretend_answers_too(scene: Scene) -> None:
    scene.recording.write_text('{"isolator_recording": 1}\n' + json.dumps({
        "request": {"method": "GET", "url": "https://hooks.example.com/x", "body_sha256": ""},
        "response": {"status": 200, "headers": [], "body": "pretended"},
    }))  # fmt: skip
    folder = scene.write('get("https://hooks.example.com/x")')
    words = [*ALONE, "isolator", "plugin", "test", str(folder), "--recording", str(scene.recording), "--json"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    (answer,) = json.loads(ran.stdout)["events"]
    assert answer["outcome"] == "ok" and "pretended" in answer["reply"]
    assert "throw-away authority that only this cage trusts" in ran.stderr


@pytest.mark.wide
def test_killed_command_with_a_recorder_leaves_nothing_that_gc_does_not_remove(scene: Scene) -> None:
    with scene.dev('"here"') as dev:
        assert scene.message(dev) == "here"
        root = dev.have("ready")["root"]
        dev.process.kill()
        dev.process.wait()
    wait_for(lambda: not _processes(root), seconds(60), what=lambda: _processes(root))
    subprocess.run(["isolator", "gc"], check=True, capture_output=True)
    assert not Path(root).exists()
    wait_for(lambda: root not in _backing_files(), seconds(30), what=_backing_files)


def _processes(word: str) -> list[str]:
    """Command lines that name something."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if word in line]


def _backing_files() -> str:
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            found.append(file.read_text())
    return " ".join(found)


class Direct:
    """A recorder alone, and connections to it as a user of the host makes them."""

    def __init__(self, recorder: Recorder, network: Mapping[str, Any], reports: list[str]) -> None:
        host, port = network["proxy"].rsplit(":", 1)
        self.recorder, self.where = recorder, (host, int(port))
        self.reports = reports

    def connect(self, target: str) -> bytes:
        """The answer to CONNECT; empty where it was closed at once."""
        with socket.create_connection(self.where, seconds(10)) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
            answer = connection.recv(100)
            if not answer:
                return b""
            connection.sendall(b"GET / HTTP/1.1\r\nHost: any.example\r\n\r\n")
            return answer + connection.recv(1000)
        return b""


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Direct]:
    paths = Paths.of(tmp_path / "root")
    paths.root.mkdir()
    tmp_path.chmod(0o755)
    reports: list[str] = []
    recorder = Recorder(tmp_path / "answers.jsonl", reports.append)
    with recorder.running(paths, HostConfig().uid_range) as network:
        yield Direct(recorder, network, reports)


def test_user_of_the_host_neither_uses_nor_poisons_a_recorder(direct: Direct, tmp_path: Path) -> None:
    """Only the broker's user is served; for that one it connects to what the broker has checked, and checks no more."""

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from the host's own loopback")

        def log_message(self, format: str, *args: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        target = f"127.0.0.1:{server.server_port}"
        assert direct.connect(target) == b""  # before there is a broker
        direct.recorder._order({"peer": os.getuid() + 1})
        assert direct.connect(target) == b""
        direct.recorder._order({"peer": os.getuid()})
        assert direct.connect(target).startswith(b"HTTP/1.1 200 Connected")
        server.shutdown()


def test_what_was_exchanged_is_told_before_what_came_of_it(tmp_path: Path) -> None:
    told: list[str] = []
    go_on = threading.Event()

    def slow(exchange: Mapping[str, Any]) -> None:
        assert go_on.wait(seconds(30))
        told.append(exchange["url"])

    def settle() -> None:
        recorder.settle()
        told.append("settled")

    ours, theirs = socket.socketpair()
    with ours, theirs, theirs.makefile("rwb", buffering=0) as reports:
        recorder = Recorder(tmp_path / "answers.jsonl", told.append, slow)
        recorder._control = ours
        hearing = threading.Thread(target=recorder._hear)
        hearing.start()
        settling = threading.Thread(target=settle)
        settling.start()
        reports.write(b'{"exchange": {"url": "https://hooks.example.com/"}}\n')
        assert reports.readline() == b"{}\n"
        reports.write(b'{"heard": true}\n')
        go_on.set()
        settling.join()
        assert told == ["https://hooks.example.com/", "settled"]
        theirs.shutdown(socket.SHUT_WR)
        hearing.join()
        recorder.settle()  # of one that has ended, nothing comes


def test_key_of_the_authority_leaves_no_process(direct: Direct, tmp_path: Path) -> None:
    """No file, no descriptor that another process of its user could open, and no core of it."""
    (pid,) = _children("host.authoring.recorder.service")
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1" and int(status["CapEff"], 16) == 0 and status["Uid"].split()[0] != "0"
    uid = int(status["Uid"].split()[0])
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "cat", f"/proc/{pid}/maps"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and "Permission denied" in ran.stderr
    found = subprocess.run(
        ["grep", "-rlI", "PRIVATE[ ]KEY", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""


def test_recorder_that_has_ended_refuses_connections_and_its_author_is_told(direct: Direct) -> None:
    (pid,) = _children("host.authoring.recorder.service")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: any("has ended" in report for report in direct.reports), seconds(30))
    with pytest.raises(ConnectionRefusedError):
        direct.connect("127.0.0.1:1")


def _children(module: str) -> list[int]:
    found = []
    for entry in Path(f"/proc/{os.getpid()}/task").iterdir():
        for pid in (entry / "children").read_text().split():
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


@pytest.mark.wide
def test_answer_of_a_server_without_a_valid_certificate_is_refused_and_not_recorded(scene: Scene) -> None:
    scene.pretend.directory.joinpath("ca.pem").rename(scene.pretend.directory / "kept.pem")
    try:
        with scene.dev('get("https://hooks.example.com/")') as dev:
            assert not scene.message(dev).startswith("host=")
            dev.have("note", lambda note: "its certificate is not valid" in note["text"])
            dev.end()
    finally:
        scene.pretend.directory.joinpath("kept.pem").rename(scene.pretend.directory / "ca.pem")
    assert not scene.recording.exists()


def test_recorder_of_a_daemon_is_not_there_without_the_option(scene: Scene, tmp_path: Path) -> None:
    """No other command leads a cage to an authority of its own."""
    sources = Path(__file__).parents[2]
    users = subprocess.run(
        ["grep", "-rl", "authoring.recorder", "--include=*.py", "host", "isolator"], cwd=sources, capture_output=True,
        text=True, check=True,
    ).stdout.split()  # fmt: skip
    allowed = ("host/authoring/recorder/", "host/authoring/options.py", "host/authoring/private_daemon.py")
    assert not [name for name in users if not name.startswith(allowed)]
