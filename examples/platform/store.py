"""What the platform knows, in SQLite, and its outbox.

A change and the event that tells of it are written in one transaction. An event that is in the outbox will be emitted,
however often the platform or the daemon dies in between; its ``key`` makes the daemon recognise a repetition.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isolator.errors import IsolatorError, NotFoundError

Row = dict[str, Any]
TABLES = """
CREATE TABLE IF NOT EXISTS projects (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, name TEXT UNIQUE, repo_url TEXT,
  default_branch TEXT, created_at TEXT);
CREATE TABLE IF NOT EXISTS deployments (seq INTEGER PRIMARY KEY, id TEXT UNIQUE,
  project_id TEXT REFERENCES projects(id), state TEXT, branch TEXT, commit_sha TEXT, url TEXT,
  error_code TEXT, started_at TEXT, duration_ms INTEGER);
CREATE TABLE IF NOT EXISTS domains (seq INTEGER PRIMARY KEY, project_id TEXT REFERENCES projects(id),
  domain TEXT UNIQUE, is_primary INTEGER, added_at TEXT);
CREATE TABLE IF NOT EXISTS outbox (seq INTEGER PRIMARY KEY, key TEXT UNIQUE, name TEXT, payload TEXT, about TEXT,
  event_id TEXT, error TEXT);
CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox(seq) WHERE event_id IS NULL AND error IS NULL;
CREATE INDEX IF NOT EXISTS outbox_about ON outbox(about);
"""


class Store:
    """One connection for all threads; every method is one transaction. ``on_event`` is told of new outbox rows."""

    def __init__(self, path: Path) -> None:
        self.on_event: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # an answered request survives a power cut
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.executescript(TABLES)
        except sqlite3.Error as error:
            raise IsolatorError(str(path), str(error), "name a folder that this user can write") from None

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def add_project(self, name: str, repo_url: str | None, default_branch: str) -> Row:
        """Create a project."""
        row = {"id": _new_id("prj"), "name": name, "repo_url": repo_url, "default_branch": default_branch}
        row["created_at"] = _now()
        event = {"project_id": row["id"], **{key: value for key, value in row.items() if key != "id"}}
        return self._add("projects", row, ("project.created", event))

    def add_domain(self, project_id: str, domain: str, is_primary: bool) -> Row:
        """Attach a domain to a project."""
        row = {"project_id": project_id, "domain": domain, "is_primary": is_primary, "added_at": _now()}
        return self._add("domains", row, ("domain.added", row))

    def add_deployment(self, project_id: str, branch: str | None, commit_sha: str | None) -> Row:
        """Accept a deployment; ``next_deployment`` finds it."""
        branch = branch or self.one("projects", "id", project_id)["default_branch"]
        row = {"id": _new_id("dep"), "project_id": project_id, "state": "running", "branch": branch}
        row |= {"commit_sha": commit_sha, "started_at": _now()}
        event = {"project_id": project_id, "deployment_id": row["id"], "branch": branch, "commit_sha": commit_sha}
        return self._add("deployments", row, ("deploy.started", event | {"started_at": row["started_at"]}))

    def next_deployment(self) -> Row | None:
        """The oldest deployment that has no end yet, also one that an earlier process left."""
        found = self._read("SELECT * FROM deployments WHERE state='running' ORDER BY seq LIMIT 1")
        return found[0] if found else None

    def finish(self, deployment: Row, duration_ms: int, *, url: str | None = None, error: str | None = None) -> None:
        """Write down how a deployment ended; nothing when that is known already."""
        event = {"project_id": deployment["project_id"], "deployment_id": deployment["id"], "finished_at": _now()}
        event |= {key: deployment[key] for key in ("branch", "commit_sha")} | {"duration_ms": duration_ms}
        name, more = ("deploy.failed", {"error_code": error}) if error else ("deploy.completed", {"url": url})
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE deployments SET state=?, url=?, error_code=?, duration_ms=? WHERE id=? AND state='running'",
                ("failed" if error else "ready", url, error, duration_ms, deployment["id"]),
            )
            if changed.rowcount:
                self._put(db, name, event | more)
        self.on_event()

    def report_error(self, project_id: str, event: Row) -> Row:
        """Pass an application's error on; the platform keeps nothing of it but the event."""
        self.one("projects", "id", project_id)
        event = {"project_id": project_id, "error_id": _new_id("err"), "last_seen": _now(), **event}
        with self._transaction() as db:
            self._put(db, "error.detected", event)
        self.on_event()
        return event

    def one(self, table: str, column: str, value: str) -> Row:
        """The row with that value; raises NotFoundError. Table and column are our own words, never a caller's."""
        found = self._read(f"SELECT * FROM {table} WHERE {column}=?", value)
        if not found:
            raise NotFoundError(f"{table[:-1]} {value[:80]}", "does not exist")
        return _shown(found[0])

    def some(self, table: str, project_id: str | None, limit: int) -> list[Row]:
        """The newest rows, of one project or of all."""
        where, args = ("WHERE project_id=?", [project_id]) if project_id is not None else ("", [])
        return [
            _shown(row) for row in self._read(f"SELECT * FROM {table} {where} ORDER BY seq DESC LIMIT ?", *args, limit)
        ]

    # The outbox

    def waiting(self, limit: int = 100) -> list[Row]:
        """Events to emit, oldest first: that order is what plugins see."""
        return self._read("SELECT * FROM outbox WHERE event_id IS NULL AND error IS NULL ORDER BY seq LIMIT ?", limit)

    def settle(self, seq: int, *, event_id: str | None = None, error: str | None = None) -> None:
        """An event was accepted by the daemon, or can never be."""
        with self._transaction() as db:
            db.execute("UPDATE outbox SET event_id=?, error=? WHERE seq=?", (event_id, error, seq))

    def events(self, about: str) -> list[Row]:
        """The events of one deployment: name, the daemon's id once it has one, why it was refused."""
        return self._read("SELECT name, event_id, error FROM outbox WHERE about=? ORDER BY seq", about)

    def health(self) -> Row:
        """How many events wait, and how many the daemon refused."""
        return self._read(
            "SELECT count(*) FILTER (WHERE event_id IS NULL AND error IS NULL) AS waiting,"
            " count(*) FILTER (WHERE error IS NOT NULL) AS refused FROM outbox"
        )[0]

    # Helpers

    def _add(self, table: str, row: Row, event: tuple[str, Row]) -> Row:
        if "project_id" in row:
            self.one("projects", "id", row["project_id"])
        names = ", ".join(row)
        try:
            with self._transaction() as db:
                marks = ", ".join("?" * len(row))
                db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))
                self._put(db, *event)
        except sqlite3.IntegrityError:
            raise IsolatorError(f"{table[:-1]} {row.get('name') or row.get('domain')}", "exists already") from None
        self.on_event()
        return row

    @staticmethod
    def _put(db: sqlite3.Connection, name: str, event: Row) -> None:
        payload = json.dumps({key: value for key, value in event.items() if value is not None})
        about = event.get("deployment_id") or event["project_id"]
        db.execute(
            "INSERT INTO outbox (key, name, payload, about) VALUES (?,?,?,?)", (_new_id("evt"), name, payload, about)
        )

    def _read(self, query: str, *args: Any) -> list[Row]:
        with self._lock:
            return [dict(row) for row in self._db.execute(query, args)]

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db, self._lock)


class _Transaction:
    def __init__(self, db: sqlite3.Connection, lock: threading.Lock) -> None:
        self._db, self._lock = db, lock

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        finally:
            self._lock.release()


def _shown(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "seq" and value is not None}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:16]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
