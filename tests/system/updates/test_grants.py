"""``plugin grant`` and ``revoke``: the operator's file, edited in place and in force at once."""

from __future__ import annotations

from pathlib import Path

from tests.support import sidecars
from tests.system.daemon import Daemon, daemon, wait_for, write_plugin

EGRESS = [{"host": f"{name}.example.com", "ports": [443]} for name in "ab"]


def _hosts(d: Daemon) -> list[str]:
    return [rule["host"] for rule in d.json("plugin", "show", "edited")["effective"]["network"]["egress"]]


def test_grant_and_revoke_are_in_force_at_once_and_keep_the_file(tmp_path: Path) -> None:
    with daemon(host_toml='[ceiling]\negress = ["a.example.com:443", "b.example.com:443"]\n') as d:
        policy = d.root / "etc/isolator/policies/edited.toml"
        policy.parent.mkdir(exist_ok=True, parents=True)
        text = '[grant]\nhooks = ["deploy.*"]  # mine\negress = ["a.example.com:443"]\n'
        policy.write_text(text)
        d.cli(
            "plugin",
            "add",
            str(write_plugin(tmp_path / "edited", sidecars.OK, sandbox={"network": {"egress": EGRESS}})),
            "--yes",
        )
        d.cli("plugin", "start", "edited")
        run = d.json("plugin", "show", "edited")["run"]
        assert _hosts(d) == ["a.example.com"]

        ran = d.cli("plugin", "grant", "edited", "egress", "B.example.com:443")
        assert '+egress = ["a.example.com:443", "b.example.com:443"]' in ran.stdout
        assert ran.stdout.endswith("edited.toml: in force\n")
        assert _hosts(d) == ["a.example.com", "b.example.com"] and "# mine" in policy.read_text()
        wait_for(lambda: d.json("plugin", "show", "edited")["run"] not in (run, None), what="not restarted with it")

        assert "stands there already" in d.cli("plugin", "grant", "edited", "egress", "b.example.com:443").stdout
        assert "in force" in d.cli("plugin", "revoke", "edited", "egress", "b.example.com:443").stdout
        assert _hosts(d) == ["a.example.com"] and policy.read_text() == text

        d.cli("plugin", "grant", "edited", "hook", "project.*", "--dry-run")
        over = d.cli("plugin", "grant", "edited", "egress", "c.example.com:443", code=None)
        assert over.returncode != 0 and "ceiling" in over.stderr
        silent = d.cli("plugin", "grant", "edited", "permission", "read:projects", code=5)
        assert "has no list for permission" in silent.stderr and "add --yes" in silent.stderr
        assert "write HOST:PORT" in d.cli("plugin", "grant", "edited", "egress", "nonsense", code=2).stderr
        assert policy.read_text() == text
        same = d.cli("plugin", "grant", "edited", "hook", "project.*").stdout
        assert "what the plugin may do is the same as before" in same
