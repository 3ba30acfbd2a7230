"""``isolator man DIR``: a man page for every command, made of its help. ``isolator install`` and packages call it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from host.cli.help import VARIABLES, exit_codes
from isolator import __version__
from isolator.errors import IsolatorError, translated

NAMES = "isolator*.1"
"""The files that belong to this program."""


@click.command(
    epilog="\b\nExamples:\n  sudo isolator man /usr/local/share/man/man1\n  isolator man pages",
)
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.pass_context
def man(ctx: click.Context, folder: Path) -> None:
    """Write a man page for every command into DIR, in place of older ones there."""
    root = ctx.find_root()
    made = dict(
        pages(root.command, click.Context(root.command, info_name="isolator", help_option_names=["-h", "--help"]))
    )
    with translated(OSError, IsolatorError, str(folder), "", "name a folder of your own"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(NAMES):
            if old.name not in made:
                old.unlink()
        for name, text in made.items():
            (folder / name).write_text(text)
    click.echo(f"wrote {len(made)} pages to {folder}")


def pages(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """File name and text of the page of a command, and of those below it."""
    path = context.command_path.split()
    yield f"{'-'.join(path)}.1", _page(command, context, path)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield from pages(found, click.Context(found, parent=context, info_name=name))


def _page(command: click.Command, context: click.Context, path: list[str]) -> str:
    title = "-".join(path)
    lines = [
        f'.TH "{title.upper()}" "1" "" "Isolator {__version__}" "Isolator"',
        ".SH NAME", f"{_text(title)} \\- {_text(command.get_short_help_str(200).rstrip('.'))}",
        ".SH SYNOPSIS", f".B {_text(' '.join(path))}", _text(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION", *_paragraphs(command.help or ""),
    ]  # fmt: skip
    records = [
        one for parameter in command.get_params(context) if (one := parameter.get_help_record(context)) and one[1]
    ]
    for number, (names, about) in enumerate(records):
        lines += [*([".SH OPTIONS"] if not number else []), ".TP", f".B {_text(names)}", _text(about)]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                lines += [".TP", f".BR {_text(f'{title}-{name}')} (1)", _text(found.get_short_help_str(200))]
    if command.epilog:
        lines += [".SH EXAMPLES AND NOTES", *_paragraphs(command.epilog)]
    lines += [".SH EXIT STATUS", _text(exit_codes(context.command_path)), ".SH ENVIRONMENT"]
    for variable, meaning in VARIABLES.items():
        lines += [".TP", f".B {variable}", _text(f"{meaning}.")]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """A help text as roff; a paragraph that click does not wrap stays as it is written."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip("\n"))):
        kept = paragraph.startswith("\b")
        if number or kept:
            yield ".PP"
        if kept:
            yield from (".nf", *(_text(line) for line in paragraph.splitlines()[1:]), ".fi")
        else:
            yield _text(" ".join(paragraph.split()))


def _text(text: str) -> str:
    """Text with everything escaped that roff would read as its own."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("\b", "")
    return f"\\&{text}" if text[:1] in (".", "'") else text
