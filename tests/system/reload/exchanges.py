"""A daemon whose services are exchanged, and plugins that keep account of what reaches them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial

from tests.support.processes import children
from tests.support.sidecars import raw, stream
from tests.system.daemon import Daemon, wait_for

MODULES = {"host": "host.service", "broker": "isolator.broker.service", "audit": "isolator.audit.service"}

NOTE = """
import threading
def note(meta):
    with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:
        seen.write(f"{meta['id']} {meta['attempt']}\\n")
"""
SLOW_ONESHOT = raw(
    """
try:
    params = json.loads(connection.recv(4096))["params"]
    note(params["_meta"])
    time.sleep(params["duration_ms"] / 1000)
    connection.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"status":"ok"}}\\n')
except (OSError, ValueError) as error:
    print("connection:", error, flush=True)
connection.close()
""",
    first=NOTE,
)
"""Answers after ``duration_ms``."""
SLOW_STREAM = stream(
    """
if method == "ping":
    send(id=id, result={})
    continue
note(params["_meta"])
def answer(id=id):
    try:
        send(id=id, result={"status": "ok"})
    except OSError as error:
        print("connection:", error, flush=True)
threading.Timer(params["duration_ms"] / 1000, answer).start()
""",
    first=NOTE,
)
"""The same, many at a time."""


def exchange(d: Daemon, *names: str) -> None:
    """Have the services exchanged; returns when each of ``names`` is another process and the one before has ended."""
    assert d.process is not None
    before = {name: wait_for(lambda name=name: d.service_pid(MODULES[name], missing_ok=True)) for name in names}
    os.kill(d.process.pid, signal.SIGUSR1)
    for name, pid in before.items():
        wait_for(partial(exchanged, d, name, pid), what=d.log.read_text)


def exchanged(d: Daemon, name: str, before: int) -> bool:
    """Whether a service is one process, and another than before."""
    pids = processes(d, name)
    return len(pids) == 1 and pids != [before]


def processes(d: Daemon, name: str) -> list[int]:
    """The processes of a service."""
    assert d.process is not None
    return children(d.process.pid, MODULES[name])


def seen(d: Daemon, plugin: str) -> Counter[str]:
    """How often each event reached a plugin that makes a ``NOTE``."""
    return Counter(line.split()[0] for line in d.noted(plugin))


def open_files(pid: int) -> int:
    """Number of a process's descriptors."""
    return len(os.listdir(f"/proc/{pid}/fd"))
