"""Table of the metrics, from the registry that is served."""

from __future__ import annotations

from isolator.audit.metrics import Metrics


def metrics() -> str:
    """Return a Markdown table: each metric with its type, its labels and its meaning, the old ones last."""
    registry = Metrics().registry
    rows = []
    for collector in registry._collector_to_names:  # it has no public way to the labels of a metric without values
        for family in collector.collect():
            counts = family.type == "counter"
            labels = getattr(family if hasattr(family, "_labelnames") else collector, "_labelnames", ())
            listed = ", ".join(f"`{label}`" for label in labels)
            old = family.documentation.startswith("Old: ")
            name = f"{family.name}_total" if counts else family.name
            rows.append((old, name, f"| `{name}` | {family.type} | {listed} | {family.documentation} |"))
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *(row for *_, row in sorted(rows))])
