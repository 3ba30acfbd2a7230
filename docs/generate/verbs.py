"""Table of the control socket's verbs and notifications, from their types."""

from __future__ import annotations

import inspect
import json

from host.control.verbs import NOTIFICATIONS, listing, result_keys


def verbs() -> str:
    """The table of docs/embedding.md: parameters and keys of the answer, the optional ones with a question mark."""
    lines = ["| verb | parameters → result | role | |", "|---|---|---|---|"]
    for verb, entry in listing().items():
        params = _keys({key: parameter["required"] for key, parameter in entry["params"].items()})
        about = entry["summary"].replace("``", "`")
        lines.append(f"| `{verb}` | `{params}` → `{_keys(entry['result'])}` | {entry['role']} | {about} |")
    for name, content in NOTIFICATIONS.items():
        about = (content.__doc__ or "").replace("``", "`")
        lines.append(f"| `{name}` | a notification: `{_keys(result_keys(content))}` | | {about} |")
    return "\n".join(lines)


def page() -> str:
    """The page docs/control.md: every verb with its parameters, their limits, and the keys of its answer."""
    lines = []
    for verb, entry in listing().items():
        lines += [f"### `{verb}`", "", _about(entry["about"]), ""]
        recorded = "; each call is in the trail" if entry["recorded"] else ""
        lines += [f"Role `{entry['role']}`{recorded}. Answer: `{_keys(entry['result'])}`.", ""]
        if entry["params"]:
            lines += ["| parameter | | value (JSON Schema) |", "|---|---|---|"]
            for key, parameter in entry["params"].items():
                needed = "required" if parameter["required"] else ""
                lines.append(f"| `{key}` | {needed} | `{json.dumps(parameter['schema'])}` |")
            lines.append("")
    lines += ["## Notifications", ""]
    for name, content in NOTIFICATIONS.items():
        about = inspect.getdoc(content) or ""
        lines += [f"### `{name}`", "", _about(about), "", f"Parameters: `{_keys(result_keys(content))}`.", ""]
    return "\n".join(lines[:-1])


def _about(text: str) -> str:
    """A docstring as Markdown."""
    return inspect.cleandoc(text).replace("``", "`")


def _keys(keys: dict[str, bool]) -> str:
    return "{" + ", ".join(key if always else f"{key}?" for key, always in keys.items()) + "}"
