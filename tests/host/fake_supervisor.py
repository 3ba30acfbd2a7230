"""Fake of the supervisor's *process border* for tests of the host, and nothing more of it.

It speaks the supervisor's half of docs/internals.md over real SOCK_SEQPACKET pairs, runs the real host as a real
unprivileged process that can be killed, and runs sidecars as plain processes of a user of their own with real Unix
sockets and real pipes. There are no cages here: those are the supervisor's, and have tests of their own.

The audit process is a fake too (``audit_fake``): every record is kept in ``records`` and acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolator.audit.client import utc_now
from isolator.errors import IsolatorError, NotFoundError, UnavailableError
from isolator.ipc import messages
from isolator.ipc.body import WithFds, by_op
from isolator.ipc.channel import Channel, pair
from isolator.ipc.messages import PluginState
from isolator.ipc.succession import Passage
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet
from isolator.reader.manifest import parse_manifest_core
from tests.host.audit_fake import FakeAudit
from tests.host.fake_registrar import FakeRegistrar
from tests.support.answers import checked

HOST_UID = 64001
PLUGIN_UID = 64002
BACKOFF = 0.05
REPO = Path(__file__).resolve().parents[2]


@dataclass
class Sidecar:
    """Registered plugin of the fake, with its present process."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    uid: int = PLUGIN_UID
    state: str = "stopped"
    run: str | None = None
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    stopping: bool = False
    pipes: list[int] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    give_up_after: int = 1000
    origin: messages.Origin = messages.Origin.PLUGIN
    """Whose doing an end is that was not asked for."""

    @property
    def socket_folder(self) -> Path:
        return self.folder / "run"


class Daemon(FakeAudit):
    """Fake daemon with a real host process: register scripts, talk to the host through its control socket."""

    def __init__(self, root: Path, *, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.root = root
        self.paths = Paths.of(root)
        self.config = HostConfig.model_validate(config or {})
        self.host: asyncio.subprocess.Process | None = None
        self.fresh = False
        """Whether the host is told that the daemon has just started."""
        self.ensured: list[str] = []
        """Plugins that the host wanted started, in order."""
        self.connected = 0
        """Connections to sidecars that the host has been given."""
        self.starts_may_go_on = asyncio.Event()
        self.starts_may_go_on.set()
        self.channel: Channel | None = None
        self.sidecars: dict[str, Sidecar] = {}
        self.foreign_listener: str | None = None
        self.first = ""
        """Python that the host process runs first, from its next start on."""
        self.registrar = FakeRegistrar(self)
        self._runs = 0
        self.hello_plugins: list[str] | None = None
        self.fences: dict[str, float] = {}
        """Deadlines that the host is told of at its start."""

    # Life

    async def start(self) -> None:
        """Lay out the root and start the host."""
        for folder in (self.paths.host_lib, self.paths.plugin_log):
            folder.mkdir(parents=True)
            os.chown(folder, HOST_UID, HOST_UID)
            folder.chmod(0o700)
        self.paths.run.mkdir(parents=True)
        await self.start_host()

    async def start_host(self) -> None:
        """Start the host process and say hello, with the runs that are there."""
        self.channel, audit = await self._spawn_host()
        self.listen_to_audit(audit)
        self.paths.control_socket.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.paths.control_socket))
        self.paths.control_socket.chmod(0o666)
        listener.listen(128)
        await self.channel.ask(self._hello(), fds=[listener.fileno()], timeout=20)
        listener.close()
        for sidecar in self.sidecars.values():
            if sidecar.state == "running":
                self._announce(sidecar)

    async def exchange_host(self) -> None:
        """Put a new process in the place of the host's, which hands everything on and ends."""
        before, old = self.host, self.channel
        assert before is not None and old is not None
        self.channel, audit = await self._spawn_host()
        audit.close()
        readable = await self.channel.ask(messages.ReadFormats(), timeout=20)
        passage = Passage(self.channel)
        for op, handler in by_op(messages.StatePart.on_fds(passage.part)).items():
            old.handle(op, handler)
        old.tell(messages.WriteFormat(formats=readable.formats))
        left = await old.ask(messages.Leave(), timeout=20)
        await self.channel.ask(self._hello(left.parts), timeout=20)
        self.channel.tell(messages.ServeCallers())
        old.close()
        await before.wait()

    async def _spawn_host(self) -> tuple[Channel, socket.socket]:
        """Start a host process; returns the channel to it, and the audit process's end of its socket."""
        ours, theirs = pair()
        audit_ours, audit_theirs = pair()
        main = f"{self.first}\nfrom host.service import main; main()"
        self.host = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", main),
            *("--channel-fd", str(theirs.fileno()), "--audit-fd", str(audit_theirs.fileno())),
            pass_fds=(theirs.fileno(), audit_theirs.fileno()),
            user=HOST_UID,
            group=HOST_UID,
            extra_groups=[],
            cwd="/",
            env={"PATH": os.environ["PATH"]},
        )
        theirs.close()
        audit_theirs.close()
        handlers = (
            by_op(
                messages.EnsureRun.on(self._ensure),
                messages.ConnectRun.on(self._connect),
                messages.ConnectRuns.on(self._connect_many),
                messages.LendSocket.on(self._lend_socket),
                messages.StopRun.on(self._stop),
                messages.RestartRun.on(self._restart),
                messages.ListPlugins.on(self._status),
                messages.ListServices.on(self._services),
            )
            | self.registrar.handlers()
        )
        return Channel(ours, handlers, name="host"), audit_ours

    def _hello(self, parts: int = 0) -> messages.HostHello:
        return messages.HostHello(
            root=str(self.root),
            config=self.config.model_dump(mode="json"),
            plugins=tuple(map(self.entry, self.sidecars.values())),
            fresh=self.fresh,
            parts=parts,
            fences=self.fences,
        )

    async def kill_host(self) -> None:
        """Kill the host process (SIGKILL), and wait for its end."""
        assert self.host is not None
        self.host.kill()
        await self.host.wait()
        assert self.channel is not None
        self.channel.close()

    async def stop(self) -> None:
        """End everything, and the sidecars last: until then somebody may start another."""
        for sidecar in self.sidecars.values():
            sidecar.stopping = True
        if self.channel is not None:
            self.channel.close()
        try:
            if self.host is not None and self.host.returncode is None:
                try:
                    async with asyncio.timeout(10):
                        await self.host.wait()
                except TimeoutError:
                    self.host.kill()
                    await self.host.wait()
                    raise AssertionError("the host did not end when its channel closed") from None
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for sidecar in self.sidecars.values():
                if sidecar.process is not None and sidecar.process.returncode is None:
                    sidecar.process.kill()
                    await sidecar.process.wait()
                for fd in sidecar.pipes:
                    os.close(fd)
            self.close_audit()

    # Plugins

    def add(
        self, name: str, script: str, *, hooks: list[str] | None = None, uid: int = PLUGIN_UID, **more: Any
    ) -> Sidecar:
        """Register a Python script as a plugin, without approval, and notify the host."""
        manifest = {
            "name": name,
            "version": "1.0.0",
            "api_version": "1",
            "binary": "./main.py",
            "hooks": hooks or ["deploy.completed"],
            **more,
        }
        sidecar = self.make(manifest, uid)
        (sidecar.folder / "main.py").write_text(script)
        self.changed(sidecar)
        return sidecar

    def make(self, manifest: dict[str, Any], uid: int = PLUGIN_UID) -> Sidecar:
        """Make a plugin of this manifest, with its folders."""
        folder = self.root / "plugins" / manifest["name"]
        sidecar = Sidecar(manifest["name"], folder, manifest, uid)
        sidecar.socket_folder.mkdir(parents=True)
        os.chown(sidecar.socket_folder, uid, uid)
        sidecar.socket_folder.chmod(0o700)
        self.sidecars[sidecar.name] = sidecar
        return sidecar

    def entry(self, sidecar: Sidecar) -> messages.RegisteredEntry:
        """A plugin as the supervisor shows it to the host."""
        core = parse_manifest_core(json.dumps(sidecar.manifest).encode())
        effective = meet(core, None, self.config).effective
        return messages.RegisteredEntry(
            name=sidecar.name,
            version=core.version,
            digest="0" * 64,
            state=PluginState(sidecar.state),
            run=sidecar.run,
            pid=sidecar.process.pid if sidecar.process is not None and sidecar.run else None,
            uid=sidecar.uid,
            started_at=utc_now(),
            restarts=max(0, sidecar.starts - 1),
            effective=effective.model_dump(mode="json") if sidecar.state != "rejected" else None,
            effective_digest=effective.digest() if sidecar.state != "rejected" else None,
            manifest=sidecar.manifest,
            ready=sidecar.run is not None,
        )

    def changed(self, sidecar: Sidecar) -> None:
        """Notify the host of a changed plugin."""
        if self.channel is not None:
            self.channel.tell(messages.PluginChanged(plugin=self.entry(sidecar)))

    async def _spawn(self, sidecar: Sidecar) -> None:
        assert self.channel is not None
        sidecar.env = (await self.channel.ask(messages.GetEnvironment(name=sidecar.name), timeout=10)).env
        self._runs += 1
        sidecar.starts += 1
        sidecar.run, sidecar.stopping = f"run{self._runs}", False
        out, err = os.pipe(), os.pipe()
        interpreter = sidecar.manifest.get("x-interpreter", sys.executable)
        sidecar.process = await asyncio.create_subprocess_exec(
            *([interpreter] if interpreter else []),
            str(sidecar.folder / sidecar.manifest["binary"]),
            stdin=subprocess.DEVNULL,
            stdout=out[1],
            stderr=err[1],
            user=sidecar.uid,
            group=sidecar.uid,
            extra_groups=[],
            cwd=sidecar.folder,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONUNBUFFERED": "1",
                "PLUGIN_NAME": sidecar.name,
                "PLUGIN_SOCKET": str(sidecar.socket_folder / "plugin.sock"),
                "PLUGIN_HOST_SOCKET": str(self._host_socket(sidecar)),
                **sidecar.env,
            },
        )
        for fd in sidecar.pipes:
            os.close(fd)
        os.close(out[1])
        os.close(err[1])
        sidecar.pipes = [out[0], err[0]]
        sidecar.state = "running"
        self._announce(sidecar)
        self.keep(self._watch(sidecar, sidecar.process, sidecar.run))

    def _host_socket(self, sidecar: Sidecar) -> Path:
        return sidecar.folder / "host.sock"

    def _announce(self, sidecar: Sidecar) -> None:
        assert self.channel is not None and sidecar.process is not None and sidecar.run is not None
        path = self._host_socket(sidecar)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        os.chown(path, sidecar.uid, sidecar.uid)
        listener.listen(16)
        started = messages.RunStarted(name=sidecar.name, run=sidecar.run, pid=sidecar.process.pid)
        self.channel.tell(started, fds=[*sidecar.pipes, listener.fileno()])
        listener.close()
        self.wake()

    async def _watch(self, sidecar: Sidecar, process: asyncio.subprocess.Process, run: str) -> None:
        code = await process.wait()
        expected = sidecar.stopping
        sidecar.run = None
        again = not expected and sidecar.starts < sidecar.give_up_after
        sidecar.state = "stopped" if expected else "backoff" if again else "failed"
        assert self.channel is not None
        ended = messages.RunEnded(
            name=sidecar.name,
            run=run,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            cause="exit",
            origin=messages.Origin.OPERATOR if expected else sidecar.origin,
            expected=expected,
            uptime=1.0,
            state=PluginState(sidecar.state),
            retry_in=BACKOFF if again else None,
        )
        self.channel.tell(ended)
        self.wake()
        if again:
            await asyncio.sleep(BACKOFF)
            async with sidecar.lock:
                if sidecar.run is None and not sidecar.stopping:
                    with contextlib.suppress(IsolatorError):
                        await self._spawn(sidecar)

    async def stop_sidecar(self, sidecar: Sidecar, reason: str = "asked") -> None:
        """Drain, send SIGTERM, wait."""
        sidecar.stopping = True
        if sidecar.run is not None and self.channel is not None:
            await self.channel.ask(messages.DrainRun(name=sidecar.name, run=sidecar.run, reason=reason), timeout=5)
        process = sidecar.process
        if process is not None and process.returncode is None:
            process.terminate()
            await process.wait()
            await self.until(lambda: sidecar.run is None)

    # Requests of the host

    def find(self, name: str) -> Sidecar:
        """The plugin of that name."""
        if name not in self.sidecars:
            raise NotFoundError(f"plugin {name}", "no such plugin")
        return self.sidecars[name]

    async def _ensure(self, request: messages.EnsureRun) -> messages.Running:
        sidecar = self.find(request.name)
        if sidecar.state == "disabled":
            raise IsolatorError(f"plugin {sidecar.name}", "is disabled")
        if sidecar.state == "failed" and request.reason != "operator":
            raise IsolatorError(f"plugin {sidecar.name}", "has failed")
        self.ensured.append(sidecar.name)
        self.wake()
        await self.starts_may_go_on.wait()
        async with sidecar.lock:
            if sidecar.run is None:
                await self._spawn(sidecar)
        return self._running(sidecar)

    def _running(self, sidecar: Sidecar) -> messages.Running:
        assert sidecar.run is not None and sidecar.process is not None
        return messages.Running(run=sidecar.run, pid=sidecar.process.pid)

    async def _connect(self, request: messages.ConnectRun) -> WithFds[None]:
        sidecar = self.find(request.name)
        end = time.monotonic() + request.deadline
        while True:
            try:
                return WithFds(None, [self._connect_at_once(sidecar, request.run)])
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                if time.monotonic() > end:
                    raise UnavailableError(f"plugin {sidecar.name}", "does not accept connections") from None
                await asyncio.sleep(0.002)

    def _connect_at_once(self, sidecar: Sidecar, run: str) -> int:
        if sidecar.run != run:
            raise UnavailableError(f"plugin {sidecar.name}", "that run has ended")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            path = sidecar.socket_folder / "plugin.sock"
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise IsolatorError("its socket was replaced")
            sock.connect(self.foreign_listener or str(path))
        except BaseException:
            sock.close()
            raise
        self.connected += 1
        return sock.detach()

    async def _connect_many(self, request: messages.ConnectRuns) -> WithFds[messages.Connected]:
        answers: list[Any] = []
        fds: list[int] = []
        for one in request.runs:
            try:
                fds.append(self._connect_at_once(self.find(one.name), one.run))
                answers.append(True)
            except OSError:
                answers.append(False)
            except IsolatorError as error:
                answers.append(error.to_json())
        return WithFds(messages.Connected(answers=tuple(answers)), fds)

    async def _lend_socket(self, request: messages.LendSocket) -> WithFds[messages.LentSocket]:
        sidecar = self.find(request.name)
        if sidecar.run != request.run:
            raise UnavailableError(f"plugin {sidecar.name}", "that run has ended")
        path = sidecar.socket_folder / "plugin.sock"
        os.chown(path, -1, HOST_UID)
        path.chmod(0o770)
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        return WithFds(messages.LentSocket(changed_ns=os.fstat(fd).st_ctime_ns), [fd])

    async def _stop(self, request: messages.StopRun) -> None:
        await self.stop_sidecar(self.find(request.name), request.reason)

    async def _restart(self, request: messages.RestartRun) -> messages.Running:
        sidecar = self.find(request.name)
        await self.stop_sidecar(sidecar)
        async with sidecar.lock:
            await self._spawn(sidecar)
        return self._running(sidecar)

    async def _services(self, _: messages.ListServices) -> messages.Services:
        assert self.host is not None
        host = messages.ServiceEntry(name="host", pid=self.host.pid, up=True, starts=1, ended="")
        return messages.Services(services=(host,))

    async def _status(self, _: messages.ListPlugins) -> messages.Plugins:
        return messages.Plugins(plugins=tuple(map(self.entry, self.sidecars.values())))

    # Requests to the host

    async def answer(self, verb: str, params: dict[str, Any]) -> dict[str, Any]:
        """Return the whole answer to one control call, on a connection of its own."""
        reader, writer = await asyncio.open_unix_connection(str(self.paths.control_socket), limit=1 << 24)
        try:
            writer.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": verb, "params": params}).encode() + b"\n")
            answer = json.loads(await reader.readline())
        finally:
            writer.close()
        assert isinstance(answer, dict)
        return answer

    async def ask(self, verb: str, **params: Any) -> dict[str, Any]:
        """Return the result of one control call; its keys must be those of the verb's type. Raises the host's error."""
        answer = await self.answer(verb, params)
        if "error" in answer:
            raise IsolatorError.from_json(answer["error"]["data"])
        return checked(verb, answer["result"])

    async def emit(self, name: str = "deploy.completed", **fields: Any) -> dict[str, Any]:
        """Emit an event with required fields filled in."""
        payload = {"project_id": "p1", "deployment_id": "d1", "url": "https://a.example", "duration_ms": 5, **fields}
        return await self.ask("event.emit", name=name, payload=payload)

    async def deliver(self, **fields: object) -> dict[str, Any]:
        """Emit an event that one plugin gets; returns its delivery once it is final."""
        row = await self.outcome(await self.emit(**fields))
        (delivery,) = row["deliveries"]
        assert isinstance(delivery, dict)
        return delivery

    async def outcome(self, emitted: dict[str, Any], timeout: float = 15.0) -> dict[str, Any]:
        """Return the event once every delivery is final, or after ``timeout`` seconds."""
        return await self.ask("event.wait", id=emitted["id"], timeout=timeout)


def end_process(pid: int) -> None:
    """Kill a process of the test's own."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
