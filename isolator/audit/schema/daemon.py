"""Records of the daemon itself."""

from __future__ import annotations

from typing import Any

from isolator.audit.schema.base import ABSENT, HOST, SUPERVISOR, RangeData, RecordData


class HostStarted(RecordData, type="host.started", sources=(SUPERVISOR,)):
    """The daemon accepts commands."""

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


class BackupTaken(RecordData, type="backup.taken", sources=(HOST,)):
    """A backup is made: all that is on record before this is in it, and nothing else."""

    id: str
    """The backup's."""
    uid: int
    """Caller."""


class BackupRestored(RecordData, type="backup.restored", sources=(SUPERVISOR,)):
    """The daemon starts with the data of a backup: what came after that backup is not in this trail."""

    id: str
    """The backup's; its ``backup.taken`` is in this trail if a daemon ran then."""
    taken: str
    """Time of the backup."""
    machine: str
    """Name of the host that it was taken on."""
    version: str
    """Isolator's, of then."""


class DaemonReloaded(RangeData, type="daemon.reloaded", sources=(SUPERVISOR,)):
    """The supervisor has executed the program that is installed, in place; what ran goes on."""

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


class HostStopped(RecordData, type="host.stopped", sources=(SUPERVISOR,)):
    """The daemon has stopped every plugin."""

    seconds: float
    """Duration of the stop."""


class ServiceEnded(RecordData, type="service.ended", sources=(SUPERVISOR,)):
    """A process of the daemon's own, or work within the supervisor, ended by itself, or hung and was ended."""

    service: str
    """``audit``, ``broker``, ``host``, ``launcher``, or ``supervisor: `` and the work."""
    why: str
    hung: bool
    """Whether it was ended because it did not answer."""


class DatabaseDamaged(RecordData, type="database.damaged", sources=(HOST,)):
    """The host's database is not as it was left, or cannot be relied on any more."""

    why: str
    missing: int = ABSENT
    """Events that the trail has as accepted and the database does not have."""
    last: str = ABSENT
    """Id of the newest of them."""


class ClusterProblem(RecordData, type="cluster.problem", sources=(HOST,)):
    """A problem of this host with its cluster began, or ended (``isolator cluster status``)."""

    kind: str
    why: str | None
    """One line; null: it has ended."""


class Resources(RecordData, type="resources", sources=(SUPERVISOR,)):
    """Use of one run: every ``snapshot_interval``, and once at its end."""

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
