"""Policy files: owners and modes, contents, and errors that name their line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from isolator.errors import DeniedError, IsolatorError, NotFoundError, UsageError
from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet
from isolator.policy.model import AddressException, EgressRule
from isolator.policy.parse.host_file import parse_host_config
from isolator.policy.parse.load import check_ceiling, load_plugin_policy, parse_plugin_policy
from isolator.policy.parse.trusted import load_host_config
from tests.policy.samples import POLICY, manifest, policy

HOST = """\
uid_range = [71000, 71999]
plugin_dirs = ["/opt/plugins"]
may_degrade = ["landlock"]

[ceiling]
memory = "1G"
permissions = ["read:*"]
read = ["/srv"]

[defaults]
memory = "128M"
stop_grace = "3s"

[roles]
emitter = [33]
viewer = [33, 1000]

[network]
exceptions = [
  "198.51.100.0/24:443,8443",
  "10.9.0.7:5432",
]
resolvers = ["198.51.100.53", "[2606::53]:5353"]

[inbound]
ports = ["8000-8099", 9000]

[restart]
crashes = 3

[audit]
disk_full = "continue"
rotate_size = "1M"

[metrics]
port = 9464
"""


def host(text: str = HOST) -> HostConfig:
    return parse_host_config(text.encode(), source="host.toml")


def error_of(text: str, *, settings: HostConfig | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        check_ceiling(policy(text), settings or HostConfig())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_policy_of_the_design_is_read_whole() -> None:
    found = policy()
    assert found.hooks == ("deploy.*",)
    assert found.egress == (EgressRule(host="hooks.slack.com", ports=(443,)),)
    assert found.limits == {"memory": 256 << 20, "cpu": 250, "tasks": 64, "nofile": 1024, "state": 64 << 20}
    assert (found.read, found.syscalls) == (("/etc/ssl/certs",), "default")
    check_ceiling(found, HostConfig())


def test_every_value_knows_its_line() -> None:
    found = policy()
    assert found.at("grant.hooks") == "policies/p.toml:3"
    assert found.at("grant.egress[0]") == "policies/p.toml:5"
    assert found.at("limits.nofile") == "policies/p.toml:11"
    assert found.at("filesystem.state") == "policies/p.toml:15"
    assert policy("[grant]\negress = [\n 'a.com:1',\n\n 'b.com:2']").at("grant.egress[1]") == "policies/p.toml:5"
    assert policy("limits.memory = '64M'").at("limits.memory") == "policies/p.toml:1"


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("[grant]\negres = []", 2, 'did you mean "egress"?'),
        ("[grnat]\nhooks = []", 1, 'did you mean "grant"?'),
        ("[limits]\n\nmemroy = '1M'", 3, 'did you mean "memory"?'),
        ("[limits]\nmemory = '12Q'", 2, "not a size"),
        ("[limits]\nmemory = -1", 2, "negative"),
        ("[limits]\nmemory = '-64M'", 2, "negative"),
        ("[limits]\nmemory = 256", 2, "least that works"),
        ("[limits]\nmemory = '3G'", 2, "over the ceiling, 2G"),
        ("[limits]\ncpu = 25", 2, "percentage"),
        ("[limits]\ncpu = '401%'", 2, "over the ceiling, 400%"),
        ("[limits]\ntasks = 1.5", 2, "whole number"),
        ("[limits]\ntasks = true", 2, "whole number"),
        ("[limits]\ntasks = 513", 2, "over the ceiling, 512"),
        ("[limits]\nnofile = 5000", 2, "over the ceiling, 4096"),
        ("[filesystem]\ntmp = 0", 2, "least that works"),
        ("[filesystem]\nstate = '64K'", 2, "at least 1M, or 0"),
        ("[filesystem]\nstate = '11G'", 2, "over the ceiling, 10G"),
        ("[filesystem]\nread = [\n '/srv/a',\n 'srv/b',\n]", 4, "absolute"),
        ("[filesystem]\nread = ['/proc/1']", 2, "never made visible"),
        ("[grant]\nhooks = 'deploy.*'", 2, "must be a list"),
        ("[grant]\nhooks = ['*.started']", 2, "wildcards"),
        ("[grant]\negress = ['a.com:443',\n'10.0.0.1:80']", 3, "never reachable (10.0.0.0/8)"),
        ("[grant]\negress = ['[::1]:80']", 2, "never reachable"),
        ("[grant]\negress = ['169.254.169.254:80']", 2, "never reachable"),
        ("[grant]\negress = ['a.com']", 2, "no port"),
        ("[grant]\nlisten = ['8080']", 2, "not open to plugins"),
        ("[grant]\nallow_no_sni = 'yes'", 2, "true or false"),
        ("[syscalls]\nprofile = 'stict'", 2, '"default" or "strict"'),
        ("[restart]\nstop_grace = '2m'", 2, "over the ceiling, 1m"),
        ("[restart]\nstart_timeout = '6m'", 2, "over the ceiling, 5m"),
        ("[restart]\nstart_timeout = '10ms'", 2, "least that works, 1s"),
        ("[restart]\nbackoff_min = '9s'\nbackoff_max = '1s'", 2, "more than backoff_max"),
        ("[delivery]\ntimeout = '16m'", 2, "over the ceiling, 15m"),
        ("grant = 1", 1, "must be a table"),
        ("[grant]\nhooks = [", 2, "not TOML"),
        ("[grant]\nhooks = []\nhooks = []", 3, "not TOML"),
        ("[limits]\nmemory = 64M  # small", 2, 'quote it: memory = "64M"'),
        ("[limits]\ncpu = 25%", 2, 'quote it: cpu = "25%"'),
        ("[filesystem]\nstate = 1.5G", 2, 'quote it: state = "1.5G"'),
        ("[filesystem]\ntmp = 4 MiB", 2, 'quote it: tmp = "4 MiB"'),
        ("[restart]\nstop_grace = 5s", 2, 'quote it: stop_grace = "5s"'),
        ("limits.memory = 64M", 1, 'quote it: limits.memory = "64M"'),
        # Found by fuzzing: Python neither reads so many digits nor writes the number that it has read in hexadecimal.
        pytest.param("[grant]\nhooks = [\n" + "1" * 8192, 3, "more than 64 bits", id="digits"),
        pytest.param("[limits]\nmemory = 0x" + "f" * 6000, 2, "more than 64 bits", id="hexadecimal"),
        pytest.param("[grant]\nhooks = [\n1,\n{ a = -9223372036854775809 }]", 4, "more than 64 bits", id="65 bits"),
    ],
)
def test_errors_name_file_and_line(text: str, line: int, why: str) -> None:
    message = error_of(text)
    assert message.startswith(f"policies/p.toml:{line}: ")
    assert why in message


def test_grants_over_a_lower_ceiling_are_refused() -> None:
    assert "over the ceiling, 1G" in error_of("[limits]\nmemory = '2G'", settings=host())
    assert "over the ceiling, read:*" in error_of("[grant]\npermissions = ['read:a', 'kv']", settings=host())
    assert "outside what the ceiling" in error_of("[filesystem]\nread = ['/opt/x']", settings=host())
    narrow = host("[ceiling]\negress = ['*.example.com:443']\nhooks = ['deploy.*']\nsyscalls = 'strict'")
    assert "over the ceiling" in error_of("[grant]\negress = ['a.example.com:80']", settings=narrow)
    assert '"public" is over' in error_of("[grant]\negress = 'public'", settings=narrow)
    assert "over the ceiling, deploy.*" in error_of("[grant]\nhooks = ['*']", settings=narrow)
    assert '"strict"' in error_of("[syscalls]\nprofile = 'default'", settings=narrow)
    check_ceiling(policy("[grant]\negress = ['a.example.com:443']\nhooks = ['deploy.started']"), narrow)
    check_ceiling(policy("[grant]\negress = ['10.9.0.7:5432']\nlisten = ['8080:80', '[::1]:9000:1']"), host())


def test_host_toml_sets_every_section() -> None:
    found = host()
    assert (found.uid_range, found.plugin_dirs, found.may_degrade) == ((71000, 71999), ("/opt/plugins",), ("landlock",))
    assert (found.ceiling.limits.memory, found.ceiling.limits.tasks) == (1 << 30, 512)
    assert (found.defaults.memory, found.defaults.tasks, found.restart.stop_grace) == (128 << 20, 64, 3.0)
    assert [found.role_of(uid) for uid in (0, 33, 1000, 5)] == ["operator", "emitter", "viewer", None]
    assert found.exceptions == (
        AddressException(cidr="198.51.100.0/24", port=443),
        AddressException(cidr="198.51.100.0/24", port=8443),
        AddressException(cidr="10.9.0.7/32", port=5432),
    )
    assert found.resolvers == ("198.51.100.53", "[2606::53]:5353")
    assert found.inbound.allows("127.0.0.1", 8050)
    assert not found.inbound.allows("127.0.0.1", 8100)
    assert not found.inbound.allows("0.0.0.0", 8050)
    assert (found.restart.crashes, found.audit.disk_full, found.metrics.port) == (3, "continue", 9464)
    assert found.where["ceiling.memory"] == "host.toml:6"


def test_runners_are_nobody_until_they_are_named_and_have_a_ceiling_of_their_own() -> None:
    assert HostConfig().roles.runner == ()
    assert HostConfig().for_runners().ceiling == HostConfig().ceiling
    found = host(
        "[roles]\nrunner = [1000]\n[ceiling]\nmemory = '1G'\n"
        "[runner]\ncages = 3\nall_memory = '300M'\nmemory = '100M'\negress = ['a.com:443']\nread = ['/srv/a']"
    )
    assert (found.runner.cages, found.runner.all_memory, found.runner.share) == (3, 300 << 20, 50)
    assert found.role_of(1000) is None  # nothing on the control socket
    own = found.for_runners()
    assert (own.ceiling.limits.memory, own.ceiling.limits.tasks) == (100 << 20, 512)
    assert "over the ceiling, 100M; lower it, or raise the ceiling in [runner] of host.toml" in error_of(
        "[limits]\nmemory = '200M'", settings=own
    )
    assert "over the ceiling" in error_of("[grant]\negress = ['b.com:443']", settings=own)
    assert '"public" is over' in error_of("[grant]\negress = 'public'", settings=own)
    assert "outside what" in error_of("[filesystem]\nread = ['/srv/b']", settings=own)
    check_ceiling(policy("[grant]\negress = ['b.com:443']\n[limits]\nmemory = '200M'"), found)


def test_private_addresses_and_ports_of_the_host_are_no_runners_unless_a_list_names_them() -> None:
    opened = "[network]\nexceptions = ['10.9.0.7:5432']\n[inbound]\nports = [8005]\n[roles]\nrunner = [1000]\n"
    grant = "[grant]\negress = ['10.9.0.7:5432']"
    check_ceiling(policy(grant), host(opened))  # a plugin's policy may grant it
    assert "never reachable" in error_of(grant, settings=host(opened).for_runners())
    listed = host(f"{opened}[runner]\negress = ['public', '10.9.0.7:5432']").for_runners()
    check_ceiling(policy(grant), listed)
    assert "not open to plugins" in error_of("[grant]\nlisten = ['8005']", settings=listed)


def test_digest_of_a_host_without_runners_is_that_of_versions_that_had_none() -> None:
    none = host("[runner]\ncages = 3")
    assert none.digest() == host("").digest()
    assert host("[roles]\nrunner = [1000]").digest() != host("[roles]\nrunner = [1001]").digest() != none.digest()


def test_settings_cross_process_borders_unchanged() -> None:
    assert HostConfig.model_validate(json.loads(host().model_dump_json())) == host()
    assert host().digest() == host(HOST + "\n# a comment\n").digest() != HostConfig().digest()


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("\nuid_rnage = [1, 2]", 2, 'did you mean "uid_range"?'),
        ("uid_range = [1000, 2000]", 1, "above 60000"),
        ("uid_range = [65000, 66000]", 1, "nobody"),
        ("uid_range = [70000]", 1, "two numbers"),
        ("plugin_dirs = ['plugins']", 1, "absolute"),
        ("may_degrade = ['landlok']", 1, 'did you mean "landlock"?'),
        ("[defaults]\nmemory = '4G'", 2, "over the ceiling, 2G"),
        ("[roles]\noperator = ['root']", 2, "uid"),
        ("[roles]\nrunner = [0]", 2, "root needs no role"),
        ("[roles]\nrunner = [1000, 70001]", 2, "lies in uid_range"),
        ("[runner]\nmemory = '3G'", 2, "over the ceiling, 2G"),
        ("[runner]\nstate = '1G'", 2, "unknown key"),
        ("[runner]\ncages = 0", 2, "must be 1 to"),
        ("[runner]\nshare = 101", 2, "must be 1 to 100"),
        ("[runner]\negress = ['a.com:443']\n[ceiling]\negress = ['b.com:443']", 2, "over the ceiling"),
        ("[runner]\negress = 'public'\n[ceiling]\negress = ['b.com:443']", 2, "over the ceiling"),
        ("[runner]\nread = ['/home']\n[ceiling]\nread = ['/srv']", 2, "outside what the ceiling"),
        ("[runner]\nsyscalls = 'default'\n[ceiling]\nsyscalls = 'strict'", 2, '"strict"'),
        ("[network]\nexceptions = ['example.com:443']", 2, "never a name"),
        ("[network]\nexceptions = ['10.0.0.0/8']", 2, "port"),
        ("[network]\nresolvers = ['ns.example.com']", 2, "port"),
        ("[network]\nresolvers = ['ns.example.com:53']", 2, "not an address"),
        ("[inbound]\nports = ['9-8']", 2, "range"),
        ("[inbound]\nports = [true]", 2, "1 to 65535"),
        ("[inbound]\naddresses = ['localhost']", 2, "not an address"),
        ("[metrics]\naddress = '0.0.0.0'", 2, "loopback"),
        ("[audit]\ndisk_full = 'ignore'", 2, '"stop" or "continue"'),
        ("[audit]\nrotate_size = 1", 2, "at least"),
    ],
)
def test_errors_of_host_toml_name_file_and_line(text: str, line: int, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        host(text)
    assert str(caught.value).startswith(f"host.toml:{line}: ")
    assert why in str(caught.value)


def test_no_host_toml_is_the_default_posture(tmp_path: Path) -> None:
    assert load_host_config(tmp_path / "host.toml") == HostConfig()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.toml"
    path.write_text(POLICY)
    return path


def test_a_file_of_roots_is_believed(file: Path) -> None:
    assert load_plugin_policy(file, HostConfig()).hooks == ("deploy.*",)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o602])
def test_a_file_that_others_can_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(DeniedError, match="others can write it"):
        load_plugin_policy(file)


def test_a_file_of_somebody_else_is_refused(file: Path) -> None:
    os.chown(file, 12345, 0)
    with pytest.raises(DeniedError, match="belongs to uid 12345"):
        load_plugin_policy(file)
    # Only the person who names it at the command line may use it, and never when just anybody can write it.
    assert load_plugin_policy(file, also_owner=12345).hooks == ("deploy.*",)
    with pytest.raises(DeniedError):
        load_plugin_policy(file, also_owner=12346)
    file.chmod(0o646)
    with pytest.raises(DeniedError):
        load_plugin_policy(file, also_owner=12345)


def test_links_fifos_and_folders_are_refused(file: Path, tmp_path: Path) -> None:
    link, fifo = tmp_path / "link.toml", tmp_path / "fifo.toml"
    link.symlink_to(file)
    os.mkfifo(fifo)
    with pytest.raises(DeniedError, match="symbolic link"):
        load_plugin_policy(link)
    with pytest.raises(DeniedError, match="regular"):
        load_plugin_policy(fifo)  # would hang here for ever if it were opened blocking
    with pytest.raises(DeniedError, match="regular"):
        load_plugin_policy(tmp_path)
    with pytest.raises(NotFoundError):
        load_plugin_policy(tmp_path / "none.toml")


def test_size_and_depth_are_bounded(file: Path) -> None:
    file.write_text("# " + "x" * 300_000)
    with pytest.raises(UsageError, match="larger than"):
        load_plugin_policy(file)
    for bomb in ("a = " + "[" * 50_000, "a = " + "[" * 50_000 + "]" * 50_000, ".".join("a" * 500) + " = 1"):
        with pytest.raises(IsolatorError):
            parse_plugin_policy(bomb.encode(), source="p")
    with pytest.raises(UsageError, match="p:2: not UTF-8"):
        parse_plugin_policy(b"a = 1\n\xff", source="p")


def test_variables_of_a_policy_are_read_and_explained_at_their_lines() -> None:
    grant = policy("[env]\nTZ = 'Europe/Berlin'\nNODE_EXTRA_CA_CERTS = '/etc/ssl/company.pem'\nLD_BIND_NOW = '1'\n")
    check_ceiling(grant, HostConfig())
    proposal = meet(manifest(), grant, HostConfig())
    assert proposal.effective.env == {
        "TZ": "Europe/Berlin", "NODE_EXTRA_CA_CERTS": "/etc/ssl/company.pem", "LD_BIND_NOW": "1",
    }  # fmt: skip
    (line,) = [line for line in proposal.lines if line.effective == "TZ=Europe/Berlin"]
    assert (line.field, line.requested, line.verdict, line.source) == ("env", None, "granted", "policies/p.toml:2")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("PATH = '/opt/bin'", "env.PATH: PATH is set by the cage itself; leave it out"),
        ("PLUGIN_SOCKET = '/tmp/s'", "env.PLUGIN_SOCKET: PLUGIN_SOCKET is set by the cage itself"),
        ("HOME = '/root'", "env.HOME: HOME is set by the cage itself"),
        ("TMPDIR = '/'", "env.TMPDIR: TMPDIR is set by the cage itself"),
        ("ISOLATOR_ROOT = '/'", "env.ISOLATOR_ROOT: ISOLATOR_ROOT is set by the cage itself"),
        ("'A=B' = 'c'", 'env.A=B: "A=B" is not the name of a variable'),
        ("7UP = 'c'", 'env.7UP: "7UP" is not the name of a variable'),
        ("WORKERS = 4", 'env.WORKERS: must be text; write "1" for the number 1'),
        (r'A = "a\u0007"', "env.A: holds control or invisible characters"),
        (r'B = "a\nb"', "env.B: holds control or invisible characters"),
        (f"C = '{'x' * 4097}'", "env.C: 4097 characters; at most 4096"),
        ("\n".join(f"V{n} = ''" for n in range(65)), "env: 65 variables; at most 64"),
        ("\n".join(f"V{n} = '{'x' * 4000}'" for n in range(5)), "env: 20010 characters; at most 16384"),
    ],
    ids=lambda text: text[:20],
)
def test_variable_that_a_policy_may_not_set_is_refused_at_its_line(line: str, why: str) -> None:
    found = error_of(f"[env]\n{line}\n")
    assert found.startswith(("policies/p.toml:2: ", "policies/p.toml:1: "))
    assert why in found


def test_byte_order_mark_is_no_part_of_the_file() -> None:
    assert parse_plugin_policy(b"\xef\xbb\xbf[limits]\nmemory = '64M'\n", source="p").limits["memory"] == 64 << 20


def test_ceiling_that_names_public_allows_that_and_what_it_lists_beside() -> None:
    settings = host('[ceiling]\negress = ["public", "b.com:8443"]')
    for granted in ("public", "a.com:443", "a.com:80", "b.com:8443"):
        check_ceiling(policy(f"[grant]\negress = ['{granted}']"), settings)
    for refused in ("a.com:22", "b.com:9000"):
        assert "over the ceiling" in error_of(f"[grant]\negress = ['{refused}']", settings=settings)
    public = host('[ceiling]\negress = "public"')
    assert "over the ceiling" in error_of("[grant]\negress = ['a.com:22']", settings=public)


def test_byte_order_mark_before_a_file_is_no_part_of_it(tmp_path: Path) -> None:
    marked = tmp_path / "slack-deploy-notifier.toml"
    marked.write_text(f"\ufeff{POLICY}")
    assert load_plugin_policy(marked) == parse_plugin_policy(POLICY.encode(), source=str(marked))
    settings = tmp_path / "host.toml"
    settings.write_text(f"\ufeff{HOST}")
    assert load_host_config(settings) == parse_host_config(HOST.encode(), source=str(settings))
    with pytest.raises(UsageError, match=r'^host\.toml:2: .*quote it: memory = "64M"'):
        parse_host_config(b"\xef\xbb\xbf[ceiling]\nmemory = 64M\n", source="host.toml")
