"""Builds the Debian package: ``./dev deb [DIR]``.

Debian's pydantic is too old, so the package brings an environment of its own: ``/usr/lib/isolator/dist``,
made for the Python of the release that it is built on, and tied to that in ``Depends``. Every dependency is pinned by
version and hash in ``requirements.txt``. Nothing is fetched when it is installed; ``postinst`` says how a service runs
from it, and why not from ``dist`` itself.

First this file runs in the development environment, to make a virtual environment of pinned dependencies; then it runs
in that one, for what is importable there is what the package gets.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from email.utils import formatdate
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent
PLACE = Path("/usr/lib/isolator")
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
BUILDER = os.environ.get("DEBFULLNAME", "Isolator developers"), os.environ.get("DEBEMAIL", "isolator@localhost")
MAINTAINER = "{} <{}>".format(*BUILDER)
DEPENDS = (
    f"python3, {PYTHON}, libc6, libcap2, libseccomp2, libnftables1, nftables, iproute2, e2fsprogs, openssl, mount, "
    "procps, passwd, systemd"
)
DESCRIPTION = """\
Runs untrusted third-party plugins in cages
 Each plugin gets a system user, control groups, namespaces, nftables rules
 and a system-call filter of its own before it is executed. Events are
 delivered to it durably, and everything it does is on a tamper-evident record."""
OVERRIDES = """\
# The environment is the package's own: Debian's versions of some of these libraries are too old.
isolator: embedded-library *
isolator: unstripped-binary-or-object *
isolator: hardening-no-fortify-functions *
isolator: shared-library-is-executable *
isolator: extra-license-file *
isolator: package-contains-documentation-outside-usr-share-doc *
isolator: script-not-executable *
isolator: library-not-linked-against-libc *
# A virtual environment names its interpreter so; a library's first line is nothing that anybody executes.
isolator: wrong-path-for-interpreter *
isolator: unusual-interpreter *
isolator: absolute-symlink-in-top-level-folder *
# Whoever builds it is its maintainer: DEBFULLNAME and DEBEMAIL.
isolator: bogus-mail-host *
isolator: bogus-mail-host-in-debian-changelog *
isolator: initial-upload-closes-no-bugs *
isolator: maintainer-script-calls-systemctl *
"""


def main() -> None:
    """Build the package and print its path."""
    parser = argparse.ArgumentParser(prog="./dev deb", description="Build the Debian package for this release.")
    parser.add_argument("output", type=Path, metavar="DIR")
    parser.add_argument("--here", action="store_true", help="with the dependencies of this environment: no network")
    parser.add_argument("--plain", action="store_true", help="uncompressed, with compiled files; for tests")
    options = parser.parse_args()
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="isolator-deb-") as folder:
        if options.here:
            print(build(Path(folder), options.output, plain=options.plain))
            return
        python = pinned_environment(Path(folder) / "pinned")
        command = [str(python), "-I", str(HERE / "build.py"), str(options.output), "--here"]
        sys.exit(subprocess.run(command, check=False).returncode)


def pinned_environment(folder: Path) -> Path:
    """A virtual environment with the dependencies, exactly those of the files here; returns its interpreter."""
    run("/usr/bin/python3", "-I", "-m", "venv", str(folder))
    pip = [str(folder / "bin/python3"), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-input", "--no-deps", "--require-hashes", "--no-compile"]
    run(*pip, "-r", str(HERE / "build-requirements.txt"))
    run(*pip, "--no-build-isolation", "-r", str(HERE / "requirements.txt"))
    paths = f"{SOURCE}\n{SOURCE / 'clients/python'}\n"
    (folder / "lib" / PYTHON / "site-packages/isolator.pth").write_text(paths)
    return folder / "bin/python3"


def build(folder: Path, output: Path, *, plain: bool) -> Path:
    """Lay out the package's files and pack them; returns the path of the package."""
    import isolator
    from isolator.cli import environment
    from isolator.cli.unit import unit
    from isolator.paths import Paths

    version = f"{isolator.__version__}+{PYTHON.replace('python', 'py')}"
    tree = folder / "tree"
    dist = tree / PLACE.relative_to("/") / "dist"
    dist.mkdir(parents=True)
    environment.fill(dist, PYTHON)
    environment.write_program(dist, PLACE / "dist")
    for compiled in list(dist.rglob("__pycache__")) if not plain else ():
        shutil.rmtree(compiled)  # postinst compiles, on the host
    (tree / "usr/bin").mkdir()
    (tree / "usr/bin/isolator").symlink_to("../lib/isolator/current/bin/isolator")

    made = unit(PLACE / "current/bin/isolator", Paths.of("/"))
    header = "# Of the Debian package isolator: put changes into a drop-in ('systemctl edit isolator').\n"
    write(tree / "usr/lib/systemd/system/isolator.service", header + made[made.index("[Unit]") :])
    write(tree / "etc/isolator/host.toml", (SOURCE / "policies/host.toml").read_text())
    (tree / "etc/isolator/policies").mkdir()
    for shell, place in (
        ("bash", "usr/share/bash-completion/completions/isolator"),
        ("zsh", "usr/share/zsh/vendor-completions/_isolator"),
        ("fish", "usr/share/fish/vendor_completions.d/isolator.fish"),
    ):
        write(tree / place, isolator_command(_ISOLATOR_COMPLETE=f"{shell}_source"))
    isolator_command("man", str(folder / "man"))
    man = tree / "usr/share/man/man1"
    man.mkdir(parents=True)
    for page in (folder / "man").iterdir():
        (man / f"{page.name}.gz").write_bytes(gzip.compress(page.read_bytes(), mtime=0))
    doc = tree / "usr/share/doc/isolator"
    write(doc / "copyright", copyright_text())
    write(tree / "usr/share/lintian/overrides/isolator", OVERRIDES)
    changes = f"isolator ({version}) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n"
    changes += f" -- {MAINTAINER}  {formatdate()}\n"
    for name, text in (("changelog.gz", changes), ("CHANGELOG.md.gz", (SOURCE / "CHANGELOG.md").read_text())):
        (doc / name).write_bytes(gzip.compress(text.encode(), mtime=0))
    architecture = run("dpkg", "--print-architecture").strip()
    write_control(tree, version, architecture)
    package = output / f"isolator_{version}_{architecture}.deb"
    run("dpkg-deb", "--root-owner-group", "-Znone" if plain else "-Zxz", "--build", str(tree), str(package))
    return package


def write_control(tree: Path, version: str, architecture: str) -> None:
    """Write what dpkg reads: description, checksums, settings, scripts."""
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    sums = "".join(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n" for path in files)
    size = sum(path.stat().st_size for path in files) >> 10
    control = f"""\
Package: isolator
Version: {version}
Architecture: {architecture}
Maintainer: {MAINTAINER}
Installed-Size: {size}
Depends: {DEPENDS}
Section: admin
Priority: optional
Description: {DESCRIPTION}
"""
    write(tree / "DEBIAN/control", control)
    write(tree / "DEBIAN/md5sums", sums)
    write(tree / "DEBIAN/conffiles", "/etc/isolator/host.toml\n")
    for script in ("preinst", "postinst", "prerm", "postrm"):
        shutil.copyfile(HERE / script, tree / "DEBIAN" / script)
        (tree / "DEBIAN" / script).chmod(0o755)


def isolator_command(*words: str, **variables: str) -> str:
    """What the command prints: it knows its own completions and man pages."""
    code = "import sys; from host.cli.main import main; sys.argv[0] = 'isolator'; sys.exit(main())"
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **variables}
    command = [sys.executable, "-I", "-c", code, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def copyright_text() -> str:
    """Licences: the project's, and where those of the dependencies are."""
    return textwrap.dedent(f"""\
        Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
        Upstream-Name: isolator

        Files: *
        Copyright: 2026 Isolator developers
        License: GPL-3.0-or-later
         On Debian systems the text of the licence is in /usr/share/common-licenses/GPL-3.

        Files: {PLACE.relative_to("/")}/dist/lib/*/site-packages/isolator_client/*
        Copyright: 2026 Isolator developers
        License: Apache-2.0
         On Debian systems the text of the licence is in /usr/share/common-licenses/Apache-2.0.

        Files: {PLACE.relative_to("/")}/dist/lib/*/site-packages/*
        Copyright: their authors
        License: various
         Each library's licence is in its *.dist-info folder.
        """)


def write(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(*command: str) -> str:
    """Run a program; its output. Ends with its last line when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        sys.exit(f"./dev deb: {command[0]}: {' '.join(last)}")
    return result.stdout


if __name__ == "__main__":
    main()
