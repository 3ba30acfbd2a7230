"""How request, grant and ceiling meet, line by line; and that what is shown is what is written and what is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.errors import UsageError
from isolator.policy.bounds import Egress, egress_within
from isolator.policy.effective import Line, Proposal, asks_more, meet, policy_alone, policy_for_run
from isolator.policy.explain import LAYERS, proposal_json, sentences
from isolator.policy.hostconfig import HostConfig, Limits
from isolator.policy.load import check_ceiling, parse_host_config, parse_plugin_policy
from isolator.policy.model import EffectivePolicy, EgressRule, NetworkPolicy
from isolator.policy.names import covers_hook, covers_permission, path_covers
from isolator.policy.request import ManifestCore, parse_manifest, synthesise_manifest
from isolator.policy.units import format_rate, parse_size
from tests.policy.samples import POLICY, asking, manifest, policy

DEFAULT = HostConfig()
OPEN = parse_host_config(
    b"[inbound]\nports = ['8000-8099']\n[network]\nexceptions = ['10.0.0.5:5432']", source="host.toml"
)


def line(proposal: Proposal, field: str, requested: str | None = None) -> Line:
    """The one line about ``field`` (and what was requested, where there are several)."""
    found = [one for one in proposal.lines if one.field == field and requested in (None, one.requested)]
    assert len(found) == 1, found
    return found[0]


def synthesised() -> ManifestCore:
    return parse_manifest(synthesise_manifest("google-indexer", "ab" * 32, "indexer", ["deploy.completed"]))


def test_the_example_of_the_design() -> None:
    proposal = meet(manifest(), policy(), DEFAULT)
    effective = proposal.effective
    assert effective.hooks == ("deploy.completed", "deploy.failed", "deploy.started")
    assert effective.permissions == ("read:deployments", "read:projects")
    assert effective.network.mode == "listed"
    assert [(rule.host, rule.ports) for rule in effective.network.egress] == [("hooks.slack.com", (443,))]
    assert (effective.resources.memory, effective.resources.memory_high) == (256 << 20, 224 << 20)
    assert effective.filesystem.read == ("/etc/ssl/certs",)
    assert not proposal.pending
    assert not proposal.needs_approval
    assert line(proposal, "memory").source == "policies/p.toml:8"
    assert line(proposal, "egress").source == "policies/p.toml:5"


def test_nothing_said_anywhere_is_the_default_posture() -> None:
    effective = meet(manifest(sandbox=None, delivery=None), None, DEFAULT).effective
    silent = EffectivePolicy(plugin="slack-deploy-notifier", hooks=effective.hooks, permissions=effective.permissions)
    assert effective == silent
    assert effective.network.mode == "public"


@pytest.mark.parametrize(
    ("asked", "granted", "usual", "effective"),
    [
        (None, None, "none", "none"),
        ("20M", None, "none", "20M"),
        (None, "30M", "none", "30M"),
        ("20M", "30M", "none", "20M"),
        ("50M", None, "40M", "40M"),
        (None, "none", "40M", "40M"),
        (None, None, "40M", "40M"),
    ],
)
def test_disk_rates_have_no_cap_unless_somebody_sets_one(
    asked: str | None, granted: str | None, usual: str, effective: str
) -> None:
    grant = policy(f'[limits]\nio_write = "{granted}"' if granted else "")
    host = parse_host_config(f'[defaults]\nio_write = "{usual}"'.encode(), source="host.toml")
    proposal = meet(asking(resources={"io_write": asked} if asked else {}), grant, host)
    assert format_rate(proposal.effective.resources.io_write) == effective
    said = sentences(proposal.effective)["cgroup"]
    assert (f"writes at most {effective} a second of each disk" in said) == (effective != "none")
    shown = [line.effective for line in proposal.lines if line.field == "io_write"]
    assert shown == ([effective] if asked or granted or effective != "none" else [])


@pytest.mark.parametrize(
    ("asked", "granted", "effective", "verdict"),
    [
        ("128M", "256M", "128M", "granted"),
        ("512M", "256M", "256M", "pending"),
        ("512M", "1G", "512M", "granted"),
        ("512M", None, "256M", "pending"),
        ("128M", None, "128M", "granted"),
        ("4G", "1G", "1G", "refused"),
        ("4G", "2G", "2G", "refused"),
        (None, "64M", "64M", "granted"),
        (None, "1G", "256M", "granted"),
    ],
)
def test_numbers_are_the_least_of_the_three(
    asked: str | None, granted: str | None, effective: str, verdict: str
) -> None:
    grant = policy(f'[limits]\nmemory = "{granted}"' if granted else "")
    proposal = meet(asking(resources={"memory": asked} if asked else {}), grant, DEFAULT)
    found = line(proposal, "memory")
    assert (found.effective, found.verdict) == (effective, verdict)
    assert proposal.effective.resources.memory == parse_size(effective)
    assert found.add == ('memory = "512M"' if verdict == "pending" else "")
    if verdict == "pending":
        assert (found.section, found.at) == ("limits", "policies/p.toml:2" if granted else "policies/p.toml")


def test_without_an_author_the_operators_number_counts() -> None:
    assert meet(synthesised(), policy('[limits]\nmemory = "1G"'), DEFAULT).effective.resources.memory == 1 << 30
    assert meet(synthesised(), policy("[grant]\negress = ['a.com:8443']"), DEFAULT).effective.network.mode == "listed"


@pytest.mark.parametrize(("state", "inodes"), [("64M", 16384), ("4M", 1024), ("1M", 256), ("1G", 16384)])
def test_a_small_state_folder_has_room_for_more_than_its_own_inodes(state: str, inodes: int) -> None:
    core = asking(filesystem={"state": state})
    assert meet(core, policy('[filesystem]\nstate = "1G"'), DEFAULT).effective.filesystem.state_inodes == inodes


def test_who_decides_how_long_a_delivery_may_take() -> None:
    said = policy('[delivery]\ntimeout = "2m"')
    assert meet(manifest(delivery={"timeout": "5m"}), None, DEFAULT).effective.delivery_timeout == 300
    assert meet(manifest(delivery={"timeout": "5m"}), said, DEFAULT).effective.delivery_timeout == 120
    assert meet(manifest(delivery={"timeout": "1h"}), None, DEFAULT).effective.delivery_timeout == 900
    assert meet(synthesised(), said, DEFAULT).effective.delivery_timeout == 120
    assert meet(synthesised(), None, DEFAULT).effective.delivery_timeout == 10


NONE, PUBLIC = "none", "public"


@pytest.mark.parametrize(
    ("asked", "granted", "effective"),
    [
        (None, None, PUBLIC),
        (None, [], NONE),
        (None, ["a.com:443"], ["a.com:443"]),
        (None, ["a.com:8443"], NONE),  # silence asks for 80 and 443 only
        (None, "public", PUBLIC),
        ([], None, NONE),
        ([], ["a.com:443"], NONE),
        ([], "public", NONE),
        (["a.com:443"], None, ["a.com:443"]),
        (["a.com:8443"], None, NONE),
        (["a.com:443"], [], NONE),
        (["a.com:443"], "public", ["a.com:443"]),
        (["x.a.com:443,8443", "b.com:443"], ["*.a.com:443"], ["x.a.com:443"]),
        (["*.a.com:443"], ["x.a.com:443"], ["x.a.com:443"]),
        (["*.a.com:443"], ["*.x.a.com:443"], ["*.x.a.com:443"]),
        (["evila.com:443"], ["*.a.com:443"], NONE),
        (["8.8.8.0/24:443"], ["8.8.8.8:443", "8.8.4.4:443"], ["8.8.8.8:443"]),
        (["8.8.8.8:443"], ["8.0.0.0/8:443"], ["8.8.8.8:443"]),
        (["8.8.8.8:443"], ["a.com:443"], NONE),
        (["169.254.169.254:80"], "public", NONE),
        (["10.0.0.5:5432"], ["10.0.0.0/8:5432"], NONE),
    ],
)
def test_egress_is_narrowed(asked: list[str] | None, granted: Any, effective: Any) -> None:
    sandbox = {} if asked is None else {"network": {"egress": asked}}
    grant = policy("" if granted is None else f"[grant]\negress = {granted!r}")
    network = meet(asking(**sandbox), grant, DEFAULT).effective.network
    shown = [f"{rule.host}:{','.join(map(str, rule.ports))}" for rule in network.egress]
    assert (network.mode if network.mode != "listed" else shown) == effective
    assert network.mode == "listed" or shown == []


def test_an_exception_of_the_host_opens_exactly_itself() -> None:
    grant = policy("[grant]\negress = ['10.0.0.5:5432', '10.0.0.6:5432']")
    proposal = meet(asking(network={"egress": ["10.0.0.5:5432", "10.0.0.6:5432"]}), grant, OPEN)
    assert [rule.host for rule in proposal.effective.network.egress] == ["10.0.0.5"]
    assert line(proposal, "egress", "10.0.0.6:5432").verdict == "refused"
    assert proposal.effective.network.exceptions == OPEN.exceptions


def test_pending_lines_say_what_to_write_and_where() -> None:
    grant = policy("[grant]\nhooks = ['deploy.*']\npermissions = []\negress = ['a.com:443']")
    core = manifest(
        hooks=["deploy.started", "domain.added"],
        sandbox={
            "network": {"egress": [{"host": "b.com", "reason": "to look"}], "listen": [8005]},
            "syscalls": "default",
        },
    )
    proposal = meet(core, grant, OPEN)
    assert [(one.field, one.requested) for one in proposal.pending] == [
        ("hooks", "domain.added"),
        ("permissions", "read:deployments"),
        ("permissions", "read:projects"),
        ("egress", "b.com:443"),
        ("listen", "port 8005"),
    ]
    found = line(proposal, "egress")
    assert (found.add, found.section, found.at) == ('egress = ["a.com:443", "b.com:443"]', "grant", "policies/p.toml:4")
    assert found.reason == "to look"
    assert line(proposal, "hooks", "domain.added").add == 'hooks = ["deploy.*", "domain.added"]'
    assert line(proposal, "listen").add == 'listen = ["127.0.0.1:8005:8005"]'


def test_every_pending_line_does_what_it_says() -> None:
    core = manifest(
        hooks=["deploy.started", "domain.added"],
        sandbox={
            "network": {"egress": ["b.com:8443", "8.8.8.8:53"], "listen": [8005, 22], "allow_no_sni": True},
            "filesystem": {"state": "1G", "tmp": "64M", "read": ["/srv/data", "/opt/x"]},
            "resources": {"memory": "1G", "cpu": "100%", "tasks": 100, "nofile": 2000},
            "syscalls": "default",
        },
    )
    text = "[grant]\nhooks = []\n\n[limits]\n[filesystem]\n[syscalls]\nprofile = 'strict'\n"
    for _ in range(30):
        proposal = meet(core, policy(text), OPEN)
        if not proposal.pending:
            break
        one = proposal.pending[0]
        rows = text.splitlines()
        if ":" in one.at:
            del rows[int(one.at.rpartition(":")[2]) - 1]
        rows.insert(rows.index(f"[{one.section}]") + 1, one.add)
        text = "\n".join(rows) + "\n"
        check_ceiling(policy(text), OPEN)
    assert not proposal.pending
    assert {one.verdict for one in proposal.lines} == {"granted"}
    effective = proposal.effective
    assert (effective.resources.memory, effective.syscalls, effective.network.allow_no_sni) == (
        1 << 30,
        "default",
        True,
    )
    assert effective.filesystem.read == ("/opt/x", "/srv/data")
    assert {rule.cage_port for rule in effective.network.listen} == {8005, 22}


def test_folders_and_ports_are_never_part_of_the_default_grant() -> None:
    core = asking(filesystem={"read": ["/srv/data"]}, network={"listen": [8005], "allow_no_sni": True})
    proposal = meet(core, None, OPEN)
    assert proposal.needs_approval
    assert proposal.effective.filesystem.read == ()
    assert proposal.effective.network.listen == ()
    assert not proposal.effective.network.allow_no_sni
    assert {one.field for one in proposal.pending} == {"read", "listen", "allow_no_sni"}


def test_a_silent_policy_grants_no_permission() -> None:
    proposal = meet(manifest(), policy("[limits]\ntasks = 10"), DEFAULT)
    assert proposal.effective.permissions == ()
    assert proposal.effective.hooks == ("deploy.completed", "deploy.failed", "deploy.started")


def test_the_stricter_profile_wins() -> None:
    strict = policy("[syscalls]\nprofile = 'strict'")
    assert meet(asking(), strict, DEFAULT).effective.syscalls == "strict"
    assert meet(asking(syscalls="strict"), policy(), DEFAULT).effective.syscalls == "strict"
    ceiling = parse_host_config(b"[ceiling]\nsyscalls = 'strict'", source="host.toml")
    proposal = meet(asking(syscalls="default"), policy(""), ceiling)
    assert proposal.effective.syscalls == "strict"
    assert line(proposal, "syscalls").verdict == "refused"


def test_the_ceiling_holds_even_over_defaults_and_old_policies() -> None:
    low = parse_host_config(
        b"[ceiling]\nmemory = '100M'\ntasks = 8\npermissions = ['read:projects']\negress = ['*.slack.com:443']",
        source="host.toml",
    )
    proposal = meet(manifest(), policy(), low)
    assert (proposal.effective.resources.memory, proposal.effective.resources.tasks) == (100 << 20, 8)
    assert proposal.effective.permissions == ("read:projects",)
    assert line(proposal, "permissions", "read:deployments").source == "host.toml:4"
    assert line(proposal, "memory").source == "host.toml:2"
    assert meet(manifest(sandbox=None), policy("[grant]\negress='public'"), low).effective.network.egress[0].ports == (
        443,
    )


# --- properties -----------------------------------------------------------------------------------------------------

_HOSTS = ["a.com", "x.a.com", "*.a.com", "b.org", "8.8.8.8", "8.8.8.0/24", "10.0.0.5", "10.0.0.0/8", "2606::1"]
_EGRESS = st.lists(
    st.builds(
        lambda host, ports: f"{f'[{host}]' if ':' in host else host}:{','.join(map(str, sorted(ports)))}",
        st.sampled_from(_HOSTS),
        st.sets(st.sampled_from([80, 443, 5432]), min_size=1),
    ),
    max_size=4,
)
_PATHS = st.lists(st.sampled_from(["/srv", "/srv/a", '/srv/a "b"\\c', "/opt/ü"]), max_size=3)
_MEMORY = st.sampled_from(["4M", "100M", "256M", "300M", "2G", "5G"])
_EVENTS = st.sampled_from(["deploy.started", "on_deploy_start", "deploy.failed", "domain.added"])
_PERMISSIONS = st.sampled_from(["read:a", "read:b", "write:a"])


def _maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


_SANDBOXES = _maybe(
    network=_maybe(
        egress=_EGRESS, listen=st.lists(st.sampled_from([22, 8000, 9000]), max_size=2), allow_no_sni=st.booleans()
    ),
    filesystem=_maybe(state=_MEMORY | st.just("0"), tmp=_MEMORY, read=_PATHS),
    resources=_maybe(memory=_MEMORY, cpu=st.sampled_from(["1%", "12.5%", "25%", "999%"]), tasks=st.integers(1, 999)),
    syscalls=st.sampled_from(["default", "strict"]),
)
_CORES = st.builds(
    lambda hooks, permissions, sandbox, delivery: manifest(
        hooks=hooks, permissions=permissions, sandbox=sandbox, delivery=delivery
    ),
    st.lists(_EVENTS, max_size=3),
    st.lists(_PERMISSIONS, max_size=3),
    _SANDBOXES,
    _maybe(timeout=st.sampled_from(["1s", "2m", "1h"]), attempts=st.integers(1, 200)),
) | st.just(synthesised())

_HOST_CONFIGS = st.sampled_from(
    [
        DEFAULT,
        OPEN,
        parse_host_config(
            b"[ceiling]\nmemory='128M'\nhooks=['deploy.*']\npermissions=['read:*']\nread=['/srv']\negress=['*.a.com:443']",
            source="host.toml",
        ),
        parse_host_config(b"[ceiling]\nsyscalls='strict'\nstate=0\n[defaults]\nstate=0\ntasks=3", source="host.toml"),
        parse_host_config(b"[defaults]\nsyscalls='strict'\ncpu='3%'\n[restart]\ncrashes=2", source="host.toml"),
    ]
)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def _policy_text(sections: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"[{section}]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in table.items())
        for section, table in sections.items()
    )


_GRANTS = _maybe(
    grant=_maybe(
        hooks=st.lists(_EVENTS | st.sampled_from(["*", "deploy.*"]), max_size=3),
        permissions=st.lists(_PERMISSIONS | st.sampled_from(["*", "read:*"]), max_size=3),
        egress=_EGRESS | st.just("public"),
        listen=st.lists(st.sampled_from(["8000", "8001:22", "9999:9000"]), max_size=2, unique=True),
        allow_no_sni=st.booleans(),
    ),
    limits=_maybe(
        memory=_MEMORY,
        io_read=_MEMORY | st.just("none"),
        cpu=st.sampled_from(["1%", "400%", "999%"]),
        tasks=st.integers(1, 999),
    ),
    filesystem=_maybe(read=_PATHS, state=_MEMORY | st.just("0"), tmp=_MEMORY),
    syscalls=_maybe(profile=st.sampled_from(["default", "strict"])),
    restart=_maybe(crashes=st.integers(1, 9), stop_grace=st.sampled_from(["1s", "50s", "10m"])),
    delivery=_maybe(timeout=st.sampled_from(["1s", "2m", "1h"]), attempts=st.integers(1, 200)),
).map(lambda sections: policy(_policy_text(sections)))


def widened(narrow: EffectivePolicy, wide: EffectivePolicy) -> list[str]:
    """Fields in which the first allows something that the second does not."""
    found = [h for h in narrow.hooks if not any(covers_hook(w, h) for w in wide.hooks)]
    found += [p for p in narrow.permissions if not any(covers_permission(w, p) for w in wide.permissions)]
    found += [p for p in narrow.filesystem.read if not any(path_covers(w, p) for w in wide.filesystem.read)]
    if not egress_within(_set(narrow.network), _set(wide.network)):
        found.append(f"egress {narrow.network} {wide.network}")
    found += [str(rule) for rule in narrow.network.listen if rule not in wide.network.listen]
    for part in ("resources", "filesystem"):
        for name, value in getattr(narrow, part):
            if isinstance(value, int) and value > getattr(getattr(wide, part), name):
                found.append(name)
    found += [
        name
        for name in ("connects_per_second", "connect_burst", "connects_open", "allow_no_sni")
        if getattr(narrow.network, name) > getattr(wide.network, name)
    ]
    if narrow.syscalls == "default" and wide.syscalls == "strict":
        found.append("syscalls")
    if narrow.delivery_timeout > wide.delivery_timeout or narrow.restart.stop_grace > wide.restart.stop_grace:
        found.append("time")
    return found


def _set(network: NetworkPolicy) -> Egress:
    return Egress(public=network.mode == "public", rules=network.egress)


@settings(max_examples=300, deadline=None)
@given(_CORES, _GRANTS, _HOST_CONFIGS)
def test_the_effective_policy_is_within_the_ceiling_the_grant_and_the_request(
    core: ManifestCore, grant: Any, host: HostConfig
) -> None:
    effective = meet(core, grant, host).effective
    ceiling = host.ceiling.limits
    # The grant under the ceiling, with nobody's request that narrows it. How long a delivery may take is left to the
    # author where the operator is silent, so there it is held against the ceiling.
    alone = policy_alone(grant, host, core.name).effective
    if grant.limits.delivery_timeout is None:
        alone = alone.model_copy(update={"delivery_timeout": ceiling.delivery_timeout})
    assert widened(effective, alone) == []
    assert effective.resources.memory <= ceiling.memory
    assert effective.resources.tasks <= ceiling.tasks
    assert effective.filesystem.state <= ceiling.state
    assert all(host.inbound.allows(rule.address, rule.port) for rule in effective.network.listen)
    asked = core.sandbox
    for value, requested in (
        (effective.resources.memory, asked.resources.memory),
        (effective.resources.tasks, asked.resources.tasks),
        (effective.filesystem.tmp, asked.filesystem.tmp),
        (effective.filesystem.state, asked.filesystem.state),
    ):
        assert requested is None or value <= requested
    assert set(effective.hooks) <= set(core.hooks)
    assert set(effective.permissions) <= set(core.permissions)
    if asked.network is not None and asked.network.egress is not None:
        requested_set = Egress(rules=tuple(EgressRule(host=e.host, ports=e.ports) for e in asked.network.egress))
        assert effective.network.mode != "public"
        assert egress_within(_set(effective.network), requested_set)
    assert effective.resources.memory_high <= effective.resources.memory
    assert EffectivePolicy.model_validate_json(effective.canonical()).digest() == effective.digest()


@settings(max_examples=200, deadline=None)
@given(_CORES, _GRANTS, _HOST_CONFIGS, st.data())
def test_a_lower_ceiling_never_widens_anything(core: ManifestCore, grant: Any, host: HostConfig, data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(Limits.model_fields)))
    present = getattr(host.ceiling.limits, name)
    lower = min(present, max(1, int(present * data.draw(st.sampled_from([0.01, 0.1, 0.9])))))
    limits = host.ceiling.limits.model_copy(update={name: lower})
    stricter = host.model_copy(
        update={"ceiling": host.ceiling.model_copy(update={"limits": limits, "permissions": ("read:a",)})}
    )
    assert widened(meet(core, grant, stricter).effective, meet(core, grant, host).effective) == []


@settings(max_examples=300, deadline=None)
@given(_CORES, _HOST_CONFIGS)
def test_the_policy_that_is_written_means_what_was_shown(core: ManifestCore, host: HostConfig) -> None:
    shown = meet(core, None, host)
    assert shown.policy_text is not None
    loaded = parse_plugin_policy(shown.policy_text.encode(), source="policies/p.toml")
    check_ceiling(loaded, host)
    again = meet(core, loaded, host)
    assert again.effective == shown.effective
    assert again.effective.digest() == shown.effective.digest()
    assert not again.needs_approval
    assert again.policy_text is None


@settings(max_examples=200, deadline=None)
@given(_CORES, st.none() | _GRANTS, _HOST_CONFIGS)
def test_lines_agree_with_what_is_in_force(core: ManifestCore, grant: Any, host: HostConfig) -> None:
    proposal = meet(core, grant, host)
    for one in proposal.lines:
        assert bool(one.add) == (one.verdict == "pending"), one
        assert one.source
        assert "\n" not in one.add
    for field, asked_for, got in (
        ("hooks", core.hooks, proposal.effective.hooks),
        ("permissions", core.permissions, proposal.effective.permissions),
    ):
        granted = {one.requested for one in proposal.lines if one.field == field and one.verdict == "granted"}
        covers = covers_hook if field == "hooks" else covers_permission
        assert granted == {name for name in asked_for if any(covers(g, name) for g in got)}
    encoded = proposal_json(proposal)
    assert set(encoded["sentences"]) == set(LAYERS)
    assert encoded["effective_digest"] == proposal.effective.digest()


# --- updates and single runs -----------------------------------------------------------------------------------------


@given(_CORES)
def test_the_same_request_asks_for_nothing_more(core: ManifestCore) -> None:
    assert asks_more(core, core, DEFAULT) == ()


def test_what_an_update_asks_for_beyond_the_old_version() -> None:
    old = asking(network={"egress": ["*.a.com:443"]}, resources={"memory": "64M"}, syscalls="strict")
    less = asking(network={"egress": ["x.a.com:443"]}, resources={"memory": "32M"}, syscalls="strict")
    assert asks_more(old, less, DEFAULT) == ()
    more = asks_more(
        old,
        manifest(
            hooks=["deploy.started", "deploy.completed", "deploy.failed", "domain.added"],
            sandbox={"network": {"egress": ["a.com:443"], "listen": [80]}, "filesystem": {"read": ["/srv"]}},
        ),
        DEFAULT,
    )
    assert more == (
        "event domain.added",
        "connections to a.com:443",
        "memory 256M instead of 64M",
        "reading /srv",
        "listening on port 80",
        'the syscall profile "default" instead of "strict"',
    )
    assert "connections to any public address" in asks_more(old, manifest(sandbox=None), DEFAULT)


def test_a_run_without_flags_has_no_network_and_no_state() -> None:
    effective = policy_for_run(DEFAULT)
    assert (effective.network.mode, effective.filesystem.state, effective.hooks) == ("none", 0, ())
    assert effective.resources.memory == 256 << 20


def test_flags_of_a_run() -> None:
    effective = policy_for_run(
        DEFAULT, memory="64M", cpu="50%", tasks=7, egress=["example.com:443", "b.org:80"], read=["/srv/x/"]
    )
    assert effective.network.mode == "listed"
    assert [rule.host for rule in effective.network.egress] == ["b.org", "example.com"]
    resources = effective.resources
    assert (resources.memory, resources.memory_high, resources.cpu, resources.tasks) == (64 << 20, 56 << 20, 500, 7)
    assert effective.filesystem.read == ("/srv/x",)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"memory": "3G"}, "over the ceiling, 2G"),
        ({"memory": "lots"}, "--memory"),
        ({"cpu": "500%"}, "over the ceiling, 400%"),
        ({"tasks": 0}, "--tasks"),
        ({"egress": ["example.com"]}, "--egress"),
        ({"egress": ["10.0.0.1:80"]}, "never reachable"),
        ({"read": ["relative"]}, "--read"),
        ({"read": ["/run/docker.sock"]}, "never made visible"),
    ],
)
def test_wrong_flags_of_a_run_are_refused(flags: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        policy_for_run(DEFAULT, **flags)
    assert why in str(caught.value)


def test_flags_and_a_policy_file(tmp_path: Any) -> None:
    path = tmp_path / "p.toml"
    path.write_text(POLICY)
    alone = policy_for_run(DEFAULT, path)
    assert (alone.filesystem.state, alone.filesystem.read) == (64 << 20, ("/etc/ssl/certs",))
    assert [rule.host for rule in alone.network.egress] == ["hooks.slack.com"]
    both = policy_for_run(DEFAULT, path, memory="512M", egress=["b.org:443"])
    assert both.resources.memory == 512 << 20
    assert [rule.host for rule in both.network.egress] == ["b.org", "hooks.slack.com"]


def test_sentences_are_plain() -> None:
    found = sentences(meet(manifest(), policy(), DEFAULT).effective)
    assert found["network"].startswith("May connect to hooks.slack.com (TCP 443) and to nothing else")
    assert "256M of memory" in found["cgroup"]
    assert "64 tasks" in found["cgroup"]
    nothing = sentences(policy_for_run(DEFAULT))
    assert nothing["network"] == "Has no network at all."
    assert "no persistent folder" in nothing["filesystem"]
