"""Manifests of strangers, read by a process that has no right to anything (``isolator/reader/``).

The daemon passes on bytes and gets typed requests back, which it checks once more: whoever breaks the parser can lie
about what a plugin requests, but neither stop the daemon nor hand it anything of another shape. The same bytes are read
once in the life of a process, so only what is new costs one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from isolator.base.structs import struct_class
from isolator.errors import IsolatorError, UsageError
from isolator.policy.grant import PluginPolicy
from isolator.policy.grant_check import check as check_policy
from isolator.policy.names import PLUGIN_NAME
from isolator.policy.parse.strict import prose
from isolator.policy.request import MAX_BYTES, MAX_DEPTH, VERSION, ManifestCore, check
from isolator.policy.trust import SIGNATURE_BYTES
from isolator.registration.certificates import Claim
from isolator.registration.processes import leased, next_chunk, running

T = TypeVar("T")

_MODULE, _POLICY_MODULE = "isolator.reader.service", "isolator.reader.policy"
_CERTIFICATE_MODULE = "isolator.reader.certificate"
"""Named, never imported."""
_BATCH = 32
"""Manifests for one process: its start takes as long as reading hundreds."""
_MAX_ANSWER = 4 * MAX_BYTES
_SECONDS = 60.0
"""Patience with one answer, in which the reader has its few seconds of processor time."""
_KEPT_BYTES = 8 << 20
"""Of the texts whose answers are kept; what is made of them takes several times as much."""


@struct_class(frozen=True)
class ReadManifest:
    """One manifest as the reader understands it."""

    core: ManifestCore
    manifest: dict[str, Any]
    """All of it, for the host, which reads it as strictly."""


_known: OrderedDict[bytes, tuple[ReadManifest | UsageError, int]] = OrderedDict()
"""Answers by the SHA-256 of their text, each with its size; what was not wanted for longest goes first."""
_lock = threading.Lock()
_OVERHEAD = 1024
_SIGNATURE = re.compile(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}")


class ManifestReader:
    """Reads manifests as users of ``uid_range`` that nobody else is."""

    def __init__(self, uid_range: tuple[int, int]) -> None:
        self.uid_range = uid_range

    def read(self, text: bytes, name: str) -> ReadManifest:
        """Read one manifest; ``name`` is what errors call it. Raises UsageError with file, line, key and remedy."""
        (found,) = self.read_all([(text, name)])
        if isinstance(found, IsolatorError):
            raise found
        return found

    def read_all(self, manifests: Sequence[tuple[bytes, str]]) -> list[ReadManifest | IsolatorError]:
        """Read several (text, name); one that cannot be read is its error."""
        digests = [hashlib.sha256(text).digest() for text, _ in manifests]
        found: dict[bytes, ReadManifest | IsolatorError] = {}
        with _lock:
            for digest in digests:
                if digest in _known:
                    _known.move_to_end(digest)
                    found[digest] = _known[digest][0]
        new = {digest: text for digest, (text, _) in zip(digests, manifests, strict=True) if digest not in found}
        while new:
            batch = list(new)[:_BATCH]
            # The reader ends with a manifest that it cannot bear; those after it get another one.
            for digest, answer in zip(batch, self._answers([new[digest] for digest in batch]), strict=False):
                found[digest] = answer
                del new[digest]
        with _lock:
            for digest, (text, _) in zip(digests, manifests, strict=True):
                answer = found[digest]
                if isinstance(answer, (ReadManifest, UsageError)):
                    _known[digest] = (answer, len(text) + _OVERHEAD)
            kept = sum(size for _, size in _known.values())
            while kept > _KEPT_BYTES:
                kept -= _known.popitem(last=False)[1][1]
        answers = [(found[digest], name) for digest, (_, name) in zip(digests, manifests, strict=True)]
        return [_named(one, name) if isinstance(one, IsolatorError) else one for one, name in answers]

    def _answers(self, texts: Sequence[bytes]) -> list[ReadManifest | IsolatorError]:
        """Answers of one process, as far as it comes, and at least one."""
        answers: list[ReadManifest | IsolatorError] = []
        try:
            for answer in _read(texts, self.uid_range, _MODULE, "core", _manifest):
                answers.append(answer)  # those before a failure count
        except (IsolatorError, OSError) as error:
            # Not the manifest's fault.
            answers.append(IsolatorError("", f"could not be read: {error}", "try again"))
        return answers


def read_certificate(text: bytes, name: str, uid_range: tuple[int, int]) -> Claim:
    """A certificate from elsewhere, read likewise; ``name`` is what errors call it. Raises IsolatorError; blocks."""
    return _read_one(text, name, uid_range, _CERTIFICATE_MODULE, "claim", _claim)


def read_policy(text: bytes, name: str, uid_range: tuple[int, int]) -> PluginPolicy:
    """A stranger's policy file, read likewise; ``name`` is what errors call it. Raises IsolatorError; blocks."""
    found = _read_one(text, name, uid_range, _POLICY_MODULE, "policy", _policy)
    where = {key: f"{name}{place}" for key, place in found.where.items()}
    return found.model_copy(update={"source": name, "where": where})


def _read_one(
    text: bytes, name: str, uid_range: tuple[int, int], module: str, key: str, made: Callable[[dict[str, Any]], T]
) -> T:
    (found,) = _read([text], uid_range, module, key, made)
    if isinstance(found, IsolatorError):
        raise _named(found, name)
    return found


def _read(
    texts: Sequence[bytes], uid_range: tuple[int, int], module: str, key: str, made: Callable[[dict[str, Any]], T]
) -> Iterator[T | IsolatorError]:
    """Have a process read texts; what ``made`` makes of each answer, which holds ``key``, or the refusal."""
    # A file and not a pipe: it is there whole, so nobody waits for the other.
    with leased(uid_range) as uid, os.fdopen(os.memfd_create("manifests", os.MFD_CLOEXEC), "wb") as file:
        for text in texts:
            bounded = text[: MAX_BYTES + 1]  # one byte too many is refused by who parses it
            file.write(len(bounded).to_bytes(4, "big") + bounded)
        file.seek(0)
        with running(module, uid, str(len(texts)), stdin=file) as process:
            try:
                for line in _lines(process, len(texts)):
                    yield _answer(line, key, made)
            except EOFError:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                yield _ended(process.returncode)
            except _NoAnswerError as error:
                yield UsageError("", str(error), "simplify it")
            except TimeoutError:
                why = f"was not read within {_SECONDS:g} s"
                yield IsolatorError("", why, "try again when the host is less busy")


def _ended(code: int | None) -> IsolatorError:
    if code is not None and code < 0:
        how = signal.Signals(-code).name
        return UsageError("", f"takes too much processor time or memory to read ({how})", "simplify it")
    return IsolatorError("", f"could not be read: its reader ended with code {code}", "run 'isolator check'")


class _NoAnswerError(Exception):
    """The reader wrote something that the parser does not make."""


def _lines(process: subprocess.Popen[bytes], count: int) -> Iterator[bytes]:
    """So many lines, each bounded. Raises _NoAnswerError, EOFError or TimeoutError when there are not so many."""
    data = bytearray()
    for _ in range(count):
        end = time.monotonic() + _SECONDS
        while b"\n" not in data:
            if len(data) > _MAX_ANSWER:
                raise _NoAnswerError("is too large once it is read")
            chunk = next_chunk(process, end)
            if not chunk:
                raise EOFError
            data += chunk
        line, _, data = data.partition(b"\n")
        yield bytes(line)


def _answer(line: bytes, key: str, made: Callable[[dict[str, Any]], T]) -> T | IsolatorError:
    """The answer in one line; raises _NoAnswerError when it is not one that the parser makes."""
    try:
        answer = json.loads(line, parse_constant=_refuse)
        return made(answer) if key in answer else _refusal(answer)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        raise _NoAnswerError("cannot be read: its reader gave no answer that makes sense") from None


def _manifest(answer: dict[str, Any]) -> ReadManifest:
    found = ReadManifest(ManifestCore.model_validate(answer["core"]), answer["manifest"])
    check(found.core)
    _check_json(answer["core"])
    _check_json(found.manifest)
    return found


def _policy(answer: dict[str, Any]) -> PluginPolicy:
    found = PluginPolicy.model_validate(answer["policy"])
    check_policy(found)
    return found


def _claim(answer: dict[str, Any]) -> Claim:
    found = answer["claim"]
    name, version, digest = (str(found[key]) for key in ("name", "version", "digest"))
    signatures = tuple(str(one) for one in found["signatures"])
    if not PLUGIN_NAME.fullmatch(name) or not VERSION.fullmatch(version) or len(version) > 256:
        raise ValueError("no name or version")
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or any(not _SIGNATURE.fullmatch(one) for one in signatures):
        raise ValueError("no digest or signature")
    return Claim(name, version, digest, signatures)


def _refusal(answer: dict[str, Any]) -> UsageError:
    at, why, remedy = (str(answer[key]) for key in ("at", "why", "remedy"))
    if not re.fullmatch(r"(?::[0-9]{1,9})?", at):
        raise ValueError("no line")
    return UsageError(at, prose(why), prose(remedy))


def _check_json(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise ValueError("no object")
    json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()
    level: list[Any] = [manifest]
    for _ in range(MAX_DEPTH + 1):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise ValueError("too deep")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _named(error: IsolatorError, name: str) -> IsolatorError:
    return type(error)(name + error.what, error.why, error.remedy)
