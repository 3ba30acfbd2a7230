"""Tables of the numeric and the yes-or-no keys, from their declarations in ``isolator/policy/keys.py``."""

from __future__ import annotations

from isolator.policy.keys import CEILING, LIMITS, SWITCHES, Limits, Switches


def for_operators() -> str:
    """Return the table of ``docs/policy.md``: key of a policy file, meaning, default, ceiling."""
    rows = ["| key | value | default | ceiling |", "|---|---|---|---|"]
    usual = Limits()
    for limit in LIMITS:
        default = "the manifest's" if limit.left_to_author else f"`{limit.show(getattr(usual, limit.name))}`"
        most = limit.show(getattr(CEILING, limit.name))
        rows.append(f"| `[{limit.section}] {limit.key}` | {limit.about} | {default} | `{most}` |")
    off = Switches()
    for switch in SWITCHES:
        default = _yes_or_no(getattr(off, switch.name))
        rows.append(f"| `[{switch.section}] {switch.key}` | `true`: {switch.about} | `{default}` | `true` |")
    return "\n".join(rows)


def for_authors() -> str:
    """Return the table of ``docs/manifest.md``: key of a manifest, meaning, value of a manifest that is silent."""
    rows = ["| key | value | when left out |", "|---|---|---|"]
    usual, off = Limits(), Switches()
    for limit in LIMITS:
        if limit.manifest:
            rows.append(f"| `{limit.manifest}` | {limit.about} | `{limit.show(getattr(usual, limit.name))}` |")
    for switch in SWITCHES:
        if switch.manifest:
            default = _yes_or_no(getattr(off, switch.name))
            rows.append(f"| `{switch.manifest}` | `true`: {switch.about} | `{default}` |")
    return "\n".join(rows)


def _yes_or_no(value: bool) -> str:
    return "true" if value else "false"
