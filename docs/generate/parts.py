"""Every generated part of the documents: where it stands, and the function that writes it."""

from __future__ import annotations

from docs.generate.floors import floors
from docs.generate.replace import Part

PARTS: tuple[Part, ...] = (Part("docs/architecture.md", "floors", floors),)
