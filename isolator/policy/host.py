"""Settings of ``host.toml``: the ceiling that nobody exceeds, the defaults, and the daemon's own settings.

The models alone; ``parse/host_file.py`` reads the file. The values here are the default posture: a host without a
``host.toml`` behaves as if it held exactly these. Sizes are bytes, cpu thousandths of a core, durations seconds.
"""

from typing import Any, Literal

from isolator.base.structs import field
from isolator.policy.cluster import Cluster
from isolator.policy.frozen import Frozen
from isolator.policy.keys import CEILING, GIB, MIB, SWITCHES, Limits, Switches
from isolator.policy.model import VIRTUAL, AddressException, EgressRule, RestartPolicy
from isolator.policy.trust import Trust

Role = Literal["caller", "viewer", "emitter", "operator"]
Profile = Literal["default", "strict"]


class _Bounds(Frozen):
    """The fields of a ceiling that are no switches; they come first, as in ``HostConfig.digest``."""

    limits: Limits = CEILING
    hooks: tuple[str, ...] = ("*",)
    permissions: tuple[str, ...] = ("*",)
    egress: tuple[EgressRule, ...] | None = None
    """None: any destination that is not on the always-blocked list."""
    egress_public: bool = True
    """Whether a policy may grant "public", that is, any public address."""
    read: tuple[str, ...] = ("/",)
    syscalls: Profile = "default"


class Ceiling(Switches, _Bounds):
    """Bounds that nobody exceeds, whatever a policy grants. Silence about a switch allows it."""

    @classmethod
    def _completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {switch.name: True for switch in SWITCHES} | values


class Inbound(Frozen):
    """Host addresses and port ranges (first, last) that a policy may have forwarded into a cage; none by default."""

    addresses: tuple[str, ...] = ("127.0.0.1", "::1")
    ports: tuple[tuple[int, int], ...] = ()

    def allows(self, address: str, port: int) -> bool:
        """Whether a policy may listen there."""
        return address in self.addresses and any(first <= port <= last for first, last in self.ports)


MAY_DEGRADE = ("cgroup.memory", "cgroup.cpu", "cgroup.pids", "cgroup.io", "landlock")
"""Keys of the ledger that ``may_degrade`` of host.toml can list: controls without which a cage is still a cage.

Each layer declares its own in ``Layer.may_degrade``; a test compares the two.
"""


class Roles(Frozen):
    """Uids of the control socket's callers by role; root is always an operator."""

    viewer: tuple[int, ...] = ()
    emitter: tuple[int, ...] = ()
    operator: tuple[int, ...] = (0,)
    caller: tuple[int, ...] = ()
    """Users who may use tools of MCP servers whose policies name them; they may be anything else besides."""
    runner: tuple[int, ...] = ()
    """Users whose ``isolator run`` the daemon serves, at a socket of its own; they may be anything else besides."""


class Runner(Frozen):
    """``[runner]``: what the runs of all users with the role ``runner`` may take, together and each."""

    cages: int = 8
    """Runs at once."""
    all_tasks: int = 512
    """Processes and threads of all of them."""
    all_memory: int = 2 * GIB
    share: int = 50
    """Percent of each of the three that one user may have."""
    ceiling: Ceiling | None = None
    """The most of one run; None: the host's ceiling."""


def without_trail(disk_full: str) -> str:
    """Consequence of ``[audit] disk_full`` while the trail cannot be written, as a clause of an alarm."""
    if disk_full == "stop":
        return "nothing is started or dispatched until it can be"
    return 'the daemon goes on without it (disk_full = "continue")'


class AuditSettings(Frozen):
    """``disk_full``: ``stop`` starts and dispatches nothing while no record can be written; ``continue`` goes on."""

    disk_full: Literal["stop", "continue"] = "stop"
    rotate_size: int = 64 * MIB
    rotate_age: float = 86400.0
    keep_files: int = 90
    """Rotated files kept; 0 keeps all of them."""
    min_age: float = 7 * 86400.0
    """Age in seconds below which files are kept even if there are more, within the room of ``keep_files``."""
    seal_records: int = 1000
    seal_interval: float = 60.0
    snapshot_interval: float = 30.0


class Metrics(Frozen):
    """Loopback address and port that Prometheus scrapes; port None serves nothing."""

    address: str = "127.0.0.1"
    port: int | None = None


class Ingress(Frozen):
    """``[ingress.NAME]``: events that come in over HTTP, each signed with a secret of the file."""

    secret_file: str
    events: tuple[str, ...]
    """Names, or patterns of names, that may come in here."""


class Console(Frozen):
    """``[console]``: HTTP on a socket, and on a loopback port if there is one."""

    port: int | None = None
    emit: bool = False
    """Whether callers with the role ``emitter`` may emit over HTTP."""
    ingress: dict[str, Ingress] = field(default_factory=dict)
    uid: int = -1
    """The process's own user, which the supervisor fills in."""


class Packages(Frozen):
    """``[packages]``: where ``plugin add --mcp`` gets packages. The first of a list is the index."""

    npm: tuple[str, ...] = ("registry.npmjs.org",)
    pypi: tuple[str, ...] = ("pypi.org/simple", "files.pythonhosted.org")
    ca: str = ""
    """A file of certificates to trust in place of the system's."""
    timeout: float = 300.0
    """Seconds for everything that one package needs."""


class HostConfig(Frozen):
    """Everything of ``host.toml``. Crosses process borders as JSON."""

    uid_range: tuple[int, int] = (70000, 74999)
    plugin_dirs: tuple[str, ...] = ()
    may_degrade: tuple[str, ...] = ()
    """Keys of the ledger's controls (``MAY_DEGRADE``) that this host may lack."""
    ceiling: Ceiling = Ceiling()
    defaults: Limits = Limits()
    default_syscalls: Profile = "default"
    restart: RestartPolicy = RestartPolicy()
    roles: Roles = Roles()
    runner: Runner = Runner()
    exceptions: tuple[AddressException, ...] = ()
    resolvers: tuple[str, ...] = ()
    virtual: str = VIRTUAL
    """Range of the addresses that stand for names inside cages."""
    proxy: str = ""
    proxy_resolves: bool = False
    inbound: Inbound = Inbound()
    event_source: str = "isolator"
    """``source`` of events where they have one: a URI, or a reference to one."""
    audit: AuditSettings = AuditSettings()
    metrics: Metrics = Metrics()
    console: Console | None = None
    cluster: Cluster | None = None
    packages: Packages = Packages()
    trust: Trust = Trust()
    source: str | None = None
    """The file it was read from; None when there is none."""
    where: dict[str, str] = field(default_factory=dict)
    """``FILE:LINE`` of every value that the file sets, by its dotted key (``ceiling.memory``)."""

    def notes(self) -> list[str]:
        """Settings that change what a cage promises, one sentence each."""
        if not self.proxy:
            return []
        found = [f"Connections leave through the proxy {self.proxy} ([network] proxy of host.toml)."]
        if self.proxy_resolves:
            found.append(
                "It looks granted names up itself (proxy_resolves): whether they lead to a private address is its to "
                "check, and no longer checked here."
            )
        return found

    def role_of(self, uid: int) -> Role | None:
        """The highest role of a caller of the control socket, or None."""
        if uid == 0 or uid in self.roles.operator:
            return "operator"
        if uid in self.roles.emitter:
            return "emitter"
        if uid in self.roles.viewer:
            return "viewer"
        return "caller" if uid in self.roles.caller else None

    def known(self) -> set[int]:
        """Uids of all callers of the control socket that have a role, beside root."""
        roles = self.roles
        return {*roles.viewer, *roles.emitter, *roles.operator, *roles.caller} - {0}

    def may_call(self, uid: int) -> bool:
        """Whether a caller of the control socket may use tools, of servers whose policies name it."""
        return uid in self.roles.caller or self.role_of(uid) == "operator"

    def with_console(self, uid: int) -> "HostConfig":
        """The settings with the console's user among those who may call: it reads, and emits only where that is on."""
        if self.console is None:
            return self
        emits = self.console.emit or bool(self.console.ingress)
        field = "emitter" if emits else "viewer"
        roles = self.roles.model_copy(update={field: (*getattr(self.roles, field), uid)})
        return self.model_copy(update={"roles": roles, "console": self.console.model_copy(update={"uid": uid})})

    def for_runners(self) -> "HostConfig":
        """The settings that the policy of a runner's ``isolator run`` is held against.

        Private addresses stay closed where no list of destinations says that somebody has thought of them, and no port
        of the host is a runner's to take.
        """
        ceiling = self.runner.ceiling or self.ceiling
        exceptions = self.exceptions if ceiling.egress is not None else ()
        source = f"[runner] of {self.source or 'host.toml'}"
        changes = {"ceiling": ceiling, "exceptions": exceptions, "inbound": Inbound(), "source": source}
        return self.model_copy(update=changes)

    def digest(self) -> str:
        """SHA-256 of the settings, wherever they were read from; without those that came later and are not set."""
        import hashlib
        import json

        data, usual = json.loads(self.model_dump_json(exclude={"source", "where"})), HostConfig()
        for name in ("console", "cluster", "packages", "trust", "event_source"):
            if getattr(self, name) == getattr(usual, name):
                del data[name]
        if not self.roles.caller:
            del data["roles"]["caller"]
        if not self.roles.runner:
            del data["runner"], data["roles"]["runner"]
        if "trust" in data and not self.trust.certifiers:
            del data["trust"]["certifiers"]
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
