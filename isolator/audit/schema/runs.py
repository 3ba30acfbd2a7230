"""Records of plugins' runs: starts, ends, figures, health."""

from __future__ import annotations

from isolator.audit.schema.base import ABSENT, HOST, SUPERVISOR, RecordData, Summed


class CageStarted(RecordData, type="plugin.started"):
    """A cage was built and its program runs; all that ``isolator run --audit`` tells of it."""

    pid: int
    """Of the cage's first process, on the host."""
    uid: int
    policy_sha256: str
    """Of the effective policy."""
    milliseconds: dict[str, float]
    """Duration of each step of the start."""
    degraded: list[str]
    """Keys of the controls that are not enforced in full."""


class PluginStarted(CageStarted, sources=(SUPERVISOR,)):
    """A plugin's cage was built and its program runs."""

    reason: str
    cgroup: str
    """Path of the control group."""
    digest: str
    binary_sha256: str | None
    """Of a binary that stays outside of the plugin's files."""
    env: list[str]
    """Names of the environment's variables."""
    ledger: dict[str, str]
    """By control, whether it is ``enforced``, ``degraded`` or ``missing``."""
    signer: str = ABSENT
    """Publisher of ``[trust]`` who has signed this version."""


class CageStopped(RecordData, type="plugin.stopped"):
    """A program without a daemon has ended: ``isolator run --audit``."""

    exit_code: int | None
    signal: int | None
    cause: str
    seconds: float
    """Since the start."""
    oom_kills: int
    task_denials: int


class _Ended(RecordData):
    cause: str
    """``exit``, ``signal``, or in words why it was ended."""
    origin: str = ABSENT
    """Whose doing it was: ``plugin``, ``operator`` or ``daemon``. Only the first counts against the plugin."""
    exit_code: int | None = ABSENT
    signal: int | None = ABSENT
    """Number of the signal that killed it."""
    oom_kills: int = ABSENT
    """Processes killed because of ``memory`` of the policy."""
    task_denials: int = ABSENT
    """Forks refused because of ``tasks`` of the policy."""
    uptime: float = ABSENT
    """Seconds since the start."""


class _SidecarEnded(_Ended):
    stderr: list[str] = ABSENT
    """Last lines, redacted."""


class PluginStopped(_SidecarEnded, type="plugin.stopped", sources=(SUPERVISOR,)):
    """A run ended because it was stopped, or with an earlier daemon: then only ``cause`` is known."""


class PluginCrashed(_SidecarEnded, type="plugin.crashed", sources=(SUPERVISOR,), caused=True):
    """A run ended by itself, or a start failed: then only ``cause`` and ``reason`` are there."""

    reason: str = ABSENT
    """Why a start failed."""


class ExecStarted(RecordData, type="exec.started", sources=(SUPERVISOR,), caused=True):
    """An invocation of a plugin with the mode `exec`: its cage was built, and the program runs for one event."""

    attempt: int
    pid: int
    digest: str
    """Digest of the plugin's version."""
    policy_sha256: str
    milliseconds: float
    """From the beginning of the cage to the exec."""
    signer: str = ABSENT
    """Publisher of ``[trust]`` who has signed this version."""


class ExecEnded(_Ended, type="exec.ended", sources=(SUPERVISOR,), caused=True):
    """An invocation ended, or could not be started: then only ``cause``, ``origin`` and ``reason`` are there."""

    reason: str = ABSENT
    """Why it could not be started."""
    cpu_us: int = ABSENT
    """Processor time."""
    memory_peak: int = ABSENT
    io_read: int = ABSENT
    io_written: int = ABSENT
    network_bytes: int = ABSENT


class RunStarted(CageStarted, type="run.started", sources=(SUPERVISOR,)):
    """A runner's ``isolator run`` through the daemon: its cage was built, and its program runs.

    ``plugin`` of it and of all that follows is ``_run.UID``, by the caller's uid.
    """

    by: str
    """Who asked, as the kernel says: ``uid:1000``. ``uid`` is the cage's own."""
    program: str
    cgroup: str
    """Path of the control group."""
    env: list[str]
    """Names of the environment's variables."""
    read: list[str]
    """Paths that it is shown."""
    write: list[str]
    """Folders that it may change."""


class RunEnded(_Ended, type="run.ended", sources=(SUPERVISOR,)):
    """A runner's run has ended, or could not be started: then only ``cause`` and ``reason`` are there."""

    by: str = ABSENT
    """Who asked, as the kernel says."""
    reason: str = ABSENT
    """Why a start failed."""


class PluginFailed(RecordData, type="plugin.failed", sources=(SUPERVISOR,)):
    """A plugin crashed too often."""

    reason: str
    """How the last run ended, and how often that was."""


class PluginQuarantined(RecordData, type="plugin.quarantined", sources=(SUPERVISOR,)):
    """A failed plugin is not started again by itself."""

    reason: str
    crashes: int
    seconds: float
    """Window in which the crashes were counted."""


class PluginPaused(RecordData, type="plugin.paused", sources=(HOST,)):
    """A plugin is sent no events any more; they wait, and its sidecar stays as it is."""

    by: str
    """``uid:N`` of the caller."""


class PluginResumed(PluginPaused, type="plugin.resumed", sources=(HOST,)):
    """A paused plugin is sent events again."""

    seconds: float
    """Length of the pause."""


class PluginHealth(RecordData, type="plugin.health", sources=(HOST,), summed=Summed("all", by="ok")):
    """A ping was missed or answered again, or the plugin broke a protocol."""

    ok: bool
    latency_us: int = ABSENT
    """Duration of the ping."""
    misses: int = ABSENT
    """Pings missed in a row."""
    detail: str = ABSENT


class PluginFrozen(RecordData, type="plugin.frozen", sources=(SUPERVISOR,)):
    """A plugin's deadline has passed, and its cages were frozen: it may be held by another host."""

    runs: list[str]
    late_ms: float | None
    """Milliseconds between the deadline and this; null if there was none, as after a loss."""


class PluginThawed(RecordData, type="plugin.thawed", sources=(SUPERVISOR,)):
    """A frozen plugin goes on: its deadline was moved on before it was lost."""

    runs: list[str]
    seconds: float
    """For which it was frozen."""


class PluginLost(RecordData, type="plugin.lost", sources=(SUPERVISOR,)):
    """Another host holds a plugin, or may; its cages were killed, and none is started."""

    runs: list[str]
