"""Contents of a manifest, and the errors that an author gets for a wrong one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.errors import UsageError
from isolator.policy.host import HostConfig
from isolator.policy.keys import LIMITS
from isolator.policy.meet.effective import meet
from isolator.policy.request import synthesise_manifest
from isolator.reader.json_text import load_json_with_lines
from isolator.reader.manifest import parse_manifest, parse_manifest_core
from tests.policy.samples import MANIFEST, asking, manifest, policy

TEXT = json.dumps(MANIFEST, indent=2)
RESOURCES = ", ".join(sorted(limit.key for limit in LIMITS if limit.manifest.startswith("sandbox.resources.")))


def refusal(text: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        parse_manifest_core(text.encode() if isinstance(text, str) else text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def line_of(fragment: str, text: str = TEXT) -> int:
    return text[: text.index(fragment)].count("\n") + 1


def test_manifest_of_the_design_is_read_whole() -> None:
    core = parse_manifest_core(TEXT.encode())
    network = core.sandbox.network
    assert network is not None
    assert network.egress is not None
    assert [(e.host, e.ports, e.reason) for e in network.egress] == [("hooks.slack.com", (443,), "post the message")]
    sizes = {"memory": 256 << 20, "state": 64 << 20, "tmp": 32 << 20}
    counts = {"cpu": 250, "tasks": 64, "nofile": 1024, "delivery_timeout": 10.0, "delivery_attempts": 12}
    assert core.limits == sizes | counts
    assert core.delivery["order_by"] == "project_id"
    assert core.transport == {"mode": "oneshot"}
    assert core.extra == ()
    assert not core.synthesised


def test_the_least_manifest_asks_for_nothing() -> None:
    core = parse_manifest(dict(name="ab", version="1.0.0", api_version="1", binary="run", hooks=[]))
    assert core.sandbox.network is None
    assert core.limits == {} and core.switches == {}
    assert core.binary == "./run"


@pytest.mark.parametrize(
    ("sandbox", "egress"),
    [
        ({}, "absent"),
        ({"network": {}}, None),
        ({"network": {"egress": []}}, ()),
        ({"network": {"egress": "public"}}, None),
    ],
)
def test_silence_and_an_empty_list_are_different(sandbox: dict[str, Any], egress: object) -> None:
    network = asking(**sandbox).sandbox.network
    assert ("absent" if network is None else network.egress) == egress


def test_unknown_top_level_keys_are_for_newer_hosts() -> None:
    assert manifest(publisher={"name": "x"}, zzz=1).extra == ("publisher", "zzz")


@pytest.mark.parametrize("key", ["name", "version", "api_version", "binary", "hooks"])
def test_missing_required_key_is_refused(key: str) -> None:
    data = {k: v for k, v in MANIFEST.items() if k != key}
    assert f"{key} is missing" in refusal(json.dumps(data))


@pytest.mark.parametrize(
    ("old", "new", "path", "hint"),
    [
        ('"egress"', '"egres"', "sandbox.network.egres", 'did you mean "egress"?'),
        ('"network"', '"netwrok"', "sandbox.netwrok", 'did you mean "network"?'),
        ('"reason"', '"raeson"', "sandbox.network.egress[0].raeson", 'did you mean "reason"?'),
        ('"memory"', '"mem"', "sandbox.resources.mem", 'did you mean "memory"?'),
        ('"memory"', '"ram"', "sandbox.resources.ram", f"known here: {RESOURCES}"),
        ('"state"', '"State"', "sandbox.filesystem.State", 'did you mean "state"?'),
    ],
)
def test_typo_in_the_sandbox_is_refused_with_line_path_and_suggestion(old: str, new: str, path: str, hint: str) -> None:
    text = TEXT.replace(old, new)
    message = refusal(text)
    assert message.startswith(f"plugin.json:{line_of(new, text)}: {path}: unknown key")
    assert hint in message


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "A"}, "lower-case"),
        ({"name": "a"}, "2 to 63"),
        ({"name": "a" * 64}, "2 to 63"),
        ({"name": "ab\n"}, "control"),
        ({"name": "-ab"}, "lower-case"),
        ({"name": 7}, "must be text"),
        ({"version": "1.2"}, "semantic"),
        ({"version": "01.2.3"}, "semantic"),
        ({"version": "1.2.3 "}, "semantic"),
        ({"api_version": 1}, 'write "1"'),
        ({"api_version": "2"}, "this host speaks 1"),
        ({"api_version": "one"}, "protocol version"),
        ({"binary": "/bin/sh"}, "relative"),
        ({"binary": "../x"}, ".."),
        ({"binary": "a/../../x"}, ".."),
        ({"binary": "./"}, "names no file"),
        ({"binary": ""}, "names no file"),
        ({"binary": "a\u0000b"}, "control"),
        ({"hooks": "deploy.started"}, "list"),
        ({"hooks": ["deploy.*"]}, "wildcards are for grants"),
        ({"hooks": ["Deploy.started"]}, "event name"),
        ({"hooks": [1]}, "must be text"),
        ({"hooks": ["a.b"] * 65}, "at most 64"),
        ({"permissions": ["read:*"]}, "wildcards"),
        ({"permissions": ["read deployments"]}, "permission"),
        ({"args": ["a\u0000"]}, "NUL"),
        ({"args": "x"}, "list"),
        ({"sandbox": []}, "object"),
        ({"delivery": {"timeout": "soon"}}, "delivery.timeout"),
        ({"delivery": {"attempts": 0}}, "delivery.attempts"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], why: str) -> None:
    message = refusal(json.dumps(MANIFEST | changes, indent=2))
    assert why in message
    assert message.startswith("plugin.json:")


@pytest.mark.parametrize(
    ("sandbox", "why"),
    [
        ({"resources": {"memory": "-1M"}}, "negative"),
        ({"resources": {"memory": 256}}, "least that works, 4M; a number alone is bytes"),
        ({"resources": {"cpu": "25"}}, "percentage"),
        ({"resources": {"tasks": True}}, "whole number"),
        ({"resources": {"tasks": 0}}, "least that works"),
        ({"filesystem": {"tmp": "0"}}, "least that works"),
        ({"filesystem": {"read": ["etc"]}}, "absolute"),
        ({"filesystem": {"read": ["/run/docker.sock"]}}, "never made visible"),
        ({"filesystem": {"read": ["/srv/../proc/1"]}}, '".."'),
        ({"filesystem": {"read": ["/"]}}, "whole host"),
        ({"syscalls": "lax"}, '"default" or "strict"'),
        ({"syscalls": {"profile": "lax"}}, '"default" or "strict"'),
        ({"network": {"egress": ["https://hooks.slack.com"]}}, "URL"),
        ({"network": {"egress": ["hooks.slack.com"]}}, "no port"),
        ({"network": {"egress": [{"host": "hooks.slack.com", "ports": []}]}}, "empty"),
        ({"network": {"egress": [{"host": "hooks.slack.com", "ports": [0]}]}}, "1 to 65535"),
        ({"network": {"egress": [{"host": "hooks.slack.com", "ports": ["443"]}]}}, "1 to 65535"),
        ({"network": {"egress": [{"ports": [443]}]}}, "host is missing"),
        ({"network": {"egress": [{"host": "*"}]}}, "host name"),
        ({"network": {"egress": [{"host": "*.com"}]}}, "top-level"),
        ({"network": {"egress": [{"host": "a.*.com"}]}}, "whole first label"),
        ({"network": {"egress": [{"host": "127.1"}]}}, "address"),
        ({"network": {"egress": [{"host": "x.0x7f"}]}}, "neither"),
        ({"network": {"egress": [{"host": "10.0.0.1/8"}]}}, "host bits"),
        ({"network": {"egress": [{"host": "slаck.com"}]}}, "xn--"),
        ({"network": {"egress": [{"host": "::ffff:10.0.0.1"}]}}, "plain address"),
        ({"network": {"egress": {"host": "x"}}}, "list"),
        ({"network": {"listen": [70000]}}, "1 to 65535"),
        ({"network": None}, "object"),
    ],
)
def test_wrong_requests_are_refused(sandbox: dict[str, Any], why: str) -> None:
    message = refusal(json.dumps(MANIFEST | {"sandbox": sandbox}, indent=2))
    assert why in message
    assert "sandbox." in message


def test_names_have_one_spelling() -> None:
    core = asking(network={"egress": ["HOOKS.Slack.com.:8443,443,443", {"host": "1.2.3.4/32"}]})
    assert core.sandbox.network is not None
    assert core.sandbox.network.egress is not None
    assert [(e.host, e.ports) for e in core.sandbox.network.egress] == [
        ("hooks.slack.com", (443, 8443)),
        ("1.2.3.4", (443,)),
    ]


def test_text_for_people_cannot_drive_a_terminal() -> None:
    core = manifest(description="line\nbreak \x1b[2J\u202eevil")
    assert core.description == "line break [2J evil"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1} x', "not JSON"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "out of range"),
        ('{"a": ' + "9" * 5000 + "}", "too long"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"a": "\ttab"}', "not JSON"),
        ('{"a": 1, "\\u0061": 2}', "there twice"),
        ("{" * 17, "deeper than 16"),
        ('{"a": ' * 10000, "deeper than 16"),
        ('{"a": ' + "[" * 16 + "]" * 16 + "}", "deeper than 16"),
        ("\ufeff{}", "not JSON: it begins with a byte order mark"),
    ],
)
def test_json_on_which_readers_differ_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        load_json_with_lines(text.encode())


def test_errors_of_syntax_name_the_line() -> None:
    assert refusal('{\n "a": 1,\n "b": {"c": 1,\n "c": 2}}').startswith('plugin.json:4: "c" is there twice')
    assert refusal('{\n "a": 1,\n}').startswith("plugin.json:")
    assert refusal(b'{\n "a": "\xff"}').startswith("plugin.json:2: not UTF-8")
    assert refusal('{\n "a": 1,\n "b": NaN}').startswith("plugin.json:3:")


def test_depth_and_size_are_bounded() -> None:
    assert load_json_with_lines(('{"a": ' + "[" * 15 + "]" * 15 + "}").encode())[0]
    with pytest.raises(UsageError, match="at most 262144"):
        load_json_with_lines(b'{"a": "' + b"x" * 262144 + b'"}')


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\:,{}[]\n', max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text('abc"\\ {', max_size=3), _JSON, max_size=4), st.sampled_from([None, 1, "\t"]))
def test_unambiguous_json_is_read_as_written(value: dict[str, Any], indent: Any) -> None:
    assert load_json_with_lines(json.dumps(value, indent=indent).encode(), max_depth=64)[0] == value


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_garbage_is_refused_and_never_crashes(text: bytes) -> None:
    try:
        parse_manifest_core(text)
    except UsageError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()


def test_synthesised_manifest_is_a_manifest_of_its_binary() -> None:
    data = synthesise_manifest("google-indexer", "9f2c41d07ab3" + "0" * 52, "google-indexer", ["deploy.completed"])
    core = parse_manifest(data)
    assert (core.version, core.api_version) == ("0.0.0+sha256.9f2c41d07ab3", "1")
    assert core.synthesised
    with pytest.raises(UsageError, match="hooks"):
        parse_manifest(synthesise_manifest("google-indexer", "0" * 64, "x", ["deploy completed"]))


def test_time_to_start_in_is_asked_for_up_to_the_ceiling() -> None:
    core = manifest(restart={"start_timeout": "2m"})
    assert core.limits["start_timeout"] == 120.0 and not core.extra
    effective = meet(core, policy(), HostConfig()).effective
    assert effective.restart.start_timeout == 120.0
    assert meet(manifest(), policy(), HostConfig()).effective.restart.start_timeout == 10.0
    (line,) = [
        line
        for line in meet(manifest(restart={"start_timeout": "1h"}), policy(), HostConfig()).lines
        if line.field == "start_timeout"
    ]
    assert (line.verdict, line.effective, line.reason) == ("refused", "5m", "over the ceiling, 5m")


def test_typo_in_restart_is_refused() -> None:
    with pytest.raises(UsageError, match=r'restart\.start_timout: unknown key; did you mean "start_timeout"'):
        manifest(restart={"start_timout": "2m"})
