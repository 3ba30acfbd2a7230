"""Rows of the table, by what they are."""

from __future__ import annotations

from tests.compat.program import Program
from tests.compat.rows.languages import LANGUAGES
from tests.compat.rows.libraries import LIBRARIES
from tests.compat.rows.plugins import PLUGINS
from tests.compat.rows.servers import SERVERS
from tests.compat.rows.services import SERVICES
from tests.compat.rows.tools import TOOLS

GROUPS: dict[str, tuple[Program, ...]] = {
    "Languages and compilers": LANGUAGES,
    "Libraries": LIBRARIES,
    "Servers and their clients, in one cage": SERVERS,
    "Tools": TOOLS,
}
BROKER = "Clients in a cage, servers beyond the broker"
PLUGGED = "Plugins in a cage, what they talk to beyond the broker"
PROGRAMS = [(group, program) for group, programs in GROUPS.items() for program in programs]
ORDER = [(group, program.name) for group, program in PROGRAMS] + [(BROKER, service.name) for service in SERVICES]
ORDER += [(PLUGGED, plugin.library) for plugin in PLUGINS]


def packages(*, everything: bool) -> set[str]:
    """The Debian packages that the rows need, and the other sandboxes."""
    named = [row.packages for _, row in PROGRAMS if everything or not row.more]
    named += [service.packages for service in SERVICES]
    for plugin in PLUGINS:
        if everything or not plugin.more:
            named += [plugin.packages, plugin.server.packages if plugin.server else ""]
    return {"bubblewrap", "firejail", *" ".join(named).split()}
