"""Requests to every service when another process takes its place (S ↔ old and new)."""

from __future__ import annotations

from isolator.ipc.body import Body, Request


class Left(Body):
    """Answer of a process before another takes its place."""

    parts: int = 0
    """how many `state.part` it has sent"""
    refused: str = ""
    """why it stays: nothing of it has changed"""


class Leave(Request[Left], op="leave"):
    """Hand everything on to another process that takes this one's place, and end with the channel. This form, and that
    of the answer, never change."""


class ReadableFormats(Body):
    """Formats of a state, the newest first."""

    formats: tuple[int, ...]


class ReadFormats(Request[ReadableFormats], op="state.formats"):
    """Which formats of a state it reads: the first request to a process that is to take another's place."""


class WriteFormat(Request[None], op="state.write"):
    """Hand the state over in the newest of these formats, which the new process reads. Comes before `leave`."""

    formats: tuple[int, ...]


class StatePart(Request[None], op="state.part", fds=range(1, 61)):
    """Pass on a part of the state that the old process hands to the new one: S sends the same to that one, and answers
    when that has it. This form never changes.

    Descriptors: those of the state, in their order; the first of the first part is a sealed memfd with its JSON
    """

    number: int
    """from 0"""
