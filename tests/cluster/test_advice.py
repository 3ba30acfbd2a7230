"""What ``isolator cluster init`` says to do where the servers' set-up is wrong, and what the daemon says of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from host.cli.root import cli
from isolator.errors import IsolatorError
from tests.support.nats_servers import nats_servers
from tests.system.daemon import daemon, wait_for


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``cluster users`` writes for h1."""
    folder = tmp_path_factory.mktemp("users") / "nats"
    done = CliRunner().invoke(cli, ["cluster", "users", "--dir", str(folder), "h1"])
    assert done.exit_code == 0, done.output
    return folder


def _refused(port: int, users: Path, *words: str, secret: str = "admin", replicas: int = 1) -> str:
    base = ["--server", f"localhost:{port}", "--credentials", str(users / f"{secret}.secret")]
    words = ("--replicas", str(replicas), "--max-bytes", str(50 << 20), *words)
    failed = CliRunner().invoke(cli, ["cluster", "init", *base, *words]).exception
    assert isinstance(failed, IsolatorError), failed
    return str(failed)


def test_each_fault_of_the_servers_is_told_with_its_remedy(tmp_path: Path, users: Path) -> None:
    conf = (users / "users.conf").read_text()
    with nats_servers(tmp_path / "one", 1, more=conf) as (server,):
        assert "admin.secret, of the same" in _refused(server.port, users, "--no-tls", secret="h1")
        assert "a server of its own has --replicas 1" in _refused(server.port, users, "--no-tls", replicas=3)
        too_large = _refused(server.port, users, "--no-tls", "--max-bytes", str(1 << 40))
        assert "--max-bytes fits into max_file_store" in too_large
        port = server.port
    nobody = _refused(port, users, "--no-tls")
    assert f"localhost:{port}: Connection refused; see that the servers run" in nobody and "Errno" not in nobody
    with nats_servers(tmp_path / "bare", 1, first_port=port) as (other,):
        other.kill()
        other.config.write_text(f'server_name: bare\nlisten: "127.0.0.1:{port}"\n{conf}')
        other.start()
        assert "needs jetstream { ... }" in _refused(port, users, "--no-tls")


def test_options_of_a_log_that_is_there_already_are_not_passed_over_in_silence(tmp_path: Path, users: Path) -> None:
    words = ["--no-tls", "--replicas", "1", "--credentials", str(users / "admin.secret"), "--max-bytes"]
    with nats_servers(tmp_path, 1, more=(users / "users.conf").read_text()) as (server,):
        init = ["cluster", "init", "--server", f"127.0.0.1:{server.port}", *words]
        made = CliRunner().invoke(cli, [*init, str(50 << 20)]).output
        again = CliRunner().invoke(cli, [*init, str(60 << 20)]).output
    assert "1 copy on nats-server" in made and "it keeps" not in made
    assert f"it keeps what it was made with: --replicas 1 --max-bytes {50 << 20}" in again


def test_certificates_are_told_as_such_and_a_good_connection_writes_nothing_beside_the_answer(
    tmp_path: Path, users: Path, pair: tuple[Path, Path]
) -> None:
    key, certificate = pair
    conf = (users / "users.conf").read_text()
    with nats_servers(tmp_path, 1, more=f'{conf}tls {{ cert_file: "{certificate}", key_file: "{key}" }}') as (server,):
        unknown = _refused(server.port, users)
        assert "its certificate is not accepted" in unknown and "--ca names the authority's" in unknown
        words = ["cluster", "init", "--server", f"localhost:{server.port}", "--replicas", "1", "--ca", str(certificate)]
        words += ["--max-bytes", str(50 << 20), "--credentials", str(users / "admin.secret")]
        done = subprocess.run(["isolator", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("log made") and done.stderr == ""


def test_settings_of_a_cluster_that_are_of_no_use_are_told_by_its_commands() -> None:
    config = '[cluster]\nname = "h1"\nservers = ["127.0.0.1:1"]\nca = "/etc/isolator/no-such.pem"\n'
    with daemon(host_toml=config) as d:
        for words in (("status",), ("leave",), ("place", "p")):
            refused = d.cli("cluster", *words, code=1).stderr
            assert "/etc/isolator/no-such.pem: cannot be used: No such file or directory" in refused, words
        wait_for(lambda: any("no-such.pem" in line for line in d.json("status", code=None)["alarms"]))
