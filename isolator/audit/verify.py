"""Verification of a trail, from its files and the public key alone.

Each line must carry the hash of its own bytes, the number after and the hash of the line before it; each seal must be
signed over the hash of the record right before it; no more than ``SEAL_EVERY`` records may follow the last seal (or
as many as a seal of this trail ever covered, if the daemon is set up to seal less often). A trail that does not begin
with record 1 must hold a *sealed* retention record that accounts for what is missing.
A trail that was cut back to one of its seals fits: to find that there are anchors (``SEQ:HASH`` pairs noted
elsewhere), and, for root on the host itself, the writer's own note of its last record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolator.audit import files
from isolator.audit.record import GENESIS, HASH_TAIL, PREV_TAIL, Record, own_hash_fits, parse
from isolator.audit.schema import AUDIT, RETENTION, AuditGap, AuditSeal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SEAL_EVERY = 1000
_MAX_MISFITS = 100
_TIME_LENGTH = 37
"""Length of ``"time":"2026-01-02T03:04:05.000006Z",``, which stands between ``seq`` and ``type``."""


@dataclass(frozen=True)
class Misfit:
    """One place where the trail does not fit together; ``line`` counts from 1."""

    file: str
    line: int
    seq: int | None
    why: str

    def __str__(self) -> str:
        record = f"record {self.seq}" if self.seq is not None else "a line that is no record"
        return f"{record} ({self.file}, line {self.line}): {self.why}"


@dataclass
class Report:
    """Result of a verification; the trail is good when ``misfits`` is empty."""

    records: int = 0
    first: int = 0
    first_prev: str = GENESIS
    last: int = 0
    first_time: str = ""
    last_time: str = ""
    last_hash: str = GENESIS
    files: int = 0
    seals: int = 0
    seal: int = 0
    """``seq`` of the newest seal that fits; its own hash and time follow."""
    seal_hash: str = ""
    seal_time: str = ""
    keys: list[str] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    lost: int = 0
    uncounted: int = 0
    """Gaps of an unknown number of records: a process died with those that it had not sent."""
    retired: int = 0
    torn: int = 0
    """Bytes of an unfinished last line: a write in progress, or a writer that was killed."""
    misfits: list[Misfit] = field(default_factory=list)
    misfit_count: int = 0

    @property
    def unsealed(self) -> int:
        """Records after the newest seal."""
        return self.last - self.seal if self.seal else self.records


class Verifier:
    """Checks the files of a trail in order; ``anchors`` maps a ``seq`` to the hash (or its beginning) it must have.

    ``advance`` is called now and then with the number of bytes that were read.
    """

    def __init__(
        self, keys: Mapping[str, Ed25519PublicKey], anchors: Mapping[int, str], *, whole: bool,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.report = Report()
        self._advance = advance
        self._keys, self._order = keys, list(keys)
        self._anchors, self._seen = anchors, set[int]()
        self._whole = whole
        self._seq, self._prev = 0, GENESIS
        self._sealed = 0
        self._key = 0
        self._retired: list[tuple[int, int, str]] = []
        """Retention records that no seal covers yet: their seq, the last retired seq and its hash."""
        self._accounted: set[tuple[int, str]] = set()
        self._span = SEAL_EVERY
        self._place = ("", 0)

    def run(self, paths: list[Path]) -> Report:
        """Check ``paths``, oldest first; raises OSError."""
        report = self.report
        for index, path in enumerate(paths):
            report.files += 1
            self._file(path, last=index == len(paths) - 1)
        report.last, report.last_hash = self._seq, self._prev
        self._check_start()
        if self._seq - self._sealed > self._span:
            self._misfit(
                self._sealed + self._span + 1,
                f"a seal is missing: never more than {self._span} records go without one",
            )
        for seq, digest in self._anchors.items():
            if seq in self._seen or seq < report.first:
                continue  # of an earlier file, or retired, or missing and named already
            why = f"the trail ends at {self._seq}" if seq > self._seq else "that record is missing"
            self._misfit(seq, f"its hash {digest[:16]}… is known, but {why}: it was cut or is an older copy")
        return report

    def _file(self, path: Path, *, last: bool) -> None:
        sha256 = hashlib.sha256
        name, number, line, at = path.name, 0, b"", 0
        seq, prev = self._seq, self._prev
        with path.open("rb", buffering=1 << 20) as file:
            for number, raw in enumerate(file, 1):
                whole = raw.endswith(b"\n")
                if not whole and last:
                    self.report.torn = len(raw)
                    break
                line = raw[:-1] if whole else raw
                head = b'{"seq":%d,' % (seq + 1)
                digest = sha256(line[:-HASH_TAIL]).hexdigest()
                if not (
                    whole
                    and line.startswith(head)
                    and line[-PREV_TAIL:-HASH_TAIL] == b',"prev":"%b"' % prev.encode()
                    and line[-HASH_TAIL:] == b',"hash":"%b"}' % digest.encode()
                ):
                    self._seq, self._prev, self._place = seq, prev, (name, number)
                    if not self._explain(line, whole=whole):
                        continue
                    seq, digest = self._seq - 1, self._prev
                seq, prev = seq + 1, digest
                self.report.records += 1
                if not self.report.first:
                    self._begin(seq, line)
                special = line.startswith(b'"type":"audit.', len(head) + _TIME_LENGTH)
                if special or seq in self._anchors:
                    self._seq, self._prev, self._place = seq, prev, (name, number)
                    self._special(seq, line, digest)
                if number % 4096 == 1:
                    self.report.last_time = _time_of(line)
                    before, at = at, file.tell()
                    self._advance(at - before)
            if self.report.records and line:
                self.report.last_time = _time_of(line)
        self._seq, self._prev = seq, prev

    def _begin(self, seq: int, line: bytes) -> None:
        self.report.first, self.report.first_time = seq, _time_of(line)
        self.report.first_prev = files.prev_of(line) or GENESIS
        self._sealed = max(0, seq - 1)

    def _explain(self, line: bytes, *, whole: bool) -> bool:
        """Record why ``line`` is not the next record, and go on from it; False when it is no record at all."""
        seq, prev = files.seq_of(line), files.prev_of(line)
        fits = whole and own_hash_fits(line)
        if not self.report.records and seq is not None and prev is not None and fits and seq > 1:
            self._seq, self._prev = seq, files.hash_of(line)
            return True  # the beginning of an older or partial trail: judged by _check_start
        expected = self._seq + 1
        if seq is None or prev is None:
            self._misfit(None, f"stands where record {expected} is expected; it was damaged, or put there by somebody")
            return False
        if not fits:
            why = "its content does not have its hash: it was changed after it was written"
        elif seq > expected:
            missing = f"record {expected} is" if seq == expected + 1 else f"records {expected} to {seq - 1} are"
            why = f"{missing} missing before it"
        elif seq < expected:
            why = f"it stands after record {self._seq}: moved, repeated, or from another copy"
        else:
            why = f"it does not carry the hash of record {self._seq}: this one or the one before was replaced"
        self._misfit(seq, why)
        self._seq, self._prev = seq, line[-66:-2].decode("ascii", "replace")
        return True

    def _special(self, seq: int, line: bytes, digest: str) -> None:
        if seq in self._anchors:
            self._seen.add(seq)
            if not digest.startswith(self._anchors[seq]):
                self._misfit(seq, "has another hash than the one noted elsewhere: the trail was rewritten")
        record = parse(line) if b'"type":"audit.' in line else None
        if record is not None and record.type == AuditSeal.TYPE:
            self._seal(record)
        elif record is not None and record.type == AuditGap.TYPE:
            self._gap(record)

    def _seal(self, record: Record) -> None:
        data = record.data
        first, last, name = data.get("from"), data.get("to"), str(data.get("key"))
        key = self._keys.get(name)
        begins = isinstance(first, int) and (first == self._sealed + 1 or not self.report.seals)
        if not begins or last != record.seq - 1 or data.get("hash") != record.prev:
            self._misfit(record.seq, f"this seal is for records {first} to {last}, not for those before it")
        elif key is None:
            self._misfit(record.seq, f"this seal is signed by the key {name}, which is not among the known ones")
        elif self._order.index(name) < self._key:
            self._misfit(record.seq, f"this seal is signed by the key {name}, which had been replaced before")
        else:
            from isolator.audit.seal import signature_fits

            assert isinstance(first, int)
            if signature_fits(key, first, record.seq - 1, record.prev, str(data.get("signature"))):
                self._key = self._order.index(name)
                self._good_seal(record, name)
            else:
                self._misfit(record.seq, f"the signature does not fit: records {first} to {last} were replaced")
        self._sealed = record.seq - 1

    def _good_seal(self, record: Record, name: str) -> None:
        report = self.report
        report.seals += 1
        self._span = max(self._span, record.seq - self._sealed)
        report.seal, report.seal_hash, report.seal_time = record.seq, record.hash, record.time
        if name not in report.keys:
            report.keys.append(name)
        self._accounted.update((last, digest) for _, last, digest in self._retired)
        self._retired.clear()

    def _gap(self, record: Record) -> None:
        count, data = record.data.get("count"), record.data
        # Only the writer's own record counts: no source may explain why files are missing.
        if data.get("why") == RETENTION and record.origin == AUDIT:
            to, digest = data.get("to"), data.get("hash")
            if isinstance(to, int) and isinstance(digest, str):
                self._retired.append((record.seq, to, digest))
            return
        if isinstance(count, int):
            self.report.lost += count
        elif count is None:
            self.report.uncounted += 1
        if len(self.report.gaps) < _MAX_MISFITS:
            self.report.gaps.append({"seq": record.seq, "count": count, "why": str(data.get("why"))})

    def _check_start(self) -> None:
        first, before = self.report.first, self.report.first_prev
        if first <= 1 or not self._whole:
            return
        if (first - 1, before) in self._accounted:
            self.report.retired = first - 1
            return
        misfit = Misfit(
            self._place[0],
            1,
            first,
            f"records 1 to {first - 1} are missing before it, and no sealed retention record accounts for them",
        )
        self.report.misfits.insert(0, misfit)
        self.report.misfit_count += 1

    def _misfit(self, seq: int | None, why: str) -> None:
        self.report.misfit_count += 1
        if len(self.report.misfits) < _MAX_MISFITS:
            self.report.misfits.append(Misfit(*self._place, seq, why))


def _time_of(line: bytes) -> str:
    at = line.find(b'"time":"') + 8
    return line[at : at + 27].decode("ascii", "replace")


def verify(
    paths: list[Path],
    keys: Mapping[str, Ed25519PublicKey],
    anchors: Mapping[int, str] | None = None,
    *,
    whole: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> Report:
    """Verify the files of a trail, oldest first. ``whole``: they are all there is, so record 1 has to be in them."""
    return Verifier(keys, anchors or {}, whole=whole, advance=advance).run(paths)


def anchors_of(texts: Iterator[str] | list[str]) -> dict[int, str]:
    """Parse ``SEQ:HASH`` texts (as verify prints them); raises ValueError."""
    anchors = {}
    for text in texts:
        seq, _, digest = text.partition(":")
        if not seq.isdigit() or len(digest) < 16 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"{text!r} is not SEQ:HASH with at least 16 hex digits")
        anchors[int(seq)] = digest
    return anchors
