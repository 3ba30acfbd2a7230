"""``isolator policy check`` and ``explain`` as a person runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.policy.samples import MANIFEST, POLICY

SHIPPED = Path(__file__).parents[2] / "policies"


def isolator(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from host.cli.main import main; main()", "--root", str(root), "policy"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slack-deploy-notifier.toml"
    path.write_text(POLICY)
    return path


def test_check_of_a_good_file_prints_ok(tmp_path: Path, file: Path) -> None:
    done = isolator(tmp_path, "check", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{file}: ok\n", "")


def test_check_prints_one_line_for_each_bad_file_with_its_line_number(tmp_path: Path, file: Path) -> None:
    typo, unit = tmp_path / "typo.toml", tmp_path / "unit.toml"
    typo.write_text(POLICY.replace("egress ", "egres  "))
    unit.write_text(POLICY.replace('"25%"', '"25"'))
    done = isolator(tmp_path, "check", file, typo, unit)
    assert done.returncode == 1
    assert done.stdout == f"{file}: ok\n"
    first, second = done.stderr.splitlines()
    assert first.startswith(f"isolator: {typo}:5: grant.egres: unknown key; did you mean")
    assert second.startswith(f"isolator: {unit}:9: limits.cpu: ")


def test_exit_codes_tell_missing_from_writable_files(tmp_path: Path, file: Path) -> None:
    assert isolator(tmp_path, "check", tmp_path / "none.toml").returncode == 3
    assert isolator(tmp_path, "check").returncode == 2
    file.chmod(0o666)
    done = isolator(tmp_path, "check", file)
    assert done.returncode == 4
    assert "chmod go-w" in done.stderr
    assert isolator(tmp_path, "explain", file).returncode == 4


def test_policies_are_held_against_the_named_or_installed_host_toml(tmp_path: Path, file: Path) -> None:
    given = tmp_path / "low.toml"
    given.write_text("[ceiling]\nmemory = '100M'\n")
    done = isolator(tmp_path, "check", file, given)
    assert f"{file}:8: limits.memory: 256M is over the ceiling, 100M" in done.stderr
    assert f"{given}: ok" in done.stdout
    installed = tmp_path / "etc/isolator/host.toml"
    installed.parent.mkdir(parents=True)
    installed.write_text("[ceiling]\ntasks = 10\n")
    assert f"{file}:10: limits.tasks: 64 is over the ceiling, 10" in isolator(tmp_path, "check", file).stderr
    installed.write_text("[ceiling]\ntaks = 10\n")
    assert f"{installed}:2: ceiling.taks" in isolator(tmp_path, "check", file).stderr


def test_byte_order_mark_is_passed_over_in_toml_and_named_in_a_manifest(tmp_path: Path, file: Path) -> None:
    file.write_text(f"\ufeff{POLICY}")
    settings, manifest = tmp_path / "marked.toml", tmp_path / "plugin.json"
    settings.write_text("\ufeff[ceiling]\nmemory = '1G'\n")
    manifest.write_text("\ufeff" + json.dumps(MANIFEST))
    done = isolator(tmp_path, "check", file, settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{file}: ok\n" in done.stdout and f"{settings}: ok (as a host.toml, by its content" in done.stdout
    done = isolator(tmp_path, "check", manifest)
    assert done.returncode == 1
    why = "not JSON: it begins with a byte order mark; save the file as UTF-8 without one"
    assert done.stderr == f"isolator: {manifest}:1: {why}\n"


def test_check_prints_a_list_as_json(tmp_path: Path, file: Path) -> None:
    bad = tmp_path / "plugin.json"
    bad.write_text('{"name": "ab"}')
    results = json.loads(isolator(tmp_path, "check", file, bad, "--json").stdout)
    assert [(r["file"], r["kind"], r["ok"]) for r in results] == [
        (str(file), "policy", True),
        (str(bad), "manifest", False),
    ]
    assert "version is missing" in results[1]["error"]


def test_explain_of_a_policy_prints_sentences_and_lines(tmp_path: Path, file: Path) -> None:
    done = isolator(tmp_path, "explain", file)
    assert done.returncode == 0, done.stderr
    assert "May connect to hooks.slack.com (TCP 443) and to nothing else" in done.stdout
    assert f"{file}:8" in done.stdout
    data = json.loads(isolator(tmp_path, "explain", file, "--json").stdout)
    assert data["effective"]["resources"]["memory"] == 256 << 20
    assert data["effective"]["network"]["mode"] == "listed"
    assert data["sentences"]["network"].startswith("May connect to hooks.slack.com")


def test_explain_with_a_manifest_shows_the_lines_to_add(tmp_path: Path, file: Path) -> None:
    manifest = tmp_path / "plugin.json"
    manifest.write_text(json.dumps(MANIFEST | {"permissions": ["read:deployments", "read:secrets"]}))
    done = isolator(tmp_path, "explain", file, "--manifest", manifest)
    assert f'in [grant] of {file}:4: permissions = ["read:deployments", "read:projects", "read:secrets"]' in done.stdout
    alone = isolator(tmp_path, "explain", manifest)
    assert "default grant" in alone.stdout


def test_shipped_files_are_good(tmp_path: Path) -> None:
    files = sorted(SHIPPED.rglob("*.toml"))
    assert {"host.toml", "slack-deploy-notifier.toml", "hostile.toml"} <= {file.name for file in files}
    done = isolator(tmp_path, "check", *files)
    assert done.returncode == 0, done.stderr


def test_check_prints_every_problem_of_a_file(tmp_path: Path, file: Path) -> None:
    text = POLICY.replace("egress ", "egres  ").replace('"25%"', '"25"').replace("[limits]", "[limits]\nswap = 5")
    file.write_text(text)
    (tmp_path / "host.toml").write_text("[ceiling]\nmemory = '100M'\ntasks = 10\n[network]\nresolver = []\n")
    done = isolator(tmp_path, "check", file, tmp_path / "host.toml", "--json")
    by_file = {result["file"]: result["errors"] for result in json.loads(done.stdout)}
    problems = by_file[str(file)]
    for key in ("grant.egres:", "limits.cpu:", "limits.swap:"):
        assert any(key in problem for problem in problems), problems
    assert [e for e in by_file[str(tmp_path / "host.toml")] if "network.resolver:" in e]
    good = tmp_path / "etc/isolator/host.toml"
    good.parent.mkdir(parents=True)
    good.write_text("[ceiling]\nmemory = '100M'\ntasks = 10\n")
    file.write_text(POLICY)
    done = isolator(tmp_path, "check", file)
    assert done.stderr.count("is over the ceiling") == 2


def test_check_takes_files_in_the_folder_of_policies_for_policies(tmp_path: Path) -> None:
    path = tmp_path / "policies/slack.toml"
    path.parent.mkdir()
    path.write_text("[defaults]\nmemory = '64M'\n")
    done = isolator(tmp_path, "check", path)
    assert done.returncode == 1 and "defaults: unknown key" in done.stderr
    elsewhere = path.rename(tmp_path / "slack.toml")
    assert "ok (as a host.toml, by its content" in isolator(tmp_path, "check", elsewhere).stdout
    assert isolator(tmp_path, "check", elsewhere, "--kind", "policy").returncode == 1


def _manifest(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run").write_text("#!/usr/bin/python3\n")
    (folder / "run").chmod(0o755)
    body = {"name": "good", "version": "1.0.0", "api_version": "1", "binary": "./run", "hooks": ["deploy.completed"]}
    (folder / "plugin.json").write_text(json.dumps(body | changes, indent=1))
    return folder / "plugin.json"


def test_check_of_a_good_manifest_prints_ok(tmp_path: Path) -> None:
    path = _manifest(tmp_path / "p")
    done = isolator(tmp_path, "check", path)
    assert (done.returncode, done.stdout) == (0, f"{path}: ok\n"), done.stderr
    path = _manifest(tmp_path / "p", hooks=["invoice.paid"])
    done = isolator(tmp_path, "check", path)
    assert "invoice.paid is an event that the platform has to register first" in done.stdout


@pytest.mark.parametrize(("changes", "problems"), [
    ({"transport": {"mode": "streem"}}, ["transport.mode: must be"]),
    ({"config_schema": {"path": {"type": "string"}}, "health": {"misses": 0}}, ["config_schema.path: PATH", "health."]),
    ({"delivery": {"concurrency": 0}, "version": "x"}, ["version: not a semantic", "delivery.concurrency: must be"]),
    ({"binary": "./gone"}, ["binary ./gone: no such file"]),
    ({"binary": "./plugin.json"}, ["binary ./plugin.json: not executable"]),
    ({"hooks": ["deploy.complete"]}, ["did you mean 'deploy.completed'?"]),
])  # fmt: skip
def test_check_of_a_manifest_finds_what_the_daemon_refuses(
    tmp_path: Path, changes: dict[str, object], problems: list[str]
) -> None:
    done = isolator(tmp_path, "check", _manifest(tmp_path / "p", **changes))
    assert done.returncode == 1
    assert all(problem in done.stderr for problem in problems), done.stderr
    assert len(done.stderr.splitlines()) == len(problems)


def test_name_of_a_plugin_is_told_the_command_that_explains_it(tmp_path: Path) -> None:
    done = isolator(tmp_path, "explain", "slack-deploy-notifier")
    assert done.returncode == 3 and "isolator plugin explain slack-deploy-notifier" in done.stderr


@pytest.mark.parametrize(
    "text", ["[audit]\nkeep_files = 3\n", "[events]\nsource = 'https://a.example'\n", "[packages]\n"]
)
def test_check_knows_a_host_toml_by_any_table_that_only_it_has(tmp_path: Path, text: str) -> None:
    path = tmp_path / "candidate.toml"
    path.write_text(text)
    assert f"{path}: ok (as a host.toml, by its content" in isolator(tmp_path, "check", path).stdout
    path.write_text("[require]\ncertified = true\n[restart]\ncrashes = 3\n")
    assert isolator(tmp_path, "check", path).stdout == f"{path}: ok\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("name", ["host.toml", "plugin.toml", "plugin.json"])
def test_file_in_a_folder_that_the_caller_may_not_enter(tmp_path: Path, name: str) -> None:
    tmp_path.chmod(0o700)
    program = "import os, sys; os.setuid(65534); from host.cli.main import main; main()"
    for command in ("check", "explain"):
        done = subprocess.run(
            [sys.executable, "-c", program, "policy", command, str(tmp_path / name)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.stderr.startswith(f"isolator: {tmp_path / name}: Permission denied"), done.stderr
