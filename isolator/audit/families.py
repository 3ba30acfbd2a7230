"""Families of metrics in the text format of Prometheus (version 0.0.4), and nothing else of a client library.

A family has a name, a meaning and labels; by the values of these it has children, which are counted up or set. Names,
labels and the order of samples are as Prometheus' own libraries write them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Kind = Literal["counter", "gauge", "histogram"]
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class Child:
    """One set of label values. Of a histogram ``value`` is the sum, and the last of ``counts`` is beyond all bounds."""

    __slots__ = ("bounds", "counts", "value")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.value = 0.0
        self.bounds = bounds
        self.counts = [0.0] * (len(bounds) + 1) if bounds else []

    def inc(self, amount: float = 1.0) -> None:
        """Count up."""
        self.value += amount

    def set(self, value: float) -> None:
        """Set a gauge."""
        self.value = float(value)

    def observe(self, value: float) -> None:
        """Count a value of a histogram."""
        self.value += value
        self.counts[bisect_left(self.bounds, value)] += 1


class Family:
    """A metric. One without labels has its one child from the beginning."""

    def __init__(
        self, kind: Kind, name: str, meaning: str, labels: tuple[str, ...] = (), bounds: tuple[float, ...] = ()
    ) -> None:
        self.kind, self.name = kind, f"{name}_total" if kind == "counter" else name
        self.meaning, self.names, self.bounds = meaning, labels, bounds
        self.children: dict[tuple[str, ...], Child] = {}
        if not labels:
            self.of()

    def of(self, *values: str) -> Child:
        """The child with these values of the labels; made when it is first used."""
        child = self.children.get(values)
        if child is None:
            child = self.children[values] = Child(self.bounds)
        return child

    def labelled(self) -> Iterator[tuple[dict[str, str], Child]]:
        """Every child with its labels."""
        for values, child in self.children.items():
            yield dict(zip(self.names, values, strict=True)), child

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Names, labels and values, as they are shown."""
        for labels, child in self.labelled():
            if self.kind != "histogram":
                yield self.name, labels, child.value
                continue
            total = 0.0
            for bound, count in zip((*self.bounds, None), child.counts, strict=True):
                total += count
                edge = "+Inf" if bound is None else repr(float(bound))
                yield f"{self.name}_bucket", {**labels, "le": edge}, total
            yield f"{self.name}_count", labels, total
            yield f"{self.name}_sum", labels, child.value


def text(families: Iterable[Family]) -> str:
    """Write families for a scraper."""
    lines = []
    for family in families:
        meaning = family.meaning.replace("\\", r"\\").replace("\n", r"\n")
        lines += [f"# HELP {family.name} {meaning}", f"# TYPE {family.name} {family.kind}"]
        for name, labels, value in family.samples():
            shown = ",".join(f'{label}="{found.translate(_ESCAPES)}"' for label, found in sorted(labels.items()))
            lines.append(f"{name}{{{shown}}} {value!r}" if shown else f"{name} {value!r}")
    return "\n".join([*lines, ""])
