"""``./dev fuzz [SECONDS] [NAME]``: look for input that a parser takes badly, led by the branches that it reaches.

Each parser of strangers' bytes is run by atheris in a process of its own, so long, from what ``parsers.py`` makes its
input of. Bad are another error than the parser's own, more executed lines than are in proportion to the bytes, and a
second without an end. What is found is shown as a Python literal, for a test.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.parsers import Parser

LINES_FOR_A_BYTE, LINES_FOR_NOTHING = 60, 20_000
SLOW = 0.02
"""Seconds of processor time from which an input's lines are counted."""


def main(words: list[str]) -> int:
    """Fuzz the parser that is named, or each in turn; the exit code is 1 when something was found."""
    library, seconds, only = Path(words[0]), int(words[1]) if len(words) > 1 else 60, " ".join(words[2:])
    sys.path.insert(0, str(library))
    from tests.fuzz.parsers import PARSERS

    if only:
        names = [name for name in PARSERS if only in name]
        if not names:
            print(f"no parser is called {only}; there are: {', '.join(PARSERS)}", file=sys.stderr)
            return 2
    else:
        names = [*PARSERS]
    failed = [name for name in names if not _passes(name, library, seconds)]
    return 1 if failed else 0


def _passes(name: str, library: Path, seconds: int) -> bool:
    command = [sys.executable, "-I", __file__, "--child", name, str(library), str(seconds)]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = [path.read_bytes() for path in Path(folder).glob("*-*") if path.is_file()]
    if result.returncode == 0:
        done = [line for line in result.stderr.splitlines() if line.startswith(("Done", "#"))][-1:]
        print(f"{name}: {done[0] if done else 'done'}", flush=True)
        return True
    print(f"{name}: FOUND {found}\n{result.stdout[-2000:]}{result.stderr[-2000:]}", flush=True)
    return False


def child(name: str, library: str, seconds: str) -> None:
    """Run one parser under atheris, which ends the process."""
    sys.path[:0] = [library, str(Path(__file__).resolve().parents[2])]
    import atheris

    with atheris.instrument_imports(include=["host", "isolator"]):
        from tests.fuzz.parsers import PARSERS, steps
    parser = PARSERS[name]
    corpus = Path("corpus")
    corpus.mkdir()
    for number, data in enumerate(_seeds(parser)):
        (corpus / str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        begun = time.thread_time()
        with contextlib.suppress(parser.errors):
            parser.parse(data)
        if time.thread_time() - begun > SLOW:
            lines = steps(parser, data)
            if lines > LINES_FOR_A_BYTE * len(data) + LINES_FOR_NOTHING:
                raise RuntimeError(f"{lines} lines for {len(data)} bytes")

    options = [f"-max_total_time={seconds}", f"-max_len={parser.size}", "-timeout=10", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def _seeds(parser: Parser) -> list[bytes]:
    pieces = b"".join(parser.pieces)
    return [begin + middle + end for begin in parser.begins for middle in (b"", pieces) for end in parser.ends]


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
