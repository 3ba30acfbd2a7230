"""Table of the floors, from the import contracts of ``pyproject.toml``."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def floors() -> str:
    """Return one Markdown table for each contract of type ``layers``: floor, packages, their first sentences."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return "\n\n".join(_table(contract) for contract in contracts if contract["type"] == "layers")


def _table(contract: dict[str, list[str]]) -> str:
    (container,) = contract["containers"]
    rows = [f"| floor | `{container}/` | |", "|--:|---|---|"]
    height = len(contract["layers"])
    for index, layer in enumerate(contract["layers"]):
        for name in layer.split(" | "):
            rows.append(f"| {height - index} | `{name}` | {_summary(ROOT / container / name)} |")
    return "\n".join(rows)


def _summary(path: Path) -> str:
    """Return the first line of a package's or module's docstring."""
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text())) or ""
    return text.partition("\n")[0].replace("|", "\\|")
