"""Before the machine is started anew: the service is put to work, and left in the middle of it.

``vagrant/legs.py`` runs this, starts the machine anew and runs ``reboot_after.py``. A unit of systemd's goes on
emitting events meanwhile, until the machine takes it along; each event that was accepted is on the disk in ``ACCEPTED``
before the next is sent. Not named like a test file: pytest runs it only when it is named.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import wait_for
from tests.vm.service import Service, needs_machine, slow_plugin

NOTES = Path("/var/tmp/isolator-reboot")  # a disk's, and swept by nobody while the machine lives
ACCEPTED, BOOT = NOTES / "accepted", NOTES / "boot"
EMITTER, PLUGIN = "isolator-vm-emitter", "slow"
pytestmark = [pytest.mark.vm, needs_machine]

# Answers only after what it did is on its disk, as a plugin must that counts on the queue to come again.
SLOW = """\
    #!/usr/bin/python3
    import json, os, socket, time
    path = os.environ["PLUGIN_SOCKET"]
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(1)
    seen = open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a")
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        time.sleep(0.2)
        seen.write(request["params"]["deployment_id"] + "\\n")
        seen.flush()
        os.fsync(seen.fileno())
        reply = {"jsonrpc": "2.0", "id": request["id"], "result": {"status": "ok"}}
        connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
"""
_AT_ONCE = 60
EMIT = f"""
import os, sys, time
from pathlib import Path
from tests.vm.service import Service
prefix, service, number = sys.argv[1], Service(), 0
notes = os.open({str(ACCEPTED)!r}, os.O_WRONLY | os.O_APPEND | os.O_DSYNC)
while True:
    name = f"{{prefix}}-{{number}}"
    if service.emit(name):
        os.write(notes, f"{{name}}\\n".encode())
    number += 1
    if number > {_AT_ONCE}:
        time.sleep(0.5)  # no more than the plugin can do, or the queue would be long after all
"""


def test_it_is_in_the_middle_of_deliveries() -> None:
    service, boot = Service(), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if service.property("ActiveState") != "active":
        subprocess.run(["isolator", "install"], check=True, timeout=seconds(30))
    NOTES.mkdir(exist_ok=True)
    if not ACCEPTED.exists():
        service.cli("plugin", "add", str(slow_plugin(NOTES / PLUGIN, SLOW)), "--yes")
    BOOT.write_text(boot)
    ACCEPTED.touch()
    known = len(accepted())
    emitter = ["systemd-run", f"--unit={EMITTER}", sys.executable, "-I", "-c", EMIT, f"boot-{boot[:8]}"]
    subprocess.run(emitter, check=True, capture_output=True)
    wait_for(lambda: len(accepted()) > known + _AT_ONCE and service.seen(PLUGIN), seconds(12), "no event is accepted")
    assert len(set(service.seen(PLUGIN))) < len(accepted()) - 20, "the plugin keeps up: nothing would wait in the queue"


def accepted() -> list[str]:
    """What the daemon has taken responsibility for, in the order in which it did."""
    return ACCEPTED.read_text().split()
