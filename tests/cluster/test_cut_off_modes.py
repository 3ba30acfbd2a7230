"""A host whose log is silent: past its deadline the plugins of every mode make no call and send no byte."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from isolator.linux.boottime import boottime
from tests.support import restless
from tests.support.internet_servers import WEB
from tests.support.nats_servers import nats_servers
from tests.support.pretend_internet import pretend_internet
from tests.support.witness import Witness
from tests.system.daemon import Daemon, daemon, wait_for

HOST_TOML = f"""
[network]
resolvers = ["{WEB}"]
[cluster]
name = "h1"
servers = ["127.0.0.1:4222"]
tls = false
"""


def _leases(d: Daemon) -> dict[str, Any]:
    return {one["name"]: one.get("lease") for one in d.json("plugin", "list")}


@pytest.mark.slow
def test_plugins_of_a_cut_off_host_make_no_call_past_its_deadline_whatever_their_mode(tmp_path: Path) -> None:
    with pretend_internet() as pretend, contextlib.ExitStack() as stack:
        witness = Witness(pretend.internet)
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{pretend.host_fd}"]
        (server,) = stack.enter_context(nats_servers(tmp_path / "nats", 1, first_port=4222, enter=enter))
        init = ["cluster", "init", "--server", "127.0.0.1:4222", "--no-tls", "--replicas", "1"]
        subprocess.run([*enter, "isolator", *init, "--max-bytes", "50000000"], check=True, capture_output=True)
        d = stack.enter_context(daemon(host_toml=HOST_TOML, network=pretend.host_fd))
        wait_for(lambda: d.json("cluster", "status", code=None)["member"], what="no member")
        for mode in restless.PLUGINS:
            restless.add(d, tmp_path, mode, mode)
        restless.emit(d, "first", "hold")
        for mode in restless.PLUGINS:
            wait_for(lambda: d.noted(mode) == ["dfirst"], what=f"{mode} has no event")  # noqa: B023
            restless.until_tried(d, mode)
        wait_for(lambda: witness.after(boottime() - 1), what="nothing comes through at all")

        server.signal(signal.SIGSTOP)
        try:
            second = restless.emit(d, "second")
            wait_for(lambda: all(_leases(d).values()), what="its plugins go on")
            silent = boottime()
            d.cli("cluster", "status", code=1)
            assert witness.after(silent) == []
            assert not [line for mode in restless.PLUGINS for line in restless.answered_after(d, mode, silent)]
        finally:
            server.signal(signal.SIGCONT)
        for mode in restless.PLUGINS:
            restless.go_on(d, mode)
        wait_for(lambda: not any(_leases(d).values()), what="nothing goes on")

        def handled() -> bool:
            return all(one["state"] == "ok" for one in d.json("event", "show", second)["deliveries"])

        wait_for(handled, what="the event that was accepted meanwhile is not delivered")
        assert witness.after(silent)
        for mode in restless.PLUGINS:
            assert sorted(d.noted(mode)) == ["dfirst", "dsecond"], mode
