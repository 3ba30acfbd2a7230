"""Three hosts that deliver one stream of events: what `sudo ./dev demo --hosts 3` runs.

Theory of operation. Inside the demo's own network namespace there is nothing; beside it four more are made, three
*machines* and a router between them, which also has the *ledger* in which the plugin enters what it does (all in
tests/support, for the tests of outages use the same). On each machine there run

    nats-server        one of three that keep the log
    isolator serve     a host of the cluster, with a root of its own below the demo's

and a platform, in this process, which emits on each host all the while. The steps (hosts_steps.py) then take away one
machine after the other: one dies, one is cut off without a word and comes back. What the ledger, the trails and, read
once more from its beginning, the log say is held against what was promised.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import hosts_steps
import report
from daemon import Daemon
from hosts_stage import Demo, Host
from report import Promise

from tests.support.ledger import COURIER, ledger
from tests.support.nats_servers import Place, nats_servers
from tests.support.platforms import platforms
from tests.support.routed import network

NAMES = ("h1", "h2", "h3")
LAST = 8
"""Number of the step that has the promises."""
RATE = 5
"""Events a second that the platform of each host emits."""
SETTINGS = """\
[cluster]
name = "{name}"
servers = [{servers}]
credentials = "/etc/isolator/cluster.secret"
tls = false        # this network leads nowhere
"""


def roots(root: Path) -> list[Path]:
    """The roots of the daemons."""
    return [root / name for name in NAMES]


def run(root: Path, pids: set[int]) -> list[Promise]:
    """Set up, do the steps, stop the daemons; the promises so far. ``pids`` collects the processes of the cages."""
    report.say(
        "Several hosts of Isolator deliver one stream of events. This demo gives three of them a network of their own,"
        " which leads nowhere: three machines, each with a daemon and a server of NATS. Then one dies, and one is cut"
        " off. Beside the machines is a ledger, which the plugin can always reach: what is not in it was not done."
    )
    work = root / "demo"
    work.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network(len(NAMES)))
        names = {machine.address: name for name, machine in zip(NAMES, net.machines, strict=True)}
        kept = stack.enter_context(ledger(net, names))
        report.heading(1, "Three machines and one log")
        daemons = [
            Daemon(path, work, work / f"{path.name}.log", enter=machine.enter)
            for path, machine in zip(roots(root), net.machines, strict=True)
        ]
        daemons[0].show("cluster", "users", "--dir", "users", *NAMES)
        users = work / "users"
        places = [Place(machine.address, machine.enter) for machine in net.machines]
        more = (users / "users.conf").read_text()
        servers = stack.enter_context(
            nats_servers(work / "nats", len(NAMES), first_port=4222, more=more, places=places)
        )
        hosts = [Host(*parts) for parts in zip(NAMES, net.machines, servers, daemons, strict=True)]
        demo = Demo(root, net, hosts, kept, users)
        make_log(demo)
        for host in hosts:
            configure(demo, host)
        for host in hosts:
            stack.callback(host.stop)
            host.start()
        demo.wait(lambda: demo.quiet(hosts), 60, "no cluster comes about")
        hosts[0].daemon.show("cluster", "status")
        try:
            hosts_steps.add_plugin(demo)
            paths = {host.name: host.daemon.root for host in hosts}
            with platforms(paths, RATE) as demo.platforms:
                for step in hosts_steps.STEPS:
                    step(demo)
            hosts_steps.settle(demo)
            hosts_steps.story(demo)
        finally:
            pids.update(int(record["data"]["pid"]) for host in hosts for record in host.records("plugin.started"))
        for host in hosts:
            host.stop()
        hosts_steps.records_hold(demo)
        return demo.promises


def make_log(demo: Demo) -> None:
    """Have an operator make the log, once."""
    words = [word for host in demo.hosts for word in ("--server", host.server.listens)]
    first = demo.hosts[0].daemon
    first.show("cluster", "init", *words, "--no-tls", "--max-bytes", "100000000", "--credentials", "users/admin.secret")


def configure(demo: Demo, host: Host) -> None:
    """Write a host's settings, its user's password, and the policy of the plugin."""
    etc = host.daemon.root / "etc/isolator"
    (etc / "policies").mkdir(parents=True, exist_ok=True)
    shutil.copy(COURIER.with_suffix(".toml"), etc / "policies")
    secret = etc / "cluster.secret"
    secret.touch(0o600)
    secret.write_text((demo.secrets / f"{host.name}.secret").read_text())
    servers = ", ".join(f'"{one.server.listens}"' for one in demo.hosts)
    settings = SETTINGS.format(name=host.name, servers=servers)
    if host is demo.hosts[0]:
        report.blank()
        report.say("Each host has this in its host.toml (here that of h1):")
        report.output(settings)
    path = etc / "host.toml"
    path.write_text(settings.replace('"/etc', f'"{host.daemon.root}/etc') + '[defaults]\nstart_timeout = "2m"\n')
    path.chmod(0o644)
