"""Sizes, rates, shares of a core, counts and durations: how people write them, and how they are written back.

Sizes are bytes with binary multiples (``64M`` = 64 MiB), cpu is thousandths of one core (``25%`` = 250),
durations are seconds. Every formatter's output parses back to the very same value, because the policy
file that ``plugin add`` stores must mean exactly what was shown. Parsers raise ``ValueError`` with a sentence
that says what is wrong; the caller knows the file and the line.
"""

from __future__ import annotations

import re

from isolator.base.patterns import pattern

_SIZE = pattern(r"(\d{1,16}(?:\.\d{1,6})?)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)
_PERCENT = pattern(r"(\d{1,6}(?:\.\d)?)\s*%", re.ASCII)
_DURATION = pattern(r"(\d{1,9}(?:\.\d{1,6})?)\s*(ms|s|m|h|d)", re.ASCII)
_MULTIPLE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MAX_SIZE = 1 << 50
NO_CAP = MAX_SIZE
"""The rate that stands for having no cap on it; written ``none``."""


def parse_size(value: object) -> int:
    """Bytes of ``64M``, ``1.5G``, ``4096`` or an integer; K, M, G and T are powers of 1024."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        if value.strip().startswith("-"):
            raise ValueError(f'"{value}" is negative')
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise ValueError(f'"{shown(value)}" is not a size; write it like "64M" or "1G"')
        exact = float(match[1]) * _MULTIPLE[(match[2] or "").upper()]
        number = int(exact)
        if number != exact:
            raise ValueError(f'"{value}" is not a whole number of bytes')
    else:
        raise ValueError('a size is text like "64M" or "1G"')
    if number < 0:
        raise ValueError(f"{number} is negative")
    if number > MAX_SIZE:
        raise ValueError(f'"{shown(str(value))}" is larger than 1 PiB')
    return number


def format_size(number: int) -> str:
    """The shortest exact spelling: ``64M`` for 67108864, ``1000`` for a thousand bytes."""
    for unit in ("T", "G", "M", "K"):
        if number and number % _MULTIPLE[unit] == 0:
            return f"{number // _MULTIPLE[unit]}{unit}"
    return str(number)


def parse_volume(value: object) -> int:
    """Bytes of a file system of its own: as ``parse_size``, but 0 (none) or at least 1 MiB."""
    number = parse_size(value)
    if 0 < number < _MULTIPLE["M"]:
        raise ValueError(f"{format_size(number)} cannot hold a file system; at least 1M, or 0 for none")
    return number


def parse_rate(value: object) -> int:
    """Bytes per second of ``20M``, or ``NO_CAP`` of ``none``."""
    return NO_CAP if value == "none" else parse_size(value)


def format_rate(number: int) -> str:
    """``20M`` for 20971520, ``none`` from ``NO_CAP`` on."""
    return "none" if number >= NO_CAP else format_size(number)


def parse_cpu(value: object) -> int:
    """Thousandths of one core of ``25%``, ``12.5%`` or ``150%``; always a percentage of one core."""
    if isinstance(value, str):
        if value.strip().startswith("-"):
            raise ValueError(f'"{value}" is negative')
        if match := _PERCENT.fullmatch(value.strip()):
            number = round(float(match[1]) * 10)
            if number < 1:
                raise ValueError(f'"{value}" is no cpu time at all; the least is "0.1%"')
            return number
    given = f'"{shown(value)}"' if isinstance(value, str) else str(value)
    raise ValueError(f'{given} is not a share of cpu; write a percentage of one core, like "25%" or "150%"')


def format_cpu(number: int) -> str:
    """``25%`` for 250, ``12.5%`` for 125."""
    return f"{number // 10}%" if number % 10 == 0 else f"{number // 10}.{number % 10}%"


def parse_count(value: object) -> int:
    """A whole number from 0 to 2³¹ - 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")
    if value < 0:
        raise ValueError(f"{value} is negative")
    if value > 2**31 - 1:
        raise ValueError(f"{value} is too large")
    return value


def parse_boolean(value: object) -> bool:
    """True or false, nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def parse_duration(value: object) -> float:
    """Seconds of ``500ms``, ``10s``, ``15m``, ``1h``, ``30d`` or a plain number of seconds."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
        # NaN compares false with everything, so the range check below refuses it together with infinities.
        if not 0 <= number <= 1e9:
            raise ValueError(f"{value} is not a duration of 0 to 1e9 seconds")
        return number
    if isinstance(value, str):
        if value.strip().startswith("-"):
            raise ValueError(f'"{value}" is negative')
        if match := _DURATION.fullmatch(value.strip()):
            return round(float(match[1]) * _SECONDS[match[2]], 6)
        raise ValueError(f'"{shown(value)}" is not a duration; write it like "500ms", "10s" or "15m"')
    raise ValueError('a duration is text like "10s" or "15m"')


def format_duration(number: float) -> str:
    """``10s``, ``15m``, ``500ms``, ``2.5s``: the largest unit that keeps the value whole."""
    for unit in ("d", "h", "m"):
        if number and number % _SECONDS[unit] == 0:
            return f"{int(number // _SECONDS[unit])}{unit}"
    if number == int(number):
        return f"{int(number)}s"
    millis = round(number * 1000, 3)
    return f"{int(millis)}ms" if millis == int(millis) and number < 1 else f"{round(number, 6):.6f}".rstrip("0") + "s"


def shown(text: str) -> str:
    """A stranger's text, fit for one line on a terminal: no control characters, at most 40 of the rest."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= 40 else clean[:39] + "…"
