"""Plugins that are found in a folder: listed, never run before an operator agreed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from host.authoring.pack import pack_folder
from host.client.client import Client
from isolator.errors import UsageError
from tests.system.daemon import daemon, event, wait_for, write_plugin
from tests.system.updates.plugins import make, states


def test_found_plugins_wait_for_approval(tmp_path: Path) -> None:
    place, later = tmp_path / "place", tmp_path / "later"
    make(place / "found-one", "1.0.0")
    broken = make(place / "broken", "1.0.0")
    (broken / "plugin.json").write_text('{"name": 7')
    (place / "nothing").mkdir()
    (place / "a-file").write_text("")
    with daemon(host_toml=f'plugin_dirs = ["{place}", "{later}"]\n') as d:
        assert states(d) == {"found-one": "pending", "broken": "rejected"}
        listing = d.cli("plugin", "list").stdout
        assert "isolator plugin approve found-one" in listing and "plugin.json" in listing
        (rejected,) = [r for r in d.records() if r["type"] == "plugin.rejected"]
        assert rejected["plugin"] == "broken"

        # Events of before the approval are not its own, and it does not start by any means.
        d.cli("event", "emit", "deploy.completed", event("before"))
        assert "isolator plugin approve found-one" in d.cli("plugin", "start", "found-one", code=5).stderr
        d.cli("plugin", "enable", "found-one", code=5)
        d.cli("plugin", "approve", "found-one", code=5)
        explained = d.cli("plugin", "explain", "found-one").stdout
        assert "deploy.completed" in explained and "this is what 'isolator plugin approve found-one' would" in explained
        assert not [r for r in d.records() if r["type"] == "plugin.started"]
        assert not (d.root / "var/lib/isolator/plugins/found-one").exists()
        assert states(d)["found-one"] == "pending"

        d.cli("plugin", "approve", "found-one", "--yes")
        d.cli("event", "emit", "deploy.completed", event("after"), "--wait")
        assert states(d) == {"found-one": "running", "broken": "rejected"}
        (added,) = [r for r in d.records() if r["type"] == "plugin.added"]
        assert added["plugin"] == "found-one"

        pack_folder(make(tmp_path / "away/parcel", "1.0.0"), place / "parcel.isolator")
        wait_for(lambda: states(d).get("parcel") == "pending")
        d.cli("plugin", "approve", "parcel", "--yes")
        d.cli("event", "emit", "deploy.completed", event("packed"), "--wait")
        assert states(d)["parcel"] == "running"
        (place / "parcel.isolator").unlink()
        d.cli("plugin", "remove", "parcel", "--yes")

        # What comes, changes and goes while it runs.
        make(later / "late-comer", "3.0.0")
        wait_for(lambda: states(d).get("late-comer") == "pending")
        write_plugin(later / "double", version="9.9.9")
        manifest = json.loads((later / "double/plugin.json").read_text()) | {"name": "found-one"}
        (later / "double/plugin.json").write_text(json.dumps(manifest))
        wait_for(lambda: states(d).get("double") == "rejected")
        assert 'the name "found-one" is taken' in d.cli("plugin", "list").stdout
        assert states(d)["found-one"] == "running"
        make(place / "broken", "1.0.1")
        wait_for(lambda: states(d).get("broken") == "pending")
        shutil.rmtree(later / "late-comer")
        wait_for(lambda: "late-comer" not in states(d))
        d.cli("plugin", "show", "late-comer", code=3)

        # Removed from the registered ones it is found again, and still not run.
        d.cli("plugin", "remove", "found-one", "--yes")
        wait_for(lambda: states(d).get("found-one") == "rejected" or states(d).get("found-one") == "pending")
        d.stop()
        d.start()
        assert states(d)["found-one"] == "pending"


def test_found_plugin_is_approved_only_as_it_was_shown(tmp_path: Path) -> None:
    folder = make(tmp_path / "place/found-one", "1.0.0")
    with daemon(host_toml=f'plugin_dirs = ["{tmp_path}/place"]\n') as d, Client(str(d.root)) as client:
        shown = client.call("plugin.stage", path=str(folder))["digest"]
        (folder / "main").write_text("#!/bin/sh\n# another\n")
        with pytest.raises(UsageError, match="something else is in its folder now"):
            client.call("plugin.approve", name="found-one", digest=shown)
        assert states(d) == {"found-one": "pending"}
        again = client.call("plugin.stage", path=str(folder))["digest"]
        client.call("plugin.approve", name="found-one", digest=again)
        assert states(d) == {"found-one": "stopped"}


def test_found_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    import os

    place = tmp_path / "place"
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"name": "stolen"}))
    for hostile in ("pipe", "link", "folder"):
        (place / hostile).mkdir(parents=True)
    os.mkfifo(place / "pipe/plugin.json")
    (place / "link/plugin.json").symlink_to(secret)
    (place / "folder/plugin.json").mkdir()
    make(tmp_path / "elsewhere/linked", "1.0.0")
    (place / "linked").symlink_to(tmp_path / "elsewhere/linked")
    make(place / "good-one", "1.0.0")
    with daemon(host_toml=f'plugin_dirs = ["{place}"]\n') as d:
        assert states(d) == {"pipe": "rejected", "link": "rejected", "folder": "rejected", "good-one": "pending"}
