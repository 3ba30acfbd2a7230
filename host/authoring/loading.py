"""Loading of an author's folder into a private daemon: registered first, afterwards exchanged for what it has become.

Every byte of the plugin is read by the daemon's own unprivileged processes, as in production; here are their answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host.authoring.private_daemon import PrivateDaemon, wait_until
from host.client.client import Client
from isolator.errors import IsolatorError, UsageError

_POLICY_SECONDS, _PAUSE = 10.0, 0.02
_LOOK = 0.01


@dataclass(frozen=True)
class Loaded:
    """A version that is in use; ``unchanged``: it was already."""

    plugin: str
    version: str
    mode: str
    effective_digest: str
    warnings: list[str] = field(default_factory=list)
    unchanged: bool = False


class Loading:
    """A version on its way into use. In another's place it is on trial for a second after it is up."""

    def __init__(self, loaded: Loaded, digest: str, exchange: Callable[[], Loaded] | None = None) -> None:
        """``exchange`` puts it in the place of the one before, and returns or raises when that is decided."""
        self.loaded, self._digest = loaded, digest
        self._decided: Future[Loaded] = Future()
        if exchange is None:
            self._decided.set_result(loaded)
        else:
            threading.Thread(target=self._exchange, args=(exchange,), name="exchange", daemon=True).start()

    def finish(self) -> Loaded:
        """Wait until it is decided; raises IsolatorError when the version before is in use again."""
        return self._decided.result()

    @property
    def decided(self) -> bool:
        """Whether ``finish`` returns, or raises, at once."""
        return self._decided.done()

    def up(self, client: Client) -> Loaded:
        """Wait until it is up, or decided; raises as ``finish``."""
        while not self.decided:
            shown = client.call("plugin.show", name=self.loaded.plugin)
            if (shown["digest"], shown["state"], shown["ready"]) == (self._digest, "running", True):
                return self.loaded
            time.sleep(_LOOK)
        return self.finish()

    def when_refused(self, call: Callable[[IsolatorError], object]) -> None:
        """Have that called, from a thread, if it is decided that the version before is in use again."""

        def decided(done: Future[Loaded]) -> None:
            error = done.exception()
            if isinstance(error, IsolatorError):
                call(error)

        self._decided.add_done_callback(decided)

    def _exchange(self, exchange: Callable[[], Loaded]) -> None:
        try:
            self._decided.set_result(exchange())
        except Exception as error:  # for whoever waits
            self._decided.set_exception(error)


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
        return self.begin(client).finish()

    def begin(self, client: Client) -> Loading:
        """As ``load``; returns once there is a version to wait for."""
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
        effective_digest = staged["proposal"]["effective_digest"]
        loaded = Loaded(
            name, staged["version"], staged["mode"], effective_digest, [*staged["warnings"], *staged["faults"]],
            unchanged=bool(self.registered) and staged["unchanged"] and not new_policy,
        )  # fmt: skip
        if self.registered is None:
            client.call("plugin.commit", token=staged["token"], config=self._config)
            self.registered = name
            return Loading(loaded, staged["digest"])

        def exchange() -> Loaded:
            with self._daemon.client() as other:
                other.call("plugin.update", token=staged["token"], config=self._config, approve=True)
                if new_policy:
                    self._wait_for_policy(other, name, effective_digest)
            return loaded

        if staged["unchanged"]:  # there is nothing to wait for
            exchange()
            return Loading(loaded, staged["digest"])
        return Loading(loaded, staged["digest"], exchange)

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
        document = tomlkit.parse(policy.decode("utf-8-sig"))
    except (ValueError, TOMLKitError):
        return policy  # whoever reads it says what is wrong
    document.pop("require", None)
    return tomlkit.dumps(document).encode()
