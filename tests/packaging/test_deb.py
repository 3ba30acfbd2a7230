"""The Debian package installed, upgraded and purged on overlays of this host; with systemd it is in ``vm/``."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.package import BUILD, NEWER, build
from tests.support.timeouts import seconds
from tests.system.daemon import event, write_plugin

OVERLAYS = """
set -eu
mount -t tmpfs none "$1"
for folder in usr etc var; do
    mkdir -p "$1/$folder" "$1/$folder.work"
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$1/$folder,workdir=$1/$folder.work" "/$folder"
done
mount -t tmpfs none /run
mkdir /run/lock
cp -r "$2" /run/packages
rm -rf /etc/isolator /var/lib/isolator /var/log/isolator
rm -f /etc/*.lock  # of a useradd on the host, at the moment of the mount
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export DEBIAN_FRONTEND=noninteractive
package() { dpkg --force-depends --force-confold -i "$1" >/run/log 2>&1 || { cat /run/log >&2; return 1; }; }
patiently() {
    for _ in $(seq 600); do "$@" 2>/run/tried && return; sleep 0.1; done
    cat /run/tried /run/*log >&2; exit 1
}
"""
"""Mounts of its own, with nothing of the host's but what is installed; then the steps of one test."""


LATE = """
import sys, isolator
print("up", flush=True)
sys.stdin.read()
import isolator.cli.gc
print("late import:", *(line for line in open(isolator.__file__) if line.startswith("__version__")), end="")
"""
"""A process of the version before, which goes on to import its own code."""


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="isolator-deb-test-"))
    try:
        _, newer = build(folder)
        newer.rename(folder / "newer.deb")
        next(folder.glob("isolator_*.deb")).rename(folder / "this.deb")
        yield folder
    finally:
        shutil.rmtree(folder)


def steps(packages: Path, script: str, *alone: str) -> str:
    """What a script prints on overlays that vanish with it; ``alone``: further namespaces, as options of unshare."""
    place = tempfile.mkdtemp(prefix="isolator-overlay-")
    try:
        command = ["unshare", "-m", *alone, "--propagation", "private"]
        command += ["sh", "-c", OVERLAYS + script, "sh", place, str(packages)]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=seconds(300)
        )
    finally:
        Path(place).rmdir()
    assert result.returncode == 0, (result.stdout, result.stderr)
    return result.stdout


@pytest.mark.wide
def test_package_is_installed_upgraded_removed_and_purged(packages: Path) -> None:
    (packages / "late.py").write_text(LATE)
    out = steps(packages, """
mkfifo /run/fifo
package /run/packages/this.deb
echo "version: $(isolator --version)"
zcat /usr/share/man/man1/isolator-plugin-add.1.gz | grep -c "^.SH SYNOPSIS"
/usr/lib/isolator/current/bin/python3 -I -c "import h11, jinja2, nats, starlette, uvicorn; print('extras')"
isolator install 2>&1 | sed 's/^/install: /'
isolator uninstall --purge --yes 2>&1 | sed 's/^/uninstall: /'
"$(readlink -f /usr/lib/isolator/current)/bin/python3" -I /run/packages/late.py </run/fifo >/run/late 2>&1 &
old=$!
exec 3>/run/fifo
while ! grep -q up /run/late; do sleep 0.1; done
real=$(readlink -f /usr/lib/isolator/current)
echo "# mine" >>/etc/isolator/host.toml
package /run/packages/newer.deb
echo "newer: $(isolator --version)"
exec 3>&-
wait $old || :
cat /run/late
[ "$real" != "$(readlink -f /usr/lib/isolator/current)" ] && echo "exchanged"
tail -n 1 /etc/isolator/host.toml
useradd --system --uid 64801 plugin-kept; useradd --system --uid 64802 isolator-host  # uids of nobody on the host
mkdir -p /var/lib/isolator/plugins/kept /var/log/isolator/audit
printf '{\\n "name": "kept",\\n "user": "plugin-kept"\\n}' >/var/lib/isolator/plugins/kept/plugin.state
dpkg -r isolator >/dev/null
[ -e /usr/lib/isolator ] || echo "no program"
[ -e /var/lib/isolator/plugins/kept/plugin.state ] && [ -e /etc/isolator/host.toml ] && echo "data are kept"
dpkg -P isolator >/dev/null 2>&1
for left in /etc/isolator /var/lib/isolator /var/log/isolator /usr/lib/isolator /usr/bin/isolator; do
    [ ! -e $left ] || echo "left: $left"
done
getent passwd plugin-kept isolator-host || echo "no user"
""", "-p", "--fork", "--mount-proc", "--kill-child")  # fmt: skip
    lines = out.splitlines()
    assert lines[0].startswith("version: isolator, version ")
    assert lines[1:3] == ["1", "extras"]
    assert re.match("install: isolator: install: the Debian package isolator is installed", lines[3])
    assert "apt-get purge isolator" in lines[4]
    this = lines[0].rpartition(" ")[2]
    assert lines[5:] == [
        f"newer: isolator, version {NEWER}", "up", f'late import: __version__ = "{this}"', "exchanged", "# mine",
        "no program", "data are kept", "no user",
    ]  # fmt: skip


SYSTEMCTL = """\
#!/bin/sh
# Stands in for systemd: one service, the daemon whose pid is in /run/daemon.
case " $* " in
*" is-active "*) [ -e /run/daemon ] ;;
*" stop "*)
    kill "$(cat /run/daemon)"
    while [ -e /run/daemon ]; do sleep 0.1; done ;;
esac
"""
SERVE = """\
#!/bin/sh
/usr/lib/isolator/current/bin/isolator serve >/run/ready 2>/run/serve.log &
echo $! >/run/daemon
wait $! && echo "the daemon ended well" || { echo "the daemon failed"; cat /run/serve.log; }
rm /run/daemon
"""


@pytest.mark.wide
def test_daemon_and_its_plugins_run_through_an_upgrade_and_a_removal_stops_them(packages: Path) -> None:
    write_plugin(packages / "echo", sandbox={"filesystem": {"state": "4M"}})
    (packages / "systemctl").write_text(SYSTEMCTL)
    (packages / "serve").write_text(SERVE)
    out = steps(packages, f"""
ip link set lo up
rm -f /usr/sbin/policy-rc.d  # of a container
for command in systemctl serve; do rm -f /usr/bin/$command; install -m 755 /run/packages/$command /usr/bin/; done
package /run/packages/this.deb
sed -i 's/^uid_range = .*/uid_range = [75000, 75999]/' /etc/isolator/host.toml
mkdir -p /run/systemd/system
serve & served=$!
patiently grep -q ready /run/ready
isolator plugin add /run/packages/echo --yes >/dev/null
emit() {{ isolator event emit deploy.completed "$1" --wait >/run/emitted || cat /run/emitted; }}
emit '{event("before")}'
pid() {{ isolator plugin show echo --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["pid"])'; }}
born() {{ cut -d' ' -f1,22 /proc/$(pid)/stat; }}
sidecar=$(born) daemon=$(cat /run/daemon)
package /run/packages/newer.deb
cat /run/log | sed -n 's/^isolator: /postinst: /p'
patiently sh -c 'isolator status --json | grep -q {NEWER}'
[ "$(born)" = "$sidecar" ] && kill -0 $daemon && echo "they run on"
emit '{event("after")}'
dpkg -r isolator >/run/log 2>&1
wait $served
[ -e /usr/lib/isolator ] || echo "no program"
package /run/packages/newer.deb
serve & served=$!
patiently grep -q ready /run/ready
emit '{event("again")}'
dpkg -P isolator >/run/log 2>&1 || cat /run/log
wait $served
ls -d /etc/isolator /var/lib/isolator /var/log/isolator /run/isolator /usr/lib/isolator 2>&- || echo "no data"
getent passwd plugin-echo isolator-host || echo "no user"
""", "-n", "-p", "--fork", "--mount-proc", "--kill-child")  # fmt: skip
    ended = "the daemon ended well"
    assert out.splitlines() == ["they run on", ended, "no program", ended, "no data", "no user"]


@pytest.mark.wide
def test_package_refuses_a_service_that_install_made(packages: Path) -> None:
    out = steps(packages, """
mkdir -p /etc/systemd/system
echo "# Written by 'isolator install', which" >/etc/systemd/system/isolator.service
package /run/packages/this.deb 2>&1 || echo refused
[ -e /usr/lib/isolator ] || echo "nothing is there"
""")  # fmt: skip
    assert "run 'sudo isolator uninstall' first" in out
    assert out.splitlines()[-2:] == ["refused", "nothing is there"]


def test_every_dependency_is_pinned_by_hash() -> None:
    text = (BUILD.parent / "requirements.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+( +--hash=sha256:[0-9a-f]{64})+", line) for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    project = tomllib.loads((BUILD.parents[1] / "pyproject.toml").read_text())["project"]
    extras = [one for name in ("cluster", "console", "http") for one in project["optional-dependencies"][name]]
    wanted = {re.split(r"[^A-Za-z0-9-]", requirement)[0] for requirement in (*project["dependencies"], *extras)}
    assert wanted - {"isolator-client"} <= pinned
