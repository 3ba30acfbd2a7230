"""Plugins, one of each mode, that write to a witness outside and call the host API as often as they can.

They do so whether they have an event or not. An event whose URL ends with ``hold`` lasts until there is a file
``go-on`` in the plugin's state. ``kept`` is memory, so that the kernel chooses them when there is none left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.mcp_servers import server
from tests.support.witness import PORT, of_day
from tests.system.daemon import Daemon, event, wait_for, write_plugin

ACT = f"""
import json, os, socket, threading, time
STATE = os.environ["PLUGIN_STATE_DIR"]
def note(name, line):
    with open(STATE + "/" + name, "a") as file:
        file.write(line + "\\n")
def write():
    address = socket.gethostbyname("hooks.example.com")
    while True:
        try:
            with socket.create_connection((address, {PORT}), 5) as sock:
                while True:
                    note("tries", "writes")
                    sock.sendall(b"%r\\n" % time.time())
                    time.sleep(0.02)
        except OSError:
            time.sleep(0.05)
def call():
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(1)
                sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
                while True:
                    note("tries", "calls")
                    began = time.time()
                    sock.sendall(b'{{"jsonrpc":"2.0","method":"whoami","id":1}}\\n')
                    if not sock.recv(4096):
                        break
                    note("answered", repr(began))
                    time.sleep(0.02)
        except OSError:
            time.sleep(0.05)
for work in (write, call):
    threading.Thread(target=work, daemon=True).start()
kept = b"x" * (30 << 20)
def act(payload):
    note("seen", payload["deployment_id"])
    while payload["url"].endswith("hold") and not os.path.exists(STATE + "/go-on"):
        time.sleep(0.02)
"""
EXEC = f"#!/usr/bin/python3\n{ACT}\nimport sys\nact(json.load(sys.stdin))\n"
HTTP = f"""#!/usr/bin/python3
{ACT}
import http.server, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        act(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
Server(("127.0.0.1", int(os.environ["PLUGIN_PORT"])), Handler).serve_forever()
"""
MCP = server(f"""{ACT}
TOOLS = [{{"name": "act", "inputSchema": {{"type": "object"}}}}]
def call(id, name, arguments, meta):
    def live():
        act(arguments)
        send(id=id, result=text("done"))
    threading.Thread(target=live, daemon=True).start()
""")
CALL = {"tool": "act", "arguments": {"deployment_id": "{{ deployment_id }}", "url": "{{ url }}"}}
PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "exec": (EXEC, {"transport": {"mode": "exec"}, "delivery": {"timeout": "60s"}}),
    "http": (HTTP, {"transport": {"mode": "http", "port": 8080}, "delivery": {"timeout": "60s"}}),
    "mcp": (MCP, {"transport": {"mode": "mcp", "calls": {"deploy.completed": CALL}}, "delivery": {"timeout": "60s"}}),
}
GRANT = f"""\
[grant]
hooks = ["deploy.*"]
egress = ["hooks.example.com:{PORT}"]
tools = ["act"]
callers = [0]
[limits]
memory = "64M"
connects_per_second = 100
[delivery]
timeout = "60s"
"""


def add(d: Daemon, folder: Path, mode: str, name: str) -> None:
    """Register the plugin of a mode under a name, with all that it asks for."""
    script, manifest = PLUGINS[mode]
    (policies := d.root / "etc/isolator/policies").mkdir(parents=True, exist_ok=True)
    (policies / f"{name}.toml").write_text(GRANT)
    sandbox = {"filesystem": {"state": "8M"}, "network": {"egress": [{"host": "hooks.example.com", "ports": [PORT]}]}}
    d.cli("plugin", "add", str(write_plugin(folder / name, script, sandbox=sandbox, **manifest)), "--yes")
    if mode == "mcp":  # in a cluster, once this host holds it
        wait_for(lambda: not d.cli("mcp", "approve", name, "--yes", code=None).returncode, what="no tool is approved")


def emit(d: Daemon, number: str, does: str = "go") -> str:
    """Emit an event that is ``hold``, or not; its id."""
    payload = event(number, url=f"https://{does}", project_id=number)
    return str(d.json("event", "emit", "deploy.completed", payload)["id"])


def answered_after(d: Daemon, name: str, then: float) -> list[str]:
    """The calls that were begun later than a time of CLOCK_BOOTTIME, and answered: when they began, by the plugin.

    When it has its answer is of no use: on a busy machine that is long after it was sent.
    """
    return [line for line in d.noted(name, "answered") if float(line) > of_day(then)]


def go_on(d: Daemon, name: str) -> None:
    """Let events go that are held."""
    (d.state_of(name) / "go-on").touch()


def until_tried(d: Daemon, name: str) -> None:
    """Return when a plugin has tried again to write, and to call."""
    for what in ("writes", "calls"):
        before = d.noted(name, "tries").count(what)
        wait_for(lambda: d.noted(name, "tries").count(what) > before + 1, what=f"it {what} no more")  # noqa: B023
