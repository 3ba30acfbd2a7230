"""The reader, with a flaw that a manifest can use: one that holds ``spin`` is never done."""

from __future__ import annotations

from isolator.reader import service

_answer = service.answer


def answer(text: bytes) -> bytes:
    """As the reader's own."""
    while b"spin" in text:
        pass
    return _answer(text)


if __name__ == "__main__":
    service.answer = answer
    service.main()
