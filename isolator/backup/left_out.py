"""Things that a backup does not bring back, named when it is taken and not when it is needed."""

from __future__ import annotations

import re
from pathlib import Path

from isolator.paths import Paths
from isolator.registration.store import readable


def left_out(paths: Paths) -> tuple[str, ...]:
    """One line for each thing that a backup of this daemon leaves out, or that a restore would stumble over here."""
    lines = [
        f"{place} is a mount point: what lies there is in the backup, and a restore asks you to unmount it first"
        for place in mount_points(paths.etc.resolve())
    ]
    size = sum(log.stat().st_size for log in _logs(paths))
    if size:
        lines.append(f"not in it: the logs of plugins, {-(-size >> 10)} KiB in {paths.plugin_log}")
    lines += [
        f"not in it: {plugin.release.binary_path}, the program of {plugin.name}, registered by its path"
        for plugin in readable(paths.plugins)
        if plugin.release.kind == "binary"
    ]
    return tuple(lines)


def mount_points(folder: Path) -> list[Path]:
    """The mount points below a folder, of files too; not the folder itself."""
    found = set[Path]()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        text = re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), line.split(" ", 5)[4])
        place = Path(text)
        if folder in place.parents:
            found.add(place)
    return sorted(found)


def _logs(paths: Paths) -> list[Path]:
    return [path for path in paths.plugin_log.glob("*.log*") if path.is_file() and not path.is_symlink()]
