"""The program of a reload: named by this process alone, root's all the way up, and tried before anything changes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from host.database.store import Store
from isolator.errors import IsolatorError
from isolator.ipc.formats import TABLES
from isolator.ipc.handover import AuditState, DaemonState, SubtreeState, TicketsState
from isolator.ipc.succession import SenderState
from isolator.supervisor import alive, kept
from isolator.supervisor.reload import formats, reloader, trial
from isolator.supervisor.reload.program import Program

STATE = DaemonState(
    version="1", generation=1, began=0.0, journal=-1, launcher=-1, launcher_pid=0,
    subtree=SubtreeState(unified="/", v1={}, on_v2=(), blkio=None, cpuset=None), plugins=(), services=(),
    audit=AuditState(
        client=SenderState(
            socket=-1, session="", number=0, pending=(), unacked=(), answered=0, sent=0, acked=0, lost=0, blocked=None,
            alarm=None,
        ),
        sources={}, made_for={},
    ),
    tickets=TicketsState(listener=-1, open=()), alarms={}, found=(),
)  # fmt: skip


def script(folder: Path, body: str) -> Program:
    """A program of root's that answers in its own way."""
    path = folder / "isolator"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return Program(str(path), (str(path), "serve"))


def test_program_is_the_one_that_this_process_was_started_as(monkeypatch: pytest.MonkeyPatch, shared_dir: Path) -> None:
    path = script(shared_dir, "true").path
    monkeypatch.setattr(sys, "argv", [path, "--root", "/x", "serve", "--adopt", "17", "--config", "/y"])
    assert Program.of_this_process() == Program(path, (path, "--root", "/x", "serve", "--config", "/y"))
    monkeypatch.setattr(sys, "argv", ["isolator", "serve"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-I", "/x/main.py", "--adopt", "3"])
    assert Program.of_this_process() == Program(sys.executable, (sys.executable, "-I", "/x/main.py"))


def test_program_that_somebody_else_could_change_is_refused(shared_dir: Path) -> None:
    program = script(shared_dir, "true")
    program.check()
    os.chown(program.path, 12345, 12345)
    with pytest.raises(IsolatorError, match="can be written by somebody other than root"):
        program.check()
    os.chown(program.path, 0, 0)
    shared_dir.chmod(0o777)
    with pytest.raises(IsolatorError, match="can be written by somebody other than root"):
        program.check()
    shared_dir.chmod(0o755)
    link = Program(str(shared_dir / "link"), ("link",))
    (shared_dir / "theirs").mkdir()
    os.chown(shared_dir / "theirs", 12345, 12345)
    os.rename(program.path, shared_dir / "theirs/isolator")
    os.symlink("theirs/isolator", link.path)
    with pytest.raises(IsolatorError, match="can be written by somebody other than root"):
        link.check()
    with pytest.raises(IsolatorError, match="No such file"):
        program.check()


def test_no_thread_but_the_main_one_executes() -> None:
    """Whatever another one has forked would end with it (PR_SET_PDEATHSIG), the cages' launcher too."""
    refused = []

    def work() -> None:
        try:
            reloader.execute(Program("/usr/bin/false", ("false",)), STATE, formats.FORMATS.present)
        except AssertionError as error:
            refused.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert refused


async def test_answer_of_the_program_decides(shared_dir: Path) -> None:
    assert await trial.try_out(script(shared_dir, """echo '{"formats": [5, 4, 3]}'"""), STATE) == 4
    refusing = """echo '{"formats": [3], "error": {"what": "host.toml", "why": "line 3", "remedy": "mend it"}}'"""
    with pytest.raises(IsolatorError, match=r"host\.toml: line 3"):
        await trial.try_out(script(shared_dir, refusing), STATE)
    unreadable = """echo '{"formats": [7], "error": {"what": "state", "why": "format 1", "remedy": ""}}'"""
    with pytest.raises(IsolatorError, match="takes over states of format 7, this one hands over 4"):
        await trial.try_out(script(shared_dir, unreadable), STATE)
    for body in ("true", "echo no JSON", "echo '[]'", "kill -9 $$"):
        with pytest.raises(IsolatorError, match="it gave no answer"):
            await trial.try_out(script(shared_dir, body), STATE)
    with pytest.raises(IsolatorError, match="cannot be executed"):
        await trial.try_out(Program(str(shared_dir / "none"), ("none",)), STATE)


async def test_program_that_knows_only_older_tables_than_the_database_has_is_refused(shared_dir: Path) -> None:
    program = script(shared_dir, """echo '{"version": "1.2", "formats": [4], "tables": 6}'""")
    assert await trial.try_out(program, STATE, tables=6) == 4
    with pytest.raises(IsolatorError, match=r"1\.2 is too old .* tables to version 7, and that one knows 6"):
        await trial.try_out(program, STATE, tables=7)
    silent = script(shared_dir, """echo '{"formats": [3]}'""")
    assert await trial.try_out(silent, STATE, tables=4) == 3
    with pytest.raises(IsolatorError, match="that one knows 4"):
        await trial.try_out(silent, STATE, tables=5)


async def test_version_of_the_tables_is_that_of_the_database(shared_dir: Path) -> None:
    path = shared_dir / "host.db"
    store = Store(path)
    assert kept.tables(path) == TABLES > 0
    await store.run(lambda db: db.execute("CREATE TABLE more (one)"))
    assert kept.tables(path) == TABLES
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={TABLES + 3}")
    assert kept.tables(path) == TABLES + 3
    (shared_dir / "link").symlink_to(path)
    os.mkfifo(shared_dir / "fifo")
    (shared_dir / "short").write_bytes(b"SQLite format 3\0")
    assert [kept.tables(shared_dir / name) for name in ("link", "fifo", "short", "none")] == [0, 0, 0, 0]


async def test_program_that_never_answers_is_ended(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "TICK", 0.05)
    with pytest.raises(IsolatorError, match=r"it does not answer, and has done nothing for 0\.5 s"):
        await trial.try_out(script(shared_dir, "exec sleep 1000"), STATE)


async def test_program_that_is_slow_is_waited_for(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than one that does nothing would be."""
    monkeypatch.setattr(alive, "TICK", 0.1)
    slow = "for i in $(seq 20); do sleep 0.1; done; echo '{\"formats\": [3]}'"
    assert await trial.try_out(script(shared_dir, slow), STATE) == 3
