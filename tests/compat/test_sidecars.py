"""Programs, web apps and MCP servers that others have written, unmodified, as sidecars; docs/plugins.md lists them."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for

pytestmark = pytest.mark.wide

PORT = 8080


@dataclass(frozen=True)
class Command:
    """A program of the host, which runs for each event."""

    name: str
    path: str
    args: tuple[str, ...] = ()
    result: str = ""
    """Part of the reply."""


@dataclass(frozen=True)
class App:
    """A web app on a framework; ``source`` by file, ``pip`` and ``npm`` are installed beside it."""

    name: str
    source: dict[str, str]
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    build: tuple[str, ...] = ()
    transport: dict[str, Any] = field(default_factory=lambda: {"port": PORT})
    result: str = ""


@dataclass(frozen=True)
class Server:
    """An MCP server; one of its tools is called."""

    name: str
    start: str
    tool: str
    arguments: dict[str, Any]
    result: str
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()


COMMANDS = (
    Command("jq", "/usr/bin/jq", ("-c", '{status: "linted", to: .deployment_id}'), '"to":"d1"'),
    Command("json_pp", "/usr/bin/json_pp", ("-json_opt", "canonical"), '"deployment_id":"d1"'),
    Command("mawk", "/usr/bin/mawk", ('{ printf "{\\"size\\": %d}\\n", length($0) }',), '"size"'),
    Command(
        "perl", "/usr/bin/perl", ("-MJSON::PP", "-ne", "print encode_json({to => decode_json($_)->{url}})"), '"to"'
    ),
    Command("sha256sum", "/usr/bin/sha256sum"),
    Command("xxd", "/usr/bin/xxd", ("-p",)),
    Command("base64", "/usr/bin/base64", ("-w0",)),
    Command("ruby", "/usr/bin/ruby", ("-rjson", "-e", "puts JSON.generate({to: JSON.parse(gets)['url']})"), '"to"'),
    Command(
        "bash", "/bin/bash", ("-c", 'read -r params; echo "{\\"attempt\\": $PLUGIN_EVENT_ATTEMPT}"'), '"attempt": 1'
    ),
)
PYTHON = """#!/usr/bin/python3
import os, sys
sys.path.insert(0, "/plugin/lib")
port = int(os.environ.get("PLUGIN_PORT", 0))
"""
APPS = (
    App("http.server", {"main": PYTHON + textwrap.dedent("""
        from http.server import BaseHTTPRequestHandler, HTTPServer
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(204)
                self.end_headers()
        HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """)}),
    App("Flask", {"main": PYTHON + textwrap.dedent("""
        from flask import Flask, request
        app = Flask(__name__)
        @app.post("/events")
        def events():
            return {"status": "posted", "to": request.json["deployment_id"]}
        app.run(port=port)
    """)}, pip=("flask",), result='"to":"d1"'),
    App("FastAPI", {"main": PYTHON + textwrap.dedent("""
        import uvicorn
        from fastapi import FastAPI
        app = FastAPI()
        @app.post("/events")
        async def events(event: dict):
            return {"status": "posted", "to": event["deployment_id"]}
        uvicorn.run(app, host="127.0.0.1", port=port)
    """)}, pip=("fastapi", "uvicorn"), result='"to":"d1"'),
    App("aiohttp", {"main": PYTHON + textwrap.dedent("""
        from aiohttp import web
        async def events(request):
            return web.json_response({"status": "posted", "to": (await request.json())["deployment_id"]})
        app = web.Application()
        app.router.add_post("/events", events)
        web.run_app(app, path=os.environ["PLUGIN_SOCKET"])
    """)}, pip=("aiohttp",), transport={}, result='"to": "d1"'),
    App("httpbin under gunicorn", {"main": PYTHON + textwrap.dedent("""
        from gunicorn.app.wsgiapp import run
        sys.argv[1:] = ["--bind", f"unix:{os.environ['PLUGIN_SOCKET']}", "--worker-tmp-dir", "/dev/shm", "httpbin:app"]
        run()
    """)}, pip=("httpbin", "gunicorn"), transport={"path": "/post"}),
    App("Express", {"main": '#!/bin/sh\nexec node /plugin/app.js\n', "app.js": textwrap.dedent("""
        const app = require("express")();
        app.use(require("express").json());
        app.post("/events", (request, response) => response.json({status: "posted", to: request.body.deployment_id}));
        app.listen(process.env.PLUGIN_PORT, "127.0.0.1");
    """)}, npm=("express",), result='"to":"d1"'),
    App("Fastify", {"main": '#!/bin/sh\nexec node /plugin/app.js\n', "app.js": textwrap.dedent("""
        const app = require("fastify")();
        app.post("/events", async (request) => ({status: "posted", to: request.body.deployment_id}));
        app.listen({path: process.env.PLUGIN_SOCKET});
    """)}, npm=("fastify",), transport={}, result='"to":"d1"'),
    App("json-server", {"main": "#!/bin/sh\ncp /plugin/db.json /tmp\n"
                                "exec node /plugin/node_modules/json-server/lib/cli/bin.js "
                                '--host 127.0.0.1 --port "$PLUGIN_PORT" /tmp/db.json\n', "db.json": '{"events": []}'},
        npm=("json-server@0.17.4",)),
    App("Go net/http", {"main.go": textwrap.dedent("""
        package main
        import ("net/http"; "os")
        func main() {
            http.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
                w.Write([]byte(`{"status": "posted"}`))
            })
            http.ListenAndServe("127.0.0.1:" + os.Getenv("PLUGIN_PORT"), nil)
        }
    """)}, build=("go", "build", "-o", "main", "main.go"), result="posted"),
)  # fmt: skip
NODE = "#!/bin/sh\nexec node /plugin/node_modules/{}\n"
SCRIPT = "#!/usr/bin/python3\nimport sys\nsys.path.insert(0, '/plugin/lib')\nfrom {0} import main\nmain()\n"
SERVERS = (
    Server("mcp-server-time", SCRIPT.format("mcp_server_time"), "get_current_time", {"timezone": "Asia/Tokyo"}, "Tokyo",
           pip=("mcp-server-time",)),
    Server("mcp-server-git", SCRIPT.format("mcp_server_git"), "git_status", {"repo_path": "/plugin"}, "",
           pip=("mcp-server-git",)),
    Server("mcp-server-fetch", SCRIPT.format("mcp_server_fetch"), "fetch", {"url": "https://example.invalid/"}, "",
           pip=("mcp-server-fetch",)),
    Server("server-everything", NODE.format("@modelcontextprotocol/server-everything/dist/index.js"), "echo",
           {"message": "hello"}, "hello", npm=("@modelcontextprotocol/server-everything",)),
    Server("server-filesystem", NODE.format("@modelcontextprotocol/server-filesystem/dist/index.js /plugin"),
           "list_directory", {"path": "/plugin"}, "plugin.json", npm=("@modelcontextprotocol/server-filesystem",)),
    Server("server-memory", NODE.format("@modelcontextprotocol/server-memory/dist/index.js"), "read_graph", {},
           "entities", npm=("@modelcontextprotocol/server-memory",)),
    Server("server-sequential-thinking", NODE.format("@modelcontextprotocol/server-sequential-thinking/dist/index.js"),
           "sequentialthinking", {"thought": "x", "nextThoughtNeeded": False, "thoughtNumber": 1, "totalThoughts": 1},
           "thoughtNumber", npm=("@modelcontextprotocol/server-sequential-thinking",)),
)  # fmt: skip
MAY_FAIL = {"mcp-server-git", "mcp-server-fetch"}
"""Their tools answer with an error of their own here: no repository, no network."""


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon() as made:
        yield made


def folder_of(place: Path, name: str, source: dict[str, str], **manifest: Any) -> Path:
    """A plugin's folder with executable files."""
    folder = place / name.lower().replace(".", "-").replace(" ", "-").replace("/", "-").replace("_", "-")
    folder.mkdir()
    body = {"name": folder.name, "version": "1.0.0", "api_version": "1", "binary": "./main",
            "hooks": ["deploy.completed"],
            "sandbox": {"network": {"egress": []}, "filesystem": {"state": "16M"},
                        "resources": {"memory": "512M", "cpu": "100%", "tasks": 128}},
            "restart": {"start_timeout": "60s"}, "delivery": {"timeout": "60s", "attempts": 2}}  # fmt: skip
    (folder / "plugin.json").write_text(json.dumps(body | manifest))
    for file, text in source.items():
        (folder / file).write_text(text)
        (folder / file).chmod(0o755)
    return folder


def install(folder: Path, pip: tuple[str, ...], npm: tuple[str, ...], build: tuple[str, ...] = ()) -> None:
    """Install packages as their authors say."""
    commands = []
    if pip:
        commands.append(["/usr/bin/python3", "-m", "pip", "install", "-q", "--target", str(folder / "lib"), *pip])
    if npm:
        commands.append(["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-bin-links", *npm])
    if build:
        commands.append(list(build))
    for command in commands:
        subprocess.run(command, cwd=folder, check=True, timeout=seconds(300), stdout=subprocess.DEVNULL)


def deliver(d: Daemon, folder: Path) -> dict[str, Any]:
    d.cli("plugin", "add", str(folder), "--yes")
    try:
        done = d.json("event", "emit", "deploy.completed", event(1), "--wait", code=None)
        (delivery,) = (one for one in done["deliveries"] if one["plugin"] == folder.name)
        return dict(delivery)
    finally:
        d.cli("plugin", "remove", folder.name, "--yes")


@pytest.mark.parametrize("command", COMMANDS, ids=[one.name for one in COMMANDS])
def test_command_runs_for_each_event(running: Daemon, tmp_path: Path, command: Command) -> None:
    if not Path(command.path).exists():
        pytest.skip(f"{command.path} is not on this host")
    folder = folder_of(tmp_path, command.name, {}, args=list(command.args), transport={"mode": "exec"})
    shutil.copy(command.path, folder / "main")
    (folder / "main").chmod(stat.S_IMODE(Path(command.path).stat().st_mode))
    done = deliver(running, folder)
    assert done["state"] == "ok" and command.result in (done["reply"] or ""), done


@pytest.mark.parametrize("app", APPS, ids=[one.name for one in APPS])
def test_web_app_takes_events(running: Daemon, tmp_path: Path, app: App) -> None:
    for tool in ("npm",) if app.npm else app.build[:1]:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on this host")
    folder = folder_of(tmp_path, app.name, app.source, transport={"mode": "http", **app.transport})
    install(folder, app.pip, app.npm, app.build)
    done = deliver(running, folder)
    assert done["state"] == "ok" and app.result in (done["reply"] or ""), done


@pytest.mark.parametrize("server", SERVERS, ids=[one.name for one in SERVERS])
def test_mcp_server_answers_a_call(running: Daemon, tmp_path: Path, server: Server) -> None:
    if server.npm and shutil.which("npm") is None:
        pytest.skip("npm is not on this host")
    calls = {"deploy.completed": {"tool": server.tool, "arguments": server.arguments}}
    folder = folder_of(tmp_path, server.name, {"main": server.start}, transport={"mode": "mcp", "calls": calls})
    install(folder, server.pip, server.npm)
    running.cli("plugin", "add", str(folder), "--yes")
    try:
        offered = [one["name"] for one in running.json("mcp", "tools", folder.name)["tools"]]
        assert server.tool in offered
        done = running.json("event", "emit", "deploy.completed", event(1), "--wait", code=None)
        (delivery,) = (one for one in done["deliveries"] if one["plugin"] == folder.name)
        if server.name in MAY_FAIL:
            assert delivery["status"] == "tool_error", delivery
        else:
            assert delivery["state"] == "ok" and server.result in delivery["reply"], delivery
        pid = running.json("plugin", "show", folder.name)["pid"]
        running.cli("plugin", "stop", folder.name)
        wait_for(lambda: pid is None or not Path(f"/proc/{pid}").exists())
    finally:
        running.cli("plugin", "remove", folder.name, "--yes")
