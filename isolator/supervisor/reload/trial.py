"""Trial of the program that a reload would execute: it reads a copy of the state in the same sandbox, changes nothing.

It answers with one line of JSON on its standard output: ``{"version", "formats", "tables"}`` and, if it would not take
over, ``error``. ``tables``: the version of the host's tables that its host process makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import isolator
from isolator.errors import IsolatorError, UnavailableError, UsageError
from isolator.ipc.formats import TABLES
from isolator.ipc.handover import DaemonState
from isolator.layers.user import add_service_user
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.model import EffectivePolicy
from isolator.registration.registrar import Registrar
from isolator.supervisor import alive
from isolator.supervisor.reload import formats
from isolator.supervisor.reload.program import CHECK, Program
from isolator.supervisor.reload.settings import settings_of

_MOST = 1 << 20
"""Bytes of an answer."""
_UNSAID = 4
"""Version of the tables that a program makes which does not say so."""


async def try_out(program: Program, state: DaemonState, host_toml: str = "", tables: int = 0) -> int:
    """Have the program read the state and the text of host.toml; returns the format to hand it over in.

    ``tables``: the version of those in the host's database, where known. Raises IsolatorError if it would not go on.
    """
    answer = await _answer(program, formats.write(state, host_toml=host_toml))
    if "error" in answer and formats.FORMATS.present not in _formats(answer):
        number = formats.newest_common(_formats(answer))
        answer = await _answer(program, formats.write(state, number, host_toml))
    if "error" in answer:
        raise IsolatorError.from_json(answer["error"])
    known = answer.get("tables", _UNSAID)
    if not isinstance(known, int) or known < tables:
        raise IsolatorError(
            f"trial of {program.path}",
            f"version {str(answer.get('version'))[:40]} is too old for the host's database: a newer one has changed its"
            f" tables to version {tables}, and that one knows {known}",
            "install the newer version again; or stop the daemon, and restore a backup from before",
        )
    return formats.newest_common(_formats(answer))


def _formats(answer: Mapping[str, Any]) -> list[int]:
    found = answer.get("formats")
    return [number for number in found if isinstance(number, int)] if isinstance(found, list) else []


async def _answer(program: Program, fd: int) -> dict[str, Any]:
    try:
        process = await asyncio.create_subprocess_exec(
            *program.with_state(CHECK, fd), executable=program.path, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, pass_fds=[fd], limit=_MOST,
        )  # fmt: skip
    except OSError as error:
        raise IsolatorError(program.path, f"cannot be executed: {error.strerror}", "install it again") from None
    finally:
        os.close(fd)
    assert process.stdout is not None
    why = "it gave no answer"
    try:
        # The daemon serves meanwhile: on a slow host it may take as long as it makes progress.
        line = await alive.answered(process.stdout.readline(), process.pid, "trial", ticks=alive.BUSY_TICKS)
        answer = json.loads(line)
        if isinstance(answer, dict):
            return answer
    except UnavailableError as error:
        why = f"it {error.why}"
    except ValueError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    remedy = f"see the daemon's log, and restart the daemon if {program.path} is of a version that cannot reload"
    raise IsolatorError(f"trial of {program.path}", why, remedy)


def check_handover(paths: Paths, config: str | None, fd: int) -> str:
    """The answer of the program that is tried."""
    answer: dict[str, Any] = {"version": isolator.__version__, "formats": formats.FORMATS.read, "tables": TABLES}
    try:
        state, host_toml = formats.read(fd)
        _check(paths, settings_of(host_toml, Path(config) if config else paths.host_toml), state)
    except IsolatorError as error:
        answer["error"] = error.to_json()
    except OSError as error:
        answer["error"] = IsolatorError(error.filename or "reload", error.strerror or str(error)).to_json()
    return json.dumps(answer)


def _check(paths: Paths, host_config: HostConfig, state: DaemonState) -> None:
    from isolator.supervisor.supervisor import check_host

    check_host(paths, host_config)
    if host_config.cluster is not None:
        from isolator.supervisor.cluster_files import check

        check(host_config.cluster, *add_service_user(paths.named("isolator-host"), comment="Isolator host"))
    registrar = Registrar(paths, host_config)
    registrar.read_ahead()
    runs = state.runners.runs if state.runners is not None else ()
    policies = [(plugin.name, plugin.effective) for plugin in state.plugins]
    for name, effective in (*policies, *((f"run {run.id} of uid {run.uid}", run.effective) for run in runs)):
        if effective is not None:
            try:
                EffectivePolicy.model_validate(effective)
            except ValueError as error:
                raise UsageError(f"policy of {name}", f"is not one of this version: {error}") from None
    for plugin in state.plugins:
        if plugin.run is not None or plugin.invocations:
            registrar.load(plugin.name)
