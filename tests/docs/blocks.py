"""Command blocks of the documents: found, run as a person would, and compared with the output that they show."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.timeouts import seconds

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "bench", "clients", "examples", "packaging", "policies", "tests", "vagrant")
_ELSEWHERE = {"node_modules", "templates", "out"}
"""Folders of pages that are not this repository's, or that become another's (tests/system/test_new.py runs those)."""
PAGES = [
    path
    for pages in (ROOT.glob("*.md"), *((ROOT / name).rglob("*.md") for name in FOLDERS))
    for path in sorted(pages)
    if not _ELSEWHERE & {*path.relative_to(ROOT).parts}
]
_FENCE = re.compile(
    r"(?:^ *<!-- (?:not run: (?P<why>[^\n]+)|run in: (?P<place>[^\n]+)) -->\n)?"
    r"^ *```(?P<kind>\w*)\n(?P<body>.*?)^ *```$",
    re.M | re.S,
)
_PROGRAMS = (
    r"(?:\$ |… \| |sudo |isolator |\./dev |git |systemctl |curl |pip |python3 |apt|npm |cargo |CGO_ENABLED=\d go |go "
    r"|rustc |gcc |javac )"
)
_VARIES = (
    (r"ev_[0-9a-f]+…?", r"ev_[0-9a-f]+"),
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", r"\d{4}-\d\d-\d\dT[\d:.]+Z"),
    (r"[\d.]+ (?:µs|ms|s)\b", r"[\d.]+ (?:µs|ms|s)"),
)
"""Ids, times and durations: as they are shown, and what stands for any."""


@dataclass(frozen=True)
class Block:
    """One block.

    ``why``: the reason of the marker above it, if it cannot be run; ``place``: the test of its own that it has.
    """

    page: str
    kind: str
    body: str
    why: str = ""
    place: str = ""

    @property
    def is_shell(self) -> bool:
        """Whether it holds commands."""
        return self.kind in ("", "sh", "bash", "console") and bool(re.search(rf"^ *{_PROGRAMS}", self.body, re.M))

    def steps(self) -> Iterator[tuple[str, list[str]]]:
        """Each command, and the lines that it is shown to print: those up to the next ``$``, if there is any."""
        lines = textwrap.dedent(self.body).splitlines()
        shows = any(line.startswith("$ ") for line in lines)
        command, shown = "", list[str]()
        for line in lines:
            if command and not _is_whole(command):
                command += f"\n{line}"
            elif line.startswith("$ ") or (not shows and line.split("#")[0].strip()):
                if command:
                    yield command, shown
                command, shown = line.removeprefix("$ "), []
            elif shows:
                shown.append(line)
        if command:
            yield command, shown


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in their order."""
    name = str(page.relative_to(ROOT))
    return [
        Block(name, m["kind"], m["body"], m["why"] or "", m["place"] or "") for m in _FENCE.finditer(page.read_text())
    ]


def shown_in(file: str) -> list[Block]:
    """The blocks whose marker names this file of tests (its ``__file__``): it has to run or to compare each."""
    place = str(Path(file).resolve().relative_to(ROOT))
    return [block for page in PAGES for block in blocks(page) if block.place == place]


def run(block: Block, folder: Path, replace: dict[str, str]) -> list[tuple[str, list[str], str]]:
    """Run every command in one shell in ``folder``, without a network: command, shown lines, output.

    A command that stays in the background is waited for until it prints its first line.
    """
    steps = list(block.steps())
    script = ["exec 2>&1"]
    for number, (command, _) in enumerate(steps):
        line = command
        for old, new in replace.items():
            line = line.replace(old, new)
        if line.endswith("&"):
            out = f"{folder}/background"
            line = f"{line[:-1]}> {out} 2>/dev/null &\nuntil [ -s {out} ]; do sleep 0.05; done; cat {out}"
        script.append(f"echo '=== {number}'\n{line}")
    done = subprocess.run(
        ["unshare", "-n", "bash", "-c", "\n".join(script)], capture_output=True, text=True, check=False, cwd=folder,
        timeout=seconds(120), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    outputs = re.split(r"^=== \d+\n", done.stdout, flags=re.M)[1:]
    assert len(outputs) == len(steps), done.stdout
    return [(command, shown, output) for (command, shown), output in zip(steps, outputs, strict=True)]


def fits(shown: list[str], output: str) -> bool:
    """Whether output is as shown, but for ids, times, durations and spaces; a line ``...`` stands for any lines."""
    return re.fullmatch(_pattern(shown), output) is not None


def holds(shown: str, output: str) -> bool:
    """Whether the lines that a block shows stand in an output, one after the other."""
    return re.search(r"(?:\A|\n)" + _pattern(textwrap.dedent(shown).splitlines()), output) is not None


def _pattern(shown: Iterable[str]) -> str:
    return "".join(r"(?:.*\n)*?" if line.strip() == "..." else rf"\s*{_any(line)}\s*\n" for line in shown)


def _any(line: str) -> str:
    parts, rest = [], line.strip()
    while rest:
        found = [(m.start(), m.end(), any_) for was, any_ in _VARIES if (m := re.search(was, rest))]
        start, end, any_ = min(found, default=(len(rest), len(rest), ""))
        parts += [r"\s+".join(map(re.escape, re.split(r"\s+", rest[:start]))), any_]
        rest = rest[end:]
    return "".join(parts)


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return not command.endswith("\\")
