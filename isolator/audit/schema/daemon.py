"""Records of the daemon itself."""

from __future__ import annotations

from typing import Any

from isolator.audit.schema.base import ABSENT, HOST, SUPERVISOR, RangeData, RecordData


class HostStarted(RecordData):
    """The daemon accepts commands."""

    TYPE = "host.started"
    SOURCES = (SUPERVISOR,)

    version: str
    """Isolator's."""
    kernel: str
    python: str
    ledger: list[dict[str, Any]]
    """This host's controls, as ``isolator check --json`` prints them."""
    config: str | None
    """Path of host.toml; null when there is none."""
    config_sha256: str
    """Digest of the settings in force."""
    cleared: list[str]
    """Remains of an earlier daemon that were removed."""


class BackupTaken(RecordData):
    """A backup is made: all that is on record before this is in it, and nothing else."""

    TYPE = "backup.taken"
    SOURCES = (HOST,)

    id: str
    """The backup's."""
    uid: int
    """Caller."""


class BackupRestored(RecordData):
    """The daemon starts with the data of a backup: what came after that backup is not in this trail."""

    TYPE = "backup.restored"
    SOURCES = (SUPERVISOR,)

    id: str
    """The backup's; its ``backup.taken`` is in this trail if a daemon ran then."""
    taken: str
    """Time of the backup."""
    machine: str
    """Name of the host that it was taken on."""
    version: str
    """Isolator's, of then."""


class DaemonReloaded(RangeData):
    """The supervisor has executed the program that is installed, in place; what ran goes on."""

    TYPE = "daemon.reloaded"
    SOURCES = (SUPERVISOR,)

    from_: str
    """Version of before."""
    to: str
    """Version of now."""
    adopted: int
    """Runs that went on."""
    seconds: float
    """Time in which nothing was begun."""
    generation: int
    """Number of the daemon's images so far."""
    config_sha256: str
    """Digest of the settings in force."""


class HostStopped(RecordData):
    """The daemon has stopped every plugin."""

    TYPE = "host.stopped"
    SOURCES = (SUPERVISOR,)

    seconds: float
    """Duration of the stop."""


class ServiceEnded(RecordData):
    """A process of the daemon's own, or work within the supervisor, ended by itself, or hung and was ended."""

    TYPE = "service.ended"
    SOURCES = (SUPERVISOR,)

    service: str
    """``audit``, ``broker``, ``host``, ``launcher``, or ``supervisor: `` and the work."""
    why: str
    hung: bool
    """Whether it was ended because it did not answer."""


class DatabaseDamaged(RecordData):
    """The host's database is not as it was left, or cannot be relied on any more."""

    TYPE = "database.damaged"
    SOURCES = (HOST,)

    why: str
    missing: int = ABSENT
    """Events that the trail has as accepted and the database does not have."""
    last: str = ABSENT
    """Id of the newest of them."""


class ClusterProblem(RecordData):
    """A problem of this host with its cluster began, or ended (``isolator cluster status``)."""

    TYPE = "cluster.problem"
    SOURCES = (HOST,)

    kind: str
    why: str | None
    """One line; null: it has ended."""


class Resources(RecordData):
    """Use of one run: every ``snapshot_interval``, and once at its end."""

    TYPE = "resources"
    SOURCES = (SUPERVISOR,)

    tasks: int
    """Threads of all processes."""
    processes: int
    cpu_us: int = ABSENT
    """Processor time since the start."""
    user_us: int = ABSENT
    system_us: int = ABSENT
    throttled_us: int = ABSENT
    """Time that ``cpu`` of the policy kept it waiting."""
    throttled: int = ABSENT
    """Periods in which it was kept waiting."""
    background: int = ABSENT
    """1: it computes, and the other plugins go first on a contended processor; 0: it does not."""
    memory: int = ABSENT
    memory_peak: int = ABSENT
    swap: int = ABSENT
    anonymous: int = ABSENT
    """Part of ``memory`` without a file behind it."""
    cached: int = ABSENT
    """Part of ``memory`` that caches files."""
    oom_kills: int = ABSENT
    """Processes killed because of ``memory`` of the policy."""
    tasks_peak: int = ABSENT
    pressure_cpu: float = ABSENT
    """Percent of the last 10 s in which a task waited for the processor."""
    pressure_memory: float = ABSENT
    """Percent of the last 10 s in which a task waited for memory."""
    pressure_io: float = ABSENT
    """Percent of the last 10 s in which a task waited for a disk."""
    threads: int = ABSENT
    """As of the last snapshot before the processes ended, like the fields that follow."""
    open_files: int = ABSENT
    io_read: int = ABSENT
    """Bytes read from disks."""
    io_written: int = ABSENT
    """Bytes written to disks."""
    network_bytes: int = ABSENT
    """Bytes sent inside the cage's network."""
    tcp_sockets: int = ABSENT
    state_free: int = ABSENT
    """Bytes that ``/state`` has room for."""
    state_files_free: int = ABSENT
    """Files that ``/state`` has room for."""
    tmp_free: int = ABSENT
    """Bytes that ``/tmp`` has room for; as of the last snapshot before the run ended, like the next."""
    tmp_files_free: int = ABSENT
    """Files that ``/tmp`` has room for."""
