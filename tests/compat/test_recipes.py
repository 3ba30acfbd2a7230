"""Recipes for dependencies in docs/plugins.md, as written: what each makes runs in a cage, from a read-only folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from isolator.registration.inspecting import inspect_folder
from tests.docs.blocks import shown_in
from tests.support.cage_fixture import isolator

PAGE = Path(__file__).parents[2] / "docs/plugins.md"
JAVA = "/usr/lib/jvm/java-17-openjdk-amd64/bin"
PYTHON_PATH = 'sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "vendor"))'
SOURCES: dict[str, tuple[str, str, str]] = {
    # Recipe: the tool that it needs, the source's file, the source.
    "Python, pure": ("pip3", "src/bell.py", "import humanize\ndef main(): print('fine', humanize.intcomma(1000))\n"),
    "Python, compiled wheels": (
        "pip3", "bell", f"#!/usr/bin/python3\nimport os, sys\n{PYTHON_PATH}\n"
        "from markupsafe import _speedups, escape\nprint('fine', escape('<'))\n",
    ),
    "Node": (
        "npm", "bell", "#!/usr/bin/node\nconst {hashSync, verifySync} = require('@node-rs/argon2');\n"
        "const semver = require('semver');\n"
        "if (semver.gt('2.0.0', '1.0.0') && verifySync(hashSync('x'), 'x')) console.log('fine');\n",
    ),
    "Go": ("go", "bell.go", "package main\nimport \"fmt\"\nfunc main() { fmt.Println(\"fine\") }\n"),
    "Rust": ("rustc", "bell.rs", "fn main() { println!(\"fine\"); }\n"),
    "C": ("gcc", "bell.c", "#include <stdio.h>\nint main(void) { puts(\"fine\"); return 0; }\n"),
    "Java": (
        "jlink", "Bell.java",
        "class Bell { public static void main(String[] a) { System.out.println(\"fine\"); } }\n",
    ),
}  # fmt: skip
FROM_THE_NETWORK = {"pip3", "npm"}


def recipe(name: str) -> str:
    """The first block of code after the recipe's name."""
    found = re.search(rf"\*\*{re.escape(name)}\*\*.*?```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found, f"docs/plugins.md has no recipe {name}"
    return found[1]


@pytest.mark.parametrize("name", list(SOURCES))
def test_recipe_makes_what_runs_in_a_cage(name: str, everything: bool, root: Path) -> None:
    tool, file, source = SOURCES[name]
    path = f"{JAVA}:/usr/local/bin:/usr/bin:/bin"
    if shutil.which(tool, path=path) is None and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    if tool in FROM_THE_NETWORK and not everything:
        pytest.skip("it downloads packages: with --all")
    folder = root / f"recipe-{len(list(root.iterdir()))}"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(source)
    (folder / file).chmod(0o755)
    made = subprocess.run(
        ["sh", "-eu", "-c", recipe(name)], cwd=folder, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "GOCACHE": str(root / "cache"),
             "GOFLAGS": "-mod=mod", "GOPATH": str(root / "go")},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    staged = shutil.copytree(folder, root / f"staged-{folder.name}", symlinks=True)  # as root's own: it is closed later
    assert not inspect_folder(staged, (70000, 74999)), "plugin add would warn of what the recipe makes"
    (folder / "bell").chmod(0o755)  # as in the store, for whoever may run it at all
    ran = isolator(root, "run", "--cpu", "100%", "--read", str(folder), "--cwd", str(folder), "--", "./bell")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("fine")


def test_page_has_no_other_recipe() -> None:
    assert sorted(map(recipe, SOURCES)) == sorted(block.body for block in shown_in(__file__))
