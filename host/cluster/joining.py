"""From ``[cluster]`` of host.toml to the log: the one place that loads the servers' client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from host.cluster.access import inbox_of
from host.cluster.log import Log, UnusableLog
from isolator.base.lean import give_asyncio_tls
from isolator.errors import IsolatorError, UnavailableError
from isolator.policy.authority import context_of
from isolator.policy.cluster import Cluster, stranger_in

if TYPE_CHECKING:
    from host.cluster.nats import Access

NOT_LEFT: Final = (
    "host.toml has no [cluster] any more, and this host has not left its cluster: isolator cluster leave (--force, as "
    "the log is out of reach), or put [cluster] back; then run isolator reload"
)


def connect(settings: Cluster) -> Log:
    """The log of a host's cluster; nothing is connected yet. Settings that are of no use are a log that refuses."""
    if not settings.servers:
        return UnusableLog(NOT_LEFT)
    try:
        if settings.credentials and not settings.secret:
            remedy = "an alarm of 'isolator status' says why: mend it"
            raise IsolatorError(settings.credentials, "cannot be used", remedy)
        if stranger := stranger_in(settings.secret, settings.name):
            raise IsolatorError(settings.credentials or "[cluster] credentials", *stranger)
        access = access_of(settings.servers, settings.secret, tls=settings.tls, ca=settings.ca, host=settings.name)
    except IsolatorError as error:
        return UnusableLog(f"this host cannot use its [cluster]: {error}, then run isolator reload")
    from host.cluster.nats import NatsLog

    return NatsLog(access)


def access_of(servers: tuple[str, ...], secret: str, *, tls: bool, ca: str, host: str = "") -> Access:
    """How to reach servers, with ``USER:PASSWORD``; answers come to the host's own inbox. Raises IsolatorError."""
    try:
        from host.cluster.nats import Access, addresses
    except ModuleNotFoundError as error:
        why = f"{error.name} is not installed"
        raise UnavailableError("[cluster]", why, "pip install 'isolator[cluster]'") from None
    context = None
    if tls:
        give_asyncio_tls()
        context = context_of(ca)
    user, _, password = secret.partition(":")
    inbox = inbox_of(host) if host else "_ISO"
    return Access(addresses(servers, tls), user, password, context, inbox)
