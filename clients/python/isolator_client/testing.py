# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the daemon in a platform's unit tests: no root, no cages, no plugins.

    with FakeDaemon(plugins=["slack"]) as daemon:
        my_platform.deploy(Client(daemon.path))
        assert daemon.emitted[0].name == "deploy.completed"
        assert daemon.call("projects.get", {"id": "p1"}) == {"name": "shop"}

It accepts every event without looking at its payload, and each delivery succeeds at once; every plugin that is staged
becomes one of ``plugins``, and each of them is healthy. Use a real daemon to test whether payloads fit their types, and
how plugins behave.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
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
    on_behalf_of: str | None = None


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
        self.registered: dict[str, dict[str, Any]] = {}
        """Event types of the platform's, by name: what ``event.register`` was asked."""
        self._staged: dict[str, str] = {}
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
                        number = -32601 if isinstance(error, _NoAnswerError) else -32000
                        reply = {"error": {"code": number, "message": str(error), "data": shown}}
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
                self._serve_by(connection, params["method"])
            chosen = self._answers.get(verb)
        if isinstance(chosen, IsolatorError):
            raise chosen
        if chosen is not None:
            return chosen(params) if callable(chosen) else chosen
        if verb == "api.unregister":
            return self._unserve_by(connection, params["method"])
        usual = _USUAL.get(verb)
        if usual is None:
            raise _NoAnswerError(f"verb {verb}", "the fake daemon has no answer", f"daemon.answer({verb!r}, ...)")
        return usual(self, params)

    def _serve_by(self, connection: socket.socket, method: str) -> None:
        if method in self._served:
            raise IsolatorError(f"method {method}", "is registered already", "one platform process serves each method")
        self._served[method] = connection
        self._changed.notify_all()

    def _unserve_by(self, connection: socket.socket, method: str) -> Mapping[str, Any]:
        with self._lock:
            if self._served.get(method) is not connection:
                raise UsageError(f"method {method}", "is not served by this connection")
            del self._served[method]
        return {}

    def _register(self, params: dict[str, Any]) -> Mapping[str, Any]:
        if not isinstance(params.get("schema"), dict):
            raise UsageError("event", "schema must be a JSON Schema object")
        self.registered[params["name"]] = params
        return {"name": params["name"], "version": params.get("version", 1)}

    def _unregister(self, params: dict[str, Any]) -> Mapping[str, Any]:
        if self.registered.pop(params["name"], None) is None:
            raise NotFoundError(f"event {params['name']}", "no such event", "see 'isolator event types'")
        return {}

    def _types(self, _: dict[str, Any]) -> Mapping[str, Any]:
        types = [
            {"name": name, "version": one.get("version", 1), "order_by": one.get("order_by"), "filled": None,
             "schema": one["schema"]}
            for name, one in self.registered.items()
        ]  # fmt: skip
        return {"types": types}

    def _need(self, name: str) -> str:
        if name not in self.plugins:
            raise NotFoundError(f"plugin {name}", "is not registered", "see 'isolator plugin list'")
        return name

    def _health(self, params: dict[str, Any]) -> Mapping[str, Any]:
        wanted = params.get("name")
        names = self.plugins if wanted is None else [self._need(wanted)]
        return {"plugins": [_healthy(name) for name in names]}

    def _stage(self, params: dict[str, Any]) -> Mapping[str, Any]:
        place = str(params.get("path") or params.get("binary") or params.get("update") or "")
        name = str(params.get("name") or params.get("update") or "")
        with contextlib.suppress(OSError, ValueError, KeyError, tarfile.TarError):
            name = name or str(json.loads(_manifest(Path(place)))["name"])
        if not name:
            raise UsageError(f"{place}/plugin.json", "not there (or not a regular file)")
        with self._lock:
            token = f"{next(self._numbers):016x}"
            self._staged[token] = name
        return {
            "token": token, "name": name, "version": "1.0.0", "digest": "0" * 64, "description": "", "mode": "oneshot",
            "synthesised": False, "registered": name in self.plugins, "unchanged": False, "files": 1, "size": 0,
            "faults": [], "proposal": {}, "differences": [], "warnings": [], "config": [], "missing": [],
            "secrets_given": [],
        }  # fmt: skip

    def _commit(self, params: dict[str, Any]) -> Mapping[str, Any]:
        with self._lock:
            name = self._staged.pop(params["token"], None)
            if name is None:
                raise UsageError("plugin add", "nothing is staged under that token", "add it again")
            if name not in self.plugins:
                self.plugins.append(name)
        return {"plugin": _entry(name), "missing": []}

    def _discard(self, params: dict[str, Any]) -> Mapping[str, Any]:
        self._staged.pop(params["token"], None)
        return {}

    def _emit(self, params: dict[str, Any]) -> Mapping[str, Any]:
        key = params.get("dedupe_key")
        with self._lock:
            before = [one for one in self.emitted if key is not None and one.dedupe_key == key]
            if not before:
                number = f"ev_{next(self._numbers):028x}"
                payload, person = params.get("payload") or {}, params.get("on_behalf_of")
                self.emitted.append(Emission(number, params["name"], payload, key, person))
            found = before[0] if before else self.emitted[-1]
        return {"id": found.id, "plugins": self.plugins, "overflowed": [], "duplicate": bool(before)}

    def _wait(self, params: dict[str, Any]) -> Mapping[str, Any]:
        found = next((one for one in self.emitted if one.id == params["id"]), None)
        if found is None:
            raise NotFoundError(f"event {params['id']}", "is not known")
        deliveries = [
            {"event_id": found.id, "event": found.name, "plugin": name, "state": "ok", "attempts": 1, "status": "ok",
             "detail": None, "reply": None, "latency_us": 1000, "updated": 0.0, "next_attempt": None,
             "host": None}
            for name in self.plugins
        ]  # fmt: skip
        return {
            "id": found.id, "name": found.name, "time": "1970-01-01T00:00:00.000Z", "accepted": 0.0, "subject": "",
            "payload": found.payload, "by": f"uid:{os.getuid()}", "deliveries": deliveries,
        }  # fmt: skip

    def _answered(self, params: dict[str, Any]) -> Mapping[str, Any]:
        with self._lock:
            future = self._calls.pop(params["call"], None)
        if future is not None and params.get("error") is not None:
            future.set_exception(IsolatorError(str(params["error"].get("message", "failed"))))
        elif future is not None:
            future.set_result(params.get("result"))
        return {}


class _NoAnswerError(UsageError):
    """The test has chosen no answer."""


_ENTRY = ("name", "version", "state", "error", "run", "started_at", "restarts")
"""Keys that a plugin's health has of its entry."""
_UNKNOWN = ("why", "holding", "held_by", "paused", "last", "failing_since", "next_attempt", "ping")
"""Keys of a plugin's health that are null of one about which nothing is known."""


def _manifest(place: Path) -> bytes:
    """The manifest in a folder or a package."""
    if place.is_dir():
        return (place / "plugin.json").read_bytes()
    with tarfile.open(place) as package:
        found = package.extractfile("plugin.json")
        return found.read() if found is not None else b""


def _entry(name: str) -> dict[str, Any]:
    """A plugin that has done nothing yet."""
    return {
        "name": name, "version": "1.0.0", "digest": "0" * 64, "state": "stopped", "error": None, "run": None,
        "pid": None, "uid": None, "started_at": None, "restarts": 0, "effective_digest": None,
    }  # fmt: skip


def _healthy(name: str) -> dict[str, Any]:
    entry = _entry(name)
    return {**{key: entry[key] for key in _ENTRY}, **dict.fromkeys(_UNKNOWN), "healthy": True, "queue": 0}


_USUAL: dict[str, Callable[[FakeDaemon, dict[str, Any]], Mapping[str, Any]]] = {
    "event.emit": FakeDaemon._emit,
    "event.wait": FakeDaemon._wait,
    "event.types": FakeDaemon._types,
    "event.register": FakeDaemon._register,
    "event.unregister": FakeDaemon._unregister,
    "api.register": lambda _, params: {"method": params["method"], "permission": params["permission"]},
    "api.answer": FakeDaemon._answered,
    "plugin.list": lambda daemon, _: {"plugins": [_entry(name) for name in daemon.plugins], "alarms": []},
    "plugin.health": FakeDaemon._health,
    "plugin.stage": FakeDaemon._stage,
    "plugin.commit": FakeDaemon._commit,
    "plugin.update": FakeDaemon._commit,
    "plugin.discard": FakeDaemon._discard,
    "version": lambda _, __: {"isolator": "0", "protocols": [1]},
}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
