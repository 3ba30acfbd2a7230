"""A text is found in a buffer wherever it stands whole, and never beyond the end that was named."""

from __future__ import annotations

import pytest

from isolator.linux.memory_search import holds


@pytest.mark.parametrize("text", [b"a", b"ab", b'","type":"net.denied","origin":"', b"\0b\0", b"ab" * 200, b""])
def test_search_finds_a_text_up_to_the_end_and_not_beyond(text: bytes) -> None:
    for before in (b"", b"a\0b" * 1000, text[:-1] * 3):
        buffer = bytearray(before + text + b"\0rest")
        for end in (len(before) + len(text), len(buffer), len(buffer) + 1, len(before) + len(text) - 1, 0):
            assert holds(buffer, max(end, 0), text) is (buffer.find(text, 0, max(end, 0)) >= 0), (before, end)


def test_buffer_that_was_searched_can_grow() -> None:
    buffer = bytearray(b"abc")
    assert holds(buffer, 3, b"c")
    buffer += bytearray(1 << 20)
    assert not holds(buffer, len(buffer), b"d")


def test_buffer_without_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="Buffer size too small"):
        holds(bytearray(), 0, b"a")
