"""Shares: what the runs of all runners take together, and those of each, counted before anything is made."""

from __future__ import annotations

from collections import Counter

from isolator.errors import UnavailableError
from isolator.policy.host import Runner
from isolator.policy.units import format_size

_KEYS = ("cages", "all_tasks", "all_memory")


class Place:
    """The share of one run, from the moment at which its caller has connected until its last trace is removed.

    Its connection, which the caller's next run may outrun, is none: who leaves too many of them is let in no more.
    """

    def __init__(self, shares: Shares, uid: int) -> None:
        self.uid = uid
        self.taken: Counter[str] = Counter()
        self._shares: Shares | None = shares

    def claim(self, *, tasks: int, memory: int) -> None:
        """Take so much; raises UnavailableError, with the key of host.toml, when there is not so much left."""
        assert self._shares is not None
        self._shares.take(self, {"all_tasks": tasks, "all_memory": memory})

    def leave(self) -> None:
        """Give everything back; idempotent."""
        if self._shares is not None:
            self._shares.give_back(self)
            self._shares = None


class Shares:
    """The bounds of ``[runner]`` and what is taken of them."""

    def __init__(self, bounds: Runner) -> None:
        self._most = {key: int(getattr(bounds, key)) for key in _KEYS}
        self._each = {key: max(1, most * bounds.share // 100) for key, most in self._most.items()}
        self._all: Counter[str] = Counter()
        self._of: dict[int, Counter[str]] = {}

    def enter(self, uid: int) -> Place:
        """A place for one run; raises UnavailableError when there is none left, for this user or for all."""
        place = Place(self, uid)
        self.take(place, {"cages": 1})
        return place

    def keep(self, uid: int, *, tasks: int, memory: int) -> Place:
        """The place of a run from before this process's exec, though the bounds may be others by now."""
        place = Place(self, uid)
        self._count(place, {"cages": 1, "all_tasks": tasks, "all_memory": memory})
        return place

    def take(self, place: Place, amounts: dict[str, int]) -> None:
        """Count so much of each key for a place; nothing of it when one of them is exhausted."""
        own = self._of.get(place.uid, Counter())
        for key, amount in amounts.items():
            for mine, taken, most in ((True, own[key], self._each[key]), (False, self._all[key], self._most[key])):
                if taken + amount > most:
                    raise _exhausted(key, amount, taken, most, mine=mine)
        self._count(place, amounts)

    def _count(self, place: Place, amounts: dict[str, int]) -> None:
        own = self._of.setdefault(place.uid, Counter())
        for counter in (self._all, own, place.taken):
            counter.update(amounts)

    def give_back(self, place: Place) -> None:
        """Forget a place and everything that it has taken."""
        own = self._of[place.uid]
        for counter in (self._all, own):
            counter.subtract(place.taken)
        if not any(own.values()):
            del self._of[place.uid]


def _exhausted(key: str, amount: int, taken: int, most: int, *, mine: bool) -> UnavailableError:
    whose = "your runs" if mine else "the runs of all users"
    bound = f"{key} in [runner] of host.toml" + (", of which one user has share percent," if mine else "")
    if key == "cages":
        why = f"{taken} of {whose} are under way, as many as {bound} allows"
    elif key == "all_tasks":
        why = f"{amount} tasks beside the {taken} of {whose} would be more than {most}, which {bound} allows"
    else:
        sizes = [format_size(size) for size in (amount, taken, most)]
        why = f"{sizes[0]} of memory beside the {sizes[1]} of {whose} would be more than {sizes[2]}"
        why += f", which {bound} allows"
    return UnavailableError("isolator run", why, "try again when one has ended, or have that raised")
