"""The reader of strangers' policy files: as ``service.py``, for ``isolator run --policy`` of a user without privilege.

``python3 -I -m isolator.reader.policy 1``: standard input has one file after its length, standard output gets one line:
``{"policy"}``, or ``{"at", "why", "remedy"}``.
"""

from __future__ import annotations

from isolator.policy.parse.load import parse_plugin_policy
from isolator.reader.service import line_of, serve

_SAMPLE = b"""[grant]
egress = ["a.com:443", "nowhere"]
[env]
TZ = "UTC"
[limits]
memory = "64M"
[filesystem]
read = ["/srv"]
"""


def answer(text: bytes) -> bytes:
    """The line for one policy file."""
    return line_of(lambda: {"policy": parse_plugin_policy(text, source="").model_dump(mode="json")})


if __name__ == "__main__":
    for _sample in (_SAMPLE, _SAMPLE.replace(b"nowhere", b"b.com:1"), b"["):
        answer(_sample)
    serve(answer)
