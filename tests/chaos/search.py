"""An exhaustive search through a model: every state that any order of steps leads to, and what is wrong in it."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol


class Step(Protocol):
    """A move of a model's: what happens, whether it is a fault, where it leads, and what is wrong with it."""

    @property
    def what(self) -> str: ...
    @property
    def fault(self) -> bool: ...
    @property
    def after(self) -> Any: ...
    @property
    def wrong(self) -> str | None: ...


class Model(Hashable, Protocol):
    """A scenario of a model's: where it starts, what can happen next, and when everybody is done.

    A state and its twin are the same but for who is called by which number: one of them is searched.
    """

    @property
    def name(self) -> str: ...
    def start(self) -> Any: ...
    def moves(self, state: Any, /) -> Iterable[Step]: ...
    def twin(self, state: Any, /) -> Any | None: ...
    def is_done(self, state: Any, /) -> bool: ...


@dataclass(frozen=True)
class Found:
    """What the search found: how many states there are, twins counted once, and the shortest way to a wrong one.

    Where the way passes from a state to its twin, the numbers in what follows are exchanged.
    """

    states: int
    wrong: str | None = None
    way: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.wrong is None:
            return f"{self.states} states, nothing wrong"
        steps = "\n".join(f"{number:3}. {step}" for number, step in enumerate(self.way, 1))
        return f"{self.wrong}\n{steps}"


@cache
def search(scenario: Model, limit: int = 3_000_000) -> Found:
    """Search breadth first.

    Wrong is a step that breaks an invariant, a state in which nobody can do anything though not everybody is done,
    and a state from which, without further faults, no order of steps leads to the end: a livelock.

    Parameters
    ----------
    limit:
        How many states there may be; more fail, so that a search is never taken for whole that was not.
    """
    gc.disable()  # the states are many, and none of them is garbage
    try:
        return _search(scenario, limit)
    finally:
        gc.enable()


def _search(scenario: Model, limit: int) -> Found:
    start = scenario.start()
    numbers: dict[Any, int] = {start: 0}
    states = [start]
    came: list[tuple[int, str]] = [(-1, "")]
    before: list[list[int]] = [[]]  # without faults
    ends: list[int] = []
    at = 0
    while at < len(states):
        state = states[at]
        stuck = True
        for move in scenario.moves(state):
            if move.wrong is not None:
                return Found(len(states), move.wrong, (*_way(came, at), move.what))
            after = numbers.get(move.after)
            if after is None and (twin := scenario.twin(move.after)) is not None:
                after = numbers.get(twin)
            if after is None:
                after = numbers[move.after] = len(states)
                states.append(move.after)
                came.append((at, move.what))
                before.append([])
                if len(states) > limit:
                    raise AssertionError(f"{scenario.name}: more than {limit} states")
            if not move.fault:
                stuck = False
                before[after].append(at)
        if scenario.is_done(state):
            ends.append(at)
        elif stuck:
            return Found(len(states), "a deadlock: nobody can go on", _way(came, at))
        at += 1
    reaching = set(ends)
    while ends:
        for earlier in before[ends.pop()]:
            if earlier not in reaching:
                reaching.add(earlier)
                ends.append(earlier)
    if len(reaching) < len(states):
        lost = next(number for number in range(len(states)) if number not in reaching)
        return Found(len(states), "a livelock: from here nothing leads to the end", _way(came, lost))
    return Found(len(states))


def _way(came: list[tuple[int, str]], at: int) -> tuple[str, ...]:
    steps: list[str] = []
    while at > 0:
        at, step = came[at]
        steps.append(step)
    return tuple(reversed(steps))
