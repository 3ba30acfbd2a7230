"""Programs learn their cage's limits, whichever way they look for them, and see nothing else of the host's figures."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from isolator.errors import ConfinementError
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.ledger import ledger
from isolator.layers.proc import figures, template
from isolator.linux import netns
from isolator.policy.model import ResourcePolicy
from tests.escape import cages
from tests.support.cage_fixture import StartedCage, cage, isolator, policy
from tests.support.go import go_cache
from tests.support.timeouts import seconds

MIB = 1 << 20
HOST = len(os.sched_getaffinity(0))
MEMORY = 200 * MIB

C = """
#include <omp.h>
#include <stdio.h>
#include <sys/sysinfo.h>
#include <unistd.h>
int main(void) {
    printf("%d %d %ld %ld\\n", omp_get_max_threads(), get_nprocs(), sysconf(_SC_NPROCESSORS_ONLN),
           sysconf(_SC_NPROCESSORS_CONF));
    return 0;
}
"""

GO = """
package main

import ("fmt"; "runtime")

func main() { fmt.Println(runtime.NumCPU(), runtime.GOMAXPROCS(0)) }
"""

NODE = """
const os = require('os');
console.log(JSON.stringify({counts: [os.cpus().length, os.availableParallelism()], total: os.totalmem(),
  free: os.freemem(), limit: process.constrainedMemory(), heap: require('v8').getHeapStatistics().heap_size_limit,
  uptime: os.uptime(), load: os.loadavg()}));
"""

PYTHON = """
import multiprocessing, os
print(os.cpu_count(), len(os.sched_getaffinity(0)), multiprocessing.cpu_count(), os.sysconf("SC_NPROCESSORS_CONF"))
"""

PSUTIL = """
import json, os, sys, time
sys.path.append(sys.argv[1])
import psutil
me = psutil.Process()
print(json.dumps({
    "counts": [psutil.cpu_count(), psutil.cpu_count(logical=False), len(psutil.cpu_times(percpu=True)),
               len(me.cpu_affinity())],
    "memory": psutil.virtual_memory().total, "available": psutil.virtual_memory().available,
    "swap": psutil.swap_memory().total, "booted": psutil.boot_time(), "started": me.create_time(), "now": time.time(),
    "pids": psutil.pids(), "stats": psutil.cpu_stats()._asdict(),
    "disks": psutil.disk_io_counters(perdisk=True), "partitions": len(psutil.disk_partitions(all=True)),
    "network": list(psutil.net_io_counters(pernic=True)), "percent": psutil.cpu_percent(0.05),
    "name": me.name(), "threads": me.num_threads(), "mine": me.memory_info().rss, "open": len(me.open_files()),
}))
"""


def _run(root: Path, *command: str, cpu: int = 100, read: str = "") -> str:
    reading = ["--read", read] if read else []
    done = isolator(root, "run", "--cpu", f"{cpu}%", "--memory", f"{MEMORY}", *reading, "--", *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _have(name: str) -> None:
    if shutil.which(name, path="/usr/bin:/bin") is None:
        pytest.skip(f"{name} is not installed in /usr/bin, where cages see it")


def _compiled(folder: Path, *command: str, **sources: str) -> Path:
    folder.chmod(0o755)
    for name, text in sources.items():
        (folder / name.replace("_", ".")).write_text(text)
    env = {**os.environ, "GOCACHE": go_cache(folder), "HOME": str(folder)}
    subprocess.run([*command], cwd=folder, check=True, timeout=seconds(120), env=env)
    return folder / "program"


@pytest.mark.parametrize("cpu", [25, 150])
def test_runtimes_count_the_processors_of_their_cap(shared_dir: Path, cpu: int) -> None:
    cpu = min(cpu, HOST * 100)
    wanted = min(HOST, -(-cpu // 100))
    assert _run(shared_dir, "/usr/bin/python3", "-c", PYTHON, cpu=cpu).split() == [str(wanted)] * 4
    assert _run(shared_dir, "sh", "-c", "nproc; nproc --all; grep -c ^processor /proc/cpuinfo", cpu=cpu).split() == (
        [str(wanted)] * 3
    )
    assert json.loads(_run(shared_dir, "node", "-e", NODE, cpu=cpu))["counts"] == [wanted] * 2


def test_openmp_and_glibc(shared_dir: Path) -> None:
    program = _compiled(shared_dir, "gcc", "-fopenmp", "-o", "program", "main.c", main_c=C)
    assert _run(shared_dir, str(program), read=str(shared_dir)).split() == ["1"] * 4


def test_go(shared_dir: Path) -> None:
    _have("go")
    program = _compiled(shared_dir, "go", "build", "-o", "program", "main.go", main_go=GO)
    assert _run(shared_dir, str(program), read=str(shared_dir)).split() == ["1"] * 2


def test_node_sizes_its_heap_by_the_cap(shared_dir: Path) -> None:
    found = json.loads(_run(shared_dir, "node", "-e", NODE))
    assert found["total"] == found["limit"] == MEMORY
    assert found["free"] <= MEMORY and found["heap"] <= 2 * MEMORY
    assert found["load"] == [0, 0, 0]


def test_psutil(shared_dir: Path) -> None:
    place = str(Path(psutil.__file__).parents[1])
    found = json.loads(_run(shared_dir, "/usr/bin/python3", "-W", "error", "-c", PSUTIL, place, read=place))
    assert found["counts"] == [1, 1, 1, 1]
    assert found["memory"] == MEMORY and 0 < found["available"] <= MEMORY and found["swap"] == 0
    assert found["booted"] - 2 <= found["started"] <= found["now"] + 1
    assert len(found["pids"]) == 1 and found["stats"]["ctx_switches"] == 0
    assert not found["disks"] and found["partitions"] > 3
    assert found["network"] == ["lo"] and found["name"] == "python3" and found["mine"] > 0


def test_tools_show_the_cage_only(shared_dir: Path) -> None:
    marks = "echo ==; free -b; echo ==; ps -eo pid,comm,lstart; echo ==; top -b -n1; echo ==; uptime; echo ==; vmstat"
    _, free, ps, top, uptime, vmstat = _run(shared_dir, "sh", "-c", marks).split("==\n")
    assert free.splitlines()[1].split()[1] == str(MEMORY)
    assert {line.split()[1] for line in ps.splitlines()[1:]} == {"sh", "ps"}
    assert str(time.gmtime().tm_year) in ps
    assert {line.split()[11] for line in top.splitlines() if line.split()[:1] and line.split()[0].isdigit()} <= (
        {"sh", "top"}
    )
    assert f"{MEMORY / MIB:.1f} total" in top
    assert "load average: 0.00, 0.00, 0.00" in uptime
    assert len(vmstat.splitlines()) == 3


def test_clocks_begin_with_the_cage(shared_dir: Path) -> None:
    if next(control for control in ledger() if control.key == "namespaces.time").state != "enforced":
        pytest.skip("this host gives no cage clocks of its own (namespaces.time in 'isolator check')")
    script = (
        "import json, time; clocks = [time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)];"
        "clocks.append(float(open('/proc/uptime').read().split()[0]));"
        "stat = dict(line.split()[:2] for line in open('/proc/stat')); print(json.dumps([clocks, int(stat['btime'])]))"
    )
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    start = time.time()
    clocks, booted = json.loads(_run(shared_dir, "/usr/bin/python3", "-c", script))
    passed = time.clock_gettime(time.CLOCK_BOOTTIME) - before
    assert max(clocks) <= passed + 2, "they count from the start of the cage"
    assert start - 2 <= booted <= time.time() + 1


T = TypeVar("T")


async def _with_cage(root: Path, look: Callable[[StartedCage], Coroutine[None, None, T]]) -> T:
    effective = policy(resources=ResourcePolicy(memory=MEMORY, memory_high=MEMORY))
    async with cage(root, ["sleep", "60"], effective) as started:
        return await look(started)


def test_an_uncovered_proc_starts_nothing(shared_dir: Path) -> None:
    async def never(_: StartedCage) -> None:
        raise AssertionError("it was started")

    with cages.template(cages.UNCOVERED), pytest.raises(ConfinementError, match="/proc"):
        asyncio.run(_with_cage(shared_dir, never))


def test_figures_follow_the_use(shared_dir: Path) -> None:
    async def look(started: StartedCage) -> dict[str, str]:
        usage = {"memory": 50 * MIB, "cached": 20 * MIB, "cpu_us": 3_000_000, "system_us": 1_000_000, "tasks": 5}
        started.cage.refresh_figures(usage)
        root = Path(f"/proc/{started.cage.pid}/root/proc")
        return {name: (root / name).read_text() for name in ("meminfo", "loadavg", "stat")}

    found = asyncio.run(_with_cage(shared_dir, look))
    sizes = {line.split()[0]: int(line.split()[1]) // 1024 for line in found["meminfo"].splitlines()}
    assert (sizes["MemTotal:"], sizes["MemFree:"], sizes["MemAvailable:"], sizes["Cached:"]) == (200, 150, 170, 20)
    assert found["loadavg"].endswith(" 1/5 5\n")
    ticks = os.sysconf("SC_CLK_TCK")
    assert found["stat"].splitlines()[0].split()[1:4] == [str(2 * ticks), "0", str(ticks)]


def test_a_cage_is_capped_by_its_memory_on_a_small_host() -> None:
    own = figures.Figures.of(-1, ResourcePolicy(memory=1 << 60, memory_high=1 << 60), (0,), 0)
    assert own.memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_cages_take_turns_at_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 3, 6})
    chosen = [figures.choose_processors(1500) for _ in range(4)]
    assert sorted({one for pair in chosen for one in pair}) == [0, 1, 3, 6]
    assert figures.choose_processors(9000) == (0, 1, 3, 6)
    assert figures._ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


def test_cpuinfo_counts_siblings_and_cores_anew() -> None:
    block = "processor\t: {}\nphysical id\t: {}\nsiblings\t: 4\ncore id\t\t: {}\ncpu cores\t: 2\n"
    host = "\n".join(block.format(number, number // 4, number // 2 % 2) for number in range(8))
    found = figures.cpuinfo(host, (0, 1, 2, 4))
    assert [line.split(": ")[1] for line in found.splitlines() if "siblings" in line] == ["3", "3", "3", "1"]
    assert [line.split(": ")[1] for line in found.splitlines() if "cpu cores" in line] == ["2", "2", "2", "1"]


def test_settings_of_a_network_are_those_of_a_new_one() -> None:
    def read() -> dict[str, str]:
        return {name: Path(f"/proc/sys/{name}").read_text() for name in template._OF_NEW_NETWORKS}

    assert netns.in_new_network(read) == template._OF_NEW_NETWORKS


def test_each_uuid_of_the_kernel_is_another(shared_dir: Path) -> None:
    script = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id"
    found = _run(shared_dir, "sh", "-c", script).split()
    assert len({*found, Path("/proc/sys/kernel/random/boot_id").read_text().strip()}) == 4
    assert all([len(part) for part in one.split("-")] == [8, 4, 4, 4, 12] for one in found)


def test_a_cage_with_further_paths_sees_the_same(shared_dir: Path) -> None:
    """It has a root of its own, into which the template's /proc and /sys are taken over."""
    shared_dir.chmod(0o755)
    script = "nproc; head -1 /proc/meminfo; wc -c < /proc/interrupts; ls /sys /proc /proc/sys | grep -v '^[0-9]'"
    found = [_run(shared_dir, "sh", "-c", script, read=path) for path in ("", str(shared_dir))]
    assert found[0] == found[1]
    assert found[0].splitlines()[0] == "1" and found[0].splitlines()[2] == "0"
    assert found[0].splitlines()[1].split()[1] == str(MEMORY // 1024)


@pytest.mark.wide
def test_java_sizes_its_heap_by_the_cap(shared_dir: Path) -> None:
    _have("java")
    flags = (
        "java -XX:+PrintFlagsFinal -version 2>/dev/null | awk '$2 ~ /^(MaxHeapSize|ActiveProcessorCount)$/ {print $4}'"
    )
    heap, _ = _run(shared_dir, "sh", "-c", flags, cpu=50).split()[::-1]
    assert int(heap) <= MEMORY
    source = "public class T { public static void main(String[] a) { System.out.println(" + (
        'Runtime.getRuntime().availableProcessors() + " " + Runtime.getRuntime().maxMemory()); } }'
    )
    script = f"echo '{source}' > /tmp/T.java; java /tmp/T.java"
    if shutil.which("javac"):
        processors, most = _run(shared_dir, "sh", "-c", script, cpu=50).split()
        assert processors == "1" and int(most) <= MEMORY


def test_a_cage_is_shown_the_groups_that_it_is_in() -> None:
    unified = Path("/groups/p.1")
    assert Leaf(unified).by_controller() == [("", "/groups/p.1")]
    hybrid = Leaf(unified, {"memory": Path("/m/p.1"), "cpu": Path("/c/p.1")}, cpuset=Path("/s/empty"))
    assert hybrid.by_controller() == [("memory", "/m/p.1"), ("cpu", "/c/p.1"), ("cpuset", "/s/empty")]
    assert {place for place, _ in hybrid.by_controller()} <= set(template.GROUP_PLACES)
