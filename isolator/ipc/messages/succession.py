"""What every service is asked when another process takes its place (S ↔ old and new)."""

from __future__ import annotations

from isolator.ipc.body import Body, Request


class Left(Body):
    """What a process has done before another takes its place."""

    parts: int = 0
    """how many `state.part` it has sent"""
    refused: str = ""
    """why it stays: nothing of it has changed"""


class Leave(Request[Left], op="leave"):
    """Hand everything on to another process that takes this one's place, and end with the channel. This form, and that
    of the answer, never change."""


class StatePart(Request[None], op="state.part", fds=range(1, 61)):
    """Pass on a part of the state that the old process hands to the new one: S sends the same to that one, and answers
    when that has it. This form never changes.

    Descriptors: those of the state, in their order; the first of the first part is a sealed memfd with its JSON
    """

    number: int
    """from 0"""
