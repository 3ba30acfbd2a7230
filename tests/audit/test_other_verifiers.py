"""The verifiers in docs, which know nothing of this program, agree with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.audit import files
from isolator.audit.log import Limits
from tests.audit.tamper import rechain
from tests.audit.test_verify import Written

SCRIPT = Path(__file__).resolve().parents[2] / "docs/verify.pl"

pytestmark = pytest.mark.skipif(not shutil.which("perl") or not shutil.which("openssl"), reason="needs perl, openssl")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    yield Written(tmp_path_factory.mktemp("perl"), 200, Limits(seal_records=25, rotate_size=20_000))


def run(written: Written, *paths: Path) -> tuple[int, str]:
    command = ["perl", str(SCRIPT), str(written.log / "public.pem"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_perl_verifier_accepts_an_untouched_trail(written: Written) -> None:
    paths = files.trail(written.log)
    assert len(paths) > 2
    code, output = run(written, *paths)
    report = written.verify()
    assert code == 0, output
    assert f"{report.last} is the last record, {report.seals} seals, {report.unsealed} records" in output


@pytest.mark.parametrize("how", ["edit", "delete", "swap", "rechain", "file missing"])
def test_perl_verifier_refuses_a_changed_trail(written: Written, how: str, tmp_path: Path) -> None:
    paths = files.trail(written.log)
    lines = paths[0].read_bytes().splitlines()
    match how:
        case "edit":
            lines[3] = lines[3].replace(b'"number":3', b'"number":4')
        case "delete":
            del lines[3]
        case "swap":
            lines[3], lines[4] = lines[4], lines[3]
        case "rechain":
            lines = rechain([line.replace(b'"number":3}', b'"number":4}') for line in lines])
    changed = tmp_path / paths[0].name
    changed.write_bytes(b"".join(line + b"\n" for line in lines))
    shown = [paths[0], *paths[2:]] if how == "file missing" else [changed, *paths[1:]]
    code, output = run(written, *shown)
    assert code == 1
    assert output.startswith("does not fit: ")
    if how == "rechain":
        assert "the signature of seal" in output


def test_verifier_in_the_documentation_works(written: Written, tmp_path: Path) -> None:
    text = (SCRIPT.parent / "audit.md").read_text()
    program = tmp_path / "verifier.py"
    program.write_text(text.split("```python\n", 1)[1].split("```", 1)[0])
    paths = files.trail(written.log)
    command = [sys.executable, str(program), str(written.log / "public.pem")]
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"{written.verify().last} records fit"), done.stderr
    changed = tmp_path / paths[0].name
    changed.write_bytes(paths[0].read_bytes().replace(b'"number":3}', b'"number":4}'))
    refused = subprocess.run([*command, str(changed)], capture_output=True, text=True, check=False)
    assert "record 4 was changed" in refused.stderr
