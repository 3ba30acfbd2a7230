"""Every generated part of the documents: where it stands, and the function that writes it."""

from __future__ import annotations

from functools import partial

from bench import recorded
from docs.generate import authors, messages, openapi, policy_keys
from docs.generate.floors import floors
from docs.generate.metrics import metrics
from docs.generate.replace import Part
from docs.generate.schemas import FOLDER, json_schema, types_table
from docs.generate.verbs import page, verbs
from isolator.audit.schema import RECORDS
from isolator.ipc.messages import DIRECTIONS
from isolator.policy import denial

PARTS: tuple[Part, ...] = (
    Part("docs/architecture.md", "floors", floors),
    Part("bench/README.md", "results", recorded.tables),
    Part("docs/audit.md", "record types", types_table),
    Part("docs/egress.md", "denial rules", denial.table),
    *(Part(f"{FOLDER}/{type}.json", None, partial(json_schema, type)) for type in RECORDS),
    *(Part(file, None, text) for file, text in authors.FILES.items()),
    Part("docs/embedding.md", "verbs", verbs),
    Part("docs/metrics.md", "metrics", metrics),
    Part("docs/control.md", "control socket", page),
    Part("docs/openapi.json", None, openapi.document),
    Part("docs/policy.md", "policy keys", policy_keys.for_operators),
    Part("docs/manifest.md", "policy keys", policy_keys.for_authors),
    *(Part("docs/internals.md", name, partial(messages.direction, name)) for name in DIRECTIONS),
    Part("docs/internals.md", "plugin entry", messages.entries),
)
