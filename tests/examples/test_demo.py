"""The demo's own instruments: would it notice what is left behind, and say honestly what it saw?"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import contained
import leftovers
import pytest
import report

from isolator.paths import Paths


def own_cgroup() -> Path:
    """A directory in which this process may make groups: its own, in any writable hierarchy."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for first, second in mounts:
        kind, _, options = second.split()[:3]
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            own = (kind == "cgroup2" and not names) or (kind == "cgroup" and names and names in options.split(","))
            place = Path(first.split()[4] + path)
            if own and os.access(place, os.W_OK):
                return place
    pytest.skip("no writable cgroup hierarchy")


class TestLeftovers:
    def test_a_clean_host_has_none(self, tmp_path: Path) -> None:
        assert leftovers.find(tmp_path / "gone", set()) == []

    def test_finds_a_folder(self, tmp_path: Path) -> None:
        assert leftovers.find(tmp_path, set()) == [f"file {tmp_path}"]

    def test_finds_a_mount(self, tmp_path: Path) -> None:
        place = tmp_path / "state"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], check=True)
        try:
            assert f"mount {place}" in leftovers.find(tmp_path, set())
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def test_finds_a_loop_device(self, tmp_path: Path) -> None:
        image = tmp_path / "state.img"
        with image.open("wb") as file:
            file.truncate(1 << 20)
        attach = ["losetup", "--find", "--show", str(image)]
        device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        try:
            assert f"loop device {Path(device).name}" in leftovers.find(tmp_path, set())
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)

    def test_finds_a_cgroup(self, tmp_path: Path) -> None:
        group = own_cgroup() / f"isolator-{Paths.of(tmp_path).instance}"
        group.mkdir()
        try:
            assert f"cgroup {group}" in leftovers.find(tmp_path, set())
        finally:
            group.rmdir()

    def test_finds_a_process_by_what_it_names_and_by_its_number(self, tmp_path: Path) -> None:
        named = subprocess.Popen(["tail", "-f", "/dev/null", str(tmp_path / "x")], stderr=subprocess.DEVNULL)
        numbered = subprocess.Popen(["unshare", "-n", "tail", "-f", "/dev/null"])
        try:
            found = " ".join(leftovers.processes(tmp_path, {numbered.pid}))
            assert f"{named.pid} (" in found
            assert f"{numbered.pid} (" in found
        finally:
            for process in (named, numbered):
                process.kill()
                process.wait()

    def test_finds_a_process_in_its_network_namespace(self, tmp_path: Path) -> None:
        code = f"import sys; sys.path.insert(0, {leftovers.__file__.rpartition('/')[0]!r})\n"
        code += "import leftovers, pathlib, subprocess\n"
        code += "other = subprocess.Popen(['cat'], stdin=subprocess.PIPE)\n"
        code += "while not pathlib.Path(f'/proc/{other.pid}/cmdline').read_bytes(): pass\n"  # it has no name before
        code += f"print(other.pid, list(leftovers.processes(pathlib.Path({str(tmp_path)!r}), set(), own_network=True)))"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.run(
            ["unshare", "-n", sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        pid, _, found = run.stdout.strip().partition(" ")
        assert found == f"['{pid} (cat)']"


class TestReport:
    def test_nothing_is_wider_than_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        report.heading(1, "A heading")
        report.say("word " * 60, 4)
        report.command(["isolator", "plugin", "add", "/a/long/path/" * 4, "--config", "key=@/another/" * 3, "--yes"])
        report.promises([report.Promise("promise " * 12, True, "evidence " * 20)])
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines if "/a/long" not in line) <= 80
        assert any(line.endswith("\\") for line in lines)

    def test_json_is_broken_where_a_shell_may(self, capsys: pytest.CaptureFixture[str]) -> None:
        payload = '{"project_id": "shop", "deployment_id": "dep_001", "url": "https://shop.example", "n": 1}'
        report.command(["printf", "%s", payload])
        typed = capsys.readouterr().out.replace("$ ", "", 1)
        assert max(map(len, typed.splitlines())) <= 80
        printed = subprocess.run(["sh", "-c", typed], capture_output=True, text=True, check=True).stdout
        assert json.loads(printed) == json.loads(payload)

    def test_a_broken_promise_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        kept, broken = report.Promise("a", True, ""), report.Promise("b", False, "why")
        assert report.promises([kept])
        assert not report.promises([kept, broken])
        assert "1 of 2 promises held; 1 DID NOT." in capsys.readouterr().out


class TestContained:
    def find(self, name: str) -> contained.Attempt:
        return next(attempt for attempt in contained.ATTEMPTS if attempt.name == name)

    def facts(self, name: str, detail: str, records: list[dict[str, Any]]) -> dict[str, str]:
        return dict(contained.facts(self.find(name), {"detail": detail}, records))

    def test_a_refused_call_with_its_record_is_seccomp(self) -> None:
        detail = "EPERM (Operation not permitted): mount, fsopen"
        records = [{"type": "syscall.denied", "data": {"call": call, "count": 1}} for call in ("mount", "fsopen")]
        told = self.facts("mount", detail, records)
        assert told == {contained.SECCOMP: "EPERM, refused (mount, fsopen); on record: mount, fsopen"}
        assert contained.calls_refused(self.find("mount"), {"detail": detail}) == ["mount", "fsopen"]

    def test_layers_of_some_hosts_are_expected_beside_those_of_all_and_no_others(self) -> None:
        attempt = self.find("write-outside")
        assert attempt.expected({contained.VIEW}) and attempt.expected({contained.VIEW, "user"})
        assert not attempt.expected({"user"}) and not attempt.expected({contained.VIEW, contained.SECCOMP})

    def test_without_a_record_it_was_another_wall(self) -> None:
        told = self.facts("mount", "EPERM (Operation not permitted): mount, fsopen", [])
        assert set(told) == {contained.CAPS}
        assert set(told) != self.find("mount").by

    def test_an_errno_that_no_layer_gives_is_unexplained(self) -> None:
        assert set(self.facts("fill-tmp", "EIO (Input/output error)", [])) == {"unexplained"}
        assert set(self.facts("host-loopback", "no answer in time: 44.1.1.1:5432", [])) == {"unexplained"}

    def test_a_file_that_is_there_but_not_readable_is_not_the_view(self) -> None:
        assert set(self.facts("read-shadow", "EACCES (Permission denied): /etc/shadow", [])) == {"user"}

    def test_its_own_loopback_is_told_from_what_is_refused(self) -> None:
        detail = "ECONNREFUSED (Connection refused): 127.0.0.1:5432, ::1:5432, 44.128.0.2:5432"
        denied = {"address": "44.128.0.2", "port": 5432, "rule": "not-granted"}
        told = self.facts("host-loopback", detail, [{"type": "net.denied", "data": denied}])
        assert set(told) == {contained.LOOPBACK, contained.NFT}
        assert "on record: 44.128.0.2:5432, rule not-granted" in told[contained.NFT]

    def test_reads_the_privileges_of_a_process(self) -> None:
        assert re.fullmatch(r"CapEff \w+, CapPrm \w+, CapBnd \w+, NoNewPrivs [01]", contained.privileges(os.getpid()))

    def test_an_event_for_each_attack_fits_one_write(self) -> None:
        place = "/var/lib/isolator-demo-abcdefgh/var/lib/isolator/host/isolator.sqlite3-wal"
        target = contained.Target(4194304, [place] * 8, [place] * 6, [place] * 3, "44.128.0.2", 5432)
        for attempt in contained.ATTEMPTS:
            payload = contained.payload(attempt, target)
            assert len(payload.get("url", "")) <= 2048, "the event catalogue refuses longer ones"

    def test_reads_a_counter_of_a_process(self) -> None:
        # Tasks that were refused: none here, but the file is found whichever version carries the controller.
        count = contained.cgroup_counter(os.getpid(), "pids", "pids.events", "max")
        assert count is None or count >= 0
