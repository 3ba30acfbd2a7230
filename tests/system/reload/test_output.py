"""What a plugin writes while the daemon is reloaded: each line is stored once and whole, or counted as dropped."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from tests.support.sidecars import OK
from tests.system.daemon import daemon, wait_for, write_plugin
from tests.system.reload.exchanges import MODULES, exchanged
from tests.system.reload.test_reload import STATE, running

LINE = 1024
FLOODS = OK.replace(
    "import json, os, signal, socket, sys, time\n",
    f"""import json, os, signal, socket, sys, threading, time
def flood(number=0):
    state = os.environ["PLUGIN_STATE_DIR"] + "/"
    while not os.path.exists(state + "go"):
        time.sleep(0.01)
    began = time.monotonic()
    while True:
        calm = os.path.exists(state + "calm")
        count = 1 if calm else 100
        lines = b"".join(b"%09d %s\\n" % (n, b"x" * {LINE - 11}) for n in range(number, number + count))
        number += count
        while lines:
            lines = lines[os.write(1, lines):]
        time.sleep(0.2 if calm else max(0.0, began + number * {LINE} / 10e6 - time.monotonic()))
threading.Thread(target=flood).start()
""",
)
"""Writes numbered lines, 10 MB of them a second or as many as are taken, and five a second once the file ``calm`` is
there."""


class Log:
    """The file of a plugin's log, read while it grows and is rotated."""

    def __init__(self, path: Path) -> None:
        self.numbers: list[int] = []
        self.dropped = 0
        """Bytes that are reported as dropped."""
        self.torn: list[str] = []
        self._path, self._file, self._rest = path, path.open("rb"), b""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    @property
    def accounted(self) -> bool:
        """Whether each line up to the newest one is there or was reported as dropped."""
        return (self.numbers[-1] + 1) * LINE == len(self.numbers) * LINE + self.dropped

    def _follow(self) -> None:
        while not self._stopped.wait(0.05):
            rotated = self._path.exists() and not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            for line in lines:
                self._note(json.loads(line))
            if rotated:
                self._file.close()
                self._file = self._path.open("rb")

    def _note(self, entry: dict[str, Any]) -> None:
        text = entry["line"]
        if entry["stream"] == "isolator":
            self.dropped += int(re.fullmatch(r"\[(\d+) bytes dropped: .*\]", text)[1])  # type: ignore[index]
        elif re.fullmatch(rf"\d{{9}} x{{{LINE - 11}}}", text):
            self.numbers.append(int(text[:9]))
        else:
            self.torn.append(text)

    def __enter__(self) -> Log:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._file.close()


def test_output_of_ten_megabytes_a_second_goes_on_over_a_reload(shared_dir: Path) -> None:
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(shared_dir / "floods", FLOODS, sandbox=STATE)), "--yes")
        d.cli("plugin", "start", "floods")
        before, host = running(d), d.service_pid(MODULES["host"])
        state, path = d.state_of("floods"), d.root / "var/log/isolator/plugins/floods.log"
        (state / "go").touch()
        wait_for(path.exists)
        with Log(path) as log:
            wait_for(lambda: log.dropped)
            d.cli("reload")
            wait_for(lambda: exchanged(d, "host", host))
            reached = len(log.numbers)
            wait_for(lambda: len(log.numbers) > reached, what="nothing is read any more")
            (state / "calm").touch()
            wait_for(lambda: log.accounted, what=lambda: f"{log.numbers[-1:]} {len(log.numbers)} {log.dropped}")
        assert not log.torn
        assert log.numbers == sorted(set(log.numbers)), "a line is stored twice, or out of its order"
        assert running(d) == before
