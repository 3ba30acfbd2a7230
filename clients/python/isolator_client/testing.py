# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the daemon in a platform's unit tests: no root, no cages, no plugins.

    with FakeDaemon(plugins=["slack"]) as daemon:
        my_platform.deploy(Client(daemon.path))
        assert daemon.emitted[0].name == "deploy.completed"
        assert daemon.call("projects.get", {"id": "p1"}) == {"name": "shop"}

It accepts every event without looking at its payload, and each delivery succeeds at once. Use a real daemon to test
whether payloads fit their types, and how plugins behave.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from isolator_client.address import control_socket
from isolator_client.errors import IsolatorError, NotFoundError, UsageError

Answer = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]] | IsolatorError


@dataclass(frozen=True)
class Emission:
    """One event that was emitted."""

    id: str
    name: str
    payload: dict[str, Any]
    dedupe_key: str | None


class FakeDaemon:
    """A control socket of its own, usable as a context manager; ``plugins`` receive every event.

    ``path`` is the socket, ``root`` what ``Client(root=...)`` takes. ``asked`` has every request: verb and parameters.
    """

    def __init__(self, plugins: Iterable[str] = ()) -> None:
        self.root = tempfile.mkdtemp(prefix="isolator-fake-")
        self.path = control_socket(root=self.root)
        self.plugins = list(plugins)
        self.emitted: list[Emission] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._served: dict[str, socket.socket] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._changed = threading.Condition(self._lock)
        self._connections: set[socket.socket] = set()
        os.makedirs(os.path.dirname(self.path))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, as a daemon that stops, and remove the socket."""
        with self._lock:
            sockets = [self._listener, *self._connections]
        for sock in sockets:
            with contextlib.suppress(OSError):  # it was closed by its other end
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def answer(self, verb: str, answer: Answer | None) -> None:
        """Answer a verb so from now on: with a result, with that of a function, or with an error; None: as usual."""
        with self._lock:
            if answer is None:
                self._answers.pop(verb, None)
            else:
                self._answers[verb] = answer

    def call(
        self, method: str, params: Mapping[str, Any] | None = None, *, plugin: str = "plugin", timeout: float = 5.0
    ) -> Any:
        """Call a method that the platform serves, as a plugin would; returns its result.

        Waits for the platform to serve it. Raises IsolatorError with what the plugin would be answered, TimeoutError.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: method in self._served, timeout):
                raise TimeoutError(f"nobody serves {method}")
            number, future = next(self._numbers), Future[Any]()
            self._calls[number] = future
            connection = self._served[method]
        call = {"call": number, "method": method, "plugin": plugin, "params": dict(params or {})}
        _send(connection, {"method": "api.call", "params": call})
        return future.result(timeout)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    verb, params = message["method"], message.get("params") or {}
                    try:
                        reply: dict[str, Any] = {"result": dict(self._result(verb, params, connection))}
                    except IsolatorError as error:
                        shown = {"code": error.code, "what": error.what, "why": error.why, "remedy": error.remedy}
                        reply = {"error": {"code": -32000, "message": str(error), "data": shown}}
                    _send(connection, {"id": message["id"], **reply})
        except OSError:
            pass  # the client has ended
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._served = {method: at for method, at in self._served.items() if at is not connection}

    def _result(self, verb: str, params: dict[str, Any], connection: socket.socket) -> Mapping[str, Any]:
        with self._changed:
            self.asked.append((verb, params))
            if verb == "api.register":
                self._served[params["method"]] = connection
                self._changed.notify_all()
            chosen = self._answers.get(verb)
        if isinstance(chosen, IsolatorError):
            raise chosen
        if chosen is not None:
            return chosen(params) if callable(chosen) else chosen
        usual = _USUAL.get(verb)
        if usual is None:
            raise UsageError(f"verb {verb}", "the fake daemon has no answer", f"daemon.answer({verb!r}, ...)")
        return usual(self, params)

    def _emit(self, params: dict[str, Any]) -> Mapping[str, Any]:
        key = params.get("dedupe_key")
        with self._lock:
            before = [one for one in self.emitted if key is not None and one.dedupe_key == key]
            if not before:
                number = f"ev_{next(self._numbers):028x}"
                self.emitted.append(Emission(number, params["name"], params.get("payload") or {}, key))
            found = before[0] if before else self.emitted[-1]
        return {"id": found.id, "plugins": self.plugins, "overflowed": [], "duplicate": bool(before)}

    def _wait(self, params: dict[str, Any]) -> Mapping[str, Any]:
        found = next((one for one in self.emitted if one.id == params["id"]), None)
        if found is None:
            raise NotFoundError(f"event {params['id']}", "is not known")
        deliveries = [
            {"plugin": name, "state": "ok", "attempts": 1, "status": "ok", "detail": None, "reply": None,
             "latency_us": 1000}
            for name in self.plugins
        ]  # fmt: skip
        return {"id": found.id, "name": found.name, "payload": found.payload, "deliveries": deliveries}

    def _answered(self, params: dict[str, Any]) -> Mapping[str, Any]:
        with self._lock:
            future = self._calls.pop(params["call"], None)
        if future is not None and params.get("error") is not None:
            future.set_exception(IsolatorError(str(params["error"].get("message", "failed"))))
        elif future is not None:
            future.set_result(params.get("result"))
        return {}


_USUAL: dict[str, Callable[[FakeDaemon, dict[str, Any]], Mapping[str, Any]]] = {
    "event.emit": FakeDaemon._emit,
    "event.wait": FakeDaemon._wait,
    "event.register": lambda _, params: {"name": params["name"], "version": params.get("version", 1)},
    "api.register": lambda _, params: {"method": params["method"], "permission": params["permission"]},
    "api.answer": FakeDaemon._answered,
    "plugin.list": lambda daemon, _: {"plugins": [{"name": name} for name in daemon.plugins], "alarms": []},
}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
