"""The application: who asks, from where, and what they may have.

Through the Unix socket the kernel names the caller, and ``[roles]`` of host.toml says what that one may do. Through the
port nobody is known: a browser has a cookie for a token that an operator asked for, which reads and never posts, and a
signed event gets in at an ingress. Everything else is refused before it is looked at any further.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from host.console import api, events
from host.console.connections import Message, Receive, Send
from host.console.pages import Context, Pages
from host.console.rendering import environment
from host.console.sessions import COOKIE, SESSION_SECONDS, Sessions, new_host
from host.console.upstream import Live, Upstream
from host.control.endpoints import ROLES
from isolator.base.pacing import TokenBucket
from isolator.errors import DeniedError, IsolatorError, NotFoundError, UnavailableError, UsageError
from isolator.policy.host import Console, HostConfig

STATIC = Path(__file__).parent / "static"
TYPES = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
QUIET = 15.0
"""Seconds after which a live stream without news gets a sign of life."""
INGRESS = "/v1/ingress/"
CHALLENGES = ('Isolator realm="console"', 'Standard-Webhooks realm="ingress"')
"""What a 401 has to come with (RFC 9110, section 15.5.2): of the console, and of an ingress. Browsers ask nobody for
schemes that they do not know."""
ASKING = 4
"""Answers of the API that are being made at a time; one may have some megabytes."""
BODIES = 8 << 20
"""Bytes of bodies that are held at a time: of callers at the socket, and as many again of those at the port."""

logger = logging.getLogger(__name__)


class App:
    """The console as an ASGI application, ``asgi``.

    ``config``: whose roles count; None in the foreground, where the daemon itself judges by the uid of this process.
    """

    def __init__(
        self, upstream: Upstream, live: Live, sessions: Sessions, trail: Path, *, port: int | None,
        config: HostConfig | None = None, secrets: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:  # fmt: skip
        self._upstream, self._live, self._sessions = upstream, live, sessions
        self._port, self._config, self._secrets = port, config, secrets or {}
        self._settings = config.console if config is not None and config.console is not None else Console()
        self._pages, self._templates = Pages(upstream, live, trail), environment()
        self._ending = False
        self._document = b""
        self._bodies: Counter[bool] = Counter()
        """Bytes of bodies that are held, by whether their callers are known."""
        self._asking = asyncio.Semaphore(ASKING)
        self._complaints = TokenBucket(1 / 60, 5)
        pages = self._pages
        routes = [
            Route("/", self._page("overview.html", lambda _: pages.overview())),
            Route("/plugin/{name}", self._page("plugin.html", lambda r: pages.plugin(r.path_params["name"]))),
            Route("/events", self._page("events.html", lambda r: pages.events(r.query_params))),
            Route("/story/{event}", self._page("story.html", lambda r: pages.story(r.path_params["event"]))),
            Route("/denials", self._page("denials.html", lambda r: pages.denials(r.query_params.get("plugin")))),
            Route("/trail", self._page("trail.html", lambda _: pages.trail())),
            Route("/trail/{seq}", self._page("record.html", lambda r: pages.record(r.path_params["seq"]))),
            Route("/live", self._live_stream),
            Route("/enter", self._enter),
            Route("/leave", self._leave),
            Route("/static/{name}", self._static),
            Route("/healthz", self._healthz),
            Route("/v1/openapi.json", self._openapi),
            *(Route(path, self._reading(request)) for path, request in api.reading().items()),
            Route("/v1/token", self._token, methods=["POST"]),
            Route("/v1/events", self._emit, methods=["POST"]),
            Route(INGRESS + "{name}", self._ingress, methods=["POST"]),
        ]

        async def failed(request: Request, error: Exception) -> Response:
            return self._error(request, 500, IsolatorError("console", "has failed at this", "see the daemon's log"))

        handlers: Any = {IsolatorError: self._refused, HTTPException: self._http_refused, Exception: failed}
        self._routes = Starlette(routes=routes, exception_handlers=handlers)
        # A redirect to the same path with a slash would be made of what the caller sent.
        self._routes.router.redirect_slashes = False

    def end(self) -> None:
        """End the live streams, so that their connections close."""
        self._ending = True
        self._live.notify("end")

    async def asgi(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        guarded = _with_headers(send)
        request = Request(scope, receive)
        try:
            self._admit(request)
        except IsolatorError as error:
            answer = await self._refused(request, error)
            answer.headers["connection"] = "close"  # nobody guesses where the next one begins
            await answer(scope, receive, guarded)
            return
        try:
            await self._routes(scope, receive, guarded)
        except Exception:
            # A fault of this program's, which was answered with 500. Whoever finds one must not fill the log with it.
            if self._complaints.try_take():
                logger.exception("a request failed")

    # --- who asks ----------------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Refuse what does not come from this console's own pages; raises DeniedError, UsageError."""
        if "content-length" in request.headers and "transfer-encoding" in request.headers:
            raise UsageError("request", "has a Content-Length and a Transfer-Encoding", "send one of them")
        if _uid(request) is not None or _path(request).startswith(INGRESS):
            return
        host = request.headers.get("host", "")
        if not _is_loopback(host):
            raise DeniedError("Host", "is not a name of this machine", "use the URL that 'isolator console' prints")
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
        if origin not in (None, f"http://{host}") or site not in ("none", "same-origin"):
            raise DeniedError("request", "comes from another page", "open the console itself")
        if request.method not in ("GET", "HEAD"):
            raise DeniedError(request.method, "is not taken here: the console reads", "use the Unix socket")

    def _caller(self, request: Request) -> int | None:
        """The uid whose rights a request has; None for nobody."""
        uid = _uid(request)
        if uid is not None:
            return uid
        session = self._sessions.of(request.cookies.get(COOKIE, ""), _name_of(request.headers.get("host", "")))
        return session.uid if session is not None else None

    def _need(self, request: Request, role: str = "viewer") -> int:
        """The caller's uid; raises DeniedError for one that does not have the role."""
        uid = self._caller(request)
        if uid is None:
            raise DeniedError("console", "this browser was not let in", "type 'isolator console' on the host")
        if self._config is None:
            return uid
        found = self._config.role_of(uid)
        if found is None or ROLES.index(found) < ROLES.index(role):
            why = f"uid {uid} has the role {found or 'none'}, it needs {role}"
            raise DeniedError("console", why, f"add it to [roles] {role} in host.toml, then 'isolator reload'")
        return uid

    # --- pages -------------------------------------------------------------------------------------------------------

    def _page(
        self, template: str, gather: Callable[[Request], Awaitable[Context]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def page(request: Request) -> Response:
            self._need(request)
            context = await gather(request)
            return self._html(template, request, context)

        return page

    def _html(self, template: str, request: Request, context: Context, status: int = 200) -> Response:
        text = self._templates.get_template(template).render(path=_path(request), live=self._live, **(
            {key: value for key, value in context.items() if key != "live"}
        ))  # fmt: skip
        return HTMLResponse(text, status)

    async def _live_stream(self, request: Request) -> Response:
        uid = self._need(request)
        listener = self._live.listen(request.cookies.get(COOKIE, "") if _uid(request) is None else uid)

        async def stream() -> AsyncIterator[str]:
            try:
                yield "retry: 2000\n\n"
                while not self._ending:
                    topics = await listener.take(QUIET)
                    if self._ending or self._caller(request) is None:
                        return  # a session ends, and so does what it may see
                    yield f"event: changed\ndata: {json.dumps(topics)}\n\n" if topics else ": quiet\n\n"
                    await listener.rest()
            finally:
                self._live.forget(listener)

        return StreamingResponse(stream(), media_type="text/event-stream")

    # --- sessions ----------------------------------------------------------------------------------------------------

    async def _token(self, request: Request) -> Response:
        """A URL with a token, for a caller of the Unix socket."""
        uid = self._need(request)
        if self._port is None:
            raise UnavailableError("[console] port", "is not set, so there are no pages to show", "set it in host.toml")
        return _json({"url": self.url_for(uid)})

    def url_for(self, uid: int) -> str:
        """A URL that lets one browser in, once, with the rights of this user."""
        return f"http://{new_host(self._port or 0)}/enter?token={self._sessions.token(uid)}"

    async def _enter(self, request: Request) -> Response:
        name = _name_of(request.headers.get("host", ""))
        cookie = self._sessions.enter(request.query_params.get("token", ""), name) if _uid(request) is None else None
        if cookie is None:
            raise DeniedError("token", "is not valid, or was used already", "type 'isolator console' for another")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, cookie, max_age=int(SESSION_SECONDS), httponly=True, samesite="strict", path="/")
        return answer

    async def _leave(self, request: Request) -> Response:
        self._sessions.end(request.cookies.get(COOKIE, ""))
        raise DeniedError("console", "this browser was not let in", "type 'isolator console' on the host")

    # --- programs ----------------------------------------------------------------------------------------------------

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in TYPES:
            raise NotFoundError("file", "there is none of this name")
        return Response((STATIC / name).read_bytes(), media_type=TYPES[name])

    async def _healthz(self, _: Request) -> Response:
        up = self._upstream.connected
        return _json({"ok": up}, 200 if up else 503)

    async def _openapi(self, request: Request) -> Response:
        self._need(request)
        self._document = self._document or json.dumps(api.document()).encode()
        return Response(self._document, media_type="application/json")

    def _reading(self, verb: Any) -> Callable[[Request], Awaitable[Response]]:
        async def read(request: Request) -> Response:
            self._need(request)
            params = api.parse_query(verb, request.query_params.multi_items())
            async with self._asking:
                return _json(await self._upstream.call(verb.spec.verb, **params))

        return read

    async def _emit(self, request: Request) -> Response:
        if _uid(request) is None:
            raise DeniedError("events", "are not taken at the port", "use the Unix socket, or an ingress")
        if not self._settings.emit:
            raise DeniedError("events", "are not taken over HTTP on this host", "[console] emit = true in host.toml")
        uid = self._need(request, "emitter")
        body = await self._body(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        return _json(await self._take_event(events.cloud_event(kind, request.headers, body), f"uid:{uid}"))

    async def _ingress(self, request: Request) -> Response:
        name, body = request.path_params["name"], await self._body(request)
        settings = self._settings.ingress.get(name)
        keys = events.as_many(self._secrets.get(name, ()), self._secrets.values())
        found = events.signed_event(name, settings, keys, request.headers, body)
        return _json(await self._take_event(found, f"ingress:{name}"))

    async def _body(self, request: Request) -> bytes:
        """The body of a request; raises UsageError for one that is too long, UnavailableError for one too many."""
        found, known = bytearray(), _uid(request) is not None
        try:
            async for part in request.stream():
                found += part
                self._bodies[known] += len(part)
                if len(found) > events.MOST_BYTES:
                    raise UsageError("body", f"is longer than {events.MOST_BYTES} bytes", "send less")
                if self._bodies[known] > BODIES:
                    raise UnavailableError("body", "many others are being received", "try again")
            return bytes(found)
        except ClientDisconnect:
            raise UsageError("body", "did not come whole") from None
        finally:
            self._bodies[known] -= len(found)

    async def _take_event(self, found: dict[str, Any], who: str) -> dict[str, Any]:
        return await self._upstream.call("event.emit", **found, on_behalf_of=who)

    # --- refusals ----------------------------------------------------------------------------------------------------

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, IsolatorError)
        status = api.STATUS.get(error.code, 502)
        if error.code == "denied" and self._is_unknown(request, error):
            status = 401
        return self._error(request, status, error)

    def _is_unknown(self, request: Request, error: IsolatorError) -> bool:
        if _path(request).startswith(INGRESS):
            return isinstance(error, events.UnknownSenderError)
        return self._caller(request) is None

    async def _http_refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found: IsolatorError = NotFoundError("page", "there is none of this name", "see /v1/openapi.json")
        if error.status_code != 404:
            found = UsageError("request", error.detail)
        return self._error(request, error.status_code, found)

    def _error(self, request: Request, status: int, error: IsolatorError) -> Response:
        answer: Response
        if _path(request).startswith("/v1/") or "text/html" not in request.headers.get("accept", ""):
            answer = _json({"error": error.to_json()}, status)
        else:
            answer = self._html("error.html", request, {"error": error, "status": status}, status)
        if status == 401:
            answer.headers["WWW-Authenticate"] = CHALLENGES[_path(request).startswith(INGRESS)]
        return answer


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _uid(request: Request) -> int | None:
    """The uid of the process at the other end of the Unix socket; None: somebody at the port."""
    found = request.scope["state"]["uid"]
    return found if isinstance(found, int) else None


def _path(request: Request) -> str:
    """The path that is routed; that of ``request.url`` is made of the ``Host`` header, too."""
    return str(request.scope["path"])


def _name_of(host: str) -> str:
    """The name in a ``Host`` header, without the port."""
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host


def _is_loopback(host: str) -> bool:
    """Whether a ``Host`` header names this machine to every browser; the port may be any (``ssh -L``)."""
    name = _name_of(host)
    first, _, rest = name.partition(".")
    return name in ("localhost", "127.0.0.1", "[::1]") or (rest == "localhost" and first.isalnum() and first.isascii())
