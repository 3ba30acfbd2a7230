"""The example platform as its own unprivileged user, the whole daemon, and plugins that ask the platform."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, wait_for, write_plugin

UID = 61999
ROLES = f"[roles]\nemitter = [{UID}]\n"
PLATFORM = Path(__file__).resolve().parents[2] / "examples/platform"
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Stream mode; asks the platform over the same connection on which the event came.
NAMER = """\
    #!/usr/bin/python3
    import asyncio, itertools, json, os

    async def connected(reader, writer):
        numbers, open_calls, tasks = itertools.count(1), {}, set()

        def send(**message):
            writer.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\\n")

        async def ask(method, **params):
            number = f"ask-{next(numbers)}"
            open_calls[number] = asyncio.get_running_loop().create_future()
            send(method=method, params=params, id=number)
            return await open_calls[number]

        async def answer(request):
            if request["method"] == "host.hello":
                result = {"protocol": "1", "handles": request["params"]["hooks"], "capabilities": []}
            elif not request["method"].startswith("deploy."):
                result = {"status": "ok"}
            else:
                params = request["params"]
                asked = await ask("projects.get", id=params["project_id"])
                if asked.get("error", {}).get("code") in (-32601, -31000):  # the platform is away
                    result = {"status": "retry", "retry_after_ms": 100}
                else:
                    result = {"status": "ok", "asked": asked}
            if "id" in request:
                send(id=request["id"], result=result)

        while line := await reader.readline():
            message = json.loads(line)
            if "method" in message:
                task = asyncio.create_task(answer(message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                open_calls.pop(message["id"]).set_result(message)
        writer.close()

    async def main():
        async with await asyncio.start_unix_server(connected, os.environ["PLUGIN_SOCKET"]) as server:
            await server.serve_forever()

    asyncio.run(main())
"""


class Platform:
    """One process of the example platform, as the user ``UID``; its data outlives it."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data, self.port = root, data, 0
        self.log = data.parent / f"{data.name}.log"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait for its ``ready``."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PLATFORM), "--data", str(self.data), "--port", "0", "--root", str(self.root)],
                stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, text=True, cwd="/",
                user=UID, group=UID, extra_groups=[],
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("platform: ready on http://127.0.0.1:"), (line, self.log.read_text())
        self.port = int(line.rpartition(":")[2])

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send the signal; the exit code and the rest of what it printed."""
        assert self.process is not None
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        code, self.process = self.process.returncode, None
        return code, rest

    def ask(self, path: str, body: Any = None, code: int = 200, **headers: str) -> Any:
        """One HTTP request that must be answered with ``code``; the answer."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with LOCAL.open(request, timeout=20) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.read()
        assert status == code, (path, status, text)
        return json.loads(text)

    def project(self, name: str = "shop") -> str:
        """A new project's id."""
        return str(self.ask("/projects", {"name": name}, 201)["id"])

    def deploy(self, project: str, **body: str) -> str:
        """A new deployment's id."""
        return str(self.ask(f"/projects/{project}/deployments", body, 202)["id"])

    def event_of(self, deployment: str, name: str) -> str:
        """The daemon's id of a deployment's event, once it has one."""

        def found() -> str | None:
            events = self.ask(f"/deployments/{deployment}")["events"]
            return next((e["event_id"] for e in events if e["name"] == name), None)

        return str(wait_for(found, what=self.log.read_text))


@pytest.fixture
def platform_in(shared_dir: Path) -> Iterator[Any]:
    """Makes a platform for a daemon's root; whatever happened, it does not outlive the test."""
    made: list[Platform] = []

    def make(root: Path) -> Platform:
        data = Path(tempfile.mkdtemp(prefix="platform-", dir=shared_dir))
        os.chown(data, UID, UID)
        made.append(Platform(root, data))
        made[-1].start()
        return made[-1]

    yield make
    for platform in made:
        if platform.process is not None:
            platform.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(host_toml=ROLES) as d:
        yield d


def _add(d: Daemon, folder: Path) -> None:
    # The plugin's folder is below a private directory of pytest's; the daemon copies it as root.
    d.cli("plugin", "add", str(folder), "--yes")


def _deliveries(d: Daemon, event_id: str) -> dict[str, Any]:
    def final() -> Any:
        rows = d.json("event", "show", event_id)["deliveries"]
        return rows and all(row["state"] in ("ok", "dead") for row in rows) and rows

    return {row["plugin"]: row for row in wait_for(final, seconds(60), d.log.read_text)}


def test_a_deployment_posted_over_http_reaches_plugins_that_ask_back(
    running: Daemon, tmp_path: Path, platform_in: Any
) -> None:
    d = running
    stream = {"transport": {"mode": "stream"}}
    _add(d, write_plugin(tmp_path / "echo"))
    _add(d, write_plugin(tmp_path / "namer", NAMER, permissions=["read:projects"], **stream))
    # The operator has written a policy for this one that leaves the permission out.
    policy = d.root / "etc/isolator/policies/nosy.toml"
    policy.write_text('[grant]\nhooks = ["deploy.*"]\negress = []\n')
    _add(d, write_plugin(tmp_path / "nosy", NAMER, permissions=["read:projects"], **stream))
    platform = platform_in(d.root)
    try:
        project = platform.project()
        deployment = platform.deploy(project, commit_sha="abc123")
        done = platform.event_of(deployment, "deploy.completed")
        rows = _deliveries(d, done)
        replies = {name: json.loads(row["reply"])["result"] for name, row in rows.items()}
        assert replies["echo"] == {"status": "ok", "echo": deployment}
        assert replies["namer"]["asked"]["result"]["name"] == "shop"
        denied = replies["nosy"]["asked"]["error"]
        assert (denied["code"], denied["data"]["permission"]) == (-31010, "read:projects")
        assert denied["data"]["grant"] == 'permissions = ["read:projects"]'
        assert "policies/nosy.toml" in denied["data"]["policy"]

        shown = platform.ask(f"/deployments/{deployment}")
        assert (shown["state"], [e["name"] for e in shown["events"]]) == (
            "ready",
            ["deploy.started", "deploy.completed"],
        )
        verdicts = {(r["plugin"], r["data"]["verdict"]) for r in d.records() if r["type"] == "api.called"}
        assert {("namer", "granted"), ("nosy", "denied")} <= verdicts, verdicts
        story = d.cli("audit", "story", done).stdout
        assert f"uid:{UID}" in story and "namer" in story, story
        # The line that the refusal named is the whole cure; the daemon watches the file.
        run = d.json("plugin", "show", "nosy")["run"]
        policy.write_text(policy.read_text() + denied["data"]["grant"] + "\n")
        wait_for(lambda: d.json("plugin", "show", "nosy")["run"] not in (run, None), seconds(60), d.log.read_text)
        again = platform.event_of(platform.deploy(project), "deploy.completed")
        reply = json.loads(_deliveries(d, again)["nosy"]["reply"])["result"]
        assert reply["asked"].get("result", {}).get("name") == "shop", reply
        d.cli("audit", "verify")
        assert platform.end() == (0, "platform: stopped\n")
    finally:
        for name in ("echo", "namer", "nosy"):
            d.cli("plugin", "remove", name, "--yes", code=None)


def test_all_six_events_are_accepted_by_the_daemon(running: Daemon, platform_in: Any) -> None:
    platform = platform_in(running.root)
    project = platform.project()
    platform.ask(f"/projects/{project}/domains", {"domain": "shop.example", "is_primary": True}, 201)
    platform.ask(f"/projects/{project}/errors", {"fingerprint": "f1", "title": "boom"}, 202)
    failed, ready = platform.deploy(project, branch="broken"), platform.deploy(project)
    platform.event_of(failed, "deploy.failed")
    platform.event_of(ready, "deploy.completed")
    assert platform.ask("/health") == {"waiting": 0, "refused": 0}
    newest = {(e["name"], e["subject"]) for e in running.json("event", "list", "--limit", "7")}
    assert newest == {
        ("project.created", project), ("domain.added", "shop.example"), ("error.detected", "f1"),
        ("deploy.started", project), ("deploy.failed", project), ("deploy.completed", project),
    }  # fmt: skip
    assert platform.ask(f"/deployments/{failed}")["error_code"] == "BUILD_FAILED"


def test_wrong_requests_get_one_clear_line(running: Daemon, platform_in: Any) -> None:
    platform = platform_in(running.root)
    project = platform.project()
    for path, body, code, word in (
        ("/projects", {}, 400, "name: is required"),
        ("/projects", {"name": 5}, 400, "name: must be a text"),
        ("/projects", {"name": "x", "colour": "red"}, 400, "has no field colour"),
        ("/projects", {"name": "shop"}, 409, "exists already"),
        ("/projects", b"{", 400, "is not JSON"),
        ("/projects", b"[" * 60000, 400, "is not JSON"),
        ("/projects", b"[]", 400, "must be an object"),
        ("/projects", b" " * 70000, 400, "up to 65536"),
        ("/projects/nobody/deployments", {}, 404, "project nobody: does not exist"),
        (f"/projects/{project}/domains", {"domain": "-.example"}, 400, "domain"),
        (f"/projects/{project}/errors", {"fingerprint": "f", "level": "loud"}, 400, "level"),
        ("/nothing", None, 404, "/nothing"),
        ("/deployments/x'--", None, 404, "does not exist"),
    ):
        assert word in platform.ask(path, body, code)["error"]
    assert "application/json" in platform.ask("/projects", {"name": "a"}, 400, Content_Type="text/plain")["error"]
    assert "localhost" in platform.ask("/projects", None, 400, Host="evil.example")["error"]
    assert len(platform.ask("/projects")["projects"]) == 1


def test_without_a_role_it_ends_with_the_line_to_add(running: Daemon, shared_dir: Path) -> None:
    data = shared_dir / "data"
    data.mkdir()
    os.chown(data, UID + 1, UID + 1)
    ended = subprocess.run(
        [sys.executable, str(PLATFORM), "--data", str(data), "--port", "0", "--root", str(running.root)],
        capture_output=True, text=True, check=False, timeout=30, cwd="/", user=UID + 1, group=UID + 1, extra_groups=[],
    )  # fmt: skip
    assert ended.returncode == 4, ended
    assert f"uid {UID + 1} has the role none" in ended.stderr and "[roles] emitter" in ended.stderr


def test_no_event_is_lost_whoever_is_killed(tmp_path: Path, platform_in: Any) -> None:
    slow = ECHO.replace("params = ", "time.sleep(0.02); params = ").replace("import json,", "import time, json,")
    wanted: list[str] = []
    with daemon(host_toml=ROLES) as d:
        _add(d, write_plugin(tmp_path / "echo", slow))
        _add(d, write_plugin(tmp_path / "namer", NAMER, permissions=["read:projects"], transport={"mode": "stream"}))
        platform = platform_in(d.root)
        project = platform.project()

        def post(count: int) -> None:
            wanted.extend(platform.deploy(project) for _ in range(count))

        poster = threading.Thread(target=post, args=(30,))
        poster.start()
        wait_for(lambda: len(wanted) > 8)
        d.kill()
        poster.join()
        post(5)
        wait_for(lambda: "events wait" in platform.log.read_text(), what="the platform did not notice")
        wait_for(lambda: platform.ask(f"/deployments/{wanted[-1]}")["state"] == "ready")
        assert platform.ask("/health")["waiting"] > 0
        d.start()
        post(5)
        platform.end(signal.SIGKILL)  # in the middle of its outbox
        platform.start()
        post(5)
        assert len(wanted) == 45
        wait_for(
            lambda: {*d.noted("echo")} >= {*wanted}, seconds(90),
            lambda: f"lost: {platform.ask('/health')} {platform.log.read_text()} {d.log.read_text()}",
        )  # fmt: skip
        # A repetition after an unknown answer is recognised: one event each, in the order of the deployments.
        ids = [platform.event_of(deployment, "deploy.completed") for deployment in wanted]
        assert len(set(ids)) == len(wanted)
        for name in ("deploy.started", "deploy.completed"):
            assert len(d.json("event", "list", "--limit", "1000", "--name", name)) == len(wanted)
        order = list(dict.fromkeys(d.noted("echo")))
        assert order == wanted
        reply = json.loads(_deliveries(d, ids[-1])["namer"]["reply"])["result"]
        assert reply["asked"]["result"]["name"] == "shop"
        assert platform.ask("/health") == {"waiting": 0, "refused": 0}
        d.cli("audit", "verify")


@pytest.mark.parametrize("language", ["python", "js"])
def test_the_platforms_of_the_guide_run_as_printed(
    running: Daemon, tmp_path: Path, shared_dir: Path, language: str
) -> None:
    d = running
    program = {"python": sys.executable, "js": "/usr/bin/node"}[language]
    if not Path(program).exists():
        pytest.skip(f"{program} is not installed")
    guide = (PLATFORM.parents[1] / "docs/embedding.md").read_text()
    text, *others = re.findall(rf"^```{language}\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    script = shared_dir / {"python": "guide.py", "js": "guide.mjs"}[language]
    # Each program emits once and for all, by its dedupe_key: the daemon is shared.
    script.write_text(text.replace("deploy-d1", f"deploy-{language}"))
    environment = {**os.environ, "ISOLATOR_ROOT": str(d.root), "CONTROL": str(d.root / "run/isolator/control.sock")}
    _add(d, write_plugin(tmp_path / "namer", NAMER, permissions=["read:projects"], transport={"mode": "stream"}))
    before = {e["id"] for e in d.json("event", "list", "--limit", "1")}
    process = subprocess.Popen(
        [program, str(script)], stdout=subprocess.PIPE, text=True, cwd="/", env=environment,
        user=UID, group=UID, extra_groups=[],
    )  # fmt: skip
    try:
        row = wait_for(lambda: [e for e in d.json("event", "list", "--limit", "1") if e["id"] not in before])[0]
        reply = json.loads(_deliveries(d, row["id"])["namer"]["reply"])["result"]
        assert reply["asked"]["result"] == {"id": "shop", "name": "Shop"}
        if language == "python":  # waits for the delivery, prints it, and ends
            assert "namer ok" in process.communicate(timeout=30)[0]
            for other in others:
                subprocess.run([program, "-c", other], check=True, env=environment, user=UID, group=UID, cwd="/")
        else:
            assert process.stdout is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            assert [line[:2] for line in lines] == ["1 ", "2 "] and row["id"] in lines[1], lines
    finally:
        process.kill()
        process.communicate()
        d.cli("plugin", "remove", "namer", "--yes")
