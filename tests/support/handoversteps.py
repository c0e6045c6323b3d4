"""Every step of a hand-over at which something may die, read off the two tables that say what a side does.

The words are those that `dyingcommand` writes down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from lazymem.handover.states import DESTINATION, RECORDED, SOURCE, Destination, Effect, Event, Move, Source

S = TypeVar("S", Source, Destination)


def walk(table: Mapping[tuple[S, Event], Move[S]], start: S, *events: Event) -> tuple[list[str], list[S]]:
    """The steps of that course from `start` on, and the states that it comes through."""
    steps, states, state = [], [start], start
    for event in events:
        move = table[state, event]
        steps.append(f"EVENT {event.name}")
        for effect in move.effects:
            steps += [f"RECORD {move.to.value}", f"RECORDED {move.to.value}"] if effect is Effect.RECORD else []
            steps += [effect.name] if effect is not Effect.RECORD else []
        if move.to is not state:
            steps.append(f"AT {move.to.value}")
            states.append(move.to)
        state = move.to
    return steps, states


def once_a_state(states: Sequence[Source | Destination]) -> list[str]:
    """A step for each of the states: it has just been reached, and if it is recorded, it is on the disk."""
    return [f"{'RECORDED' if state in RECORDED else 'AT'} {state.value}" for state in states]


SOURCE_GIVES = walk(SOURCE, Source.OURS, Event.READY, Event.RECEIVED, Event.MINE, Event.WHOLE)
SOURCE_GIVES_SOON = walk(SOURCE, Source.OURS, Event.READY, Event.SENT, Event.RECEIVED, Event.MINE, Event.WHOLE)
SOURCE_GIVES_WHAT_TEARS = walk(SOURCE, Source.OURS, Event.READY, Event.SENT, Event.REFUSED)
SOURCE_TAKES_BACK = walk(SOURCE, Source.GIVEN, Event.REFUSED)
DESTINATION_TAKES = walk(DESTINATION, Destination.ASKED, Event.LOADED, Event.GIVEN, Event.ALL_HERE, Event.DONE)
DESTINATION_LOADS_LATE = walk(DESTINATION, Destination.ASKED, Event.GIVEN, Event.LOADED)
DESTINATION_MISSES_THE_END = walk(DESTINATION, Destination.ASKED, Event.GIVEN, Event.FAILED)
DESTINATION_REFUSES = walk(DESTINATION, Destination.ASKED, Event.FAILED)
DESTINATION_YIELDS = walk(DESTINATION, Destination.MINE, Event.VOID)

SOURCE_SETS = ["SET"]
"""Of a source, in the middle of MIGRATE: its emulator's settings are changed."""

SOURCE_STANDS = ["STOPPED"]
"""Of a source, in the middle of MIGRATE: the emulator has stopped the guest."""

OFFERS = ["OFFER", "OFFERED"]
"""Of the source, before anything moves it."""

SERVES_AGAIN = ["SERVE"]
"""Of a source that was started again after it had given its guest."""

PREPARES = ["CHECKED", "MOUNTED", "STARTED"]
"""Of the destination, before there is a hand-over."""

ASKS = ["RECORD asked", "RECORDED asked"]
"""Of the destination, before anything moves it."""
