"""Table of the control socket's verbs and notifications, from their types."""

from __future__ import annotations

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


def _keys(keys: dict[str, bool]) -> str:
    return "{" + ", ".join(key if always else f"{key}?" for key, always in keys.items()) + "}"
