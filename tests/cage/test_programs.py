"""Ordinary programs of every kind run in a cage of the default profile; under ``strict`` they start nothing."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path

import pytest

from tests.support.cage_fixture import isolator
from tests.support.go import go_cache

PYTHON = """
import json, os, socket, sqlite3, ssl, subprocess, tempfile, threading
t = threading.Thread(target=lambda: None); t.start(); t.join()
with tempfile.TemporaryFile() as f: f.write(b"x")
sqlite3.connect("/tmp/db").execute("create table t (a)")
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
ssl.create_default_context()
assert subprocess.run(["echo", "hi"], capture_output=True).stdout == b"hi\\n"
print("fine")
"""

NODE = """
const fs = require('fs'), net = require('net');
const {execSync} = require('child_process'), {Worker} = require('worker_threads');
fs.writeFileSync('/tmp/file', 'x');
execSync('true');
new Worker('require("worker_threads").parentPort.postMessage(1)', {eval: true}).on('message', () => {
  const server = net.createServer(s => s.end('fine')).listen(0, '127.0.0.1', () =>
    net.connect(server.address().port, '127.0.0.1').on('data', d => { console.log(String(d)); server.close(); }));
});
"""

BASH = """
set -e
cd /tmp; mkdir -p a/b; echo text > a/b/file; cp -r a c; mv c d; ln -s d e; find . -name file | sort | head -1
seq 100 | sort -rn | awk '{s += $1} END {print s}' | tee sum; sha256sum sum > /dev/null
tar cf t.tar a; date > /dev/null
diff -r a d; rm -r a d e; (sleep 0.01 &) ; wait; test "$(cat sum)" = 5050; echo fine
"""

C = """
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
static void *thread(void *x) { return x; }
int main(void) {
    pthread_t t;
    if (pthread_create(&t, 0, thread, 0) || pthread_join(t, 0)) return 1;
    pid_t pid = fork();
    if (pid == 0) _exit(7);
    int status;
    if (waitpid(pid, &status, 0) != pid || WEXITSTATUS(status) != 7) return 2;
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) return 3;
    if (mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) return 4;
    puts("fine");
    return 0;
}
"""

GO = """
package main

import ("fmt"; "net"; "os"; "os/exec"; "sync")

func main() {
    var group sync.WaitGroup
    for i := 0; i < 20; i++ { group.Add(1); go func() { defer group.Done() }() }
    group.Wait()
    if err := os.WriteFile("/tmp/file", []byte("x"), 0600); err != nil { panic(err) }
    listener, err := net.Listen("tcp", "127.0.0.1:0")
    if err != nil { panic(err) }
    go func() { c, _ := listener.Accept(); c.Close() }()
    if _, err = net.Dial("tcp", listener.Addr().String()); err != nil { panic(err) }
    if err = exec.Command("true").Run(); err != nil { panic(err) }
    fmt.Println("fine")
}
"""

RUST = """
use std::{fs, net, process, thread};
fn main() {
    thread::spawn(|| ()).join().unwrap();
    fs::write("/tmp/file", "x").unwrap();
    let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
    net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    assert!(process::Command::new("true").status().unwrap().success());
    println!("fine");
}
"""


def _have(name: str) -> str:
    path = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin") or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def _run(root: Path, *command: str, read: str = "") -> str:
    reading = ["--read", read] if read else []
    result = isolator(root, "run", "--cpu", "100%", *reading, "--", *command)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _visible(name: str) -> str:
    path = _have(name)
    if not str(Path(path).resolve()).startswith("/usr/"):
        pytest.skip(f"{name} is outside /usr, where no cage sees it")
    return path


def test_python(shared_dir: Path) -> None:
    assert _run(shared_dir, "/usr/bin/python3", "-c", PYTHON) == "fine\n"


def test_node(shared_dir: Path) -> None:
    assert _run(shared_dir, _visible("node"), "-e", NODE) == "fine\n"


def test_bash_and_coreutils(shared_dir: Path) -> None:
    assert _run(shared_dir, "bash", "-c", BASH).endswith("fine\n")


def test_curl(shared_dir: Path) -> None:
    curl = _visible("curl")
    retry = "--retry 20 --retry-connrefused --retry-delay 0 --retry-max-time 20"
    serve = "cd /tmp; echo fine > f; python3 -m http.server 8000 -b 127.0.0.1 2>/dev/null &"
    script = f"{serve} {curl} -s {retry} http://localhost:8000/f; kill %1"
    assert _run(shared_dir, "bash", "-c", script) == "fine\n"


@pytest.mark.parametrize(
    ("compiler", "name", "source", "arguments"),
    [
        ("gcc", "main.c", C, ["-pthread", "-o", "program", "main.c"]),
        ("gcc", "static.c", C, ["-pthread", "-static", "-o", "program", "static.c"]),
        ("go", "main.go", GO, ["build", "-o", "program", "main.go"]),
        ("rustc", "main.rs", RUST, ["-o", "program", "main.rs"]),
    ],
    ids=["c", "static c", "go", "rust"],
)
def test_compiled(shared_dir: Path, compiler: str, name: str, source: str, arguments: list[str]) -> None:
    path = _have(compiler)
    folder = shared_dir / "build"
    folder.mkdir()
    (folder / name).write_text(textwrap.dedent(source))
    environment = {"PATH": f"{Path(path).parent}:/usr/bin:/bin", "HOME": str(Path.home()), "GOFLAGS": "-mod=mod",
                   "GOCACHE": go_cache(shared_dir)}  # fmt: skip
    made = subprocess.run([path, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert _run(shared_dir, f"{folder}/program", read=str(folder)) == "fine\n"


OWN_OBJECTS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
def done(answer):
    assert answer != -1, os.strerror(ctypes.get_errno())
    return answer
segment = done(libc.shmget(0, 4096, 0o1600))
address = libc.shmat(segment, None, 0)
ctypes.memset(address, 1, 4096)
done(libc.shmdt(ctypes.c_void_p(address))); done(libc.shmctl(segment, 0, None))
sets = done(libc.semget(0, 1, 0o1600)); done(libc.semctl(sets, 0, 0))
queue = done(libc.msgget(0, 0o1600)); done(libc.msgctl(queue, 0, None))
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
done(libc.capset(header, none))
done(libc.syncfs(os.open("/tmp", os.O_RDONLY)))
for number in NUMA:
    assert libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 38  # as without CONFIG_NUMA
print("fine")
"""


def test_calls_that_reach_only_the_cages_own_work_and_are_not_on_record(shared_dir: Path) -> None:
    import pyseccomp

    names = ("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "migrate_pages")
    numbers = [pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) for name in names]
    done = isolator(shared_dir, "run", "--", "python3", "-c", OWN_OBJECTS.replace("NUMA", str(numbers)))
    assert (done.stdout, done.stderr) == ("fine\n", "")


BUILT = """
set -e
cd /tmp; cp /usr/bin/true program; ./program; printf '#!/bin/sh\\necho script\\n' > script; chmod +x script; ./script
cp /usr/bin/true /dev/shm/program; /dev/shm/program
test -x /usr/bin/gcc || exit 0
printf 'int main(void) { return 0; } int number(void) { return 7; }' > main.c
gcc -o built main.c; ./built
gcc -shared -fPIC -o library.so main.c; python3 -c 'import ctypes; assert ctypes.CDLL("/tmp/library.so").number() == 7'
"""


def test_what_is_built_in_a_cage_runs(shared_dir: Path) -> None:
    """Under the default profile; the battery's strict attempts show that none of it does under the other."""
    assert _run(shared_dir, "bash", "-c", BUILT) == "script\n"


TERMINAL = """
import os, pty, shutil, subprocess
child, master = pty.fork()
if child == 0:
    os.execvp("bash", ["bash", "-ic", "tty; jobs; stty size"])
seen = b""
try:
    while part := os.read(master, 1000):
        seen += part
except OSError:  # EIO: the last one has closed it
    pass
assert b"/dev/pts/0" in seen and b"job control" not in seen, seen
if shutil.which("script"):
    assert "/dev/pts/" in subprocess.run(["script", "-qec", "tty", "/dev/null"], capture_output=True, text=True).stdout
if shutil.which("tmux"):
    terminal = os.openpty()[1]
    subprocess.run(
        ["tmux", "-S", "/tmp/tmux", "new-session", "tty > /tmp/name"], stdin=terminal, stdout=terminal, check=True
    )
    assert open("/tmp/name").read().startswith("/dev/pts/")
print("fine")
"""


def test_programs_have_terminals_of_their_own(shared_dir: Path) -> None:
    done = isolator(shared_dir, "run", "--", "env", "TERM=linux", "python3", "-c", TERMINAL)
    assert done.stdout == "fine\n", done.stderr


def test_public_files_of_etc_are_there(shared_dir: Path) -> None:
    """Whatever of them this host has: where links of /usr lead, and what libraries read."""
    names = (
        "fonts/fonts.conf ssl/openssl.cnf services protocols java-17-openjdk/security/java.security maven/m2.conf "
        "maven/logging/simplelogger.properties matplotlibrc R/Makeconf R/Renviron R/ldpaths R/repositories octaverc "
        "libreoffice/registry"
    )
    code = f"import os; print([n for n in {names.split()} if not os.path.exists('/etc/' + n)])"
    absent = [name for name in names.split() if not Path("/etc", name).exists()]
    assert _run(shared_dir, "python3", "-c", code) == f"{absent}\n"


def test_a_path_below_etc_can_be_granted(shared_dir: Path) -> None:
    """A folder that the view lacks, one beside a mounted one, and a file that is a link in every other cage."""
    with tempfile.TemporaryDirectory(dir="/etc/ssl") as folder:
        Path(folder).chmod(0o755)
        Path(folder, "file").write_text("granted")
        for path, wanted in ((folder, "granted"), (f"{folder}/file", "granted"), ("/etc/hosts", "")):
            file = path if Path(path).is_file() else f"{path}/file"
            code = f"cat {file}; test -e /etc/ssl/certs -a -s /etc/resolv.conf -a -s /etc/passwd || echo lost"
            found = _run(shared_dir, "sh", "-c", code, read=path)
            assert found == (wanted or Path(path).read_text())


INTERFACES = """
import socket
assert [name for _, name in socket.if_nameindex()] == ["lo"]
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_UNSPEC, "127.0.0.1")):
    found = socket.getaddrinfo("localhost", 80, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
    assert address in [place[0] for *_, place in found], found
for address in ("127.0.0.1", "192.0.0.8"):  # the cage's own, and what an interface shows is its own too
    server = socket.create_server((address, 0))
    socket.create_connection(server.getsockname(), timeout=20)
print("fine")
"""


def test_programs_list_the_cages_interfaces(shared_dir: Path) -> None:
    done = isolator(shared_dir, "run", "--", "python3", "-c", INTERFACES)
    assert (done.stdout, done.stderr) == ("fine\n", "")
    if shutil.which("node", path="/usr/bin"):
        code = "console.log(Object.keys(require('os').networkInterfaces()).join())"
        assert _run(shared_dir, "node", "-e", code) == "lo\n"


# --- strict --------------------------------------------------------------------------------------------------


@pytest.fixture
def strict(shared_dir: Path) -> list[str]:
    file = shared_dir / "strict.toml"
    file.write_text('[syscalls]\nprofile = "strict"\n')
    return ["run", "--policy", str(file), "--"]


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['true'])",
        "mmap.mmap(-1, 4096, prot=7)",
        "os.memfd_create('x')",
        "executable()",
    ],
)
def test_strict_refuses(shared_dir: Path, strict: list[str], attempt: str) -> None:
    code = f"""
import ctypes, mmap, os, subprocess
def executable():
    area = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), 4096, 5):
        raise OSError(ctypes.get_errno(), "mprotect")
try:
    {attempt}
    print("through")
except OSError as error:
    print(error.errno)
"""
    assert isolator(shared_dir, *strict, "/usr/bin/python3", "-c", code).stdout == "1\n"
    assert "through\n" in isolator(shared_dir, "run", "--", "/usr/bin/python3", "-c", code).stdout


FILTER = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))  # return: allow
wanted = ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(program)))
libc.prctl(ctypes.c_int(22), ctypes.c_ulong(2), wanted)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
print(ctypes.get_errno())
"""


def test_strict_loads_no_filter_of_a_plugins_own(shared_dir: Path, strict: list[str]) -> None:
    """The memory of its compiled program is counted against no cap, and there is one pool of it for the whole host."""
    assert isolator(shared_dir, *strict, "/usr/bin/python3", "-c", FILTER).stdout == "1\n"
    assert isolator(shared_dir, "run", "--", "/usr/bin/python3", "-c", FILTER).stdout == "1\n"


def test_strict_allows_threads_and_a_second_exec(shared_dir: Path, strict: list[str]) -> None:
    """What it cannot tell from the first exec replaces the program; it stays under both filters."""
    threads = "import threading; t = threading.Thread(target=print, args=['fine']); t.start(); t.join()"
    assert isolator(shared_dir, *strict, "/usr/bin/python3", "-c", threads).stdout == "fine\n"
    script = "exec python3 -c 'import os\ntry: os.fork()\nexcept OSError as e: print(e.errno)'"
    assert isolator(shared_dir, *strict, "sh", "-c", script).stdout == "1\n"
