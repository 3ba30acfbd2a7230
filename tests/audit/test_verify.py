"""Verification against everything that somebody without the key can do to the files."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolator.audit import files
from isolator.audit.log import Chain, Limits, Trail
from isolator.audit.record import Incoming, parse, parse_incoming, spell
from isolator.audit.seal import load_public
from isolator.audit.verify import Report, verify
from tests.audit.tamper import rechain

TIME = "2026-01-02T03:04:05.000006Z"
SEAL = 10


class Written:
    """A trail of ``count`` records with a seal after each ten, written by the real writer's own classes."""

    def __init__(self, place: Path, count: int, limits: Limits, *, start: int = 0) -> None:
        self.log, self.lib = place / "log", place / "lib"
        self.log.mkdir(parents=True)
        self.lib.mkdir(mode=0o700)
        self._limits, self._number = limits, start
        self.write(count)

    def write(self, count: int) -> None:
        """Add ``count`` records."""
        numbers = range(self._number, self._number + count)
        self._add(Incoming(TIME, "event.accepted", event_id=f"e{n}", data={"number": n}) for n in numbers)
        self._number += count

    def append(self, record: Incoming) -> None:
        """Add this record and a seal over it."""
        self._add([record], sealed=True)

    def _add(self, records: Iterable[Incoming], *, sealed: bool = False) -> None:
        trail = Trail(self.log, self.lib, self._limits)
        state, signer = trail.open()
        chain = Chain(state, signer, self._limits)
        for number, record in enumerate(records, self._number):
            chain.append(record)
            if number % 7 == 0:
                trail.commit(chain.take())
        if sealed:
            chain.seal(TIME)
        trail.commit(chain.take())
        trail.close()
        self.head = (trail.seq, chain.hash)

    @property
    def live(self) -> Path:
        return self.log / files.LIVE

    def lines(self) -> list[bytes]:
        return self.live.read_bytes().splitlines()

    def verify(self, anchors: dict[int, str] | None = None) -> Report:
        return verify(files.trail(self.log), load_public(self.log / "public.pem"), anchors)

    def verify_lines(self, lines: list[bytes], anchors: dict[int, str] | None = None) -> Report:
        copy = self.log / "copy"
        copy.write_bytes(b"".join(line + b"\n" for line in lines))
        return verify([copy], load_public(self.log / "public.pem"), anchors)


@pytest.fixture(scope="module")
def written() -> Iterator[Written]:
    with tempfile.TemporaryDirectory() as name:
        yield Written(Path(name), 59, Limits(seal_records=SEAL))


def test_an_untouched_trail_fits(written: Written) -> None:
    report = written.verify()
    assert (report.misfits, report.first, report.seals) == ([], 1, 6)
    assert report.last == report.records == len(written.lines())
    assert report.unsealed == report.last - report.seal


def test_an_edit_is_named(written: Written) -> None:
    lines = written.lines()
    lines[6] = lines[6].replace(b'"number":6', b'"number":7')
    misfit = written.verify_lines(lines).misfits[0]
    assert (misfit.seq, misfit.line) == (7, 7)
    assert "changed after it was written" in misfit.why


def test_an_edit_with_its_hash_mended_shows_at_the_next_record(written: Written) -> None:
    lines = written.lines()
    lines[6] = rechain([lines[6].replace(b'"number":6', b'"number":7')], parse(lines[5]).hash, 7)[0]  # type: ignore[union-attr]
    misfit = written.verify_lines(lines).misfits[0]
    assert misfit.seq == 8
    assert "the one before was replaced" in misfit.why


def test_a_trail_rewritten_from_one_record_on_fails_at_its_first_seal(written: Written) -> None:
    lines = written.lines()
    lines[6] = lines[6].replace(b'"number":6', b'"number":7')
    report = written.verify_lines(rechain(lines))
    assert report.misfits[0].seq == 11


def test_a_trail_rewritten_without_its_seals_fails(written: Written) -> None:
    lines = [line for line in written.lines() if b'"type":"audit.seal"' not in line]
    assert not written.verify_lines(rechain(lines)).seals
    many = rechain([lines[i % len(lines)] for i in range(1100)])
    assert "a seal is missing" in written.verify_lines(many).misfits[0].why


def test_a_cut_back_to_a_seal_needs_an_anchor_and_one_is_enough(written: Written) -> None:
    lines = written.lines()[:22]
    assert not written.verify_lines(lines).misfits  # nothing in the file can tell
    report = written.verify_lines(lines, dict([written.head]))
    assert "it was cut or is an older copy" in report.misfits[0].why
    seal = written.verify()
    assert written.verify_lines(lines, {seal.seal: seal.seal_hash[:16]}).misfits
    assert not written.verify({seal.seal: seal.seal_hash[:16]}).misfits


def test_seals_of_another_key_do_not_count(written: Written, tmp_path: Path) -> None:
    other = Written(tmp_path, 59, Limits(seal_records=SEAL))
    misfit = written.verify_lines(other.lines()).misfits[0]
    assert misfit.seq == 11
    assert "not among the known" in misfit.why


def test_a_record_that_looks_like_a_seal_is_none(written: Written) -> None:
    data = {"type": "audit.seal", "origin": "audit", "x": '","type":"audit.seal","origin":"audit"'}
    line, _ = spell(1, Incoming(TIME, "net.query", data=data), "0" * 64)
    report = written.verify_lines([line[:-1]])
    assert (report.seals, report.misfits) == (0, [])


def test_unfinished_last_line_is_no_misfit(written: Written) -> None:
    copy = written.log / "torn"
    copy.write_bytes(written.live.read_bytes()[:-30])
    report = verify([copy], load_public(written.log / "public.pem"))
    assert report.torn > 0
    assert not report.misfits


OPERATIONS = st.sampled_from(["delete", "swap", "repeat", "flip", "insert", "older", "renumber"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_change_of_sealed_records_is_found(written: Written, data: st.DataObject) -> None:
    """Any edit, deletion, insertion, exchange or repetition before the last seal is found, and not before its place."""
    original = written.lines()
    lines = list(original)
    last, inserted = len(lines) - 2, 0
    for _ in range(data.draw(st.integers(1, 3))):
        at, length = data.draw(st.integers(0, len(lines) - 2)), len(lines)
        match data.draw(OPERATIONS):
            case "delete":
                del lines[at]
            case "swap":
                other = data.draw(st.integers(0, last - 1))
                if other < len(lines):
                    lines[at], lines[other] = lines[other], lines[at]
            case "repeat":
                lines.insert(at, lines[data.draw(st.integers(0, len(lines) - 1))])
            case "flip":
                byte = data.draw(st.integers(0, len(lines[at]) - 1))
                bit = 1 << data.draw(st.integers(0, 6))
                changed = bytearray(lines[at])
                changed[byte] ^= bit
                lines[at] = bytes(changed).replace(b"\n", b"?")
            case "insert":
                lines.insert(at, spell(at + 1, Incoming(TIME, "net.denied"), "0" * 64)[0][:-1])
            case "older":
                lines[at:at] = original[: data.draw(st.integers(1, 5))]
            case "renumber":
                before = parse(lines[at - 1]) if at else None
                lines[at:] = rechain(lines[at:], before.hash if before else "0" * 64, at + 1)
        inserted += max(0, len(lines) - length)
    report = written.verify_lines(lines)
    if lines == original:
        assert not report.misfits
        return
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(lines, original, strict=False)))
    if lines != original[: len(lines)] or len(lines) < written.head[0]:
        # Whoever knows the last record sees every change, a cut included.
        assert written.verify_lines(lines, dict([written.head])).misfits
    if same >= report.seal and not report.misfits:
        # Without that: the trail was cut back behind all its remaining seals, and perhaps written on from there.
        assert not any(b'"type":"audit.seal"' in line for line in lines[same:])
        return
    first = same
    assert report.misfits
    # Never before the change; an edit that was chained again shows at the next seal at the latest.
    where = report.misfits[0].line - 1
    assert first <= where <= first + SEAL + 1 + inserted


@pytest.fixture(scope="module")
def several() -> Iterator[Written]:
    with tempfile.TemporaryDirectory() as name:
        made = Written(Path(name), 100, Limits(seal_records=SEAL, rotate_size=6000))
        assert len(files.rotated(made.log)) >= 4
        yield made


WHOLE_FILES = st.sampled_from("remove exchange copy-over cut shorten append older edit drop-line".split())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_change_of_several_files_is_found(several: Written, data: st.DataObject) -> None:
    """Files removed, exchanged, cut, replaced by an older state or edited: found without an anchor, unless what is
    left is how the trail once was; and with one always."""
    originals = [(path.name, path.read_bytes()) for path in files.trail(several.log)]
    contents = dict(originals)

    def draw(most: int) -> int:
        return data.draw(st.integers(0, most))

    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(contents)))
        content = contents[name]
        match data.draw(WHOLE_FILES):
            case "remove" if len(contents) > 1:
                del contents[name]
            case "exchange":
                other = data.draw(st.sampled_from(sorted(contents)))
                contents[name], contents[other] = contents[other], content
            case "copy-over":
                contents[name] = data.draw(st.sampled_from(originals))[1]
            case "cut":
                contents[name] = content[: draw(len(content))]
            case "shorten":
                contents[name] = content[draw(len(content)) :]
            case "append":
                contents[name] += data.draw(st.sampled_from(originals))[1][: draw(2000)]
            case "older":
                lines = content.splitlines(keepends=True)
                contents[name] = b"".join(lines[: draw(len(lines))])
            case "edit" if content:
                at = draw(len(content) - 1)
                contents[name] = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
            case "drop-line" if content:
                lines = content.splitlines(keepends=True)
                del lines[draw(len(lines) - 1)]
                contents[name] = b"".join(lines)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for name, content in contents.items():
            (copy / name).write_bytes(content)
        keys = load_public(several.log / "public.pem")
        found = verify(files.trail(copy), keys)
        anchored = verify(files.trail(copy), keys, dict([several.head]))
        now = b"".join(path.read_bytes() for path in files.trail(copy))
    before = b"".join(content for _, content in originals)
    if now == before:  # what moved to another file shows only where it is half of a line
        whole = all(not content or content.endswith(b"\n") for content in contents.values())
        assert whole == (not found.misfits) == (not anchored.misfits)
        return
    rest = now[len(before) :] if now.startswith(before) else None
    assert anchored.misfits or (rest is not None and anchored.torn == len(rest)), "an anchor did not help"
    finished = now[: now.rfind(b"\n") + 1]
    if not before.startswith(finished):
        assert found.misfits
    elif not found.misfits:
        assert found.torn == len(now) - len(finished)


@pytest.mark.parametrize("end", [b"", b" ", b"\0"])
def test_changed_last_byte_of_a_full_file_is_found(tmp_path: Path, end: bytes) -> None:
    written = Written(tmp_path, 100, Limits(seal_records=10, rotate_size=5000))
    first = files.trail(written.log)[0]
    first.write_bytes(first.read_bytes()[:-1] + end)
    misfit = written.verify().misfits[0]
    assert (misfit.file, misfit.line) == (first.name, first.read_bytes().count(b"\n") + 1)


def test_only_the_writer_explains_missing_files(tmp_path: Path) -> None:
    """A host or broker that was taken over claims that missing files were retired; the writer seals the claim."""
    for origin, accepted in (("audit", True), ("host:5f2a9c10:42", False), ("supervisor:5f2a9c10:42", False)):
        written = Written(tmp_path / origin[:4], 100, Limits(seal_records=SEAL, rotate_size=6000))
        gone = files.rotated(written.log)[0]
        after = files.first_line(files.rotated(written.log)[1])
        to = (files.seq_of(after) or 0) - 1
        data = {"why": "retention", "count": to, "from": 1, "to": to, "hash": files.prev_of(after)}
        source, _, number = origin.partition(":")
        written.append(Incoming(TIME, "audit.gap", data=data, source=source, number=number))
        gone.unlink()
        report = written.verify()
        assert (report.misfits == []) is accepted, origin
        assert report.retired == (to if accepted else 0)


TEXT = st.text(st.characters(codec=None, categories=None), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(TEXT, JSON, max_size=5), TEXT)
def test_line_of_a_source_becomes_one_ascii_line_of_the_same_meaning(data: dict[str, object], plugin: str) -> None:
    import json

    sent = json.dumps({"time": TIME, "type": "api.called", "plugin": plugin, "data": data}).encode()
    line, digest = spell(1, parse_incoming("host", sent), "0" * 64)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert all(32 <= byte < 127 for byte in line[:-1])
    record = parse(line)
    assert record is not None
    assert record.hash == digest
    assert json.dumps(record.data) == json.dumps(_mended(data))


def _mended(value: object) -> object:
    if isinstance(value, str):
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)
    if isinstance(value, dict):
        return {_mended(k): _mended(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_mended(v) for v in value]
    return value
