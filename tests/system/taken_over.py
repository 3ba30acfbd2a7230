"""A process of the daemon's, taken over: it does its work, and sends the supervisor whatever a test wants.

``tests.system.taken_over`` with ``TAKEN=MODULE`` is MODULE, of the daemon's services, with a socket of its own
(``$ORDERS/MODULE``) that takes lines of JSON. ``{"op": NAME, "fields": {}}`` goes to the supervisor over the channel
that the process was given, with a descriptor of ``{"folder": PATH}``. ``{"connect": PATH}`` and ``{"open": PATH}`` are
done with the process's own rights. ``{"fence": [VERB, ...]}`` calls the fences of a host, as a holder of leases does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import runpy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isolator.errors import IsolatorError
from isolator.ipc import channel
from isolator.linux.descriptors import close_all
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, alive, daemon, wait_for

ORDERS = "orders"
"""Folder of the sockets, below the daemon's root."""


class TakenOver(Daemon):
    """A daemon whose host and audit process are in an attacker's hands."""

    def command(self) -> list[str]:
        orders = self.root / ORDERS
        orders.mkdir(exist_ok=True)
        orders.chmod(0o777)
        program = (
            "import sys\n"
            "from dataclasses import replace\n"
            "from isolator.supervisor.zygote import Zygote\n"
            "real = Zygote.fork\n"
            "def fork(zygote, spec, descriptors):\n"
            "    if 'broker' not in spec.module:\n"
            f"        zygote.environment['ORDERS'], zygote.environment['TAKEN'] = {str(orders)!r}, spec.module\n"
            "        spec = replace(spec, module='tests.system.taken_over')\n"
            "    return real(zygote, spec, descriptors)\n"
            "Zygote.fork = fork\n"
            "from host.cli.main import main; sys.exit(main())"
        )
        return [sys.executable, "-I", "-c", program, "--root", str(self.root), "serve"]

    def service_pid(self, module: str, *, missing_ok: bool = False) -> int:
        """Those that are taken over have another name, and note their pid themselves."""
        if "broker" in module:
            return super().service_pid(module, missing_ok=missing_ok)
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.root / ORDERS / f"{module}.pid").read_text())
            if alive(pid):
                return pid
        assert missing_ok, f"no {module}"
        return 0

    def order(self, module: str, **order: Any) -> dict[str, Any]:
        """Have a process do something; returns the answer, or the error under ``error``."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(seconds(60))
            sock.connect(str(self.root / ORDERS / module))
            sock.sendall(json.dumps(order).encode() + b"\n")
            with sock.makefile("rb") as answers:
                return json.loads(answers.readline())

    def fence(self, verb: str, *arguments: Any) -> None:
        """Have the host hold, free or lose a plugin; if one is about to take another's place, that one."""

        def done() -> bool:
            with contextlib.suppress(OSError, ValueError):
                return "error" not in self.order("host.service", fence=[verb, *arguments])
            return False

        wait_for(done, what="no host obeys")

    def ask_as_host(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send the supervisor a request in the host process's name."""
        return self.order("host.service", op=op, fields=fields)


@contextlib.contextmanager
def taken_over(host_toml: str = "") -> Iterator[TakenOver]:
    """A running daemon of that kind."""
    with daemon(host_toml=host_toml, kind=TakenOver) as made:
        assert isinstance(made, TakenOver)
        yield made


_fences: list[Any] = []
"""Those of this process, if it is a host."""


async def _obey(link: channel.Channel, order: dict[str, Any]) -> dict[str, Any]:
    try:
        if "fence" in order:
            if not _fences:
                return {"error": {"code": "no hello yet"}}
            verb, *arguments = order["fence"]
            getattr(_fences[-1], verb)(*arguments)
        elif "op" in order:
            fds = [os.open(order["folder"], os.O_RDONLY | os.O_DIRECTORY)] if "folder" in order else []
            try:
                answer = await link.call(order["op"], fds=fds, timeout=seconds(60), **order["fields"])
            finally:
                close_all(fds)
            answer.close()
            return answer.fields
        elif "connect" in order:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(order["connect"])
        else:
            Path(order["open"]).read_bytes()
    except IsolatorError as error:
        return {"error": error.to_json()}
    except OSError as error:
        return {"error": {"code": type(error).__name__}}
    return {}


def _keep_fences() -> None:
    from host.fence.fences import Fences

    made = Fences.__init__

    def init(self: Fences, *arguments: Any) -> None:
        made(self, *arguments)
        _fences.append(self)

    Fences.__init__ = init  # type: ignore[method-assign]


def main() -> None:
    """Run the service, and obey."""
    orders, module = os.environ["ORDERS"], os.environ["TAKEN"]
    sys.argv[0] = module
    note = Path(orders) / f"{module}.pid"
    note.unlink(missing_ok=True)
    note.write_text(str(os.getpid()))
    real = channel.Channel.__init__
    kept = []

    def init(self: channel.Channel, *arguments: Any, **keywords: Any) -> None:
        real(self, *arguments, **keywords)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(json.dumps(await _obey(self, json.loads(await reader.readline()))).encode() + b"\n")
            writer.close()

        path = Path(orders) / module
        path.unlink(missing_ok=True)
        kept.append(asyncio.get_running_loop().create_task(asyncio.start_unix_server(serve, path)))

    channel.Channel.__init__ = init  # type: ignore[method-assign]
    if module == "host.service":
        _keep_fences()
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
