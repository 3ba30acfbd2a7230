"""The page of the example platform: its commands are run as they stand, from the daemon's start to its removal."""

from __future__ import annotations

import json
from pathlib import Path

from tests.docs.blocks import ROOT, shown_in
from tests.docs.shell import Shell
from tests.system.daemon import wait_for

UNTIL = {"isolator serve &": "isolator: ready", "--data": "connected to the daemon"}
"""What a job has to have written before the page goes on, by words of its command."""
KINDS = {"project.created", "deploy.started", "deploy.completed", "deploy.failed", "domain.added", "error.detected"}


def test_platform_of_the_example_is_tried_as_its_page_says(shared_dir: Path) -> None:
    start, connect, use, remove = shown_in(__file__)
    places = {
        "/var/lib/isolator-try": f"{shared_dir}/root", "/opt/platform-try": f"{shared_dir}/platform",
        "/var/lib/platform-try": f"{shared_dir}/data",
    }  # fmt: skip
    ids: dict[str, str] = {}

    def typed(command: str) -> str:
        for word, value in (places | ids).items():
            command = command.replace(word, value)
        return command

    def kinds(shell: Shell) -> set[str]:
        return {row["name"] for row in json.loads(shell.do("isolator event list --json"))}

    with Shell(ROOT) as shell:
        for block in (start, connect):
            for command, _ in block.steps():
                until = next((text for words, text in UNTIL.items() if words in command), "")
                shell.do(typed(command), until)
        for command, _ in use.steps():
            if command.startswith("api "):
                answer = json.loads(shell.do(typed(command)))
                assert "error" not in answer, (command, answer)
                ids.setdefault("PRJ", str(answer.get("id")))
                if "/deployments" in command:
                    ids.setdefault("DEP", str(answer.get("id")))
            else:
                shell.do(typed(command))
        wait_for(lambda: kinds(shell) >= KINDS, what="not every event has come")
        for command, _ in remove.steps():
            shell.do(typed(command))
    assert not list(shared_dir.iterdir())
