"""Imports without OpenSSL, asyncio that takes it up later, and modules that are imported when something fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HANDSHAKE = """
import sys
sys.path[:0] = {paths!r}
from isolator.base.lean import give_asyncio_tls, import_asyncio
import_asyncio()
import asyncio
assert "ssl" not in sys.modules and "_ssl" not in sys.modules
{take_up}
import ssl

async def main():
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain({pair!r})
    async def serve(reader, writer):
        writer.write(await reader.readline())
        writer.close()
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=ours)
    theirs = ssl.create_default_context(cafile={pair!r})
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await writer.start_tls(theirs, server_hostname="localhost")
    writer.write(b"over TLS\\n")
    print((await reader.readline()).decode(), end="")
    writer.close()
    server.close()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for ``localhost`` in one file."""
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", path, "-out", "-"],
        check=True, stdout=(certificate := path.with_suffix(".crt")).open("wb"), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + certificate.read_bytes())
    return path


def over_tls(pair: Path, take_up: str) -> subprocess.CompletedProcess[str]:
    """Send a line over TLS with an asyncio that was imported without."""
    code = HANDSHAKE.format(paths=sys.path, pair=str(pair), take_up=take_up)
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)


def test_asyncio_that_was_imported_without_tls_speaks_it_once_it_is_given_it(pair: Path) -> None:
    assert over_tls(pair, "give_asyncio_tls()").stdout == "over TLS\n"
    refused = over_tls(pair, "")
    assert refused.stdout == "" and refused.returncode != 0


PUT_OFF = """
import sys
sys.path[:0] = {paths!r}
from isolator.base.lean import import_asyncio, put_off_for_a_command
put_off_for_a_command()
import_asyncio()
import asyncio
import pathlib
from concurrent.futures import ThreadPoolExecutor

async def quiet():
    with ThreadPoolExecutor() as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, len, "four")

assert asyncio.run(quiet()) == 4
print(sorted(name for name in {names!r} if "__file__" in vars(sys.modules.get(name, object))))

async def failing():
    asyncio.get_running_loop().create_future().set_exception(ValueError("that nobody retrieves"))
    child = await asyncio.create_subprocess_exec("echo", "a program", stdout=asyncio.subprocess.PIPE)
    print((await child.communicate())[0])

asyncio.run(failing())
print(pathlib.Path("/a b").as_uri())
import logging, logging.handlers, traceback
print(logging.getLogger("asyncio").level, logging.handlers.logging.INFO)
print(traceback.format_exception_only(ValueError("seen")))
"""


def test_modules_that_are_put_off_come_when_they_are_used() -> None:
    names = ["inspect", "logging", "subprocess", "traceback", "urllib.parse"]
    code = PUT_OFF.format(paths=sys.path, names=names)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", "b'a program\\n'", "file:///a%20b", "0 20", "['ValueError: seen\\n']"]
    assert "Future exception was never retrieved" in done.stderr
    assert "ValueError: that nobody retrieves" in done.stderr


def test_part_of_a_package_that_is_put_off_is_found_in_the_package() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; from isolator.base.lean import import_asyncio; import_asyncio(); "
    code += "import urllib.parse; print('urllib.parse' in sys.modules, urllib.parse.quote('a b'))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True a%20b\n", done.stderr
