"""The main job on real cages, in under a minute: what `sudo ./dev demo` runs.

Theory of operation. This process re-executes itself in an empty network namespace (`unshare -n`, which keeps the
host's /sys and with it the cgroups). There it starts, in this order, and stops in the reverse:

    a database-like service on loopback      what the hostile plugin must not reach
    the pretend internet                     a second namespace, joined by a veth pair (internet.py)
    isolator serve                           with a temporary root
    isolator audit tail -f --json            a follower, from which all evidence is read

and then does what an operator would do, through the command line only (steps.py). It ends with a table of
promises; the exit code is 0 only if every one of them held. Everything is removed again, whatever happened, and
that nothing is left is the last promise of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# Python runs isolated (-I: nothing of the caller's environment), so the script's own folder is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

import console  # noqa: E402
import internet  # noqa: E402
import leftovers  # noqa: E402
import report  # noqa: E402
import steps  # noqa: E402
from daemon import Daemon, DemoError, Trail  # noqa: E402
from report import Promise  # noqa: E402
from stage import DATABASE_PORT, Demo  # noqa: E402

INSIDE = "ISOLATOR_DEMO_INSIDE"
"""Set in the empty network; with a browser, to the descriptor of the listener outside it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    if os.geteuid() != 0:
        report.fail("cages need root; try: sudo ./dev demo")
        return 1
    parser = argparse.ArgumentParser(prog="./dev demo", description="The main job on real cages.")
    parser.add_argument("--browser", action="store_true", help="let a browser on this machine see the console")
    parser.add_argument("--screenshot", type=Path, metavar="DIR", help="write pictures of the console to DIR")
    parser.add_argument("--hosts", type=int, choices=[3], help="three hosts that deliver one stream of events")
    options = parser.parse_args()
    if options.hosts and (options.browser or options.screenshot):
        parser.error("--hosts stands alone")
    if INSIDE not in os.environ:
        os.environ[INSIDE] = str(console.outside()) if options.browser else ""
        os.execvp("unshare", ["unshare", "-n", sys.executable, "-I", str(Path(__file__).resolve()), *sys.argv[1:]])
    for number in SIGNALS:
        signal.signal(number, interrupt)
    began = time.monotonic()
    # A root-owned folder below root-owned folders: nothing that others can rename is executed.
    root = Path(tempfile.mkdtemp(prefix="isolator-demo-", dir="/var/lib"))
    root.chmod(0o755)
    roots, last = [root], 6
    if options.hosts:
        import hosts  # with the servers' client

        roots, last = hosts.roots(root), hosts.LAST
    found = list[Promise]()
    pids: set[int] = set()
    failure = ""
    try:
        found = hosts.run(root, pids) if options.hosts else run(root, pids, options)
    except (DemoError, OSError, TimeoutError, RuntimeError, AssertionError) as error:
        failure = str(error)
    except KeyboardInterrupt:
        failure = "interrupted"
    finally:
        only_clean_up()
        failure = "; ".join(filter(None, [failure, *map(remove, roots)]))
        shutil.rmtree(root, ignore_errors=True)
    left = list(dict.fromkeys(line for one in (root, *roots) for line in leftovers.find(one, pids, own_network=True)))
    found.append(
        Promise(
            "Nothing is left behind",
            not left,
            "; ".join(left) or "no user, group, cgroup, mount, loop device, process, namespace, file",
        )
    )
    if failure:
        found.append(Promise("The demo comes to its end", False, failure[:200]))
    held = False
    with contextlib.suppress(KeyboardInterrupt):  # nobody reads any more; there is nothing left to clean up
        report.heading(last, "What was promised, and what held")
        held = report.promises(found)
        report.say(f"The whole took {time.monotonic() - began:.0f} s.")
    if failure:
        report.fail(failure)
    return 0 if held and not failure else 1


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: by the way that cleans up."""
    only_clean_up()
    raise KeyboardInterrupt


def only_clean_up() -> None:
    """From here on a (second) Ctrl-C would only leave things behind."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run(root: Path, pids: set[int], options: argparse.Namespace) -> list[Promise]:
    """Set up, do the steps, stop the daemon; the promises so far. ``pids`` collects the processes of the cages."""
    with_console = options.browser or options.screenshot is not None
    report.say(
        "Isolator runs other people's plugins, each in a cage of its own. This demo starts the daemon in an empty"
        " network namespace beside a pretend internet (its own resolver, a webhook called hooks.slack.com, a"
        " metadata service, an outside resolver at 8.8.8.8) and treats it as an operator and as an attacker would."
    )
    work = root / "demo"
    work.mkdir(mode=0o700)
    settings = root / "etc/isolator/host.toml"
    (settings.parent / "policies").mkdir(parents=True)
    # A quarter of an emulated processor takes its time to import what a plugin needs.
    settings.write_text(f'[network]\nresolvers = ["{internet.RESOLVER}"]\n[defaults]\nstart_timeout = "2m"\n'
                        + (console.SETTINGS if with_console else ""))  # fmt: skip
    settings.chmod(0o644)
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(internet.Internet(work))
        contacts: list[str] = []
        stack.enter_context(serving(contacts))
        daemon = stack.enter_context(Daemon(root, work, work / "daemon.log"))
        trail = stack.enter_context(Trail(daemon))
        demo = Demo(root, work, daemon, net, trail, contacts)
        port = stack.enter_context(console.leading(int(os.environ[INSIDE]))) if options.browser else 0
        if options.browser:
            console.offer(daemon, port)
        try:
            for step in steps.STEPS:
                step(demo)
            if options.screenshot is not None:
                console.take_pictures(demo, options.screenshot)
            if options.browser:
                console.wait_for_person(daemon, port)
        finally:
            pids.update(int(record["data"]["pid"]) for record in trail.kinds("plugin.started"))
    steps.record_holds(demo)
    return demo.promises


@contextlib.contextmanager
def serving(contacts: list[str]) -> Iterator[None]:
    """A database-like service on every address of the host, loopback first of all."""
    server = internet.banner_server("0.0.0.0", DATABASE_PORT, contacts.append)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def remove(root: Path) -> str:
    """Have the daemon's own command remove what it made; what went wrong, or nothing."""
    root.mkdir(exist_ok=True)
    daemon = Daemon(root, root, root / "uninstall.log")
    try:
        code, text = daemon.run("uninstall", "--purge", "--yes")
    except (DemoError, OSError) as error:
        code, text = 1, str(error)
    return "" if code == 0 else f"'isolator uninstall --purge --yes' ended with {code}: {text.strip()[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
