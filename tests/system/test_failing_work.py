"""Work within the root process that fails is named in an alarm and on record, and goes on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin
from tests.system.failing_work import WORK


class FailingOnce(Daemon):
    """A daemon in which each piece of lasting work fails once."""

    @property
    def begin(self) -> Path:
        """File whose presence lets the later ones fail."""
        return self.root / "begin"

    def command(self) -> list[str]:
        program = "from tests.system.failing_work import main; import sys; sys.exit(main())"
        set_it = ["env", f"FAULTS_AT={self.begin}"]
        return [*set_it, sys.executable, "-I", "-c", program, "--root", str(self.root), "serve"]


def test_work_that_fails_in_the_root_process_is_named_and_goes_on(tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    host_toml = f'plugin_dirs = ["{found}"]\n[audit]\nsnapshot_interval = "1s"\n'
    with daemon(host_toml=host_toml, kind=FailingOnce) as d:
        assert isinstance(d, FailingOnce)
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        d.cli("event", "emit", "deploy.completed", event(0), "--wait")
        d.begin.touch()
        write_plugin(found / "offered")
        os.kill(d.json("plugin", "show", "echo")["pid"], signal.SIGKILL)
        wait_for(lambda: d.json("plugin", "show", "echo")["state"] == "running", what=d.log.read_text)
        for work in WORK:
            wait_for(lambda work=work: f"ALARM: {work} has failed" in d.log.read_text(), what=f"{work}: no alarm")
        alarms = d.json("check", code=1)["alarms"]
        assert all(any(line.startswith(f"{work} has failed") for line in alarms) for work in WORK), alarms
        ended = {r["data"]["service"]: r["data"] for r in d.records() if r["type"] == "service.ended"}
        assert ended.keys() == {f"supervisor: {work}" for work in WORK}
        assert not any(data["hung"] for data in ended.values())
        # Everything goes on: what was found is shown, denied calls are answered, a launcher that dies is replaced.
        wait_for(lambda: "offered" in {plugin["name"] for plugin in d.json("plugin", "list")})
        launcher = d.service_pid("isolator.launcher.server")
        os.kill(launcher, signal.SIGKILL)
        wait_for(lambda: d.service_pid("isolator.launcher.server", missing_ok=True) not in (0, launcher))
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        assert d.stop() == 0
