"""Neighbours of the benchmark ``bad_neighbours`` that keep to their cages: disk, memory, processes, its own sockets."""

from __future__ import annotations

from bench.bad_neighbours_subjects import ANSWERED, HEAD, BadPlugin

_STATE = '    state = os.environ["PLUGIN_STATE_DIR"]\n'
_SYNCS = """\
    def flood():
        file = os.open(f"{state}/{threading.get_ident()}", os.O_RDWR | os.O_CREAT)
        while True:
            os.pwrite(file, b"x" * 4096, 0)
            os.fsync(file)
    together(4, flood)
"""
_WRITES = """\
    def flood():
        file = os.open(f"{state}/{threading.get_ident()}", os.O_RDWR | os.O_CREAT)
        while True:
            for at in range(0, 24 << 20, 1 << 20):
                os.pwrite(file, bytes(1 << 20), at)
            os.fsync(file)
    together(2, flood)
"""
_FILES = """\
    def flood():
        own = f"{state}/{threading.get_ident()}"
        os.mkdir(own)
        folder = os.open(own, os.O_RDONLY)
        while True:
            for number in range(500):
                os.close(os.open(str(number), os.O_WRONLY | os.O_CREAT, dir_fd=folder))
            os.fsync(folder)
            for number in range(500):
                os.unlink(str(number), dir_fd=folder)
    together(2, flood)
"""
_TMP = """\
    while True:
        with open("/tmp/file", "wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 20))
                except OSError:
                    break
        os.unlink("/tmp/file")
"""
_MAPS = """\
    import mmap
    def flood():
        while True:
            mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
    together(2, flood)
"""
_CAP = """\
    held = bytearray(os.urandom(1 << 20)) * 200
    def flood():
        file = os.open(f"{state}/{threading.get_ident()}", os.O_RDWR | os.O_CREAT)
        while True:
            for at in range(0, 50 << 20, 1 << 20):
                os.pwrite(file, bytes(1 << 20), at)
            for at in range(0, 50 << 20, 1 << 20):
                os.pread(file, 1 << 20, at)
    together(1, flood)
"""
_FORKS = """\
    import signal
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        try:
            if os.fork() == 0:
                os._exit(0)
        except OSError:
            pass
"""
_PROGRAMS = """\
    while True:
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
"""
_PIPES = """\
    for _ in range(8):
        (mine, its), (back, forth) = os.pipe(), os.pipe()
        if os.fork() == 0:
            while data := os.read(mine, 1):
                os.write(forth, data)
        def flood(its=its, back=back):
            while True:
                os.write(its, b"x")
                os.read(back, 1)
        threading.Thread(target=flood, daemon=True).start()
    time.sleep(3600)
"""
_DATAGRAMS = """\
    def flood():
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        drain(other)
        while True:
            one.send(b"x")
    together(8, flood)
"""
_STARTS = """\
    while True:
        end = time.monotonic() + 0.08
        while time.monotonic() < end:
            pass
        time.sleep(0.22)
"""
_READS = """\
    import mmap
    names = [os.path.join(folder, name) for folder, _, names in os.walk("/usr/lib") for name in names]
    large = [name for name in names if not os.path.islink(name) and os.path.getsize(name) > 1 << 20]
    def flood():
        into = mmap.mmap(-1, 1 << 20)
        for name in large:
            file = os.open(name, os.O_RDONLY | os.O_DIRECT)
            for at in range(0, os.fstat(file).st_size, 1 << 20):
                os.preadv(file, [into], at)
            os.close(file)
    together(4, flood)
"""
_BARRIERS = """\
    import ctypes
    libc = ctypes.CDLL(None)
    membarrier, private, everywhere = 324, 16, 4
    libc.syscall(membarrier, private, 0)
    libc.syscall(membarrier, everywhere, 0)
    def flood(command):
        while True:
            libc.syscall(membarrier, command, 0)
    for command in (1, 2, 8):
        threading.Thread(target=flood, args=(command,), daemon=True).start()
    time.sleep(3600)
"""


def _own(does: str, script: str) -> BadPlugin:
    return BadPlugin(does, HEAD + ANSWERED + _STATE + script)


BAD = (
    _own("syncs 4 KiB in its state again and again", _SYNCS),
    _own("fills its state again and again", _WRITES),
    _own("creates and removes files in its state", _FILES),
    _own("fills its /tmp again and again", _TMP),
    _own("maps and unmaps memory", _MAPS),
    _own("lives at its memory cap", _CAP),
    _own("forks as fast as it can", _FORKS),
    _own("starts programs as fast as it can", _PROGRAMS),
    _own("pipes bytes between its processes", _PIPES),
    _own("floods unix datagrams", _DATAGRAMS),
    _own("computes for 80 ms of every 300", _STARTS),
    _own("reads files of the host past the cache", _READS),
    _own("asks for memory barriers", _BARRIERS),
)
