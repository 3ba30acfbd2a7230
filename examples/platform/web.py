"""The platform's HTTP API: JSON in, JSON out, on loopback.

Only ``application/json`` is accepted and only a loopback name as ``Host``: a page in somebody's browser can send
neither to us. Whoever can log in on this machine can call it: a real platform would ask who they are.
"""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from store import Row, Store

from isolator.errors import IsolatorError, NotFoundError, UsageError

MAX_BODY = 64 * 1024
HOSTS = re.compile(r"^(localhost|127\.0\.0\.1)(:\d+)?$")
DOMAIN = re.compile(r"^(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}$")
LEVELS = ("debug", "info", "warning", "error", "fatal")


def take(body: Row, **fields: tuple[type, bool]) -> Row:
    """The named fields, each ``(type, required)``; raises UsageError for what is missing, unknown or wrong."""
    unknown = ", ".join(sorted(body.keys() - fields.keys()))
    if unknown:
        raise UsageError("request", f"has no field {unknown[:80]}", f"it may have {', '.join(fields)}")
    for name, (kind, required) in fields.items():
        value = body.get(name)
        if value is None and required:
            raise UsageError(name, "is required")
        if value is not None and (type(value) is not kind or (kind is str and not 0 < len(value) <= 200)):
            raise UsageError(
                name, "must be a text of 1 to 200 characters" if kind is str else f"must be {kind.__name__}"
            )
    return {name: body.get(name) for name in fields}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    store: Store
    timeout = 10  # seconds that a slow client may keep a thread

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self, words: list[str]) -> tuple[int, Any]:
        match words:
            case ["health"]:
                return 200, self.store.health()
            case ["projects" | "deployments" | "domains" as table]:
                return 200, {table: self.store.some(table, None, 100)}
            case ["projects", project]:
                return 200, self.store.one("projects", "id", project)
            case ["projects", project, "deployments" | "domains" as table]:
                self.store.one("projects", "id", project)
                return 200, {table: self.store.some(table, project, 100)}
            case ["deployments", deployment]:
                return 200, self.store.one("deployments", "id", deployment) | {"events": self.store.events(deployment)}
        raise NotFoundError(self.path[:80], "is nothing here")

    def _post(self, words: list[str]) -> tuple[int, Any]:
        body = self._body()
        match words:
            case ["projects"]:
                given = take(body, name=(str, True), repo_url=(str, False), default_branch=(str, False))
                return 201, self.store.add_project(given["name"], given["repo_url"], given["default_branch"] or "main")
            case ["projects", project, "deployments"]:
                given = take(body, branch=(str, False), commit_sha=(str, False))
                return 202, self.store.add_deployment(project, given["branch"], given["commit_sha"])
            case ["projects", project, "domains"]:
                given = take(body, domain=(str, True), is_primary=(bool, False))
                if not DOMAIN.match(given["domain"]):
                    raise UsageError("domain", "must be a name such as shop.example")
                return 201, self.store.add_domain(project, given["domain"], bool(given["is_primary"]))
            case ["projects", project, "errors"]:
                given = take(body, fingerprint=(str, True), level=(str, False), count=(int, False), title=(str, False))
                given |= {"level": given["level"] or "error", "count": 1 if given["count"] is None else given["count"]}
                if len(given["fingerprint"]) > 128 or given["level"] not in LEVELS or given["count"] < 0:
                    raise UsageError("error", f"needs a fingerprint, a count and a level of {', '.join(LEVELS)}")
                return 202, self.store.report_error(project, given)
        raise NotFoundError(self.path[:80], "takes no POST")

    def _body(self) -> Row:
        length = self.headers.get("Content-Length") or ""
        if self.headers.get_content_type() != "application/json":
            raise UsageError("Content-Type", "must be application/json")
        if not length.isascii() or not length.isdigit() or int(length) > MAX_BODY:
            raise UsageError("Content-Length", f"must be a number up to {MAX_BODY}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise UsageError("body", "is not JSON") from None
        if not isinstance(body, dict):
            raise UsageError("body", "must be an object")
        return body

    def _answer(self, handle: Any) -> None:
        try:
            if not HOSTS.match(self.headers.get("Host", "")):
                raise UsageError("Host", "must be localhost or 127.0.0.1")
            code, body = handle(self.path.partition("?")[0].strip("/").split("/"))
        except NotFoundError as error:
            code, body = 404, {"error": str(error)}
        except UsageError as error:
            code, body = 400, {"error": str(error)}
        except IsolatorError as error:
            code, body = 409, {"error": str(error)}
        data = json.dumps(body).encode() + b"\n"
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the client has the answer."""


class Server(ThreadingHTTPServer):
    """Closing it waits for the requests that are under way."""

    daemon_threads = False


def server(store: Store, port: int) -> Server:
    """Listen on 127.0.0.1; raises IsolatorError."""
    handler = type("BoundHandler", (Handler,), {"store": store})
    try:
        return Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise IsolatorError(f"127.0.0.1:{port}", error.strerror or str(error), "name another --port") from None
