"""Every attack of the hostile example succeeds where nothing holds it back; else it could prove nothing.

Each runs here as a plain root process: against a planted file, a service in a network namespace of our own,
our own child. One that cannot succeed on a bare host would be found by this file.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from attacks import ATTACKS, attempt, outcome

from tests.examples.conftest import EXAMPLES, Starter
from tests.support.timeouts import seconds


def succeeds(name: str, **known: object) -> str:
    result = attempt(name, known)
    assert result["succeeded"], result
    return str(result["detail"])


def in_own_network(code: str) -> str:
    """Run Python in a network namespace of its own with `lo` up; never on the machine's own interface."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(EXAMPLES / "hostile")!r}, {str(EXAMPLES / "demo")!r}]
        from pyroute2 import IPRoute
        with IPRoute() as routes:
            index = routes.link_lookup(ifname="lo")[0]
            routes.link("set", index=index, state="up")
            for address in ("8.8.8.8", "169.254.169.254"):
                routes.addr("add", index=index, address=address, prefixlen=32)
        from attacks import attempt
        import internet, threading
        def serve(*servers):
            for server in servers:
                threading.Thread(target=server.serve_forever, daemon=True).start()
    """)
    run = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", script + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=seconds(30),
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


class TestFiles:
    def test_reads_a_planted_secret(self, tmp_path: Path) -> None:
        (tmp_path / "shadow").write_text("root:$y$planted")
        assert "read 15 bytes" in succeeds("read-shadow", path=str(tmp_path / "shadow"))

    def test_an_empty_file_is_no_success(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        assert not attempt("read-shadow", {"path": str(tmp_path / "empty")})["succeeded"]

    def test_reads_another_process_environment(self) -> None:
        with subprocess.Popen(["cat"], env={"SECRET": "x"}, stdin=subprocess.PIPE) as other:
            assert f"/proc/{other.pid}/environ" in succeeds("read-secret", pid=other.pid)

    def test_writes_outside_and_removes_it(self, tmp_path: Path) -> None:
        assert str(tmp_path) in succeeds("write-outside", places=[str(tmp_path)])
        assert list(tmp_path.iterdir()) == []


class TestNetwork:
    def test_reaches_a_loopback_service(self) -> None:
        out = in_own_network("""
            serve(internet.banner_server("127.0.0.1", 5432, print))
            print(attempt("host-loopback", {"port": "5432"}))
        """)
        assert "'succeeded': True" in out

    def test_reads_the_metadata(self) -> None:
        out = in_own_network('serve(internet.metadata_server()); print(attempt("metadata", {}))')
        assert "'succeeded': True" in out

    def test_asks_an_outside_resolver_both_ways(self) -> None:
        out = in_own_network("""
            serve(*internet.dns_servers("8.8.8.8", "resolver"))
            print(attempt("resolver-udp", {}), attempt("resolver-tcp", {}))
        """)
        assert out.count("'succeeded': True") == 2

    def test_reaches_a_name(self) -> None:
        out = in_own_network("""
            serve(internet.banner_server("127.0.0.1", 443, print))
            print(attempt("ungranted-name", {"name": "localhost"}))
        """)
        assert "'succeeded': True" in out

    def test_a_connection_closed_without_a_byte_is_no_success(self) -> None:
        out = in_own_network("""
            import socket
            listener = socket.create_server(("127.0.0.1", 5432))
            threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
            print(attempt("host-loopback", {"port": "5432"}))
        """)
        assert "'succeeded': False" in out

    def test_connects_to_another_socket(self, tmp_path: Path) -> None:
        path = str(tmp_path / "other.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            assert path in succeeds("other-socket", paths=[path])


class TestKernel:
    def test_mounts(self) -> None:
        code = f"import sys; sys.path.insert(0, {str(EXAMPLES / 'hostile')!r})\n"
        code += "from attacks import attempt; print(attempt('mount', {}))"
        run = subprocess.run(
            ["unshare", "-m", sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=seconds(30),
            check=True,
        )
        assert "'succeeded': True" in run.stdout
        assert "mounted and unmounted a tmpfs: mount" in run.stdout
        assert "opened a file system: fsopen" in run.stdout

    def test_makes_a_user_namespace_both_ways(self) -> None:
        assert "a new user namespace: unshare, clone3" in succeeds("user-namespace")

    @pytest.mark.parametrize("name", ["ptrace-init", "ptrace-outside"])
    def test_takes_over_a_process_of_ours(self, name: str) -> None:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
            detail = succeeds(name, pid=other.pid)
            assert "attached: ptrace" in detail
            assert "may read its memory: process_vm_readv" in detail
            assert "opened its memory for writing" in detail

    def test_becomes_root_when_it_may(self) -> None:
        assert "user id is now 0" in succeeds("setuid-root")

    def test_does_not_when_it_may_not(self) -> None:
        def unprivileged() -> str:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            return str(attempt("setuid-root", {}))

        text = outcome.in_child(unprivileged)
        assert "'succeeded': False" in text
        assert "EPERM" in text


class TestBombs:
    @pytest.fixture(autouse=True)
    def _time_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bomb ends by itself after a while, in which a busy machine gets less far."""
        monkeypatch.setattr(outcome, "SECONDS", seconds(120))

    def test_forks(self) -> None:
        before = set(Path("/proc/self/task/", str(os.getpid()), "children").read_text().split())
        assert attempt("fork-bomb", {"forks": "100"})["how_far"] == "100 of 100 processes"
        assert set(Path("/proc/self/task/", str(os.getpid()), "children").read_text().split()) == before

    def test_takes_memory(self) -> None:
        succeeds("memory-bomb")

    def test_fills_a_directory_and_empties_it(self, tmp_path: Path) -> None:
        assert attempt("fill-tmp", {"directory": str(tmp_path)})["how_far"] == "64.0 of 64 MiB"
        assert attempt("fill-state", {"directory": str(tmp_path)})["succeeded"]
        assert list(tmp_path.iterdir()) == []

    def test_opens_files_beyond_the_limit_when_it_may_raise_it(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        assert attempt("open-files", {})["how_far"] == "5000 of 5000 files"
        assert len(os.listdir("/proc/self/fd")) == before

    def test_floods_its_output(self, start: Starter) -> None:
        hostile = start("hostile")
        result = hostile.send("error.detected", {"title": "flood-stdout", "project_id": "p"})
        assert result["succeeded"], result
        assert hostile.log.stat().st_size >= 16 << 20


class TestSidecar:
    def test_knows_every_attack_of_the_demo(self) -> None:
        from contained import ATTEMPTS

        assert {attack.name for attack in ATTEMPTS} == set(ATTACKS)

    def test_tells_what_an_event_asked_for(self, start: Starter, tmp_path: Path) -> None:
        (tmp_path / "a secret").write_text("x")
        url = f"https://known.invalid/?path={tmp_path}/a%20secret"
        result = start("hostile").send("error.detected", {"title": "read-shadow", "url": url})
        assert result == {
            "status": "ok",
            "attempt": "read-shadow",
            "succeeded": True,
            "detail": f"read 1 bytes: {tmp_path}/a secret",
            "how_far": "1 tried",
        }

    def test_rejects_what_it_does_not_know(self, start: Starter) -> None:
        assert start("hostile").send("error.detected", {"title": "make-coffee"})["status"] == "rejected"
