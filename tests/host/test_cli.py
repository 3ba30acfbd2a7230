"""The commands, run as a user runs them, against a real host process."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from host.cli.arguments import config_values
from host.cli.root import cli
from tests.host.fake_supervisor import REPO, Daemon
from tests.support import sidecars

MANIFEST: dict[str, Any] = {
    "name": "notifier",
    "version": "1.2.0",
    "description": "Says hello\x07",
    "api_version": "1",
    "binary": "./main.py",
    "hooks": ["deploy.completed"],
    "config_schema": {
        "webhook_url": {"type": "string", "required": True, "secret": True},
        "channel": {"type": "string", "default": "#deployments"},
        "level": {"type": "enum", "values": ["low", "high"]},
        "account": {"type": "file"},
    },
    "novelty": 1,
}

COMMAND = (
    *(sys.executable, "-I", "-c"),
    f"import sys; sys.path.insert(0, {str(REPO)!r}); from host.cli.main import main; main()",
)


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def isolator(root: Path, *arguments: str, stdin: str = "", cwd: Path | None = None) -> Ran:
    """Run one command."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "--root", str(root), *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env={"PATH": os.environ["PATH"]},
    )
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


def _folder(daemon: Daemon, **changes: Any) -> Path:
    folder = daemon.root / "src"
    folder.mkdir(exist_ok=True)
    (folder / "plugin.json").write_text(json.dumps({**MANIFEST, **changes}))
    body = 'return {"message": os.environ["WEBHOOK_URL"] + os.environ["channel"]}'
    (folder / "main.py").write_text(f"#!{sys.executable}\n" + sidecars.oneshot(body))
    return folder


async def test_a_missing_daemon_is_reported_in_one_line(tmp_path: Path) -> None:
    ran = await isolator(tmp_path, "plugin", "list")
    assert ran.code == 1
    socket = tmp_path / "run/isolator/control.sock"
    start = "start it with 'systemctl start isolator' or 'isolator serve', or name its --root"
    assert ran.err == f"isolator: the daemon is not running: no {socket}; {start}\n"


async def test_wrong_path_is_told_with_what_to_name(daemon: Daemon) -> None:
    root = daemon.root
    ran = await isolator(root, "audit", "verify", str(root / "nowhere"))
    assert (ran.code, ran.out) == (3, "") and "nowhere; name a file or folder that is there" in ran.err
    ran = await isolator(root, "new", str(root / "Bad_Name"), "--lang", "sh")
    assert ran.code == 2 and ran.err.startswith(f"isolator: {root}/Bad_Name: name: must be ")
    ran = await isolator(root, "new", str(root / "hookless"), "--lang", "sh", "--hooks", ",")
    assert (ran.code, ran.err) == (2, "isolator: --hooks: names no event; see 'isolator event types'\n")


async def test_plugin_that_no_event_starts_is_told_so(daemon: Daemon) -> None:
    ran = await isolator(daemon.root, "plugin", "add", str(_folder(daemon, hooks=[])), "--yes")
    assert ran.code == 0 and "added notifier 1.2.0; no event starts it, for it gets none\n" in ran.out


async def test_who_waits_is_told_what_is_not_done(daemon: Daemon) -> None:
    daemon.add("later", sidecars.oneshot('return {"status": "retry", "retry_after_ms": 60000}'))
    payload = '{"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}'
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", payload, "--wait", "--timeout", "0")
    assert ran.code == 1
    assert f"isolator: not all are done after 0 s; see 'isolator event show {ran.out.split()[0]}'\n" == ran.err


async def test_a_plugin_from_add_to_remove(daemon: Daemon) -> None:
    folder, root = _folder(daemon), daemon.root
    (folder / "url.txt").write_text("https://hooks.example/T0/secret-part\n")
    ran = await isolator(root, "plugin", "add", "./src", "--config", "webhook_url=@src/url.txt", "--yes", cwd=root)
    assert ran.code == 0, ran.err
    assert "notifier 1.2.0" in ran.out
    assert "memory" in ran.out
    assert "effective sha256" in ran.out
    assert "\x07" not in ran.out
    assert 'unknown key "novelty"' in ran.err
    assert "secret-part" not in ran.out + ran.err

    ran = await isolator(root, "plugin", "list", "--json")
    assert [(p["name"], p["state"], p["queue"]) for p in ran.json] == [("notifier", "stopped", 0)]

    payload = {"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}
    ran = await isolator(root, "event", "emit", "deploy.completed", "-", "--wait", "--json", stdin=json.dumps(payload))
    assert ran.code == 0, ran.out + ran.err
    (delivery,) = ran.json["deliveries"]
    assert json.loads(delivery["reply"])["result"]["message"] == "[redacted]#deployments"

    ran = await isolator(root, "event", "emit", "deploy.completed", json.dumps(payload), "--wait")
    assert "notifier  ok" in ran.out
    assert "µs" in ran.out or "ms" in ran.out

    ran = await isolator(root, "plugin", "config", "notifier")
    assert "[secret]" in ran.out
    assert "secret-part" not in ran.out
    ran = await isolator(root, "plugin", "config", "notifier", "set", "channel=#ops")
    assert ran.out == "set channel; restarted\n"
    ran = await isolator(root, "plugin", "config", "notifier", "set", "webhook_url=typed-here")
    assert "shell's history" in ran.err
    ran = await isolator(root, "plugin", "config", "notifier", "set", "level=medium")
    assert (ran.code, ran.err) == (2, "isolator: config level: must be one of low, high\n")
    ran = await isolator(root, "plugin", "config", "notifier", "set", "chanel=x")
    assert ran.code == 3
    assert 'did you mean "channel"?' in ran.err

    for verb in ("stop", "start", "restart", "disable", "enable"):
        ran = await isolator(root, "plugin", verb, "notifier")
        assert ran.code == 0, ran.err
    ran = await isolator(root, "plugin", "explain", "notifier")
    assert "effective sha256" in ran.out
    ran = await isolator(root, "plugin", "show", "notifier", "--json")
    assert ran.json["hooks"] == ["deploy.completed"]

    ran = await isolator(root, "plugin", "remove", "notifier", "--yes")
    assert ran.code == 0
    ran = await isolator(root, "plugin", "show", "notifier")
    assert (ran.code, ran.err) == (3, "isolator: plugin notifier: is not registered; see 'isolator plugin list'\n")
    for record in daemon.records:
        assert "secret-part" not in json.dumps(record)
        assert "typed-here" not in json.dumps(record)
    injected = daemon.of_type("secret.injected")
    assert injected[0]["data"]["names"] == ["webhook_url", "WEBHOOK_URL"]


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("s3cret\n", "s3cret"),
        ("s3cret\r\n", "s3cret"),
        ("s3cret", "s3cret"),
        ("one\ntwo\n", "one\ntwo\n"),
        ("a\nb", "a\nb"),
    ],
)
def test_value_from_a_file_with_one_line_is_that_line(tmp_path: Path, content: str, value: str) -> None:
    (tmp_path / "value").write_bytes(content.encode())
    assert config_values((f"token=@{tmp_path}/value",)) == ({"token": value}, [])


async def test_fault_of_a_payload_in_a_file_names_the_file(daemon: Daemon) -> None:
    (daemon.root / "payload.json").write_bytes(b"\xef\xbb\xbf{no")
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", f"@{daemon.root}/payload.json")
    assert ran.code == 2 and f"@{daemon.root}/payload.json: is not JSON: " in ran.err and "quote it" not in ran.err
    (daemon.root / "payload.json").write_bytes(b"\xef\xbb\xbf[]")
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", f"@{daemon.root}/payload.json")
    assert ran.code == 2 and "must be a JSON object" in ran.err


async def test_an_addition_without_consent_needs_approval_and_leaves_nothing(daemon: Daemon) -> None:
    folder = _folder(daemon)
    ran = await isolator(daemon.root, "plugin", "add", str(folder))
    assert ran.code == 5
    assert ran.err.splitlines()[-1].startswith("isolator: plugin add: nobody is there to agree")
    await daemon.until(lambda: not daemon.registrar.staged)
    assert (await isolator(daemon.root, "plugin", "list", "--json")).json == []


async def test_proposal_shows_config_and_the_reasons_of_the_author_and_warns_of_a_deaf_plugin(daemon: Daemon) -> None:
    schema = {"channel": {"type": "string", "default": "#ops", "description": "Where it posts"}}
    egress = [{"host": "hooks.example.com", "ports": [443], "reason": "posts the messages"}]
    folder = _folder(daemon, config_schema=schema, sandbox={"network": {"egress": egress}}, hooks=[])
    ran = await isolator(daemon.root, "plugin", "add", str(folder))
    told = " ".join(ran.out.split())
    assert "config channel: string, default #ops; Where it posts" in told
    assert "egress hooks.example.com:443: posts the messages" in told
    assert told.index("config channel") < told.index("item requested")
    assert "it will never receive an event: its manifest names no hook" in ran.err


async def test_a_typo_in_a_security_section_is_an_error_with_a_hint(daemon: Daemon) -> None:
    for change, hint in (
        ({"transport": {"mod": "stream"}}, 'did you mean "mode"'),
        ({"delivery": {"atempts": 2}}, 'did you mean "attempts"'),
        ({"sandbox": {"resorces": {}}}, 'did you mean "resources"'),
        ({"config_schema": {"PATH": {"type": "string"}}}, "PATH is a reserved variable"),
        ({"config_schema": {"ld_preload": {"type": "string"}}}, "LD_PRELOAD is a reserved variable"),
        ({"config_schema": {"a_b": "string", "aB": "string"}}, "becomes the same variable A_B"),
    ):
        folder = _folder(daemon, **change)
        ran = await isolator(daemon.root, "plugin", "add", str(folder), "--yes")
        assert ran.code == 2, (change, ran.out)
        assert hint in ran.err
        assert len(ran.err.splitlines()) == 1


async def test_flags_without_a_manifest_make_one_and_config_becomes_secret(daemon: Daemon) -> None:
    binary = daemon.root / "indexer"
    body = 'return {"message": os.environ["api_key"]}'
    binary.write_text(f"#!{sys.executable}\n" + sidecars.oneshot(body))
    ran = await isolator(
        daemon.root, *("plugin", "add", "--name", "indexer", "--binary", str(binary), "--hooks", "deploy.completed"),
        *("--config", "api_key=-", "--yes"), stdin="very-secret-key\n",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "flags only" in ran.out
    items = (await isolator(daemon.root, "plugin", "config", "indexer", "--json")).json
    assert [(i["key"], i["secret"], i["value"]) for i in items] == [("api_key", True, None)]
    daemon.sidecars["indexer"].manifest["x-interpreter"] = ""
    row = await daemon.outcome(await daemon.emit())
    assert json.loads(row["deliveries"][0]["reply"])["result"]["message"] == "[redacted]"


async def test_a_required_value_that_is_missing_is_said_and_holds_the_queue(daemon: Daemon) -> None:
    ran = await isolator(daemon.root, "plugin", "add", str(_folder(daemon)), "--yes")
    assert ran.code == 0
    assert "cannot start before webhook_url is set: isolator plugin config notifier set webhook_url=@FILE" in ran.err
    unset = "webhook_url is required and not set; isolator plugin config notifier set webhook_url=@FILE"
    assert unset in (await isolator(daemon.root, "plugin", "list", "--failed")).out
    assert (await isolator(daemon.root, "status")).code == 0
    emitted = await daemon.emit()
    row = await daemon.outcome(emitted, timeout=0.3)
    assert row["deliveries"][0]["state"] == "queued"
    (shown,) = (await isolator(daemon.root, "plugin", "list", "--json")).json
    assert "webhook_url is required" in shown["holding"]
    assert (shown["state"], shown["missing"]) == ("stopped", ["webhook_url"])
    ran = await isolator(daemon.root, "status")
    assert ran.code == 1 and "failing:   notifier" in ran.out
    await isolator(daemon.root, "plugin", "config", "notifier", "set", "webhook_url=-", stdin="https://x\n")
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    assert delivery["state"] == "ok"


async def test_logs_show_lines_redacted_and_follow(daemon: Daemon) -> None:
    body = 'print("secret is", os.environ["token"], "\\x1b[31m", flush=True)\nprint("warn", file=sys.stderr)\nreturn {}'
    daemon.add("talker", sidecars.oneshot(body), config_schema={"token": {"type": "string", "secret": True}})
    await daemon.ask("config.set", name="talker", config={"token": "s3cr3t-token"})
    await daemon.outcome(await daemon.emit())
    await daemon.poll(lambda: len((daemon.paths.plugin_log / "talker.log").read_text().splitlines()) == 2)
    assert "s3cr3t" not in (daemon.paths.plugin_log / "talker.log").read_text()
    ran = await isolator(daemon.root, "plugin", "logs", "talker")
    assert "secret is [redacted]" in ran.out
    assert "\x1b" not in ran.out
    assert " ! warn" in ran.out


async def test_dead_letters_are_listed_and_replayed(daemon: Daemon) -> None:
    daemon.add("no", sidecars.oneshot('return {"status": "rejected", "message": "not for me"}'))
    emitted = await daemon.emit()
    await daemon.outcome(emitted)
    ran = await isolator(daemon.root, "event", "dead")
    assert emitted["id"] in ran.out
    assert "not for me" in ran.out
    ran = await isolator(daemon.root, "event", "replay", emitted["id"])
    assert ran.out == f"queued {emitted['id']} again for no\n"
    ran = await isolator(daemon.root, "event", "show", emitted["id"], "--json")
    assert ran.json["name"] == "deploy.completed"
    ran = await isolator(daemon.root, "event", "replay", "ev_unknown")
    assert ran.code == 3
    ran = await isolator(daemon.root, "event", "list", "--json")
    assert [e["id"] for e in ran.json] == [emitted["id"]]


async def test_misspelt_command_is_answered_with_the_one_that_was_meant(daemon: Daemon) -> None:
    for words, meant in ((("plgin", "list"), "plugin"), (("plugin", "lst"), "list")):
        ran = await isolator(daemon.root, *words)
        assert (ran.code, f"Did you mean '{meant}'?" in ran.err) == (2, True)


async def test_missing_option_is_named_with_its_choices_on_one_line(daemon: Daemon) -> None:
    ran = await isolator(daemon.root, "new", "/nowhere/x")
    assert (ran.code, ran.err.count("\n"), "\\n" in ran.err) == (2, 1, False)
    choices = "go, node, python, rust, sh, typescript"
    assert f"Missing option '--lang'. Choose from: {choices}; try 'isolator new --help'" in ran.err


async def test_a_failed_emit_has_its_exit_code_and_its_reason(daemon: Daemon) -> None:
    ran = await isolator(daemon.root, "event", "emit", "deploy.complete")
    assert (ran.code, "did you mean deploy.completed?" in ran.err) == (3, True)
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", "{nonsense")
    assert ran.code == 2
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", "@/no/such/file")
    assert ran.code == 3
    daemon.add("no", sidecars.oneshot('return {"status": "rejected"}'))
    payload = json.dumps({"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1})
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", payload, "--wait")
    assert ran.code == 1
    assert "no      dead" in ran.out


async def test_the_fields_that_an_event_needs_are_easy_to_find(daemon: Daemon) -> None:
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", "{}")
    assert (ran.code, "see 'isolator event types deploy.completed'" in ran.err) == (2, True)
    fields = (await isolator(daemon.root, "event", "types", "deploy.completed")).out.splitlines()
    assert [line.split()[1] for line in fields if line.split()[0] in ("url", "finished_at", "branch")] == [
        "required",
        "filled",
        "optional",
    ]
    (row,) = [r for r in (await isolator(daemon.root, "event", "types")).out.splitlines() if "deploy.completed" in r]
    assert "duration_ms" in row and "finished_at" not in row
    (entry,) = (await isolator(daemon.root, "event", "types", "deploy.completed", "--json")).json
    assert entry["filled"] == "finished_at"


async def test_an_empty_list_is_reported_on_stderr(daemon: Daemon) -> None:
    for words in (("plugin", "list"), ("event", "list"), ("event", "dead")):
        ran = await isolator(daemon.root, *words)
        assert (ran.code, ran.out, ran.err[:3]) == (0, "", "no "), words


def test_the_examples_of_every_help_can_be_typed() -> None:
    shown = 0
    for path, command in _commands(cli, click.Context(cli)):
        for words in _examples(command.epilog or ""):
            chosen, context, rest = _chosen(words)
            chosen.make_parser(context).parse_args(list(rest))  # raises for an option that there is not
            shown += 1
        if isinstance(command, click.Group) or len(command.params) > 3:
            assert "Example" in (command.epilog or ""), f"isolator {path} has no example"
    assert shown > 30


def _commands(command: click.Command, context: click.Context, path: str = "") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _commands(found, context, f"{path} {name}".strip())


def _examples(epilog: str) -> Iterator[list[str]]:
    """The commands among the examples, each as its words after ``isolator``."""
    text = epilog.replace("\b", "").replace("\n    ", " ")  # an example may go on in the next line
    for line in text.splitlines():
        words = shlex.split(line, comments=True) if line.startswith("  ") else []
        if "isolator" in words[:2]:
            ends = [number for number, word in enumerate(words) if word in ("|", ">>", "<")]
            yield words[words.index("isolator") + 1 : min(ends, default=len(words))]


def _chosen(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """Which command words are for, and the words that are its own."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        _, words, _ = command.make_parser(context).parse_args(list(words))
        found = command.get_command(context, words[0]) if words else None
        assert found is not None, f"no such command: {words}"
        command, words, context = found, words[1:], click.Context(found, parent=context)
    return command, context, words


async def test_a_check_without_root_names_its_limits(daemon: Daemon) -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "check", stdout=asyncio.subprocess.PIPE, user=65534, group=65534, extra_groups=[], cwd="/"
    )
    out, _ = await process.communicate()
    assert process.returncode == 1
    assert out.decode().splitlines()[-1] == "Not all of it can be told by this user: run it with sudo."


async def test_light_commands_import_nothing_heavy(daemon: Daemon) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(REPO)!r}); from host.client.client import Client;"
        f"Client({str(daemon.root)!r}).call('status');"
        "print([m for m in ('pydantic', 'rich', 'pyroute2', 'asyncio', 'cryptography') if m in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", script, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"


async def test_the_key_can_be_rotated(daemon: Daemon) -> None:
    daemon.add("keyed", sidecars.OK)
    await daemon.ask("config.set", name="keyed", config={"token": "abcdef"})
    before = (daemon.paths.host_lib / "key").read_bytes()
    ran = await isolator(daemon.root, "config", "rotate-key")
    assert ran.out == "re-encrypted 1 value with a new key\n"
    assert (daemon.paths.host_lib / "key").read_bytes() != before
    await daemon.kill_host()
    await daemon.start_host()
    await daemon.outcome(await daemon.emit())
    assert daemon.sidecars["keyed"].env["TOKEN"] == "abcdef"
