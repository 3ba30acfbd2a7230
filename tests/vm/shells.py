"""What a shell completes, asked of the shell itself with the files that the installation wrote."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time

from isolator.cli.install import COMPLETIONS
from tests.support.timeouts import seconds

_READY = b"now-it-is-ready\r\n"
_SET_UP = b"autoload -Uz compinit; compinit -u; echo now-'it'-is-ready\n"


def completed(shell: str, line: str, wanted: str) -> bool:
    """Whether ``wanted`` is what ``shell`` makes of the last, unfinished word of ``line``."""
    if shell == "zsh":
        return _at_its_prompt(line.encode(), wanted.encode())
    words = line.split()
    ask = {
        "bash": f". {COMPLETIONS['bash']}; COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}; "
        '_isolator_completion isolator; echo "${COMPREPLY[@]}"',
        "fish": f"complete -C '{line}' | string split -f1 \\t",
    }[shell]
    found = subprocess.run([shell, "-c", ask], capture_output=True, text=True, check=True)
    return found.stdout.split() == [wanted]


def _at_its_prompt(line: bytes, wanted: bytes) -> bool:
    """zsh completes for a person at a terminal only."""
    terminal, inner = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "PS1": "$ "}
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
    )
    os.close(inner)
    try:
        os.write(terminal, _SET_UP)
        assert _READY in _until(terminal, _READY)
        os.write(terminal, line + b"\t")
        whole = line[: line.rindex(b" ") + 1] + wanted
        return whole in _until(terminal, whole)
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def _until(terminal: int, text: bytes) -> bytes:
    """What it wrote until the text was seen, or until that is no longer to be expected."""
    shown, deadline = b"", time.monotonic() + seconds(10)
    while text not in shown and (left := deadline - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            shown += os.read(terminal, 4096)
    return shown
