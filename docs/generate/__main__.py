"""Write the generated parts of the documents, or check them: ``python3 -I docs/generate [--check] [DOCUMENT...]``.

A table that follows from types in the code is generated from them, so that it cannot fall behind. It stands in the
document between two lines, ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; the rest is written by hand. Each
generator is one entry of ``PARTS`` in ``parts.py``. ``./dev lint`` runs the check.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this file is run by its path, under -I: nothing else finds the packages beside docs

from docs.generate.parts import PARTS  # noqa: E402
from docs.generate.replace import update  # noqa: E402


def main() -> int:
    """Returns the exit code: 1 when a document is stale and ``--check`` was given."""
    parser = argparse.ArgumentParser(prog="docs/generate", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a document is stale")
    parser.add_argument("documents", nargs="*", metavar="DOCUMENT", help="paths below the repository; default: all")
    arguments = parser.parse_args()
    stale = update(ROOT, [p for p in PARTS if not arguments.documents or p.document in arguments.documents],
                   write=not arguments.check)  # fmt: skip
    for name in stale:
        remedy = "is stale: run 'python3 docs/generate' and commit it" if arguments.check else "written"
        print(f"{name}: {remedy}", file=sys.stderr)
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
