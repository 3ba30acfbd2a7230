"""One script under each sandbox, with the flags that its users use."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.compat.layer import HOME, UID, USER, Layer
from tests.compat.program import Program
from tests.support.cage_fixture import COMMAND
from tests.support.timeouts import seconds

PATIENCE = seconds(120)
BUBBLEWRAP = (
    "bwrap --unshare-all --die-with-parent --new-session --ro-bind /usr /usr --ro-bind /etc /etc "
    "--symlink usr/bin /bin --symlink usr/sbin /sbin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc "
    "--dev /dev --tmpfs /tmp"
)
FIREJAIL = "firejail --quiet --net=none --private-tmp"
"""With its ``default.profile``, which it takes for a command that it does not know."""
ISOLATOR = "isolator run --cpu 100%"
"""A quarter of a processor, the default, would give the same answers later."""

_DONE = "the script is done"
_SHELL = ["bash", "-euo", "pipefail", "-c"]
WAIT = r"""
up() { for _ in $(seq 300); do (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return; sleep 0.1; done; return 1; }
trap 'kill $(jobs -p) 2>/dev/null || :' EXIT
found() { grep "$@" | cat >/dev/null; }
"""
"""``up PORT`` waits for a server; what still runs at the end is ended (firejail would wait for it). ``found`` reads all
that a program writes, where ``grep -q`` would end it by SIGPIPE once it has seen enough."""
ENVIRONMENT = [f"HOME={HOME}", "LANG=C.UTF-8", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]


@dataclass(frozen=True)
class Ending:
    """How a script ended under one sandbox."""

    code: int
    output: str

    @property
    def done(self) -> bool:
        return self.code == 0


@contextmanager
def _project(program: Program) -> Iterator[Path | None]:
    """A folder of the user's that the program may change, if it asks for one; none of the sandboxes covers ``/srv``."""
    if not program.project:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="isolator-project-", dir="/srv"))
    try:
        folder.chmod(0o755)
        os.chown(folder, UID, UID)
        yield folder
    finally:
        shutil.rmtree(folder)


def isolator(place: Path, program: Program, layer: Layer | None, *, network: str = "") -> Ending:
    """Run it in a cage; without a layer, on the host's own ``/usr``."""
    with _project(program) as folder:
        flags = [*ISOLATOR.split()[1:], *program.flags.split()]
        if folder:
            flags += ["--write", str(folder), "--cwd", str(folder)]
        command = [*COMMAND, "--root", str(place), *flags, "--", *_SHELL, _started(program, folder)]
        return _run(command if layer is None else layer.inside(*command, network=network), owner=folder is not None)


def bubblewrap(program: Program, layer: Layer) -> Ending:
    """Run it under bubblewrap, as an ordinary user."""
    with _project(program) as folder:
        bind = ["--bind", str(folder), str(folder), "--chdir", str(folder)] if folder else []
        flags = program.flags.split()
        for flag, read in itertools.pairwise(flags):
            if flag == "--read":
                bind += ["--ro-bind", read, read]
        command = [*BUBBLEWRAP.split(), *bind, "--", "env", "-i", *ENVIRONMENT, "HOME=/tmp"]
        return _run(layer.inside(*as_user(), *command, *_SHELL, _started(program, folder)))


def firejail(program: Program, layer: Layer) -> Ending:
    """Run it under firejail, as an ordinary user.

    Its exit code is that of whichever process ended last, such as a server that the script ends: a line after the
    script's last one says that it came so far.
    """
    with _project(program) as folder:
        script = f"{_started(program, folder)}\necho {_DONE}"
        ending = _run(layer.inside(*as_user(), "env", "-i", *ENVIRONMENT, *FIREJAIL.split(), "--", *_SHELL, script))
        done = _DONE in ending.output.splitlines()
        return Ending(0 if done else ending.code or 1, ending.output)


def plain(program: Program, layer: Layer) -> Ending:
    """Run it outside every sandbox: a script that fails here proves nothing about the others."""
    with _project(program) as folder:
        command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c",
                   'mount -t tmpfs -o mode=1777 none /tmp && exec "$@"', "sh"]  # fmt: skip
        return _run(layer.inside(*command, *as_user(), "env", "-i", *ENVIRONMENT, *_SHELL, _started(program, folder)))


def as_user() -> list[str]:
    """The beginning of a command that the layer's user runs."""
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--"]


def _started(program: Program, folder: Path | None) -> str:
    return f"{WAIT}cd {folder or '/tmp'}\n{program.script}"


def _run(command: list[str], *, owner: bool = False) -> Ending:
    environment = {**os.environ, **({"SUDOUID": str(UID), "SUDO_GID": str(UID)} if owner else {})}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=PATIENCE, check=False, env=environment, cwd="/",
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        text = late.output.decode(errors="replace") if isinstance(late.output, bytes) else late.output or ""
        return Ending(124, f"{text}\nnot done after {PATIENCE:.0f} s")
    return Ending(done.returncode, done.stdout)
