"""Files of an operator's secrets: a missing one is shown at once, and no more when a reload has found it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from tests.system.daemon import Daemon, daemon, wait_for

_CONFIG = """\
    [cluster]
    name = "h1"
    servers = ["127.0.0.1:1"]
    tls = false
    credentials = "{folder}/cluster.secret"

    [console]
    port = 8099

    [ingress.shop]
    secret_file = "{folder}/shop.secret"
    events = ["deploy.completed"]
"""


def test_alarm_of_a_missing_secret_is_there_at_once_and_ends_with_the_reload_that_finds_it() -> None:
    with daemon(host_toml="# none yet", start=False) as d:
        folder = d.root / "etc/isolator"
        (folder / "host.toml").write_text(textwrap.dedent(_CONFIG).format(folder=folder))
        secrets = {"cluster.secret": "h1:guess\n", "shop.secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n"}
        d.start()
        wait_for(lambda: _alarmed(d, secrets) == {*secrets}, what="both are shown")
        for name, text in secrets.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o600)
            d.cli("reload")
            assert name not in _alarmed(d, secrets)
        (folder / "shop.secret").unlink()  # without the other one no reload goes on: tests/cluster/test_advice.py
        d.cli("reload")
        assert _alarmed(d, secrets) == {"shop.secret"}


def _alarmed(d: Daemon, names: Iterable[str]) -> set[str]:
    """The files that an alarm names."""
    alarms = d.json("status", code=None)["alarms"]
    return {name for name in names if any(f"{name}:" in line for line in alarms)}
