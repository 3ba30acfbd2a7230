"""The resolver, which runs in a cage: has npm or pip fetch a package, and writes it to standard output.

``python3 -I -c TEXT KIND NAME VERSION INDEX [CA]``; the standard library alone. No script of a package is run: npm is
told so, and of Python's packages only wheels are taken, which have none.

Output: one line of JSON, ``{"missing": TOOL}`` or the report (``package.Resolved``), then for each file a line of JSON
(``path``, ``size``, ``executable``) and its bytes; at last ``{"end": true}``.
"""

from __future__ import annotations

import configparser
import email
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

OUT = Path("/tmp/package")
REPORT = Path("/tmp/report.json")
EXIT_FAILED = 70


def npm(name: str, version: str, index: str, ca: str) -> dict[str, Any] | None:
    """Have npm fetch it with everything that it depends on; None without npm."""
    if shutil.which("npm") is None:
        return None
    (OUT / "package.json").write_text("{}")
    _run(
        "npm", "install", "--ignore-scripts", "--no-bin-links", "--omit=dev", "--no-audit", "--no-fund",
        "--no-update-notifier", "--save-exact", "--registry", index, "--cache", "/tmp/cache", "--fetch-retries", "1",
        "--userconfig", "/dev/null", "--globalconfig", "/tmp/npmrc", "--loglevel", "error",
        *(["--cafile", ca] if ca else []), "--", f"{name}@{version}",
    )  # fmt: skip
    lock = json.loads((OUT / "package-lock.json").read_text())
    hashes = {
        f"{place.rpartition('node_modules/')[2]}@{entry.get('version')}": entry.get("integrity") or ""
        for place, entry in lock["packages"].items()
        if place
    }
    own = json.loads((OUT / "node_modules" / name / "package.json").read_text())
    found = own.get("bin") or {}
    programs = {name.rpartition("/")[2]: found} if isinstance(found, str) else found
    return {
        "programs": {program: f"node_modules/{name}/{path}" for program, path in programs.items()},
        "hashes": hashes,
        "description": own.get("description"),
    }


def pypi(name: str, version: str, index: str, ca: str) -> dict[str, Any] | None:
    """Have pip fetch the wheels of it and of everything that it depends on; None without pip."""
    command = [sys.executable, "-I", "-m", "pip"]
    if subprocess.run([*command, "--version"], check=False, capture_output=True).returncode:
        return None
    _run(
        *command, "install", "--isolated", "--no-input", "--only-binary", ":all:", "--no-compile", "--no-cache-dir",
        "--disable-pip-version-check", "--no-warn-script-location", "--progress-bar", "off", "--quiet",
        "--retries", "1", "--target", str(OUT / "lib"), "--report", str(REPORT), "--index-url", index,
        *(["--cert", ca] if ca else []), f"{name}=={version}",
    )  # fmt: skip
    hashes, own = {}, None
    for item in json.loads(REPORT.read_text())["install"]:
        metadata, archive = item["metadata"], item["download_info"].get("archive_info", {})
        digest = archive.get("hashes", {}).get("sha256") or archive.get("hash", "").removeprefix("sha256=")
        hashes[f"{metadata['name']}@{metadata['version']}"] = f"sha256-{digest}" if digest else ""
        if item.get("requested"):
            own = metadata["name"]
    programs: dict[str, str] = {}
    for folder in (OUT / "lib").glob("*.dist-info"):
        if email.message_from_string((folder / "METADATA").read_text(errors="replace"))["Name"] == own:
            entries = configparser.ConfigParser(delimiters=("=",), interpolation=None)
            entries.optionxform = str  # type: ignore[assignment,method-assign]  # names as they are
            entries.read(folder / "entry_points.txt")
            if entries.has_section("console_scripts"):
                programs = {key: value.split("[")[0].strip() for key, value in entries["console_scripts"].items()}
    return {"programs": programs, "hashes": hashes, "description": ""}


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, cwd=OUT, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())
    if done.returncode:
        sys.exit(EXIT_FAILED)


def write(report: dict[str, Any]) -> None:
    """Write the report and every file."""
    out = sys.stdout.buffer

    def line(value: object) -> None:
        out.write(json.dumps(value).encode() + b"\n")

    line(report)
    for folder, _, names in os.walk(OUT):
        for name in names:
            path = Path(folder, name)
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                sys.exit(f"{path.relative_to(OUT)}: is no plain file")
            shown = {"path": str(path.relative_to(OUT)), "size": status.st_size, "executable": status.st_mode & 1 == 1}
            line(shown)
            with path.open("rb") as file:
                shutil.copyfileobj(file, out)
    line({"end": True})
    out.flush()


def main() -> None:
    """Resolve the package that the arguments name."""
    kind, name, version, index, *ca = sys.argv[1:]
    OUT.mkdir()
    tool = {"npm": npm, "pypi": pypi}[kind]
    report = tool(name, version, index, ca[0] if ca else "")
    if report is None:
        print(json.dumps({"missing": {"npm": "npm", "pypi": "pip"}[kind]}), flush=True)
        return
    write(report)


if __name__ == "__main__":
    main()
