"""Loading of an author's folder into a private daemon: registered first, afterwards exchanged for what it has become.

Every byte of the plugin is read by the daemon's own unprivileged processes, as in production; here are their answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host.authoring.private_daemon import PrivateDaemon, wait_until
from host.client.client import Client
from isolator.errors import IsolatorError, UsageError

_POLICY_SECONDS, _PAUSE = 10.0, 0.02


@dataclass(frozen=True)
class Loaded:
    """A version that is in use; ``unchanged``: it was already."""

    plugin: str
    version: str
    mode: str
    effective_digest: str
    warnings: list[str] = field(default_factory=list)
    unchanged: bool = False


class Loader:
    """One folder with its config and, unless it gets all that it asks for, its policy."""

    def __init__(self, daemon: PrivateDaemon, folder: str, config: Mapping[str, str], policy: Path | None) -> None:
        self._daemon, self._folder, self._config, self._policy = daemon, folder, dict(config), policy
        self._policy_text: bytes | None = None
        self.registered: str | None = None

    def load(self, client: Client) -> Loaded:
        """Take the folder and the policy over as they are now; raises IsolatorError for what cannot run.

        A version that does not come up is such an error, too: the one before is in use again then.
        """
        new_policy = self.registered is not None and self._take_policy(self.registered)
        staged = self._stage(client)
        name = staged["name"]
        if self.registered is None and self._take_policy(name):
            client.call("plugin.discard", token=staged["token"])
            staged = self._stage(client)
        if staged["missing"]:
            key = staged["missing"][0]
            raise UsageError(f"plugin {name}", f"needs the config {key}", f"add --config {key}=VALUE")
        self._daemon.hide({key: self._config[key] for key in staged["secrets_given"]})
        if self.registered is None:
            done = client.call("plugin.commit", token=staged["token"], config=self._config)
            self.registered = name
        else:
            done = client.call("plugin.update", token=staged["token"], config=self._config, approve=True)
        digest = staged["proposal"]["effective_digest"]
        if new_policy:
            self._wait_for_policy(client, name, digest)
        return Loaded(
            name,
            staged["version"],
            staged["mode"],
            digest,
            [*staged["warnings"], *staged["faults"]],
            bool(done.get("unchanged")) and not new_policy,
        )

    def _stage(self, client: Client) -> dict[str, Any]:
        update = {"update": self.registered} if self.registered else {}
        return client.call("plugin.stage", path=self._folder, config=self._config, **update)

    @staticmethod
    def _wait_for_policy(client: Client, name: str, digest: str) -> None:
        """Wait until the daemon has noticed a policy that came without a new version."""
        deadline = time.monotonic() + _POLICY_SECONDS
        while client.call("plugin.show", name=name)["effective_digest"] != digest:
            if not wait_until(deadline, _PAUSE):
                raise IsolatorError(f"the policy of {name}", "is not in use yet", "save it again")

    def _take_policy(self, name: str) -> bool:
        """Copy the author's policy file, if it has changed, to where the daemon reads it; whether it has."""
        if self._policy is None:
            return False
        text = _without_demands(self._policy.read_bytes())
        if text == self._policy_text:
            return False
        (self._daemon.paths.policies / f"{name}.toml").write_bytes(text)
        self._policy_text = text
        return True


def _without_demands(policy: bytes) -> bytes:
    """A policy without what it demands of a version's origin: here it is being tried."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(policy.decode())
    except (ValueError, TOMLKitError):
        return policy  # whoever reads it says what is wrong
    document.pop("require", None)
    return tomlkit.dumps(document).encode()
