"""Fetching a package: resolved in a cage, unpacked here into a plugin's folder, asked for its era in another cage."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from host.cli.output import safe
from host.cli.packages.caged import GRACE, Caged, TooMuchError, caged
from host.cli.packages.package import Package, Resolved, parse, read_resolved
from host.wire import mcp as protocol
from host.wire.strict_json import WireError
from isolator.errors import IsolatorError, NotFoundError, UsageError
from isolator.policy.keys import BY_NAME
from isolator.standalone.options import RunOptions

if TYPE_CHECKING:
    from isolator.policy.host import HostConfig

MOST_BYTES, MOST_FILES = 512 << 20, 50_000
_LINE = 1 << 20
PYTHON = "/usr/bin/python3"
_BOUNDS = {
    "memory": 1 << 30, "cpu": 2000, "tasks": 128, "tmp": 768 << 20, "tmp_inodes": 65536, "connects_per_second": 100,
    "connects_open": 256, "nofile": 4096,
}  # fmt: skip
"""Limits of a resolver, where the host's ceiling allows them; keys of policies."""
_REMEDIES = {"npm": "apt-get install npm", "pip": "apt-get install python3-pip"}
_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
_ERA_SECONDS = 15.0
_START = "start"
_OURS = (_START, "plugin.json", "resolved.json")
"""Names that are written here."""


def resolve(root: str | None, package: Package, host_config: HostConfig, folder: Path) -> Resolved:
    """Resolve a package and write its files below ``folder``, which is empty; raises IsolatorError."""
    packages = host_config.packages
    index, *others = packages.npm if package.kind == "npm" else packages.pypi
    host, slash, path = index.partition("/")
    arguments = ("inside.py", package.kind, package.name, package.version, f"https://{host}{slash}{path}")
    egress = (_destination(host), *map(_destination, others))
    with fetching(root, str(package), arguments, egress, host_config, MOST_BYTES + MOST_FILES * 1024) as running:
        try:
            resolved = unpack(running.stdout, folder)
        except (ValueError, OSError) as error:
            code, lines = running.end(GRACE)
            if code == 0:
                raise IsolatorError(str(package), f"the resolver's answer cannot be used: {error}") from None
            why = reason(code, lines)
            raise IsolatorError(str(package), why, "see [packages] of host.toml for where it looks") from None
    if not any(_same(package, package.kind, name.rpartition("@")[0]) for name in resolved.hashes):
        raise IsolatorError(str(package), "the registry gave another package")
    return resolved


def reason(code: int, lines: list[str]) -> str:
    """Why a command in a cage has failed, by its exit code and its last words."""
    shown = [safe(line) for line in map(str.strip, lines) if line][-3:]
    return "; ".join(shown)[:600] or f"the command in the cage ended with {code}"


@contextlib.contextmanager
def folder_for(what: object, *, quiet: bool) -> Iterator[Path]:
    """A folder for what is fetched, which every process can read, until the block ends; says so unless ``quiet``."""
    with tempfile.TemporaryDirectory(prefix="isolator-package-", dir="/var/tmp") as made:
        folder = Path(made)
        folder.chmod(0o755)
        if not quiet:
            click.echo(f"fetching {what}", err=True)
        yield folder


@contextlib.contextmanager
def fetching(
    root: str | None, what: str, arguments: Sequence[str], egress: tuple[str, ...], host: HostConfig, most: int
) -> Iterator[Caged]:
    """A program beside this module, with its arguments, in a cage that reaches these destinations alone.

    Raises IsolatorError, about ``what``, when it writes more than ``most`` bytes or takes longer than ``[packages]``
    has it take.
    """
    script, ca = Path(__file__).with_name(arguments[0]).read_text(), host.packages.ca
    read = (ca,) if ca else ()
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as policy:
        policy.write(_limits(host))
        policy.flush()
        command = (PYTHON, "-I", "-c", script, *arguments[1:], *read)
        options = RunOptions(root=root, command=command, egress=egress, read=read, policy=policy.name)
        with caged(options, most=most, seconds=host.packages.timeout) as running:
            running.stdin.close()
            try:
                yield running
            except TooMuchError as error:
                raise IsolatorError(what, error.why, "see [packages] of host.toml") from None


def _limits(host: HostConfig) -> str:
    """The limits of the resolver's cage, as a policy."""
    ceiling = (host.ceiling if os.geteuid() == 0 else host.runner.ceiling or host.ceiling).limits
    lines: dict[str, list[str]] = {}
    for name, wanted in _BOUNDS.items():
        limit = BY_NAME[name]
        lines.setdefault(limit.section, []).append(limit.toml(min(wanted, getattr(ceiling, name))))
    return "\n".join(line for section, keys in lines.items() for line in (f"[{section}]", *keys))


def _destination(name: str) -> str:
    host = name.partition("/")[0]
    return host if ":" in host else f"{host}:443"


def _same(package: Package, kind: str, name: str) -> bool:
    """Whether the registry of that kind means the package by this name: PyPI has several spellings of one."""
    if kind != package.kind or kind != "pypi":
        return (kind, name) == (package.kind, package.name)
    plain, other = (re.sub(r"[-_.]+", "-", one).lower() for one in (package.name, name))
    return plain == other


def unpack(stream: IO[bytes], folder: Path) -> Resolved:
    """Write the files of a resolver's output; raises ValueError for whatever it must not be, OSError."""
    first = _read_line(stream)
    if isinstance(first, dict) and first.get("missing") in _REMEDIES:
        tool = first["missing"]
        raise NotFoundError(tool, "is not on this host, which fetches packages with it", _REMEDIES[tool])
    resolved = read_resolved(first)
    left = MOST_BYTES
    for count in range(MOST_FILES + 1):
        entry = _read_line(stream)
        if isinstance(entry, dict) and entry.get("end") is True:
            resolved.files = count
            return resolved
        path, size = _entry(entry, left)
        left -= size
        target = folder.joinpath(*path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            while size:
                data = stream.read(min(size, 1 << 16))
                if not data:
                    raise ValueError("it ends too early")
                file.write(data)
                size -= len(data)
        target.chmod(0o755 if entry.get("executable") is True else 0o644)
    raise ValueError(f"more than {MOST_FILES} files")


def _read_line(stream: IO[bytes]) -> Any:
    line = stream.readline(_LINE)
    if not line.endswith(b"\n"):
        raise ValueError("it ends too early")
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _entry(entry: Any, most: int) -> tuple[list[str], int]:
    """The parts of a file's path and its size."""
    path, size = (entry.get("path"), entry.get("size")) if isinstance(entry, dict) else (None, None)
    if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= most:
        raise ValueError("a file has no path or size, or all of them are too large")
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts) or parts[0] in _OURS:
        raise ValueError(f"a file has the path {path[:80]!r}")
    return parts, size


def entry_of(package: Package, resolved: Resolved, program: str | None) -> str:
    """The entry of the program to start; raises UsageError when it is not clear which."""
    names = sorted(resolved.programs)
    wanted = program or (names[0] if len(names) == 1 else package.name.rpartition("/")[2])
    if wanted not in resolved.programs:
        has = f"has {safe(', '.join(names))}" if names else "has no program to start"
        raise UsageError(str(package), has[:300], "name one with --program" if names else "is it an MCP server?")
    return resolved.programs[wanted]


def write_start(package: Package, entry: str, folder: Path) -> None:
    """Write the program that starts the server; raises UsageError for an entry that cannot be started."""
    if package.kind == "npm":
        path = Path(entry)
        if path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
            raise UsageError(str(package), f"its program {entry[:200]!r} is not there")
        text = f'#!/bin/sh\nexec node "${{0%/*}}"/{shlex.quote(str(path))} "$@"\n'
    else:
        if not _ENTRY.fullmatch(entry):
            raise UsageError(str(package), f"its program {entry[:200]!r} is no function of a module")
        module, _, function = entry.partition(":")
        text = (
            f"#!{PYTHON} -I\nimport os, sys\n"
            "sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), 'lib'))\n"
            f"from {module} import {function}\nsys.exit({function}())\n"
        )
    start = folder / _START
    start.write_text(text)
    start.chmod(0o755)


def ask_era(root: str | None, folder: Path, arguments: tuple[str, ...]) -> protocol.Era:
    """Ask the server once, in a cage without a network, which era it speaks: silence and errors mean the older one."""
    options = RunOptions(root=root, command=(str(folder / _START), *arguments), read=(str(folder),), memory="512M")
    number = "era"
    with caged(options, most=_LINE, seconds=_ERA_SECONDS) as running:
        try:
            running.stdin.write(protocol.opening(protocol.STATELESS, number))
            while line := running.stdout.readline():
                try:
                    message = protocol.read(line)
                except WireError:
                    continue
                if isinstance(message, protocol.Answer) and message.id == protocol.Id(True, number):
                    protocol.greeting(protocol.STATELESS, message)
                    return protocol.STATELESS
        except (TooMuchError, OSError, ValueError):
            pass
    return protocol.SESSION


def is_of(package: Package, manifest: Mapping[str, Any]) -> bool:
    """Whether a plugin's manifest was written here for a version of the package."""
    try:
        before = parse(str(manifest.get("description")).split(" ", 1)[0])
    except UsageError:
        return False
    ours = manifest.get("binary") == f"./{_START}" and manifest.get("transport", {}).get("mode") == "mcp"
    return ours and _same(package, before.kind, before.name)


def asked_before(manifest: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arguments and the egress of a manifest that was written here."""
    egress = manifest.get("sandbox", {}).get("network", {}).get("egress", ())
    return tuple(map(str, manifest.get("args", ()))), tuple(map(str, egress))


def write_manifest(
    package: Package, resolved: Resolved, folder: Path, *, name: str | None, era: protocol.Era,
    arguments: tuple[str, ...], egress: tuple[str, ...],
) -> None:  # fmt: skip
    """Write the manifest of the server, and what was resolved beside it."""
    manifest = {
        "name": name or package.plugin_name,
        "version": package.plugin_version,
        "api_version": "1",
        "description": f"{package} {resolved.description}".strip(),
        "binary": f"./{_START}",
        "args": list(arguments),
        "hooks": [],
        "transport": {"mode": "mcp", "era": era},
        "sandbox": {"network": {"egress": list(egress)}},
    }
    (folder / "plugin.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (folder / "resolved.json").write_text(json.dumps({"package": str(package), "hashes": resolved.hashes}, indent=2))
