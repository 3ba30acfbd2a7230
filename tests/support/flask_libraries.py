"""Flask and what it needs, in a plugin's folder: what its ``build`` would fetch, from this environment."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

_PACKAGES = ("flask", "werkzeug", "jinja2", "markupsafe", "click", "blinker", "itsdangerous")


def bring_flask(folder: Path) -> None:
    """Copy the libraries as pip's ``--target`` would lay them out."""
    for package in _PACKAGES:
        for file in importlib.metadata.distribution(package).files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                place = folder / "vendor" / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), place)
