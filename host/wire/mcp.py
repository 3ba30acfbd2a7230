"""Messages of the Model Context Protocol in both of its eras, without input or output.

Until 2025-11-25 a connection is a session that ``initialize`` opens; from 2026-07-28 on each request carries version
and client in its ``_meta``, and nothing is remembered. Which one a server speaks stands in its manifest. Of the
protocol this host uses ``tools/list`` and ``tools/call`` alone, and declares no capability: a server has nothing to ask
of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from host.wire.strict_json import WireError, line, parse
from isolator import __version__

Era = Literal["2025-11-25", "2026-07-28"]
SESSION: Final = "2025-11-25"
STATELESS: Final = "2026-07-28"
"""The newest version of each era: the one with a session, and the one without."""
SESSION_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""Versions of a session that this host understands: ``tools`` are the same in each."""

MAX_LINE = 1 << 20
MAX_DEPTH = 64
IN_FLIGHT = 16
"""Requests that may be unanswered by one server."""
PATIENCE = 60.0
"""Seconds for one answer."""

INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32600, -32601, -32602, -32603
UNSUPPORTED_VERSION: Final = -32022

_VERSION, _CLIENT, _CAPABILITIES = (
    f"io.modelcontextprotocol/{key}" for key in ("protocolVersion", "clientInfo", "clientCapabilities")
)
_SERVER = "io.modelcontextprotocol/serverInfo"
HOST_INFO = {"name": "isolator", "version": __version__}


class Id(NamedTuple):
    """The id of a request: text or a whole number, which are never the same id."""

    text: bool
    value: str | int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: the result of a request, or its error; ``id`` None: the sender could not read the request."""

    id: Id | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Call:
    """A request (``id``) or a notification (no id)."""

    id: Id | None
    method: str
    params: Mapping[str, Any]


def read(data: bytes) -> Answer | Call:
    """Read one line; raises WireError for whatever is no message of JSON-RPC 2.0.

    Both eras are without batches: a list is refused.
    """
    if len(data) > MAX_LINE:
        raise WireError(f"longer than {MAX_LINE} bytes", INVALID_REQUEST)
    message = parse(data, max_depth=MAX_DEPTH)
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise WireError("no message of JSON-RPC 2.0", INVALID_REQUEST)
    number = _id(message["id"]) if message.get("id") is not None else None
    method = message.get("method")
    if isinstance(method, str):
        params = message.get("params", {})
        if not isinstance(params, dict):
            raise WireError("params are no object", INVALID_REQUEST)
        if number is None and "id" in message:
            raise WireError("the id of a request must not be null", INVALID_REQUEST)
        return Call(number, method, params)
    result, error = message.get("result"), message.get("error")
    if isinstance(error, dict) and "result" not in message:
        return Answer(number, None, error)
    if isinstance(result, dict) and "error" not in message and number is not None:
        return Answer(number, result, None)
    raise WireError("neither a request nor an answer", INVALID_REQUEST)


def _id(value: Any) -> Id:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise WireError("an id is neither text nor a whole number", INVALID_REQUEST)
    return Id(isinstance(value, str), value)


def request(era: Era, number: str, method: str, params: Mapping[str, Any], *, progress: bool = False) -> bytes:
    """The line of a request to a server; with ``progress`` its id is also the token of its progress."""
    meta: dict[str, Any] = {"progressToken": number} if progress else {}
    if era == STATELESS:
        meta |= {_VERSION: STATELESS, _CLIENT: HOST_INFO, _CAPABILITIES: {}}
    body = {**params, "_meta": meta} if meta else dict(params)
    return line({"jsonrpc": "2.0", "id": number, "method": method, "params": body})


def notification(method: str, params: Mapping[str, Any] | None = None) -> bytes:
    """The line of a notification."""
    return line({"jsonrpc": "2.0", "method": method, **({"params": dict(params)} if params else {})})


def result_line(number: Id | None, result: Mapping[str, Any]) -> bytes:
    return line({"jsonrpc": "2.0", "id": number.value if number is not None else None, "result": dict(result)})


def error_line(number: Id | None, code: int, message: str, data: Any = None) -> bytes:
    error = {"code": code, "message": message, **({"data": data} if data is not None else {})}
    return line({"jsonrpc": "2.0", "id": number.value if number is not None else None, "error": error})


def refuse(call: Call) -> bytes | None:
    """The answer to a request of a server's own; None to a notification.

    ``ping`` has to be answered; a question to a person, a model or its folders is nothing that this host passes on.
    """
    if call.id is None:
        return None
    if call.method == "ping":
        return result_line(call.id, {})
    return error_line(call.id, METHOD_NOT_FOUND, f"{call.method[:80]}: a server has nothing to ask of this client")


# Opening


def opening(era: Era, number: str) -> bytes:
    """The first request to a server."""
    if era == STATELESS:
        return request(era, number, "server/discover", {})
    return request(era, number, "initialize", {"protocolVersion": SESSION, "capabilities": {}, "clientInfo": HOST_INFO})


@dataclass(frozen=True, slots=True)
class Greeting:
    """A server's answer to the first request."""

    version: str
    name: str
    instructions: str
    tools: bool
    """Presence of tools among its capabilities."""


def greeting(era: Era, answer: Answer) -> Greeting:
    """Read the answer to ``opening``; raises ValueError with the reason when nothing can come of it."""
    if answer.result is None:
        raise ValueError(f"it answers {describe_error(answer.error)}; does its manifest name the right era?")
    result = answer.result
    if era == STATELESS:
        offered = result.get("supportedVersions")
        if not isinstance(offered, list) or STATELESS not in offered:
            raise ValueError(f"it does not speak {STATELESS}")
        meta = result.get("_meta")
        info, version = (meta.get(_SERVER) if isinstance(meta, dict) else None), str(STATELESS)
    else:
        chosen = result.get("protocolVersion")
        if chosen not in SESSION_VERSIONS:
            raise ValueError(f"it chose the version {str(chosen)[:20]!r}; understood: {', '.join(SESSION_VERSIONS)}")
        info, version = result.get("serverInfo"), str(chosen)
    name = info.get("name") if isinstance(info, dict) else None
    capabilities, instructions = result.get("capabilities"), result.get("instructions")
    return Greeting(
        version,
        name if isinstance(name, str) else "",
        instructions if isinstance(instructions, str) else "",
        isinstance(capabilities, dict) and isinstance(capabilities.get("tools"), dict),
    )


# Outcomes

Verdict = Literal["ok", "tool_error", "input_required", "refused", "error", "bad_reply"]
"""``refused``: the server knows no such tool, or not these arguments, so that no repetition helps."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The meaning of an answer to ``tools/call``; ``detail`` is the server's text, whole."""

    verdict: Verdict
    detail: str | None = None


def judge(answer: Answer) -> Judged:
    """Judge the answer to ``tools/call``."""
    if answer.result is None:
        code = answer.error.get("code") if answer.error is not None else None
        permanent = code in (METHOD_NOT_FOUND, INVALID_PARAMS)
        return Judged("refused" if permanent else "error", describe_error(answer.error))
    kind = answer.result.get("resultType", "complete")
    if kind == "input_required":
        return Judged("input_required", "it asks for more input, which nobody is there to give")
    if kind != "complete":
        return Judged("bad_reply", f"its result is of the unknown type {str(kind)[:40]!r}")
    if answer.result.get("isError") is True:
        return Judged("tool_error", text_of(answer.result) or "the tool failed and does not say why")
    return Judged("ok")


def describe_error(error: Mapping[str, Any] | None) -> str:
    """An error object as a phrase."""
    code, message = (error or {}).get("code"), (error or {}).get("message")
    known = isinstance(code, int) and not isinstance(code, bool)
    return f"{code if known else 'an error without a code'}: {message if isinstance(message, str) else 'no message'}"


def text_of(result: Mapping[str, Any]) -> str:
    """The text in the content of a result."""
    content = result.get("content")
    blocks = content if isinstance(content, list) else []
    texts = (block.get("text") for block in blocks if isinstance(block, dict) and block.get("type") == "text")
    return "\n".join(text for text in texts if isinstance(text, str))


def progress_of(call: Call) -> tuple[Id, dict[str, Any]] | None:
    """The token and the figures of a progress notification; None for any other, or one that is not well-formed."""
    if call.id is not None or call.method != "notifications/progress":
        return None
    token, progress = call.params.get("progressToken"), call.params.get("progress")
    if isinstance(token, bool) or not isinstance(token, (str, int)) or not _is_number(progress):
        return None
    shown: dict[str, Any] = {"progress": progress}
    if _is_number(call.params.get("total")):
        shown["total"] = call.params["total"]
    if isinstance(call.params.get("message"), str):
        shown["message"] = call.params["message"][:1000]
    return Id(isinstance(token, str), token), shown


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
