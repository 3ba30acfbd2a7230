"""The commands of README and docs are run as they stand, page by page, against one daemon.

What stands for something of the reader's is replaced: a path, an id, the other host. A command has to end with 0, or as
its page says; questions are answered yes. A block that shows output has to show what is printed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks, fits, run
from tests.docs.scene import READER, Scene, scene, write_plugin_of

WIDE = (pytest.mark.wide,)
Before = Callable[[Scene], object]


@dataclass(frozen=True)
class Play:
    """How one block is run; keys of the mappings are words of the command that they are about."""

    page: str
    words: str
    """Words that this block alone has on its page."""
    replace: Mapping[str, str] = field(default_factory=dict)
    """Text that stands for the reader's own; ``{root}`` is the daemon's root, ``{here}`` the reader's folder."""
    codes: Mapping[str, int] = field(default_factory=dict)
    """Exit codes other than 0."""
    before: Mapping[str, Before] = field(default_factory=dict)
    """The state of things that a command speaks of."""
    follows: Mapping[str, Callable[[Scene, str], bool]] = field(default_factory=dict)
    """Commands that do not end by themselves: whether one has shown what it should."""
    refuses: str = ""
    """Words of the command whose question is answered no."""
    user: int | None = None
    marks: tuple[pytest.MarkDecorator, ...] = ()

    @property
    def block(self) -> Block:
        """The block."""
        (found,) = [b for b in blocks(ROOT / self.page) if b.is_shell and self.words in f"\n{b.body}"]
        return found


def printed(scene: Scene, text: str) -> bool:
    """It has printed something."""
    return bool(text)


def copied(scene: Scene, text: str) -> bool:
    """Records have come to the other host."""
    copy = scene.folder / "isolator-HOST.jsonl"
    return copy.exists() and copy.stat().st_size > 0


def fresh_copy(scene: Scene) -> None:
    (scene.folder / "isolator-HOST.jsonl").unlink(missing_ok=True)


def trail_copied(scene: Scene) -> None:
    """A copy of the trail, with its last seal."""
    source = scene.daemon.root / "var/log/isolator/audit"
    shutil.copytree(source, scene.folder / "COPY", dirs_exist_ok=True)
    shutil.copy(source / "public.pem", scene.folder)


def resumed(scene: Scene) -> None:
    """Undo what a block before may have ended with."""
    scene.daemon.cli("plugin", "resume", "slack")


def held_back(scene: Scene) -> None:
    """An event that waits for its next attempt: something needs the operator."""
    resumed(scene)
    scene.emit("later", "retry")


def given_up(scene: Scene) -> None:
    """A dead letter."""
    resumed(scene)
    scene.emit("never", "dead")


def another_waits(scene: Scene) -> None:
    """A version that asks for more than the one in use, and waits."""
    scene.version("3.0", permissions=["read:projects", "read:users"])
    scene.daemon.cli("plugin", "update", "slack", str(scene.folder / "slack-3.0"), code=5)


def asks_for_more(scene: Scene) -> None:
    scene.version("2.0", sandbox={"network": {"egress": [{"host": "hooks.slack.com", "ports": [443]}]}})


def notifier_asks_for_more(scene: Scene) -> None:
    """The notifier's next version, on a daemon where the one before works."""
    old, new = scene.folder / "examples/slack-deploy-notifier", scene.folder / "slack-1.3"
    shutil.copytree(old, new)
    text = (new / "plugin.json").read_text().replace('"1.2.0"', '"1.3.0"').replace('"read:projects"', '"read:users"')
    (new / "plugin.json").write_text(text)
    scene.daemon.cli("plugin", "config", "slack-deploy-notifier", "set", "slack_webhook_url=https://hooks.slack.com/x")


def bell_runs(scene: Scene, text: str) -> bool:
    """The program runs, in a cage."""
    wanted = f"{scene.folder}/deploy-bell/deploy-bell".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:1] == [b"/usr/bin/python3"] and wanted in words:
            return True
    return False


def nothing_is_there(scene: Scene) -> None:
    """The daemon has ended, and its host is a new one."""
    scene.daemon.stop()
    scene.daemon.cli("uninstall", "--purge", "--yes")


PLAYS = (
    Play("docs/audit.md", "tail -f    ", follows={"tail -f": printed}),
    Play(
        "docs/audit.md", "verify COPY/audit", replace={"audit.000000064001.jsonl": "audit.jsonl"},
        before={"verify COPY/ ": trail_copied},
    ),
    Play(
        "docs/audit.md", "ssh other-host", replace={"--after 12001": "--after 1"}, before={"tail": fresh_copy},
        follows={"tail": copied}, marks=WIDE,
    ),
    Play("docs/console.md", "curl", replace={"/run/isolator": "{root}/run/isolator", "curl": "curl -fsS"}),
    Play("docs/events.md", "event types deploy.completed"),
    Play("docs/events.md", "@payload.json", replace={"… |": "cat payload.json |"}),
    Play(
        "docs/events.md", "event dead",
        before={"replay": given_up, "retry ev": held_back, "skip": held_back, "cancel": held_back},
    ),
    Play("docs/host-api.md", "rotate-key", replace={"NAME": "slack"}),
    Play("docs/mcp.md", "mcp approve"),
    Play("docs/operations.md", "isolator status", before={"status": held_back}, codes={"status": 1},
         follows={"logs": printed}),
    Play(
        "docs/operations.md", "plugin reject", before={"update": asks_for_more, "reject": another_waits},
        codes={"update": 5}, refuses="update",
    ),
    Play("docs/operations.md", "policy check", replace={"/etc/isolator": "{root}/etc/isolator"}),
    Play("docs/operations.md", "event skip", before={"retry ev": held_back, "skip": held_back}, marks=WIDE),
    Play(
        "docs/plugins.md", "plugin add ./deploy-bell", replace={"--wait": "--wait --timeout 1"}, codes={"emit": 1},
    ),
    Play("docs/plugins.md", "PLUGIN_SOCKET=", before={"run": resumed}, codes={"run": 130}, follows={"run": bell_runs},
         marks=WIDE),
    Play("docs/policy.md", "policy explain ./examples"),
    Play(
        "docs/policy.md", "policy check policies/*.toml", replace={"./plugin.json": "./deploy-bell/plugin.json"},
        marks=WIDE,
    ),
    Play("docs/policy.md", "slack-1.3", before={"update": notifier_asks_for_more}, refuses="update",
        codes={"update": 5}, marks=WIDE),
    Play("docs/run.md", "make -j2", replace={"/opt/weather": "{here}"}, marks=WIDE),
    Play("docs/run.md", "\nisolator run --write", user=READER, marks=WIDE),
    # A program by path, which nobody but root may change; an event would start it.
    Play("docs/manifest.md", "google-indexer", replace={"/opt/plugins/google-indexer": "/usr/bin/sleep"}),
    Play(
        "docs/operations.md", "isolator restore", before={"restore": nothing_is_there},
        replace={"/var/backups": "{root}", "/root": "{here}"}, marks=WIDE,
    ),
)  # fmt: skip
"""In the order in which they are run; the last one ends the daemon."""


@pytest.fixture(scope="module")
def place() -> Iterator[Scene]:
    with scene() as made:
        yield made


def test_program_of_the_clients_page_serves_emits_and_reads_the_trail(place: Scene) -> None:
    (block,) = [b for b in blocks(ROOT / "clients/python/README.md") if "client.serve(" in b.body]
    (place.folder / "client.py").write_text(block.body)
    ran = place.run("python3 client.py")
    assert ran.returncode == 0 and " event.response slack\n" in ran.stdout, ran


@pytest.mark.parametrize(
    "play", [pytest.param(p, id=f"{Path(p.page).stem}: {p.words.strip()}", marks=p.marks) for p in PLAYS]
)
def test_commands_of_a_block_do_what_the_page_says(place: Scene, play: Play) -> None:
    place.user = play.user
    for command, shown in play.block.steps():
        line = command
        for old, new in play.replace.items():
            line = line.replace(old, new.format(root=place.daemon.root, here=place.folder))
        for words, prepare in play.before.items():
            if words in command:
                prepare(place)
        follows = [seen for words, seen in play.follows.items() if words in command]
        ran = (
            place.follow(line, lambda text, seen=follows[0]: seen(place, text))
            if follows
            else place.run(line, "n" if play.refuses and play.refuses in command else "y")
        )
        code = next((code for words, code in play.codes.items() if words in command), 0)
        assert "|" in command or ran.returncode == code, (line, ran)
        assert not shown or fits(shown, ran.stdout), (line, ran.stdout)


def test_first_plugin_of_the_readme_runs_as_shown(shared_dir: Path) -> None:
    write_plugin_of("README.md", shared_dir / "hello-deploy")
    (block,) = [b for b in blocks(ROOT / "README.md") if "hello-deploy --yes" in b.body]
    for command, shown, output in run(block, shared_dir, {"/var/lib/isolator-try": f"{shared_dir}/root"}):
        assert fits(shown, output), (command, output)
