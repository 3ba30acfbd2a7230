"""Table of the metrics, from the families that are served."""

from __future__ import annotations

from isolator.audit.metrics import Metrics


def metrics() -> str:
    """Return a Markdown table: each metric with its type, its labels and its meaning, the old ones last."""
    rows = []
    for family in Metrics().families():
        listed = ", ".join(f"`{label}`" for label in family.names)
        old = family.meaning.startswith("Old: ")
        rows.append((old, family.name, f"| `{family.name}` | {family.kind} | {listed} | {family.meaning} |"))
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *(row for *_, row in sorted(rows))])
