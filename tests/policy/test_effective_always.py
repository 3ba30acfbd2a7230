"""Properties of every request, grant and ceiling: nothing exceeds the least of them; the policy shown is in force."""

from __future__ import annotations

import json
from math import inf
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.layers.explain import ORDER, proposal_json
from isolator.policy.host import HostConfig
from isolator.policy.keys import LIMITS, SWITCHES, Limits
from isolator.policy.meet.bounds import Egress, egress_within
from isolator.policy.meet.effective import asks_more, meet, policy_alone
from isolator.policy.model import EffectivePolicy, EgressRule, NetworkPolicy
from isolator.policy.names import covers_hook, covers_permission, path_covers
from isolator.policy.parse.host_file import parse_host_config
from isolator.policy.parse.load import check_ceiling, parse_plugin_policy
from isolator.policy.request import ManifestCore, check
from tests.policy.samples import DEFAULT, OPEN, manifest, policy, synthesised

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
    lambda hooks, permissions, sandbox, delivery, restart: manifest(
        hooks=hooks, permissions=permissions, sandbox=sandbox, delivery=delivery, restart=restart
    ),
    st.lists(_EVENTS, max_size=3),
    st.lists(_PERMISSIONS, max_size=3),
    _SANDBOXES,
    _maybe(timeout=st.sampled_from(["1s", "2m", "1h"]), attempts=st.integers(1, 200)),
    _maybe(start_timeout=st.sampled_from(["1s", "2m", "1h"])),
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


@given(core=_CORES)
def test_every_parsed_manifest_passes_the_check_of_the_reader_s_answers(core: ManifestCore) -> None:
    answer = ManifestCore.model_validate(json.loads(core.model_dump_json()))
    check(answer)
    assert answer == core


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
        allow_ech=st.booleans(),
    ),
    limits=_maybe(
        memory=_MEMORY,
        io_read=_MEMORY | st.just("none"),
        cpu=st.sampled_from(["1%", "400%", "999%"]),
        tasks=st.integers(1, 999),
    ),
    filesystem=_maybe(read=_PATHS, state=_MEMORY | st.just("0"), tmp=_MEMORY),
    syscalls=_maybe(profile=st.sampled_from(["default", "strict"])),
    restart=_maybe(
        crashes=st.integers(1, 9),
        stop_grace=st.sampled_from(["1s", "50s", "10m"]),
        start_timeout=st.sampled_from(["1s", "4m", "1h"]),
    ),
    delivery=_maybe(timeout=st.sampled_from(["1s", "2m", "1h"]), attempts=st.integers(1, 200)),
    env=_maybe(TZ=st.sampled_from(["UTC", "Asia/Tokyo"])),
).map(lambda sections: policy(_policy_text(sections)))


def widened(narrow: EffectivePolicy, wide: EffectivePolicy) -> list[str]:
    """Fields in which the first allows something that the second does not."""
    found = [h for h in narrow.hooks if not any(covers_hook(w, h) for w in wide.hooks)]
    found += [p for p in narrow.permissions if not any(covers_permission(w, p) for w in wide.permissions)]
    found += [p for p in narrow.filesystem.read if not any(path_covers(w, p) for w in wide.filesystem.read)]
    if not egress_within(_set(narrow.network), _set(wide.network)):
        found.append(f"egress {narrow.network} {wide.network}")
    found += [str(rule) for rule in narrow.network.listen if rule not in wide.network.listen]
    found += [key.name for key in (*LIMITS, *SWITCHES) if narrow.value(key) > wide.value(key)]
    found += ["memory_high"] if narrow.resources.memory_high > wide.resources.memory_high else []
    if narrow.syscalls == "default" and wide.syscalls == "strict":
        found.append("syscalls")
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
    left = [limit.name for limit in LIMITS if limit.left_to_author and limit.name not in grant.limits]
    most = {name: getattr(ceiling, name) for name in left}
    of_restart = {name: value for name, value in most.items() if name in type(alone.restart).model_fields}
    alone = alone.model_copy(
        update={"restart": alone.restart.model_copy(update=of_restart)}
        | {name: value for name, value in most.items() if name not in of_restart}
    )
    assert widened(effective, alone) == []
    assert all(effective.value(limit) <= getattr(ceiling, limit.name) for limit in LIMITS)
    assert all(host.inbound.allows(rule.address, rule.port) for rule in effective.network.listen)
    asked = core.sandbox
    assert all(effective.value(limit) <= core.limits.get(limit.name, inf) for limit in LIMITS)
    assert set(effective.hooks) <= set(core.hooks)
    assert set(effective.permissions) <= set(core.permissions)
    if asked.network is not None and asked.network.egress is not None:
        requested_set = Egress(rules=tuple(EgressRule(host=e.host, ports=e.ports) for e in asked.network.egress))
        assert effective.network.mode != "public"
        assert egress_within(_set(effective.network), requested_set)
    assert effective.resources.memory_high <= effective.resources.memory
    assert EffectivePolicy.model_validate(json.loads(effective.canonical())).digest() == effective.digest()


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
def test_written_policy_has_the_effect_that_was_shown(core: ManifestCore, host: HostConfig) -> None:
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
def test_lines_agree_with_the_policy_in_force(core: ManifestCore, grant: Any, host: HostConfig) -> None:
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
    assert set(encoded["sentences"]) == {*(layer.name for layer in ORDER), "events"}
    assert encoded["effective_digest"] == proposal.effective.digest()


@given(_CORES)
def test_same_request_asks_for_nothing_more(core: ManifestCore) -> None:
    assert asks_more(core, core, DEFAULT) == ()
