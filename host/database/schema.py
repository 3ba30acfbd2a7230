"""Tables of the host's database, and the way from an older version of them to this one."""

from __future__ import annotations

GIVEN_UP = "(state='dead' OR state='expired' OR state='quarantined')"
"""Condition of the index of deliveries that were given up, as its queries repeat it. Not ``IN``: SQLite makes a table
of such a list for each row that it changes, which takes ten times as long as the change."""

_CONFIG_NEXT = """CREATE TABLE config_next (
  plugin TEXT NOT NULL, digest TEXT NOT NULL, key TEXT NOT NULL, secret INTEGER NOT NULL, type TEXT NOT NULL,
  value BLOB NOT NULL, updated REAL NOT NULL, PRIMARY KEY (plugin, digest, key)
) WITHOUT ROWID;"""
_OPERATIONS = """CREATE TABLE pauses (plugin TEXT PRIMARY KEY, since REAL NOT NULL, by TEXT NOT NULL);
CREATE TABLE operational (one INTEGER PRIMARY KEY, seq INTEGER NOT NULL, standing TEXT NOT NULL);
CREATE TABLE jobs (
  id TEXT PRIMARY KEY, plugin TEXT NOT NULL, added REAL NOT NULL, dead INTEGER NOT NULL, missed INTEGER NOT NULL,
  first INTEGER NOT NULL, last INTEGER NOT NULL, rate REAL NOT NULL, by TEXT NOT NULL, created REAL NOT NULL,
  state TEXT NOT NULL, total INTEGER NOT NULL, done INTEGER NOT NULL
);
"""
_TABLES = """
CREATE TABLE events (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, time TEXT NOT NULL, accepted REAL NOT NULL,
  expires REAL NOT NULL, subject TEXT NOT NULL, payload TEXT NOT NULL, dedupe_key TEXT, trace TEXT, by TEXT
);
CREATE UNIQUE INDEX events_dedupe ON events(dedupe_key) WHERE dedupe_key IS NOT NULL;
CREATE TABLE deliveries (
  seq INTEGER NOT NULL, plugin TEXT NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0, key TEXT, status TEXT, detail TEXT, reply TEXT,
  latency_us INTEGER, updated REAL NOT NULL, PRIMARY KEY (seq, plugin)
) WITHOUT ROWID;
CREATE TABLE plugins (name TEXT PRIMARY KEY, digest TEXT NOT NULL, version TEXT NOT NULL, added REAL NOT NULL);
CREATE TABLE config (
  plugin TEXT NOT NULL, key TEXT NOT NULL, secret INTEGER NOT NULL, type TEXT NOT NULL, value BLOB NOT NULL,
  updated REAL NOT NULL, PRIMARY KEY (plugin, key)
) WITHOUT ROWID;
CREATE TABLE kv (
  plugin TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, expires REAL, PRIMARY KEY (plugin, key)
) WITHOUT ROWID;
CREATE TABLE event_types (
  name TEXT PRIMARY KEY, schema TEXT NOT NULL, order_by TEXT, version INTEGER NOT NULL, by TEXT
);
"""
_OWED = "CREATE TABLE owed (id TEXT PRIMARY KEY, since TEXT NOT NULL, record TEXT NOT NULL);"
SCHEMA = _TABLES + _CONFIG_NEXT + _OPERATIONS + _OWED
MIGRATIONS = {1: _CONFIG_NEXT, 2: _OPERATIONS, 3: _OWED}
"""Statements that lead from a version of the tables (``TABLES``) to the next one."""
INDEX = f"CREATE INDEX deliveries_given_up ON deliveries(plugin, seq) WHERE {GIVEN_UP}"
"""Made anew where it is another one: versions differ in it, and each can use the tables without its own."""
