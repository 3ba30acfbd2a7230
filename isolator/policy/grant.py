"""The grant of an operator to one plugin: the model of ``policies/NAME.toml``. Reading it is ``load.py``.

None, or a name that a mapping lacks, means that the file is silent, so that the default posture holds there.
"""

from isolator.base.structs import field
from isolator.policy.frozen import Frozen
from isolator.policy.host import Profile
from isolator.policy.model import EgressRule, ListenRule


class PluginPolicy(Frozen):
    """One policy file."""

    source: str
    """The file, as errors and ``explain`` name it."""
    hooks: tuple[str, ...] | None = None
    permissions: tuple[str, ...] | None = None
    filters: tuple[str, ...] | None = None
    """Filters of ``filters.py``: the plugin receives only events that pass all of them."""
    egress: tuple[EgressRule, ...] | None = None
    """None: the file does not list destinations, so any public address may be granted."""
    egress_public: bool = False
    """The list holds "public": any public address, TCP 443 and 80, besides the rules."""
    listen: tuple[ListenRule, ...] | None = None
    tools: tuple[str, ...] = ()
    """Names and patterns of its MCP tools that callers may use."""
    callers: tuple[int, ...] = ()
    """Uids of the users who may."""
    switches: dict[str, bool] = field(default_factory=dict)
    """Yes-or-no keys that the file sets, by the names of ``keys.py``."""
    limits: dict[str, int | float] = field(default_factory=dict)
    """Numbers that the file sets, likewise."""
    restart: dict[str, int | float] = field(default_factory=dict)
    """Overrides of ``CrashPolicy``."""
    read: tuple[str, ...] | None = None
    syscalls: Profile | None = None
    certified: bool = False
    """``[require] certified``: only a version with a certificate that counts on this host is taken, and started."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of its environment."""
    where: dict[str, str] = field(default_factory=dict)
    """``FILE:LINE`` of every value by its dotted key: ``grant.egress``, ``grant.egress[1]``, ``limits.memory``."""

    def at(self, key: str) -> str:
        """Place of a value, ``FILE:LINE``; the file alone when it does not set it."""
        return self.where.get(key, self.source)
