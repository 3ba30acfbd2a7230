"""``isolator console``: a URL of the console that runs with the daemon, or a console in the foreground."""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path

import click

from host.wire.strict_json import parse_object
from isolator.cli.output import here, print_json
from isolator.errors import IsolatorError, UnavailableError, translated
from isolator.paths import Paths

_HINT = (
    "Open it in a browser on this host; it works once. From another machine: ssh -L {port}:127.0.0.1:{port} HOST, and "
    "the same URL there. A browser that does not know names below localhost takes 127.0.0.1 in its place."
)

_URL = re.compile(r"http://i[0-9a-f]{16}\.localhost:[0-9]{1,5}/enter\?token=[\w-]{43}", re.ASCII)


@click.command(
    epilog="\b\nExamples:\n  isolator console\n  isolator console --port 8090\n"
    "  isolator console --json | jq -r .url\n\n"
    "Where [console] of host.toml has a port, the daemon's own console makes the URL;\n"
    "else one is served here, with your rights, until Ctrl-C."
)
@click.option("--port", type=click.IntRange(0, 65535), help="Serve in the foreground on this port (0: any).")
@here
def console(root: str | None, port: int | None, as_json: bool) -> None:
    """Print the URL of the web console, with a token that works once."""
    paths = Paths.of(root)
    if port is None and (url := _url_of_the_daemons(paths.console_socket)) is not None:
        _print(url, as_json=as_json)
        return
    missing = [name for name in ("starlette", "uvicorn", "jinja2") if find_spec(name) is None]
    if missing:
        why = f"{', '.join(missing)} not installed"
        raise UnavailableError("isolator console", why, "pip install 'isolator[console]'")
    try:
        asyncio.run(_serve(paths, port or 0, as_json=as_json))
    except KeyboardInterrupt:
        return


def _print(url: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"url": url})
    else:
        port = url.partition("/enter")[0].rpartition(":")[2]
        click.echo(url)
        click.echo(_HINT.format(port=port), err=True)


def _url_of_the_daemons(path: Path) -> str | None:
    """A URL of the daemon's console; None when it has none, or none with pages. Raises IsolatorError when refused."""
    connection = http.client.HTTPConnection("localhost", timeout=30)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(os.fspath(path))
        connection.request("POST", "/v1/token", body=b"")
        answer = connection.getresponse()
        found = parse_object(answer.read(1 << 16))
    except PermissionError:
        why = f"{path} belongs to root and the group of the console"
        raise IsolatorError("isolator console", why, f"join it: usermod -a -G {path.group()} USER") from None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    if answer.status == 503:
        return None
    if answer.status != 200:
        error = found.get("error")
        raise IsolatorError.from_json(error if isinstance(error, dict) else {})
    url = found.get("url")
    if not isinstance(url, str) or not _URL.fullmatch(url):  # printed on a terminal, and opened
        raise IsolatorError("isolator console", "the console's answer is no URL of its own", "isolator reload")
    return url


async def _serve(paths: Paths, port: int, *, as_json: bool) -> None:
    from host.console.serving import Serving
    from host.console.sessions import Sessions

    with translated(OSError, UnavailableError, f"port {port}", "", "choose another with --port"):
        listener = socket.create_server(("127.0.0.1", port), backlog=64)
    serving = Serving(paths, [listener], Sessions())
    try:
        await serving.start()
        await serving.check()
        _print(serving.app.url_for(os.getuid()), as_json=as_json)
        await asyncio.Event().wait()
    finally:
        await serving.end()
