"""What an operator is told of a version: last words of one that does not come up, what stays withheld, promises."""

from __future__ import annotations

from pathlib import Path

from tests.system.daemon import Daemon
from tests.system.updates.plugins import add, make

LAST_WORDS = "#!/bin/sh\necho starting >&2\necho no database at 10.0.0.5 >&2\nexit 3\n"
ASKS = {"network": {"egress": [{"host": name, "ports": [443]} for name in ("a.example.com", "b.example.com")]}}
POLICY = '[grant]\nhooks = ["deploy.*"]\negress = ["a.example.com:443"]\n'


def test_start_of_a_plugin_that_ends_shows_its_last_words(running: Daemon, tmp_path: Path, name: str) -> None:
    running.cli("plugin", "add", str(make(tmp_path / name, "1.0.0", LAST_WORDS)), "--yes")
    failed = running.cli("plugin", "start", name, code=1).stderr.splitlines()
    assert "stderr: no database at 10.0.0.5" in failed[:-1]
    assert failed[-1].startswith(f"isolator: plugin {name}: is ") and f"isolator plugin logs {name}" in failed[-1]


def test_agreement_says_what_stays_withheld_and_what_is_asked_for_beyond_before(
    running: Daemon, tmp_path: Path, name: str
) -> None:
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    policy.write_text(POLICY)
    folder = make(tmp_path / name, "1.0.0", sandbox=ASKS)
    agreed = running.cli("plugin", "add", str(folder), "--yes").stdout
    _, _, withheld = agreed.partition("What its policy withholds (")
    assert withheld.splitlines()[0] == f"{policy}) stays withheld:" and "  - egress b.example.com:443" in withheld
    assert "a.example.com" not in withheld

    make(folder, "1.1.0", sandbox=ASKS, hooks=["deploy.completed", "project.created"])
    waits = running.cli("plugin", "update", name, str(folder), code=5)
    _, _, more = waits.stdout.partition(f"It asks for more than {name} was granted so far:\n")
    assert more.splitlines()[0].startswith("  + ") and "project.created" in more.splitlines()[0], waits
    approved = running.cli("plugin", "approve", name, "--yes").stdout
    assert "project.created" in policy.read_text() and "b.example.com" not in policy.read_text()
    _, _, withheld = approved.partition("stays withheld:\n")
    assert "  - egress b.example.com:443" in withheld and "project.created" not in withheld


def test_promises_of_the_layers_are_shown_where_they_are_wanted(running: Daemon, tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / name, "1.0.0")
    short = running.cli("plugin", "add", str(folder), code=5).stdout
    whole = running.cli("plugin", "add", str(folder), "--verbose", code=5).stdout
    add(running, folder, start=False)
    explained = running.json("plugin", "explain", name)
    sentences = explained.get("proposal", explained)["sentences"]
    assert len(sentences) > 5
    for sentence in sentences.values():
        first = " ".join(sentence.split()[:4])
        assert first in whole and first not in short
