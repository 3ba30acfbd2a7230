"""Signatures: who may publish a plugin, and what another key, an older or a withdrawn version comes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from host.authoring.pack import pack_folder
from host.authoring.sign import _new_key, public_half, read_key, sign_package, with_signatures
from isolator.errors import DeniedError, UsageError
from isolator.policy.host import HostConfig
from isolator.policy.parse.host_file import parse_host_config
from isolator.policy.trust import Publisher, Trust, is_older
from isolator.reader import package
from isolator.registration.reading import ManifestReader
from isolator.registration.signatures import publisher_of
from isolator.registration.staging import Source, Staged, discard, stage
from tests.host.test_cli import isolator
from tests.support.offers import offered
from tests.system.daemon import Daemon, daemon, event, write_plugin

READER = ManifestReader(HostConfig().uid_range)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """A key each of two publishers and of a stranger."""
    made = {name: tmp_path / f"{name}.key" for name in ("acme", "beta", "stranger")}
    for path in made.values():
        _new_key(path)
    return made


@pytest.fixture
def trust(keys: dict[str, Path]) -> Trust:
    return Trust(publishers={
        "acme": Publisher(key=public_half(read_key(keys["acme"])), names=("bell", "acme-*")),
        "beta": Publisher(key=public_half(read_key(keys["beta"])), names=("beta-*",)),
    })  # fmt: skip


def _packed(folder: Path, version: str = "1.0.0") -> Path:
    write_plugin(folder / "bell", version=version)
    return pack_folder(folder / "bell", folder / f"bell-{version}.isolator").path


def _staged(tmp_path: Path, path: Path) -> Staged:
    base = tmp_path / "store"
    base.mkdir(exist_ok=True)
    staged = stage(base, Source(path=str(path)), READER, offered(path))
    discard(staged)
    return staged


def _publisher(staged: Staged, trust: Trust, version: str = "1.0.0") -> str:
    return publisher_of("bell", version, staged.digest, staged.signatures, trust)


def test_signature_of_a_trusted_publisher_is_known_and_the_content_stays(
    tmp_path: Path, keys: dict[str, Path], trust: Trust
) -> None:
    path = _packed(tmp_path)
    before = _staged(tmp_path, path)
    said = sign_package(path, read_key(keys["acme"]))
    after = _staged(tmp_path, path)
    assert after.digest == before.digest == said["digest"] and len(after.signatures) == 1
    assert _publisher(after, trust) == "acme"
    once = path.read_bytes()
    sign_package(path, read_key(keys["acme"]))
    assert path.read_bytes() == once, "signing again changes nothing"
    sign_package(path, read_key(keys["stranger"]))
    both = _staged(tmp_path, path)
    assert len(both.signatures) == 2 and _publisher(both, trust) == "acme"


def test_envelope_is_one_that_other_tools_verify(tmp_path: Path, keys: dict[str, Path]) -> None:
    path = _packed(tmp_path)
    sign_package(path, read_key(keys["acme"]))
    data = path.read_bytes()
    start = data.index(b'{"payload"')
    envelope = Envelope.from_dict(json.loads(data[start : data.index(b"\0", start)]))
    half = public_half(read_key(keys["acme"]))
    key = SSlibKey(half, "ed25519", "ed25519", {"public": half})
    assert envelope.verify([key], 1)
    assert json.loads(envelope.payload) == {
        "digest": _staged(tmp_path, path).digest, "name": "bell", "version": "1.0.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (None, "is not signed, and only acme"),
        ("stranger", "does not trust"),
        ("beta", "beta has signed it and may not"),
    ],
)
def test_plugin_of_a_publisher_is_nobody_elses_to_publish(
    tmp_path: Path, keys: dict[str, Path], trust: Trust, by: str | None, expected: str
) -> None:
    path = _packed(tmp_path)
    if by is not None:
        sign_package(path, read_key(keys[by]))
    with pytest.raises(DeniedError, match=expected):
        _publisher(_staged(tmp_path, path), trust)


def test_signature_of_another_content_version_or_name_is_none(
    tmp_path: Path, keys: dict[str, Path], trust: Trust
) -> None:
    path = _packed(tmp_path)
    sign_package(path, read_key(keys["acme"]))
    staged = _staged(tmp_path, path)
    for changed in (
        ("bell", "1.0.1", staged.digest),
        ("bell", "1.0.0", "0" * 64),
        ("acme-bell", "1.0.0", staged.digest),
    ):
        with pytest.raises(DeniedError, match="does not trust"):
            publisher_of(*changed, staged.signatures, trust)
    data = path.read_bytes()
    start = data.index(b'{"payload"')
    envelope = data[start : data.index(b"\0", start)]
    other = _packed(tmp_path / "other")
    (tmp_path / "other/bell/main").write_text("#!/bin/sh\n")
    other = pack_folder(tmp_path / "other/bell", other).path
    other.write_bytes(with_signatures(other.read_bytes(), envelope))
    with pytest.raises(DeniedError, match="does not trust"):
        _publisher(_staged(tmp_path, other), trust)


@pytest.mark.parametrize(
    "envelope",
    [b"", b"{}", b"[" * 9000, b'{"payloadType":"x","payload":"","signatures":[]}', b"x" * 20000,
     b'{"payloadType":"application/vnd.isolator.package+json","payload":"","signatures":[{"sig":"AAAA"}]}'],
)  # fmt: skip
def test_envelope_that_holds_no_signature_is_refused(tmp_path: Path, envelope: bytes) -> None:
    path = _packed(tmp_path)
    path.write_bytes(with_signatures(path.read_bytes(), envelope))
    with pytest.raises(UsageError, match=r"isolator\.sig"):
        _staged(tmp_path, path)
    assert not list((tmp_path / "store").iterdir())


def test_file_behind_the_signatures_is_refused(tmp_path: Path, keys: dict[str, Path]) -> None:
    path = _packed(tmp_path)
    sign_package(path, read_key(keys["acme"]))
    data = path.read_bytes()
    content = data[: -len(package.trailer(bytes(32)))] + package.header(b"zzz", 0)
    path.write_bytes(content + package.trailer(hashlib.sha256(content).digest()))
    with pytest.raises(UsageError, match="behind the signatures"):
        _staged(tmp_path, path)


def test_withdrawn_version_and_one_that_nobody_signed_are_refused(tmp_path: Path, trust: Trust) -> None:
    staged = _staged(tmp_path, _packed(tmp_path))
    for withdrawn in ("bell 1.0.0", staged.digest):
        with pytest.raises(DeniedError, match="is withdrawn"):
            _publisher(staged, Trust(withdrawn=(withdrawn,)))
    assert _publisher(staged, Trust(withdrawn=("bell 1.0.1",))) == ""
    with pytest.raises(DeniedError, match="is not signed"):
        _publisher(staged, Trust(require=True))


@pytest.mark.parametrize(
    ("older", "newer"),
    [("1.0.0", "1.0.1"), ("1.9.0", "1.10.0"), ("1.0.0-rc.1", "1.0.0"), ("1.0.0-rc.2", "1.0.0-rc.10"),
     ("1.0.0-1", "1.0.0-alpha"), ("1.0.0-alpha", "1.0.0-alpha.1")],
)  # fmt: skip
def test_order_of_versions_is_that_of_semver(older: str, newer: str) -> None:
    assert is_older(older, newer) and not is_older(newer, older) and not is_older(newer, newer + "+build")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[trust.publishers.acme]\nkey = "00"\nnames = ["a"]', "64 hexadecimal"),
        ('[trust.publishers.acme]\nnames = ["a"]', "has no key"),
        (f'[trust.publishers.acme]\nkey = "{"0" * 64}"', "has no names"),
        (f'[trust.publishers.acme]\nkey = "{"0" * 64}"\nnames = ["*"]', "begin of names"),
        ('[trust]\nwithdrawn = ["bell"]', "NAME VERSION"),
        ("[trust]\nrequired = true", 'did you mean "require"'),
    ],
)
def test_mistake_in_trust_is_refused_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        parse_host_config(text.encode(), source="host.toml")
    assert str(caught.value).startswith("host.toml:")


def test_settings_without_trust_have_the_digest_that_they_had() -> None:
    plain = parse_host_config(b"", source="host.toml")
    assert parse_host_config(b"[trust]\nrequire = false\n", source="host.toml").digest() == plain.digest()
    assert parse_host_config(b"[trust]\nrequire = true\n", source="host.toml").digest() != plain.digest()


async def test_commands_make_a_key_once_and_sign(tmp_path: Path) -> None:
    made = (await isolator(tmp_path, "sign", "--new-key", "k", "--json", cwd=tmp_path)).json["public"]
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    again = await isolator(tmp_path, "sign", "--new-key", "k", cwd=tmp_path)
    assert again.code == 2 and "is there already" in again.err
    (tmp_path / "plugin/inner").mkdir(parents=True)
    (tmp_path / "plugin/plugin.json").touch()
    inside = await isolator(tmp_path, "sign", "--new-key", "k", cwd=tmp_path / "plugin/inner")
    assert inside.code == 2 and "would be packed with it" in inside.err and inside.err.count("\n") == 1
    path = _packed(tmp_path)
    assert (await isolator(tmp_path, "sign", str(path), "--key", "k", "--json", cwd=tmp_path)).json["public"] == made
    for words, code in ((["nowhere", "--key", "k"], 3), ([str(path)], 2), ([str(tmp_path / "k"), "--key", "k"], 2)):
        ran = await isolator(tmp_path, "sign", *words, cwd=tmp_path)
        assert (ran.code, ran.err.count("\n")) == (code, 1), ran.err


@pytest.fixture
def trusting(trust: Trust) -> Iterator[Daemon]:
    lines = ["[trust]", 'withdrawn = ["bell 1.3.0"]']
    for name, publisher in trust.publishers.items():
        lines += [f"[trust.publishers.{name}]", f'key = "{publisher.key}"', f"names = {json.dumps(publisher.names)}"]
    with daemon(host_toml="\n".join(lines)) as d:
        yield d


def test_daemon_records_the_signer_and_holds_back_what_is_older_or_withdrawn(
    trusting: Daemon, tmp_path: Path, keys: dict[str, Path]
) -> None:
    paths = {version: _packed(tmp_path / version, version) for version in ("1.1.0", "1.2.0", "1.3.0")}
    refused = trusting.cli("plugin", "add", str(paths["1.2.0"]), "--yes", code=4)
    assert "only acme" in refused.stderr and refused.stderr.count("\n") == 1
    for path in paths.values():
        sign_package(path, read_key(keys["acme"]))
    assert "signed by acme" in trusting.cli("plugin", "add", str(paths["1.2.0"]), "--yes").stdout
    trusting.cli("event", "emit", "deploy.completed", event(1), "--wait")
    (started,) = [record for record in trusting.records() if record["type"] == "plugin.started"]
    shown = trusting.json("plugin", "show", "bell")
    assert (started["data"]["signer"], started["data"]["digest"]) == ("acme", shown["digest"])
    assert shown["signer"] == "acme"
    older = trusting.cli("plugin", "update", "bell", str(paths["1.1.0"]), code=5)
    assert "version: 1.1.0, older than 1.2.0" in older.stderr
    assert trusting.json("plugin", "show", "bell")["version"] == "1.2.0"
    trusting.cli("plugin", "reject", "bell")
    assert "is withdrawn" in trusting.cli("plugin", "update", "bell", str(paths["1.3.0"]), code=4).stderr
    trusting.cli("plugin", "update", "bell", str(paths["1.1.0"]), "--yes")
    assert trusting.json("plugin", "show", "bell")["version"] == "1.1.0"
    host_toml = trusting.root / "etc/isolator/host.toml"
    host_toml.write_text(host_toml.read_text().replace("bell 1.3.0", "bell 1.1.0"))
    trusting.cli("reload")
    shown = trusting.json("plugin", "show", "bell")
    assert "is withdrawn" in (shown["error"] or ""), shown
