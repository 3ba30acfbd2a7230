"""Templates: everything that is put into one is escaped for HTML, and for the eye as for a terminal.

What a plugin wrote never reaches a page but through ``shown``: characters that are not plainly visible (control and
direction-changing characters, escape sequences) stand there as escapes, and a long text is cut.
"""

from __future__ import annotations

import json
import time
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from host.cli.output import ago, duration, latency, result_in
from isolator.errors import printable
from isolator.policy.units import format_size

LONGEST = 2000
"""Characters of one text on a page."""


def shown(value: Any) -> Any:
    """A value as it may stand on a page; jinja2 escapes it for HTML afterwards."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return "–"
    text = printable(str(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"


def _plain(value: Any) -> str:
    """A value as text; one that is no text, as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _result(reply: str | None) -> str | None:
    return result_in(reply) if reply is not None else None


def environment() -> Environment:
    """The environment of every page, and of the report."""
    made = Environment(
        loader=PackageLoader("host.console", "templates"), autoescape=True, finalize=shown, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, auto_reload=False,
    )  # fmt: skip
    made.filters |= {
        "ago": ago, "count": "{:,}".format, "plain": _plain, "result": _result,
        "duration": duration, "latency": latency, "size": format_size,
        "until": lambda moment: duration(moment - time.time()), "when": lambda text: str(text)[:19].replace("T", " "),
    }  # fmt: skip
    return made
