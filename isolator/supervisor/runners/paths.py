"""Paths of a run, opened by its caller, as mounts for its cage: by a process that may hang, within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.packet import pair, receive_packet, send_message
from isolator.ipc.run_request import unpack
from isolator.layers.base import Bind, Tree
from isolator.linux.descriptors import FdSet
from isolator.linux.readable import readable

_MODULE = "isolator.collector.paths"
"""Named, never imported."""
_SECONDS = 10.0
_FACTS = re.compile(rb"([df])([0-9]{1,20})")


async def find_paths(
    paths: Sequence[tuple[str, bool]],
    fds: Sequence[int],
    caller: tuple[int, int, Sequence[int]],
    cage: int,
    owned: FdSet,
) -> list[Bind]:
    """The binds of a cage of the uid ``cage``; ``fds`` stay the caller's, ``owned`` gets the new ones.

    Each path is one that the caller (uid, gid, groups) had open for reading under that name; one that may be changed it
    may change. Raises IsolatorError.
    """
    uid, gid, groups = caller
    mine, theirs = pair()
    with contextlib.closing(mine):
        with contextlib.closing(theirs):
            mine.setblocking(False)
            process = _start(theirs.fileno(), uid, gid, groups, cage)
        try:
            words = b"\0".join((b"w" if writable else b"r") + os.fsencode(path) for path, writable in paths)
            send_message(mine, words, fds)
            async with asyncio.timeout(_SECONDS):
                await readable(mine.fileno())
            packet, found = receive_packet(mine)
            for fd in found:
                owned.add(fd)
            return _binds(paths, packet, found)
        except TimeoutError:
            names = ", ".join(path for path, _ in paths[:3])
            why = f"not opened in {_SECONDS:g} s: a file system hangs"
            raise UnavailableError(names, why, "try again, or leave it out") from None
        except OSError as error:
            raise IsolatorError("paths", error.strerror or str(error), "try again") from None
        finally:
            process.kill()
            await _end(process)


def _start(connection: int, uid: int, gid: int, groups: Sequence[int], cage: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-m", _MODULE, str(uid), str(gid), ",".join(map(str, groups)), str(cage)],
        stdin=connection, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
    )  # fmt: skip


def _binds(paths: Sequence[tuple[str, bool]], packet: bytes, found: Sequence[int]) -> list[Bind]:
    facts = [_FACTS.fullmatch(word) for word in packet.split(b" ")]
    if len(found) == len(paths) == len(facts) and all(facts):
        trees = [Tree(match[1] == b"d", int(match[2])) for match in facts if match is not None]
        made = zip(paths, found, trees, strict=True)
        return [Bind(path, fd, writable=writable, tree=tree) for (path, writable), fd, tree in made]
    fields = dict(unpack(packet)) if packet.startswith(b"error=") else {}
    if fields:
        raise IsolatorError.from_json(fields | {"code": fields["error"]})
    raise IsolatorError("paths", "the process that looks for them has failed", "see the daemon's log")


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Reap it; one that hangs in a file system is left for the start of a later one."""
    with contextlib.suppress(TimeoutError), FdSet() as owned:
        if process.poll() is None:
            ended = owned.add(os.pidfd_open(process.pid))
            async with asyncio.timeout(_SECONDS):
                await readable(ended)
            process.wait()
