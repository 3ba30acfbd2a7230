"""The root of the command line, as click shows it: the one place that knows both packages.

Every command lives in a module of its own that is imported only when it is called, so that
``isolator --help`` answers in well under 200 ms.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import NoReturn

import click

from host.cli.help import use_formatter
from host.cli.many import load_command
from isolator import __version__
from isolator.errors import IsolatorError, UsageError, nearest

# command -> (module, attribute, one line for --help); kept here so that --help imports none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("isolator.cli.serve:serve", "Run the daemon in the foreground."),
    "reload": ("host.cli.reload:reload", "Take over an update and host.toml; plugins go on running."),
    "run": ("isolator.cli.run:run", "Run one command in a cage; needs no daemon."),
    "status": ("host.cli.status:status", "Show the daemon on one screen; exit code for scripts."),
    "top": ("host.cli.top.command:top", "Show what plugins use and do, as it changes."),
    "console": ("host.console.command:console", "Print the URL of the web console."),
    "report": ("host.console.report:report", "Write what happened into one HTML file."),
    "check": ("host.cli.check:check", "Show which controls this host can enforce, and how to mend gaps."),
    "prove": ("isolator.cli.prove:prove", "Attack a cage from inside and show what held."),
    "plugin": ("host.cli.plugin:plugin", "Add, inspect, start, stop, update and remove plugins."),
    "mcp": ("host.cli.mcp.command:mcp", "Use MCP servers from editors and agents; approve their tools."),
    "event": ("host.cli.event:event", "Emit events and follow their deliveries."),
    "audit": ("host.cli.audit:audit", "Read and verify the audit trail."),
    "policy": ("host.plugins.policy_command:policy", "Check and explain policy files."),
    "new": ("host.authoring.new:new", "Start a new plugin from a working example."),
    "schema": ("host.authoring.schema_command:schema", "Print JSON Schemas of manifests, policies, payloads."),
    "certify": ("host.authoring.certify.command:certify", "Play the faults of the protocol against a plugin."),
    "dev": ("host.authoring.dev.command:dev", "Run a plugin in its cage while you write it."),
    "pack": ("host.authoring.pack:pack", "Pack a plugin's folder into one file."),
    "sign": ("host.authoring.sign:sign", "Sign a package, or make a key."),
    "cluster": ("host.cluster.command:cluster", "Set up and watch a cluster of several hosts."),
    "backup": ("host.cli.backup:backup", "Copy everything a daemon keeps to a new folder."),
    "restore": ("host.cli.backup:restore", "Put a backup in the place of what is there."),
    "gc": ("isolator.cli.gc:gc", "Remove what earlier runs left behind."),
    "man": ("host.cli.man:man", "Write a man page for every command."),
    "install": ("isolator.cli.install:install", "Install the systemd service."),
    "uninstall": ("isolator.cli.install:uninstall", "Remove the service, its users and its files."),
    "config": ("host.cli.config:config", "Manage the daemon's keys."),
}


use_formatter()


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        return load_command(entry[0])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = nearest(args[0], COMMANDS) if args[0] not in COMMANDS else ""
        if near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[1]) for name, entry in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="\b\nExamples:\n  isolator check\n  isolator run -- cat /etc/shadow\n"
    "  isolator plugin add ./examples/slack-deploy-notifier\n  isolator audit tail -f\n\n"
    "With --json an error is JSON too, on stderr.",
)
@click.option("--root", metavar="DIR", envvar="ISOLATOR_ROOT", help="Put every path below DIR (default: /).")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="isolator")
@click.pass_context
def cli(ctx: click.Context, root: str | None, debug: bool) -> None:
    """Run untrusted plugins in cages, deliver events to them, and keep a record of everything they do."""
    ctx.obj = root


def call() -> None:
    """Call the command that was named: every failure becomes one line on stderr and an exit code of the contract."""
    try:
        code = cli.main(standalone_mode=False)
    except BaseException as error:
        report(error)
    sys.exit(code if isinstance(code, int) else 0)


def report(failure: BaseException) -> NoReturn:
    """Write one line about a failure, and exit."""
    options = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    debug = "--debug" in options

    def say(error: IsolatorError) -> None:
        if "--json" in options:
            shown = {"error": {**error.to_json(), "exit_code": error.exit_code}}
            click.echo(json.dumps(shown), err=True)
        else:
            click.echo(f"isolator: {error}", err=True)

    try:
        raise failure
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("isolator: cancelled", err=True)
        sys.exit(1)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"; try 'isolator {' '.join(error.ctx.command_path.split()[1:])} --help'".replace("  ", " ")
        else:
            hint = ""
        kind = UsageError if isinstance(error, click.UsageError) else IsolatorError
        message = " ".join(error.format_message().split())  # click writes choices on lines of their own
        say(kind(f"{message.rstrip('.')}{hint}"))
        sys.exit(kind.exit_code)
    except IsolatorError as error:
        if debug:
            traceback.print_exc()
        say(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        say(IsolatorError(type(error).__name__, str(error), "run again with --debug and report it"))
        sys.exit(1)
