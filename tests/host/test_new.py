"""``isolator new``: every language's example runs as written."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from host.authoring.languages import COMPILED, MODES
from tests.host.fake_supervisor import Daemon
from tests.host.test_cli import isolator
from tests.support.new_plugins import need

SOURCES = {language: files[0][1] for language, files in MODES["oneshot"].items()}
EACH = [pytest.param(one, marks=pytest.mark.wide if one == "typescript" else ()) for one in sorted(SOURCES)]
WITHOUT_BUILDS = [pytest.param(one, marks=pytest.mark.wide if one in COMPILED else ()) for one in sorted(SOURCES)]


@pytest.mark.parametrize("language", EACH)
async def test_a_new_plugin_works_as_written(daemon: Daemon, language: str) -> None:
    need(language)
    folder = daemon.root / "my-plugin"
    ran = await isolator(daemon.root, "new", str(folder), "--lang", language)
    assert ran.code == 0, ran.err
    assert "isolator plugin add" in ran.out
    if (folder / "Makefile").exists():
        await asyncio.to_thread(subprocess.run, ["make", "-s", "-C", str(folder)], check=True)
    ran = await isolator(daemon.root, "plugin", "add", str(folder), "--yes")
    assert ran.code == 0, ran.err
    daemon.sidecars["my-plugin"].manifest["x-interpreter"] = ""
    for _ in range(2):
        (delivery,) = (await daemon.outcome(await daemon.emit(project_id="shop")))["deliveries"]
        assert delivery["state"] == "ok", delivery
        assert json.loads(delivery["reply"])["result"] == {"status": "ok"}
    log = daemon.paths.plugin_log / "my-plugin.log"
    await daemon.poll(lambda: log.exists() and "deploy.completed shop" in log.read_text())


FAILING = {
    "python": ('    return {"status": "ok"}\n', '    raise OSError("no answer")\n'),
    "node": ('  return { status: "ok" };\n', '  throw new Error("no answer");\n'),
    "typescript": ('  return { status: "ok" };\n', '  throw new Error("no answer");\n'),
    "go": ('\treturn map[string]any{"status": "ok"}\n', '\tpanic("no answer")\n'),
    "rust": ('    r#"{"status":"ok"}"#\n', '    panic!("no answer")\n'),
    "sh": ("trap - EXIT\n", "echo no answer >&2\nfalse\ntrap - EXIT\n"),
}
"""By language, how its handler works and how it fails."""


@pytest.mark.parametrize("language", WITHOUT_BUILDS)
async def test_failing_handler_of_a_new_plugin_asks_for_another_delivery_and_logs_why(
    daemon: Daemon, language: str
) -> None:
    need(language)
    folder = daemon.root / "my-plugin"
    assert (await isolator(daemon.root, "new", str(folder), "--lang", language)).code == 0
    source = folder / SOURCES[language].format(name="my-plugin")
    text, (works, fails) = source.read_text(), FAILING[language]
    assert text.count(works) == 1
    source.write_text(text.replace(works, fails))
    manifest = json.loads((folder / "plugin.json").read_text())
    (folder / "plugin.json").write_text(json.dumps({**manifest, "delivery": {"attempts": 1}}))
    if (folder / "Makefile").exists():
        await asyncio.to_thread(subprocess.run, ["make", "-s", "-C", str(folder)], check=True)
    assert (await isolator(daemon.root, "plugin", "add", str(folder), "--yes")).code == 0
    daemon.sidecars["my-plugin"].manifest["x-interpreter"] = ""
    delivery = await daemon.deliver(project_id="shop")
    assert json.loads(delivery["reply"])["result"] == {"status": "retry"}
    assert daemon.sidecars["my-plugin"].starts == 1
    log = daemon.paths.plugin_log / "my-plugin.log"
    await daemon.poll(lambda: log.exists() and "no answer" in log.read_text())


async def test_a_name_for_no_plugin_and_a_folder_in_use_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    ran = await isolator(tmp_path, "new", str(tmp_path / "Bad Name"), "--lang", "python")
    assert ran.code == 2
    assert "lower-case" in ran.err
    assert not (tmp_path / "Bad Name").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").touch()
    ran = await isolator(tmp_path, "new", str(full), "--lang", "python")
    assert (ran.code, list(full.iterdir())) == (2, [full / "precious"])
