"""The reader of strangers' manifests can do nothing but answer, and the daemon believes no answer that is none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from isolator.errors import IsolatorError, UsageError
from isolator.linux.unprivileged import service_command
from isolator.policy.host import HostConfig
from isolator.registration import reading
from isolator.registration.reading import ManifestReader, ReadManifest
from tests.policy.samples import MANIFEST
from tests.reader.broken import ANSWERS, ATTEMPTS

READER = ManifestReader(HostConfig().uid_range)
BAD = sorted(ANSWERS.keys() - {"good", "silent"})


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    reading._known.clear()
    yield
    reading._known.clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MODULE", "tests.reader.broken")


def attempts(how: str) -> list[str]:
    command = [*service_command("tests.reader.broken", 64999, 64999, {}), how]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.splitlines()


def test_hardened_reader_can_do_none_of_what_an_unhardened_one_can() -> None:
    assert attempts("free") == [name for name in ATTEMPTS if name != "execute"]
    assert attempts("hardened") == ["still here"]


def test_manifest_is_read_whole() -> None:
    text = json.dumps(MANIFEST | {"later": "é\u2028"}).encode()
    found = READER.read(text, "plugin.json")
    assert found.manifest == MANIFEST | {"later": "é\u2028"}
    assert (found.core.name, found.core.extra, found.core.limits["memory"]) == (MANIFEST["name"], ("later",), 256 << 20)


def test_error_names_file_line_and_key() -> None:
    with pytest.raises(UsageError) as caught:
        READER.read(b'{\n "name": "x y"\n}', "/srv/a/plugin.json")
    assert str(caught.value).startswith("/srv/a/plugin.json:2: name: must be 2 to 63")


def test_error_of_a_key_that_is_near_another_names_that() -> None:
    with pytest.raises(UsageError, match='did you mean "memory"'):
        READER.read(json.dumps(MANIFEST | {"sandbox": {"resources": {"memroy": "1M"}}}).encode(), "plugin.json")


def test_errors_of_one_manifest_reach_no_other() -> None:
    good = [json.dumps(MANIFEST | {"name": f"plugin-{number}"}).encode() for number in range(70)]
    texts = [text for number, one in enumerate(good) for text in (one, b"%d" % number)]
    found = READER.read_all([(text, "p") for text in texts])
    names = [one.core.name for one in found if isinstance(one, ReadManifest)]
    assert names == [f"plugin-{number}" for number in range(70)]
    assert len([one for one in found if isinstance(one, UsageError)]) == 70


def test_same_bytes_are_read_once_in_the_life_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(MANIFEST).encode()
    READER.read(text, "one")
    with pytest.raises(UsageError, match=r"^one:1"):
        READER.read(b"[]", "one")
    monkeypatch.setattr(reading, "running", None)  # a process more would be a TypeError
    assert READER.read(text, "two").core.name == MANIFEST["name"]
    with pytest.raises(UsageError, match=r"^two:1"):
        READER.read(b"[]", "two")


def test_answers_that_are_kept_are_bounded_in_size() -> None:
    large = [json.dumps(MANIFEST | {"description": "x" * 250_000 + str(number)}).encode() for number in range(40)]
    READER.read_all([(text, "p") for text in large])
    assert 20 < len(reading._known) < 40


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("kind", BAD)
def test_broken_reader_is_cut_off_and_others_are_read(kind: str) -> None:
    one, two, three = READER.read_all([(b"good", "one"), (kind.encode(), "two"), (b"no json", "three")])
    assert isinstance(one, ReadManifest)
    assert isinstance(two, IsolatorError)
    assert str(two).startswith("two: ")
    assert str(two).isprintable()
    assert str(three).startswith("three: cannot be read")


@pytest.mark.usefixtures("broken")
def test_reader_that_says_nothing_is_given_up_and_not_held_against_the_manifest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_SECONDS", 0.5)
    with pytest.raises(IsolatorError, match=r"one: was not read within"):
        READER.read(b"silent", "one")
    assert not reading._known
