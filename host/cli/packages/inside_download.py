"""The downloader, which runs in a cage: writes what an address has to standard output.

``python3 -I -c TEXT URL [CA]``; the standard library alone. Redirects are followed below the same name only: the cage
reaches no other.
"""

from __future__ import annotations

import http.client
import ssl
import sys
from urllib.parse import urljoin, urlsplit

REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
SECONDS = 30.0


def fetch(url: str, ca: str | None) -> str | None:
    """Write the body; returns the address that a redirect leads to, or None."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    context = ssl.create_default_context(cafile=ca)
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=SECONDS, context=context)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "isolator"})
    answer = connection.getresponse()
    if answer.status in REDIRECTS:
        return urljoin(url, answer.headers.get("Location") or "")
    if answer.status != 200:
        sys.exit(f"the server answers {answer.status}")
    expected, received = answer.length, 0
    while chunk := answer.read(1 << 16):
        received += len(chunk)
        sys.stdout.buffer.write(chunk)
    if expected is not None and received != expected:
        sys.exit(f"the server closes after {received} of {expected} bytes")
    sys.stdout.buffer.flush()
    return None


def main() -> None:
    """Fetch what the arguments name."""
    url, *ca = sys.argv[1:]
    start = urlsplit(url)
    try:
        for _ in range(MOST_REDIRECTS + 1):
            further = fetch(url, ca[0] if ca else None)
            if further is None:
                return
            there = urlsplit(further)
            if (there.scheme, there.hostname, there.port or 443) != ("https", start.hostname, start.port or 443):
                sys.exit(f"it leads to {further[:200]}; if that is right, name that address")
            url = further
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")
    sys.exit("the server redirects without end")


if __name__ == "__main__":
    main()
