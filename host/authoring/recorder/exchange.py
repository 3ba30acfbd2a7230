"""HTTP/1.1 between a plugin and the recorder: requests are answered from the recording, or passed on and recorded."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import h11

from host.authoring.recorder.tape import MOST_BODY, Redactor, Request, Response, Tape, to_line

Report: TypeAlias = dict[str, Any]
"""One line to the parent: ``exchange`` (a request and its status), ``entry`` (a line of the recording), ``note`` (a
sentence about ``name``), ``miss`` (a request to ``name`` without an answer)."""
_IDLE_SECONDS = 60.0
_ANSWER_SECONDS = 60.0
_MOST_REQUEST = 8 << 20
_PIECE = 1 << 16
_NOT_PASSED_ON = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te", b"upgrade", b"accept-encoding",
    b"expect", b"transfer-encoding", b"content-length",
})  # fmt: skip
_ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 47}
"""Encodings that a server may use though it was asked for none, as zlib's window bits."""


@dataclass(frozen=True)
class _Place:
    """The other side as the plugin means it."""

    scheme: str
    address: str
    port: int
    name: str | None
    """by its certificate; None where there is none, and each request's Host says it"""

    def url(self, host: str, target: str) -> str:
        """The URL of a request."""
        usual = {"http": 80, "https": 443}[self.scheme]
        name = self.name or host or self.address
        port = "" if self.port == usual else f":{self.port}"
        return f"{self.scheme}://{f'[{name}]' if ':' in name else name}{port}{target}"


class Exchanges:
    """Every exchange of one recorder; ``tape`` is played, or None where answers are recorded."""

    def __init__(self, tape: Tape | None, redactor: Redactor, tell: Callable[[Report], None]) -> None:
        self._tape, self._redactor, self._tell = tape, redactor, tell
        self._playing = threading.Lock()

    def know(self, secrets: Mapping[str, str]) -> None:
        """Keep these values out of everything."""
        self._redactor.know(secrets)
        if self._tape is not None:
            with self._playing:
                self._tape.hide(self._redactor)

    def serve(self, connection: socket.socket, scheme: str, address: str, port: int, name: str | None) -> None:
        """Serve one connection to its end; raises OSError."""
        place = _Place(scheme, address, port, name)
        with _Http(connection, h11.SERVER) as client, contextlib.closing(_Upstream(place)) as upstream:
            connection.settimeout(_IDLE_SECONDS)
            try:
                while self._one(client, place, upstream):
                    client.state.start_next_cycle()
            except h11.RemoteProtocolError:
                self.note(name or address, f"port {port}: speaks no HTTP/1.1, and the recorder nothing else")
            except h11.LocalProtocolError:
                pass  # the answer cannot be passed on any further

    def pinned(self, name: str, why: str) -> None:
        """Report a program that does not take the recorder's certificates."""
        self.note(
            name,
            f"the program refused the throw-away certificate ({why}): it pins the certificates of this server, or "
            "brings its own list of authorities; try it without --recording",
        )

    def note(self, name: str, text: str) -> None:
        """Report something that the author should know."""
        self._tell({"note": text, "name": name})

    def _show(self, request: Request, status: int, body: bytes) -> None:
        sent = {"method": request.method, "url": request.url, "body": self._redactor.shown(body)}
        self._tell({"exchange": {**sent, "status": status}})

    def _one(self, client: _Http, place: _Place, upstream: _Upstream) -> bool:
        """One request and its answer; whether another may follow."""
        head = client.next_event()
        if not isinstance(head, h11.Request):
            if place.scheme == "https" and not client.used:
                self.pinned(place.name or place.address, "it closed the connection")
            return False
        client.used = True
        body = client.body(_MOST_REQUEST)
        host = next((value.decode("ascii", "replace") for key, value in head.headers if key == b"host"), "")
        host = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        method, url = head.method.decode("ascii"), place.url(host, head.target.decode("ascii", "replace"))
        request = self._redactor.request(method, url, body)
        if self._tape is not None:
            self._play(client, request, place.name or host, body)
        elif any(key == b"upgrade" for key, _ in head.headers):
            self.note(place.name or host, "asks for another protocol (WebSocket, say), which cannot be recorded")
            client.answer(501, (), b"isolator: the recorder speaks HTTP/1.1 alone\n")
        else:
            self._record(client, head, body, request, upstream)
        return client.may_go_on

    def _play(self, client: _Http, request: Request, name: str, body: bytes) -> None:
        assert self._tape is not None
        with self._playing:
            found = self._tape.play(request)
        if found is None:
            self._tell({"miss": f"{request.method} {request.url}", "name": name})
            text = f"isolator: no answer is recorded for {request.method} {request.url}\n"
            found = Response(504, (("content-type", "text/plain; charset=utf-8"),), text.encode("utf-8", "replace"))
        self._show(request, found.status, body)
        bodiless = request.method == "HEAD" or found.status in (204, 304)
        client.answer(found.status, found.headers, b"" if bodiless else found.body, counted=not bodiless)

    def _record(self, client: _Http, head: h11.Request, body: bytes, request: Request, upstream: _Upstream) -> None:
        name, kept = upstream.place.name or upstream.place.address, bytearray()
        try:
            answer, pieces = upstream.ask(head, body)
            client.begin(answer)
            for piece in pieces:
                client.send(h11.Data(data=piece))
                if len(kept) <= MOST_BODY:
                    kept += piece
            self._show(request, answer.status_code, body)  # before the program has all of its answer, and goes on
            client.send(h11.EndOfMessage())
        except _UpstreamError as error:
            # As if the other side had broken off: a program has to live with that, too.
            self.note(name, f"did not answer {request.method} {request.url}: {error}")
            raise ConnectionAbortedError from None
        headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in answer.headers]
        plain = _plain(bytes(kept), headers) if len(kept) <= MOST_BODY else None
        if plain is None:
            self.note(name, f"the answer to {request.method} {request.url} is too large, or encoded, to be recorded")
            return
        self._tell({"entry": to_line(request, self._redactor.response(answer.status_code, headers, plain))})


class _UpstreamError(Exception):
    """The real other side did not answer; the sentence says why."""


@contextlib.contextmanager
def _upstream_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, h11.RemoteProtocolError) as error:
        raise _UpstreamError(_reason(error)) from None


class _Http:
    """One end of a connection that speaks HTTP/1.1."""

    def __init__(self, connection: socket.socket, role: type[h11.CLIENT] | type[h11.SERVER]) -> None:
        self._connection = connection
        self.state = h11.Connection(role)
        self.used = False
        """Whether a request has come."""

    def __enter__(self) -> _Http:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    @property
    def may_go_on(self) -> bool:
        """Whether another request may come."""
        return self.state.our_state is h11.DONE and self.state.their_state is h11.DONE

    def next_event(self) -> h11.Event | type[h11.PAUSED]:
        """The next event; raises OSError and RemoteProtocolError."""
        while (event := self.state.next_event()) is h11.NEED_DATA:
            if self.state.they_are_waiting_for_100_continue:
                self.send(h11.InformationalResponse(status_code=100, headers=[]))
            self.state.receive_data(self._connection.recv(_PIECE))
        return cast("h11.Event | type[h11.PAUSED]", event)

    def send(self, event: h11.Event) -> None:
        data = self.state.send(event)
        if data:
            self._connection.sendall(data)

    def body(self, most: int) -> bytes:
        """The rest of a message; raises OSError for one that is too long."""
        found = bytearray()
        for piece in self.pieces():
            found += piece
            if len(found) > most:
                raise OSError("a body that is too long")
        return bytes(found)

    def pieces(self) -> Iterator[bytes]:
        """The body of a message as it comes."""
        while isinstance(event := self.next_event(), h11.Data):
            yield bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            raise OSError("a message that has no end")

    def begin(self, answer: h11.Response) -> None:
        """Send the head of another server's answer."""
        headers = [pair for pair in answer.headers if pair[0] not in (b"connection", b"keep-alive", b"alt-svc")]
        self.send(h11.Response(status_code=answer.status_code, headers=headers, reason=answer.reason))

    def answer(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes, *, counted: bool = True) -> None:
        """Send a whole answer."""
        length = [("content-length", str(len(body)))] if counted else []
        self.send(h11.Response(status_code=status, headers=[*headers, *length]))
        if body:
            self.send(h11.Data(data=body))
        self.send(h11.EndOfMessage())


class _Upstream:
    """The real other side of one connection, connected to for each request: it may not keep a connection."""

    def __init__(self, place: _Place) -> None:
        self.place = place
        self._connection: socket.socket | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def ask(self, head: h11.Request, body: bytes) -> tuple[h11.Response, Iterator[bytes]]:
        """Pass a request on; returns the head of its answer, and its body as it comes. Raises _UpstreamError."""
        with _upstream_errors():
            answer, http = self._ask(head, body)
        return answer, self._pieces(http)

    @staticmethod
    def _pieces(http: _Http) -> Iterator[bytes]:
        with _upstream_errors():
            yield from http.pieces()

    def _ask(self, head: h11.Request, body: bytes) -> tuple[h11.Response, _Http]:
        http = self._connect()
        headers = [(key, value) for key, value in head.headers if key not in _NOT_PASSED_ON]
        # Encoded answers would hide secrets from the one who takes them out.
        headers += [(b"accept-encoding", b"identity"), (b"connection", b"close")]
        if body or head.method in (b"POST", b"PUT", b"PATCH"):
            headers.append((b"content-length", str(len(body)).encode()))
        http.send(h11.Request(method=head.method, target=head.target, headers=headers))
        if body:
            http.send(h11.Data(data=body))
        http.send(h11.EndOfMessage())
        while isinstance(event := http.next_event(), h11.InformationalResponse):
            pass
        if not isinstance(event, h11.Response):
            raise OSError("it has closed the connection")
        return event, http

    def _connect(self) -> _Http:
        self.close()
        connection = socket.create_connection((self.place.address, self.place.port), _ANSWER_SECONDS)
        self._connection = connection
        if self.place.scheme == "https":
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            self._connection = context.wrap_socket(connection, server_hostname=self.place.name or self.place.address)
        return _Http(self._connection, h11.CLIENT)


def _plain(body: bytes, headers: list[tuple[str, str]]) -> bytes | None:
    """A body without its encoding; None where that is not known, or it grows too large."""
    encoding = next((value.strip().lower() for key, value in headers if key.lower() == "content-encoding"), "identity")
    if encoding == "identity":
        return body
    if encoding not in _ENCODINGS:
        return None
    try:
        unpacking = zlib.decompressobj(_ENCODINGS[encoding])
        plain = unpacking.decompress(body, MOST_BODY + 1)
    except zlib.error:
        return None
    return plain if len(plain) <= MOST_BODY and unpacking.eof else None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
