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
        wait_for(lambda: any("no-such.pem" in line for line in d.json("status", code=None)["alarms"]))
        for words in (("status",), ("leave",)):
            refused = d.cli("cluster", *words, code=1)
            why = "/etc/isolator/no-such.pem: cannot be used: No such file or directory"
            assert why in refused.stdout + refused.stderr, words


def test_reload_with_files_that_the_cluster_cannot_use_is_refused_in_one_line_and_changes_nothing(
    tmp_path: Path, users: Path
) -> None:
    with daemon(host_toml="# none yet") as d:
        etc = d.root / "etc/isolator"
        secret, ca = etc / "cluster.secret", etc / "ca.pem"

        def refused(credentials: bytes | None, certificates: bytes | None, mode: int = 0o644) -> str:
            for path, content, its in ((secret, credentials, 0o600), (ca, certificates, mode)):
                path.unlink(missing_ok=True)
                if content is not None:
                    path.write_bytes(content)
                    path.chmod(its)
            (etc / "host.toml").write_text(
                f'[cluster]\nname = "h1"\nservers = ["127.0.0.1:1"]\ncredentials = "{secret}"\nca = "{ca}"\n'
            )
            done = d.cli("reload", code=1)
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert not any(record["type"] == "daemon.reloaded" for record in d.records())
            assert "no [cluster] in host.toml" in d.cli("cluster", "status", code=None).stderr
            return done.stderr

        good, admin = (users / "h1.secret").read_bytes(), (users / "admin.secret").read_bytes()
        pem = tmp_path / "ca.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", "/CN=ca", "-keyout", tmp_path / "ca.key", "-out", pem],
            check=True, capture_output=True,
        )  # fmt: skip
        certificates = pem.read_bytes()
        assert f"{secret}: No such file or directory; put h1.secret" in refused(None, certificates)
        assert "is not one line, USER:PASSWORD" in refused(b"", certificates)
        assert "is of the user 'admin', and this host is h1; put h1.secret" in refused(admin, certificates)
        assert f"{ca}: cannot be used: No such file or directory" in refused(good, None)
        assert f"{ca}: cannot be used: it holds no certificate" in refused(good, b"none")
        assert f"{ca}: cannot be used: Permission denied" in refused(good, certificates, 0o600)
        ca.chmod(0o644)
        d.cli("reload")
        wait_for(lambda: not d.cli("cluster", "status", code=None).stderr, what="a cluster")


def test_administrators_credentials_are_no_hosts(tmp_path: Path, users: Path) -> None:
    config = '[cluster]\nname = "h1"\nservers = ["127.0.0.1:1"]\ntls = false\ncredentials = "{}"\n'
    with daemon(host_toml="# none yet", start=False) as d:
        secret = d.root / "etc/isolator/cluster.secret"
        secret.touch(0o600)
        secret.write_bytes((users / "admin.secret").read_bytes())
        (d.root / "etc/isolator/host.toml").write_text(config.format(secret))
        d.start()
        line = wait_for(
            lambda: next((one for one in d.json("cluster", "status", code=None)["problems"]), None), what="a problem"
        )
        assert line["kind"] == "refused" and "is of the user 'admin', and this host is h1" in line["line"]
        assert "put h1.secret of 'isolator cluster users' there" in line["line"]
