"""Records of a cage without a daemon: all of them in a file when one was named, else only denials, on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from isolator.errors import UsageError, translated

if TYPE_CHECKING:
    from isolator.audit.schema import RecordData

_SYSCALL, _NETWORK = "syscall.denied", "net.denied"
_DENIALS = (_NETWORK, _SYSCALL, "fs.denied")
"""Their types are written out: the schema takes longer to import than most commands to run."""
_SHOWN_PER_KIND = 5


class Records:
    """The records of one run: all of them in a file when one was named, else only denials, on stderr (not if quiet)."""

    def __init__(self, path: Path | None, run: str, *, quiet: bool = False) -> None:
        self._run, self._quiet = run, quiet
        self._out: IO[str] | None = None
        self._shown: dict[str, int] = {}
        if path is not None:
            with translated(OSError, UsageError, f"--audit {path}", "", "name a file that can be written"):
                self._out = path.open("a")

    @property
    def keeps_all(self) -> bool:
        """Whether records of every type are of use."""
        return self._out is not None

    def record(self, record: RecordData) -> None:
        """Write a record of this process's own."""
        from isolator.audit.client import utc_now

        self.write({"time": utc_now(), "type": record.TYPE, "plugin": "run", "run": self._run, "data": record.data})

    def write(self, record: dict[str, Any]) -> None:
        """Write a record, of whichever process."""
        if self._out is not None:
            self._out.write(json.dumps(record, ensure_ascii=True) + "\n")
            self._out.flush()
        elif record["type"] in _DENIALS and not self._quiet:
            self._show(record["type"], record["data"])

    def _show(self, kind: str, data: dict[str, Any]) -> None:
        text = _denial(kind, data)
        count = self._shown[text] = self._shown.get(text, 0) + 1
        if count == 1 and len(self._shown) <= _SHOWN_PER_KIND * len(_DENIALS):
            print(f"isolator: denied: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._out is not None:
            self._out.close()


def _denial(kind: str, data: dict[str, Any]) -> str:
    if kind == _SYSCALL:
        from isolator.policy.denial import INSTEAD

        instead = INSTEAD.get(str(data.get("call")))
        return f"system call {data.get('call')}" + (f"; {instead}" if instead else "")
    if kind == _NETWORK:
        place = data.get("name") or data.get("address") or "?"
        port = f":{data['port']}" if data.get("port") else ""
        return f"connection to {ascii(str(place))[1:-1]}{port} ({data.get('rule')})"
    return f"access to {ascii(str(data.get('path')))[1:-1]}"
