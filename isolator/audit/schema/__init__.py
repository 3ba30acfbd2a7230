"""The records of the trail: one type each, with who may write it and the fields of its ``data``.

    audit.record(NetDenied(rule="port", name="example.org", port=25), plugin=name, run=run_id)

A type is a set of annotated fields; type checkers know its constructor from them. An instance is no more than the
``data`` of one record as it is written: the fields that were passed, in that order. A field declared ``= ABSENT`` may
be missing; ``None`` is written as ``null``. Thousands of records a second pass here, so nothing is checked at run time.

The writer's rule, the table in docs/audit.md and the JSON Schemas in docs/schemas/ follow from this package, and so
does the test that compares it with the trail of a daemon. A field's docstring is its description there. To add a
record: declare its type in the module of its likes, record it, and run ``python3 docs/generate``.

Sizes are in bytes; SHA-256 are 64 hex digits; ``*_us`` are microseconds; a *digest* is the SHA-256 of a plugin's files.
"""

# ruff: noqa: F403, F405  # all that these modules declare is a record, or what records are made of

from __future__ import annotations

from isolator.audit.schema import control, daemon, events, network, runs, tools, trail, versions
from isolator.audit.schema.base import *
from isolator.audit.schema.control import *
from isolator.audit.schema.daemon import *
from isolator.audit.schema.events import *
from isolator.audit.schema.network import *
from isolator.audit.schema.runs import *
from isolator.audit.schema.tools import *
from isolator.audit.schema.trail import *
from isolator.audit.schema.versions import *

RECORDS: dict[str, type[RecordData]] = {
    kind.TYPE: kind
    for module in (daemon, versions, runs, events, tools, network, control, trail)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, RecordData) and hasattr(kind, "SOURCES") and hasattr(kind, "TYPE")
}
"""Every record of the trail by its type, in the order of the modules."""


def may_write(source: str, type: str) -> bool:
    """Whether the process ``source`` may write records of ``type``."""
    kind = RECORDS.get(type)
    return kind is not None and source in kind.SOURCES
