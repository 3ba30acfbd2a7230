"""Keys and seals: each check of ``verify``, of the key's file and of the end of a trail, one at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isolator.audit import files
from isolator.audit.log import Chain, Limits, Trail
from isolator.audit.record import GENESIS, MAX_DEPTH, MAX_TEXT, Incoming, RejectedError, parse_incoming, spell
from isolator.audit.recover import HEAD_NAME, read_head
from isolator.audit.seal import KEY_NAME, PUBLIC_NAME, Signer, fingerprint, load_public, load_signer, message
from isolator.audit.verify import SEAL_EVERY, anchors_of, verify
from tests.audit.test_verify import TIME, Written

LIMITS = Limits(seal_records=10)


def replace_key(written: Written) -> Path:
    """Take the key away, so that the next writer makes another; returns the old one."""
    old = written.lib / "old.key"
    (written.lib / KEY_NAME).rename(old)
    return old


def test_seal_of_a_key_that_was_replaced_does_not_count(tmp_path: Path) -> None:
    """Whoever got hold of the old key writes on with it."""
    written = Written(tmp_path, 25, LIMITS)
    old = replace_key(written)
    written.write(25)
    assert not written.verify().misfits and len(written.verify().keys) == 2
    old.rename(written.lib / KEY_NAME)
    written.write(25)
    misfit = written.verify().misfits[0]
    assert "had been replaced before" in misfit.why


def forged(written: Written, signer: Signer, **changed: Any) -> list[bytes]:
    """Lines of the trail, and a seal over all of them that this signer made."""
    lines = written.lines()
    seq, digest = len(lines), files.hash_of(lines[-1])
    report = written.verify()
    data = {"from": report.seal, "to": seq, "hash": digest, "key": signer.name} | changed
    data.setdefault("signature", signer.sign(data["from"], data["to"], data["hash"]))
    seal, _ = spell(seq + 1, Incoming(TIME, "audit.seal", data=data), digest)
    return [*lines, seal[:-1]]


def test_seal_is_checked_in_each_of_its_parts(tmp_path: Path) -> None:
    written = Written(tmp_path, 25, LIMITS)
    report, last = written.verify(), len(written.lines())
    signer = load_signer(written.lib, written.log)
    assert not written.verify_lines(forged(written, signer)).misfits
    for changed, why in (
        ({"from": report.seal - 1}, "not for those before it"),
        ({"from": report.seal + 1}, "not for those before it"),
        ({"from": None, "signature": "00"}, "not for those before it"),
        ({"to": last - 1}, "not for those before it"),
        ({"hash": "0" * 64}, "not for those before it"),
        ({"signature": "00" * 64}, "signature does not fit"),
        ({"signature": "no hex"}, "signature does not fit"),
        ({"signature": signer.sign(report.seal, last - 1, files.hash_of(written.lines()[-1]))}, "does not fit"),
        ({"signature": signer.sign(1, last, files.hash_of(written.lines()[-1]))}, "does not fit"),
        ({"key": "0" * 16}, "not among the known ones"),
    ):
        misfits = written.verify_lines(forged(written, signer, **changed)).misfits
        assert misfits and why in misfits[0].why, changed
    stranger = Signer(Ed25519PrivateKey.generate())
    assert "not among the known" in written.verify_lines(forged(written, stranger)).misfits[0].why
    # Under the name of the real key: the name proves nothing.
    lie = forged(written, stranger, key=signer.name)
    assert "signature does not fit" in written.verify_lines(lie).misfits[0].why


def test_bad_seal_neither_counts_nor_vouches(tmp_path: Path) -> None:
    written = Written(tmp_path, 25, LIMITS)
    before = written.verify()
    report = written.verify_lines(forged(written, load_signer(written.lib, written.log), signature="00" * 64))
    assert (report.seals, report.seal, report.keys) == (before.seals, before.seal, before.keys)


def test_records_beyond_the_last_seal_are_at_most_as_many_as_one_covers(tmp_path: Path) -> None:
    for count, fits in ((SEAL_EVERY, True), (SEAL_EVERY + 1, False)):
        lines, prev = [], GENESIS
        for seq in range(1, count + 1):
            line, prev = spell(seq, Incoming(TIME, "net.query"), prev)
            lines.append(line)
        path = tmp_path / "audit.jsonl"
        path.write_bytes(b"".join(lines))
        key = Ed25519PrivateKey.generate().public_key()
        misfits = verify([path], {fingerprint(key): key}).misfits
        assert (not misfits) is fits, count
        assert fits or misfits[0].seq == SEAL_EVERY + 1


def test_retention_record_counts_only_under_a_seal_and_for_its_hash(tmp_path: Path) -> None:
    for name, wrong, sealed in (("right", {}, True), ("unsealed", {}, False), ("hash", {"hash": "0" * 64}, True)):
        written = Written(tmp_path / name, 100, Limits(seal_records=10, rotate_size=6000))
        gone, following, *_ = files.rotated(written.log)
        after = files.first_line(following)
        to = (files.seq_of(after) or 0) - 1
        data = {"why": "retention", "count": to, "from": 1, "to": to, "hash": files.prev_of(after)} | wrong
        written._limits = Limits(rotate_age=1e12)  # of itself it seals nothing now
        written._add([Incoming(TIME, "audit.gap", data=data)], sealed=sealed)
        gone.unlink()
        assert (not written.verify().misfits) is (name == "right"), name


def test_signed_message_is_the_documented_one() -> None:
    assert message(3, 9, "ab") == b"isolator audit seal\n3 9 ab\n"


@pytest.mark.parametrize("text", ["", "1", "x:" + "0" * 16, "1:" + "0" * 15, "1:" + "G" * 16, "-1:" + "0" * 16])
def test_anchor_that_proves_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="SEQ:HASH"):
        anchors_of([text])


def test_anchor_is_held_against_its_own_record(tmp_path: Path) -> None:
    written = Written(tmp_path, 25, LIMITS)
    digests = {seq: files.hash_of(line) for seq, line in enumerate(written.lines(), 1)}
    assert not written.verify({7: digests[7][:16], 12: digests[12]}).misfits
    assert written.verify({7: digests[8][:16]}).misfits[0].seq == 7


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda key: key.chmod(0o640), "open to others"),
        (lambda key: key.chmod(0o604), "open to others"),
        (lambda key: os.chown(key, 64009, -1), "belonged to uid 64009"),
        (lambda key: key.write_bytes(b"x"), "could not be read"),
    ],
)
def test_key_that_somebody_else_may_know_signs_no_more(tmp_path: Path, spoil: Any, why: str) -> None:
    written = Written(tmp_path, 5, LIMITS)
    before = load_signer(written.lib, written.log).name
    spoil(written.lib / KEY_NAME)
    signer = load_signer(written.lib, written.log)
    assert signer.name != before
    assert why in signer.notes[0] and signer.name in signer.notes[0]
    # Both are shown, the old one first: what it signed still counts.
    assert list(load_public(written.log / PUBLIC_NAME)) == [before, signer.name]
    assert (written.lib / KEY_NAME).stat().st_mode & 0o777 == 0o600
    assert load_signer(written.lib, written.log).notes == ()


def test_key_is_never_read_through_a_link(tmp_path: Path) -> None:
    written = Written(tmp_path, 5, LIMITS)
    old = replace_key(written)
    (written.lib / KEY_NAME).symlink_to(old)
    assert "symbolic link" in load_signer(written.lib, written.log).notes[0]


@pytest.mark.parametrize("content", ["[]", "{}", '{"seq":"1","hash":"x"}', '{"seq":1,"hash":2}', "[" * 100_000, "\xff"])
def test_note_of_another_shape_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / HEAD_NAME
    path.write_bytes(content.encode("latin-1"))
    assert read_head(path) is None


def reopened(written: Written) -> tuple[Trail, Any]:
    trail = Trail(written.log, written.lib, LIMITS)
    end, signer = trail.open()
    trail.close()
    return trail, (end, signer)


def test_writer_goes_on_from_its_note_and_not_from_a_rewritten_end(tmp_path: Path) -> None:
    """The same number with another hash: the last record was exchanged, hash and all."""
    written = Written(tmp_path, 13, LIMITS)
    lines = written.lines()
    prev = files.prev_of(lines[-1]) or ""
    line, _ = spell(len(lines), Incoming(TIME, "net.query", data={"forged": True}), prev)
    written.live.write_bytes(b"".join(each + b"\n" for each in lines[:-1]) + line)
    trail, (end, _) = reopened(written)
    assert (end.seq, end.hash) == written.head
    assert "rewritten" in trail.notes[0].why


def test_edit_of_the_last_record_is_noticed_at_the_next_start(tmp_path: Path) -> None:
    """Number, prev and hash are left as they were; only the hash of its own bytes tells."""
    written = Written(tmp_path, 13, LIMITS)
    content = written.live.read_bytes()
    written.live.write_bytes(content.replace(b'"number":12}', b'"number":13}'))
    trail, (end, _) = reopened(written)
    assert (end.seq, end.hash) == written.head
    assert "cut or changed" in trail.notes[0].why


def test_what_stands_after_a_break_of_the_chain_is_cut_off_and_kept(tmp_path: Path) -> None:
    written = Written(tmp_path, 13, LIMITS)
    size, count = written.live.stat().st_size, len(written.lines())
    stray, _ = spell(count + 1, Incoming(TIME, "net.query"), "f" * 64)
    with written.live.open("ab") as file:
        file.write(stray + stray)
    trail, (end, _) = reopened(written)
    assert (end.seq, written.live.stat().st_size) == (count, size)
    (note,) = trail.notes
    assert (written.log / str(note.kept)).read_bytes() == stray + stray and note.count == 3


def test_next_writer_seals_from_the_seal_before(tmp_path: Path) -> None:
    """The range of its first seal begins where the last one ended, and origins go on from the records since."""
    written = Written(tmp_path, 0, LIMITS)
    numbered = (Incoming(TIME, "net.query", source="broker", number=f"00000001:{n}") for n in range(1, 13))
    written._add(numbered)
    _, (end, signer) = reopened(written)
    assert (end.sealed, end.origins) == (10, {"broker": "00000001:12"})
    chain = Chain(end, signer, LIMITS)
    chain.seal(TIME)
    assert b'"data":{"from":11,"to":13,' in chain.take()[-1].lines[-1]


def incoming(**changed: Any) -> Incoming:
    import json

    sent = {"time": TIME, "type": "net.query", "data": {}} | changed
    return parse_incoming("broker", json.dumps(sent).encode())


@pytest.mark.parametrize(
    "changed",
    [
        {"time": TIME + '","x":"'},
        {"time": TIME[:-1]},
        {"time": TIME.replace("2", "\N{ARABIC-INDIC DIGIT TWO}")},
        {"time": 5},
        {"type": 'net.query","x":"'},
        {"type": "audit.seal"},
        {"type": "audit.summary"},
        {"data": []},
        {"plugin": 5},
        {"data": {"x": 0}, "event_id": ["e"]},
    ],
)
def test_line_that_could_break_out_of_its_field_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(RejectedError):
        incoming(**changed)


def test_depth_and_length_are_bounded_exactly() -> None:
    nest: Any = "x"
    for _ in range(MAX_DEPTH):
        nest = [nest]
    assert incoming(data={"n": nest[0]}).data == {"n": nest[0]}
    with pytest.raises(RejectedError, match="deep"):
        incoming(data={"n": nest})
    for length, cut in ((MAX_TEXT, False), (MAX_TEXT + 1, True)):
        record = incoming(data={"x": "x" * length})
        assert len(record.data["x"]) == MAX_TEXT and (record.cut is not None) is cut
    # Keys, too, are a plugin's text now and then.
    assert list(incoming(data={"k" * 5000: 1}).data) == ["k" * MAX_TEXT]


def test_number_of_a_source_is_taken_only_in_its_form() -> None:
    assert incoming(n="0000000a:12").number == "0000000a:12"
    for number in ("0000000a:x", "supervisor:1", "0000000a:1\n", "0000000a:01", "0000000a:0", 'a","x":"'):
        assert incoming(n=number).number == ""
