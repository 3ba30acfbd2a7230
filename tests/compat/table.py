"""A page for readers, from what a run saw."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

from tests.compat.program import Result
from tests.compat.sandboxes import BUBBLEWRAP, FIREJAIL, ISOLATOR

_HEAD = """\
# Compatibility

Real programs, each doing real work in a cage, and the same script under bubblewrap and firejail. The scripts are in
[tests/compat/](../tests/compat/); this page is written by

<!-- not run: installs more than a hundred programs -->
```
sudo ./dev test tests/compat --all --write-table "$PWD/docs/compatibility.md"
```

which installs what a program needs into overlays of `/usr`, `/etc` and `/var`: the host does not change, and no service
is started. Without `--all` it leaves out large packages and what has to come from PyPI and npm.

| | every row is run as |
|---|---|
"""
_LEGEND = """
"Flags" are those of `isolator run` beyond these; `/tmp` counts as memory, and what is read besides is bound for
bubblewrap, too. firejail uses its `default.profile`, as for any command that it does not know. A dash: not to be
compared, as neither bubblewrap nor firejail sets a limit on memory or decides by name where a connection goes.

Clients of services run once more without their grant, and have to fail then. [Plugins](../tests/compat/plugins/) have a
daemon, a manifest and a policy in place of flags; a row counts if the first delivery of the event succeeded and nothing
was refused.
"""
_MARK = {True: "yes", False: "**no**", None: "–"}


def write(results: Iterable[Result], file: Path, order: Iterable[tuple[str, str]]) -> None:
    """Write the page; ``order`` has the group and name of every row that there is."""
    by_name = {(row.group, row.name): row for row in results}
    rows = [by_name[key] for key in order if key in by_name]
    file.write_text(text(rows))


def text(rows: list[Result]) -> str:
    """The page's text."""
    lines = [
        _HEAD
        + f"| isolator | `{ISOLATOR} FLAGS -- bash -c SCRIPT` |\n| bubblewrap | `{BUBBLEWRAP} -- bash -c SCRIPT` |\n"
        f"| firejail | `{FIREJAIL} -- bash -c SCRIPT` |\n{_LEGEND}"
    ]
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    compared = [row for row in rows if row.bubblewrap is not None]
    lines.append(
        f"Seen on {system}, Linux {'.'.join(platform.release().split('.')[:2])}: **{sum(r.isolator for r in rows)} of "
        f"{len(rows)}** work. Of the {len(compared)} that can be compared: isolator "
        f"{sum(r.isolator for r in compared)}, {sum(r.isolator and not r.flags for r in compared)} of them without a "
        f"flag; bubblewrap {sum(bool(r.bubblewrap) for r in compared)}; firejail "
        f"{sum(bool(r.firejail) for r in compared)}.\n"
    )
    for group in dict.fromkeys(row.group for row in rows):
        lines.append(
            f"## {group}\n\n| program | work | isolator | flags | bubblewrap | firejail |\n|---|---|---|---|---|---|"
        )
        lines += [
            f"| {row.name} | {_cell(row.work)} | {_MARK[row.isolator]} | {f'`{row.flags}`' if row.flags else ''} | "
            f"{_MARK[row.bubblewrap]} | {_MARK[row.firejail]} |"
            for row in rows
            if row.group == group
        ]
        lines.append("")
    refused = [row for row in rows if not row.isolator]
    if refused:
        lines.append("## Why not\n\n| program | reason |\n|---|---|")
        lines += [f"| {row.name} | {row.why or 'unknown'} |" for row in refused]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
