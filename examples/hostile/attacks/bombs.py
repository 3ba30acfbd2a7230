"""Attacks by quantity. Each truly exceeds the caps it is sent against, and ends by itself all the same."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from pathlib import Path

from .outcome import Known, Outcome, checked, deadline, libc, said

FORKS = 500
MEMORY_MIB = 1024
TMP_MIB = 64
FILES = 5000
FLOOD_MIB = 16

PR_SET_PDEATHSIG = 1
MIB = 1 << 20


def fork_bomb(known: Known) -> Outcome:
    """Many processes alive at the same time."""
    limit, left, stopped = int(known.get("forks", FORKS)), deadline(), ""
    parent, children = os.getpid(), list[int]()
    try:
        while len(children) < limit and left():
            try:
                child = os.fork()
            except OSError as error:
                stopped = said(error)
                break
            if child == 0:
                checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
                if os.getppid() == parent:  # else it died before the line above: nobody would kill us
                    signal.pause()
                os._exit(0)
            children.append(child)
        reached = len(children)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
    detail = "all of them" if reached == limit else stopped or "out of time"
    return Outcome(reached == limit, detail, f"{reached} of {limit} processes")


def memory_bomb(known: Known) -> Outcome:
    """Memory, every page written, in a child. An out-of-memory kill may take this process too: then no reply comes."""
    limit = int(known.get("mib", MEMORY_MIB))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        hoard, left = list[bytearray](), deadline()
        with contextlib.suppress(MemoryError):
            while len(hoard) * 8 < limit and left():
                hoard.append(bytearray(b"x") * (8 * MIB))
                os.write(writer, b".")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reached = 8 * len(pipe.read())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    detail = f"killed by {signal.Signals(-code).name}" if code < 0 else "all of it" if reached >= limit else "no more"
    return Outcome(reached >= limit, detail, f"{reached} of {limit} MiB")


def fill(directory: Path, limit: int) -> Outcome:
    path, left, reached, stopped = directory / f"fill-{os.getpid()}", deadline(), 0, ""
    chunk = b"x" * MIB
    try:
        with path.open("xb", buffering=0) as file:
            while reached < limit * MIB and left():
                reached += file.write(chunk) or 0
    except OSError as error:
        stopped = said(error)
    finally:
        path.unlink(missing_ok=True)
    done = reached >= limit * MIB
    return Outcome(done, "all of it" if done else stopped or "out of time", f"{reached / MIB:.1f} of {limit} MiB")


def fill_tmp(known: Known) -> Outcome:
    """More in /tmp than there is room for; on most hosts that is memory."""
    return fill(Path(known.get("directory", "/tmp")), int(known.get("mib", TMP_MIB)))


def fill_state(known: Known) -> Outcome:
    """More in the state directory than was granted: the host's disk."""
    return fill(
        Path(known.get("directory", os.environ.get("PLUGIN_STATE_DIR", "/state"))), int(known.get("mib", TMP_MIB))
    )


def open_files(known: Known) -> Outcome:
    """Raise the limit, then open files until it ends."""
    limit, descriptors, notes, left = int(known.get("files", FILES)), list[int](), list[str](), deadline()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limit + 1000  # beside those that are open already
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, before[1])))
    except (OSError, ValueError) as error:
        notes.append(f"raising the limit: {error if isinstance(error, ValueError) else said(error)}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        while len(descriptors) < limit and left():
            descriptors.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        notes.insert(0, said(error))
    reached = len(descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(before[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]), before[1])
    )
    detail = "all of them" if reached == limit else "; ".join(notes) or "out of time"
    return Outcome(reached == limit, detail, f"{reached} of {limit} files")


def flood_stdout(known: Known) -> Outcome:
    """Output without end. All of it may well be taken; whether it can fill the host's disk only the host can say."""
    limit, left, reached = int(known.get("mib", FLOOD_MIB)) * MIB, deadline(), 0
    line = b"flood " * 682 + b"...\n"
    assert len(line) <= select.PIPE_BUF  # poll promises room for that much only
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    began = time.monotonic()
    while reached < limit and left():
        if poll.poll(left() * 1000):
            reached += os.write(1, line)
    took = time.monotonic() - began
    detail = "everything was taken" if reached >= limit else f"blocked for the rest of {took:.1f} s"
    return Outcome(reached >= limit, detail, f"{reached / MIB:.1f} of {limit // MIB} MiB written in {took:.2f} s")
