"""The console's process: with the daemon, over a reload, after a crash, and not at all where nobody wants it."""

from __future__ import annotations

import socket
import subprocess
import sys

from isolator.linux import netns
from tests.console.support import PORT, STRANGER, VIEWER, Console
from tests.system.daemon import Daemon, kill_9, wait_for


def pid_of(d: Daemon) -> int:
    return d.service_pid("host.console.service", missing_ok=True)


def reloaded(d: Daemon) -> None:
    generation = d.json("reload")["generation"]
    assert generation > 1


def test_reload_exchanges_the_process_and_keeps_who_was_let_in(console: Console) -> None:
    d = console.daemon
    host, cookie = console.enter()
    before = pid_of(d)
    reloaded(d)
    wait_for(lambda: pid_of(d) not in (0, before), what="the console was not exchanged")
    assert console.at_port("/", host=host, cookie=cookie).status == 200
    assert console.at_socket("/v1/status").json["services"][-1]["name"] == "console"


def test_killed_process_comes_back_and_knows_nobody(console: Console) -> None:
    d = console.daemon
    host, cookie = console.enter()
    # Of two that are alive in an exchange, the one that serves.
    kill_9(next(one["pid"] for one in d.json("status", code=None)["services"] if one["name"] == "console"))
    wait_for(lambda: _status(console) == 200, what="the console did not come back")
    assert console.at_port("/", host=host, cookie=cookie).status == 401
    host, cookie = console.enter()
    assert console.at_port("/", host=host, cookie=cookie).status == 200


def _status(console: Console) -> int:
    try:
        return console.at_port("/healthz").status
    except OSError:
        return 0


def test_command_prints_a_url_that_lets_one_browser_in(console: Console) -> None:
    url = console.daemon.cli("console").stdout.strip()
    host, _, rest = url.removeprefix("http://").partition("/")
    assert console.at_port(f"/{rest}", host=host).status == 303


def test_console_in_the_foreground_has_the_rights_of_who_typed_it(console: Console) -> None:
    words = ["isolator", "--root", str(console.daemon.root), "console", "--port", str(PORT + 2)]
    for uid, trail in ((0, 200), (VIEWER, 503)):
        typed = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *words]
        with netns.in_network(
            console.network, lambda typed=typed: subprocess.Popen(typed, stdout=subprocess.PIPE, text=True)
        ) as served:
            assert served.stdout is not None
            try:
                host, _, rest = served.stdout.readline().strip().removeprefix("http://").partition("/")
                assert host.endswith(f".localhost:{PORT + 2}")
                cookie = console.at_port(f"/{rest}", host=host, port=PORT + 2).headers["set-cookie"].partition(";")[0]
                assert console.at_port("/", host=host, cookie=cookie, port=PORT + 2).status == 200
                assert console.at_port("/trail", host=host, cookie=cookie, port=PORT + 2).status == trail
                assert console.at_port("/", host=host, port=PORT + 2).status == 401
            finally:
                served.terminate()
    stranger = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", *words]
    done = subprocess.run(stranger, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr


def test_reload_without_the_table_ends_it_and_with_it_starts_it(console: Console) -> None:
    d = console.daemon
    toml = d.root / "etc/isolator/host.toml"
    with_console = toml.read_text()
    toml.write_text("[roles]\nviewer = [61100]\n")
    reloaded(d)
    wait_for(lambda: not pid_of(d) and not console.path.exists(), what="the console went on")
    assert [one["name"] for one in d.json("status")["services"]] == ["supervisor", "audit", "host"]
    toml.write_text(with_console)
    reloaded(d)
    wait_for(lambda: _status(console) == 200, what="the console did not start")
    wait_for(lambda: console.at_socket("/v1/plugin/list").status == 200, what="the daemon does not know it")
    status = console.path.stat()
    assert status.st_mode & 0o777 == 0o660 and status.st_uid == 0


def test_port_that_is_taken_costs_the_console_alone(console: Console) -> None:
    d = console.daemon
    toml = d.root / "etc/isolator/host.toml"
    before = toml.read_text()
    with netns.in_network(console.network, lambda: socket.create_server(("127.0.0.1", PORT + 1))):
        toml.write_text(before.replace(f"port = {PORT}", f"port = {PORT + 1}"))
        reloaded(d)
        wait_for(lambda: "console does not start" in str(d.json("status", code=None)["alarms"]), what="no alarm")
        assert d.json("plugin", "list") == []  # the daemon goes on
        toml.write_text(before)
        reloaded(d)  # nor does it hold up the next reload
    wait_for(lambda: _status(console) == 200, what="the console did not move back")


def test_nothing_of_it_is_loaded_without_the_table() -> None:
    program = (
        "import sys, isolator.supervisor.supervisor, isolator.cli.daemon, host.service, host.cli.root\n"
        "wrong = [m for m in sys.modules if m.split('.')[0] in ('starlette', 'uvicorn', 'jinja2', 'h11', 'anyio')"
        " or m.startswith('host.console') or m == 'isolator.supervisor.console_link']\n"
        "sys.exit(', '.join(wrong) or 0)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
