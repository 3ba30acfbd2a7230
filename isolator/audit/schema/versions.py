"""Records of plugins' versions: added, approved, exchanged, removed."""

from __future__ import annotations

from typing import Literal

from isolator.audit.schema.base import ABSENT, HOST, SUPERVISOR, RecordData


class PluginAdded(RecordData, type="plugin.added", sources=(SUPERVISOR,)):
    """A plugin was approved and registered."""

    new: str
    """Digest."""
    version: str
    policy_sha256: str | None
    """Of the effective policy; null when the plugin is rejected."""
    who: str | None
    """``uid:N`` of the caller."""


class PackageResolved(RecordData, type="package.resolved", sources=(HOST,)):
    """A package was fetched from its registry, in a cage, and staged."""

    by: str
    """``uid:N`` of the caller."""
    package: str
    """``npm:NAME@VERSION`` or ``pypi:NAME==VERSION``."""
    digest: str
    """Of the folder that was made of it."""
    hashes: dict[str, str]
    """Hashes that the registry names, by ``NAME@VERSION`` of all that it consists of; as the caller says."""


class PluginPending(RecordData, type="plugin.pending", sources=(SUPERVISOR,)):
    """A found plugin, or a version that asks for more than the one in use, waits for approval."""

    version: str
    folder: str = ABSENT
    """Place of a plugin that was found in a watched folder; the fields that follow are those of a version."""
    old: str = ABSENT
    """Digest in use."""
    new: str = ABSENT
    """Digest that waits."""
    differences: list[str] = ABSENT
    """Everything that it asks for beyond the version in use."""
    who: str | None = ABSENT
    """``uid:N`` of the caller."""


class PluginApproved(RecordData, type="plugin.approved", sources=(SUPERVISOR,)):
    """A waiting version, a changed binary or a policy was approved."""

    old: str
    """Digest in use."""
    new: str
    """Digest approved."""
    version: str
    binary_sha256: str | None
    """Of a binary that stays outside of the plugin's files."""
    differences: list[str]
    """Everything that it asks for beyond the version in use."""
    who: str | None
    """``uid:N`` of the caller."""


class _Exchanged(RecordData):
    old: str
    """Digest before."""
    new: str
    """Digest in use now."""
    version: str
    reason: str
    who: str | None
    """``uid:N`` of the caller, or ``the daemon``."""
    old_policy_sha256: str | None = ABSENT
    """Of the effective policy before."""
    policy_sha256: str | None = ABSENT
    """Of the effective policy now."""


class PluginUpdated(_Exchanged, type="plugin.updated", sources=(SUPERVISOR,)):
    """Another version is in use and came up."""


class PluginDeclined(RecordData, type="plugin.declined", sources=(SUPERVISOR,)):
    """A version that waited for approval was refused and is not kept."""

    new: str
    """Digest that waited."""
    version: str
    who: str
    """``uid:N`` of the caller."""


class PluginRolledBack(_Exchanged, type="plugin.rolled_back", sources=(SUPERVISOR,)):
    """An earlier version is in use again: on demand, or because the new one did not come up."""


class PluginRemoved(RecordData, type="plugin.removed", sources=(SUPERVISOR,)):
    """A plugin was stopped and removed with its state."""

    old: str
    """Digest."""
    who: str | None
    """``uid:N`` of the caller."""


class PluginRejected(RecordData, type="plugin.rejected", sources=(SUPERVISOR,)):
    """A found plugin, or an edited policy, has an error."""

    reason: str
    folder: str = ABSENT
    """Place of a plugin that was found in a watched folder; the fields that follow are those of a policy."""
    what: Literal["policy"] = ABSENT
    file: str = ABSENT
    """Path of the policy."""
    policy_sha256: str | None = ABSENT
    """Of the effective policy that stays in force; null when there is none."""
