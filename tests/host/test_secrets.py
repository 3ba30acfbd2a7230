"""Secrets at rest, in listings and in text."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sqlite3
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from host.database.store import Store
from host.plugins import manifest as manifests
from host.plugins.manifest import Manifest, environment_names
from host.plugins.secrets import FILES_AT, REDACTED, ConfigStore, KeyFile, Redactor
from isolator.errors import IsolatorError, NotFoundError, UsageError


def _manifest(schema: dict[str, Any] | None = None) -> Manifest:
    data = {"name": "p1", "version": "1.0.0", "api_version": "1", "binary": "./x", "hooks": []}
    return manifests.from_data({**data, **({"config_schema": schema} if schema is not None else {})})


async def test_values_are_encrypted_and_bound_to_their_place(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")
    await config.set("p1", _manifest(), {"token": "plain-text-token"})
    await config.set("p2", _manifest(), {"token": "other-token-here"})
    await store.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"plain-text-token" not in everything
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    # A row that is moved to another plugin does not open there.
    with sqlite3.connect(tmp_path / "host.db") as db:
        db.execute("UPDATE config SET value=(SELECT value FROM config WHERE plugin='p1') WHERE plugin='p2'")
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")
    assert config.environment("p1", _manifest()).env == {"token": "plain-text-token", "TOKEN": "plain-text-token"}
    with pytest.raises(IsolatorError, match="cannot be decrypted"):
        config.environment("p2", _manifest())
    await store.close()


async def test_values_that_are_set_beside_a_rotation_are_there_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")
    await config.set("p1", _manifest(), {"old": "value-1"})
    await asyncio.gather(
        config.set("p1", _manifest(), {"old": "value-2", "new": "fresh"}),
        config.rotate(),
        config.set("p1", _manifest(), {"late": "added"}),
        config.unset("p1", "new"),
        config.rotate(),
    )
    known = config.environment("p1", _manifest()).env
    await store.close()
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")
    assert config.environment("p1", _manifest()).env == known
    assert known == {"old": "value-2", "OLD": "value-2", "late": "added", "LATE": "added"}
    await store.close()


@pytest.mark.parametrize(
    "damage", ["missing", "readable", "link", "truncated", "folder", "fifo", "nested", "latin-1", "number"]
)
async def test_a_bad_key_file_is_refused_with_a_reason_and_never_replaced(tmp_path: Path, damage: str) -> None:
    key = tmp_path / "key"
    store = Store(tmp_path / "host.db")
    await ConfigStore(store, key).set("p1", _manifest(), {"token": "some-value"})
    if damage == "missing":
        key.unlink()
    elif damage == "readable":
        key.chmod(0o644)
    elif damage == "link":
        key.rename(tmp_path / "elsewhere")
        key.symlink_to(tmp_path / "elsewhere")
    elif damage == "truncated":
        key.write_bytes(key.read_bytes()[:20])
    elif damage in ("folder", "fifo"):
        key.unlink()
        key.mkdir(mode=0o700) if damage == "folder" else os.mkfifo(key, 0o600)
    else:
        texts = {"nested": b"[" * 4096, "latin-1": b'{"keys": ["\xe4"]}', "number": b'{"keys": [1]}'}
        key.write_bytes(texts[damage])
    config = ConfigStore(store, key)
    with pytest.raises(IsolatorError, match="key"):
        config.environment("p1", _manifest())
    with pytest.raises(IsolatorError, match="key"):
        await config.set("p1", _manifest(), {"token": "new"})
    assert config.environment("without", _manifest()).env == {}
    assert damage != "missing" or not key.exists()
    await store.close()


async def test_rotation_interrupted_at_any_point_leaves_every_value_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, key)
    for n in range(3):
        await config.set(f"p{n}", _manifest(), {"token": f"value-{n}"})

    class PowerCut(Exception):
        pass

    real_save, real_run = KeyFile.save, Store.run
    for stage in ("first save", "rows", "second save"):
        saves = 0

        def save(self: KeyFile, keys: list[bytes], stage: str = stage) -> None:
            nonlocal saves
            saves += 1
            if stage == ("first save", "second save")[saves - 1]:
                raise PowerCut
            real_save(self, keys)

        async def run(self: Store, apply: Any, stage: str = stage) -> Any:
            if stage == "rows":
                raise PowerCut
            return await real_run(self, apply)

        monkeypatch.setattr(KeyFile, "save", save)
        monkeypatch.setattr(Store, "run", run)
        with pytest.raises(PowerCut):
            await ConfigStore(store, key).rotate()
        monkeypatch.undo()
        again = ConfigStore(store, key)
        for n in range(3):
            assert again.environment(f"p{n}", _manifest()).env["TOKEN"] == f"value-{n}", stage
    final = ConfigStore(store, key)
    assert await final.rotate() == 3
    assert len(json.loads(key.read_text())["keys"]) == 1
    assert ConfigStore(store, key).environment("p1", _manifest()).env["TOKEN"] == "value-1"
    await store.close()


async def test_config_is_typed_and_injected_under_both_spellings(tmp_path: Path) -> None:
    manifest = _manifest(
        {
            "port": {"type": "integer", "default": 8080},
            "rate": {"type": "number"},
            "loud": {"type": "boolean"},
            "webhookUrl": {"type": "string", "secret": True},
            "account": {"type": "file", "secret": True},
            "color": {"type": "enum", "values": ["red", "blue"]},
        }
    )
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")
    for bad in ({"port": "many"}, {"rate": "x"}, {"loud": "maybe"}, {"color": "green"}, {"webhookUrl": "a\nb"},
                {"webhookUrl": "a\0b"}, {"account": "x" * 40_000}):  # fmt: skip
        with pytest.raises(UsageError):
            await config.set("p1", manifest, bad)
    with pytest.raises(NotFoundError, match='did you mean "color"'):
        await config.set("p1", manifest, {"colour": "red"})
    await config.set("p1", manifest, {"rate": "1.5", "loud": "YES", "WEBHOOK_URL": "u", "account": "{\n}\n"})
    environment = config.environment("p1", manifest)
    assert environment.env["PORT"] == "8080"
    assert environment.env["loud"] == environment.env["LOUD"] == "true"
    assert environment.env["webhookUrl"] == environment.env["WEBHOOK_URL"] == "u"
    assert environment.env["ACCOUNT"] == f"{FILES_AT}/account"
    assert environment.files == {"account": "{\n}\n"}
    assert set(environment.secrets) == {"webhookUrl", "WEBHOOK_URL", "account", "ACCOUNT"}
    shown = {item["key"]: item["value"] for item in config.listing("p1", manifest)}
    assert shown["webhookUrl"] is None
    assert shown["account"] is None
    assert shown["rate"] == "1.5"
    await store.close()


@pytest.mark.parametrize(
    "key",
    [
        "PATH",
        "path",
        "ld_preload",
        "LD_X",
        "pythonPath",
        "PLUGIN_SOCKET",
        "nodeOptions",
        "home",
        "1a",
        "a b",
        "",
        "a=b",
    ],
)
async def test_reserved_and_impossible_keys_are_refused(tmp_path: Path, key: str) -> None:
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")
    with pytest.raises(UsageError):
        await config.set("p1", _manifest(), {key: "x"})
    await store.close()


def test_config_key_has_two_spellings_as_a_variable() -> None:
    assert environment_names("slack_webhook_url") == ("slack_webhook_url", "SLACK_WEBHOOK_URL")
    assert environment_names("webhookUrl") == ("webhookUrl", "WEBHOOK_URL")
    assert environment_names("API_KEY") == ("API_KEY",)
    assert environment_names("a-b.c") == ("a-b.c", "A_B_C")


def test_redaction_finds_a_value_however_it_is_written() -> None:
    secret = 'p@ss/w"ord é'
    redact = Redactor([secret, "p@ss", "abc"])
    for form in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False),
                 urllib.parse.quote(secret, safe=""), base64.b64encode(secret.encode()).decode()):  # fmt: skip
        shown = redact(f"before {form} after")
        assert REDACTED in shown
        assert "ord" not in shown.replace("[redacted]", "")
    assert redact("abc is too short to be replaced") == "abc is too short to be replaced"
    assert Redactor(["hunter22\n"])("it is hunter22, it says") == "it is [redacted], it says"
    assert Redactor()("nothing") == "nothing"


async def test_public_file_may_be_as_long_as_a_bundle_of_certificates(tmp_path: Path) -> None:
    """A secret one may not: it is looked for in each line of the log."""
    manifest = _manifest(
        {**{f"bundle{n}": {"type": "file"} for n in range(5)}, "key": {"type": "file", "secret": True}}
    )
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")
    await config.set("p1", manifest, {f"bundle{n}": "x" * (256 << 10) for n in range(4)} | {"key": "s" * 20_000})
    assert len(config.environment("p1", manifest).files["bundle3"]) == 256 << 10
    for bad, why in (
        ({"bundle4": "x" * ((256 << 10) + 1)}, "is longer than 262144 bytes; put it where 'read' of"),
        ({"bundle4": "x"}, "has files of more than 1048576 bytes in all"),
        ({"key": "s" * 33_000}, "is longer than 32768 bytes; put it where 'read' of"),
    ):
        with pytest.raises(UsageError, match=why):
            await config.set("p1", manifest, bad)
    await store.close()


async def test_redaction_follows_each_change_of_the_config(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    config = ConfigStore(store, tmp_path / "key")

    def shown(text: str) -> str:
        return config.redactor("p1")(text)

    assert shown("first-secret second-secret") == "first-secret second-secret"
    await config.set("p1", _manifest(), {"token": "first-secret"})
    assert shown("first-secret second-secret") == f"{REDACTED} second-secret"
    await config.set("p1", _manifest(), {"token": "second-secret"})
    assert shown("second-secret") == REDACTED
    await config.set_next("p1", "d1", _manifest(), {"token": "secret-on-trial"})
    assert shown("second-secret secret-on-trial") == f"{REDACTED} {REDACTED}"
    config.settle("p1", "d1")
    assert shown("secret-on-trial") == REDACTED
    await config.set_next("p1", "d2", _manifest(), {"token": "secret-that-failed"})
    config.drop_next("p1", "d2")
    assert shown("secret-on-trial") == REDACTED and shown("secret-that-failed") == "secret-that-failed"
    await config.unset("p1", "token")
    assert shown("secret-on-trial") == "secret-on-trial"
    await store.close()
