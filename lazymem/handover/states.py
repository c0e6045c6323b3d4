"""Who may run a guest that moves: both sides' states, every legal move, and what each move makes a side do. Pure.

The two tables are all there is to it. A move's effects are carried out in their order, each whole before the next
begins, and RECORD (the new state, on the disk before it returns) always stands before what acts on it. So whatever
dies between two effects, what is on the disk tells the restarted process where it is: it takes its state from its
record and moves by RESTARTED. NOTE is RECORD without the wait for the disk: it outlives the process, and not the host.
The orders on which "at most one side runs" rests:

- the source records GIVEN before it says so, and from then on runs the guest only after the destination has recorded
  REFUSED (or by hand);
- the destination records MINE or PROMISED only after it heard GIVEN (or by hand), and lets the guest run only after
  that; with PROMISED alone on the disk it has noted MINE by then. So a process that finds PROMISED knows that its guest
  has not run; after a host's crash nobody does, and it counts as MINE (`after_host_restart`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Generic, TypeVar

from msgspec import Struct


class Source(enum.Enum):
    """Where the guest comes from."""

    OURS = "ours"
    """The guest is here; nothing was begun, or what was begun is void."""
    MOVING = "moving"
    """Its device state is on its way. Not recorded: a restarted process finds OURS and lets the guest go on."""
    GIVEN = "given"
    """The destination may run it now; here it stands, whatever happens, until the destination has said what it did."""
    GONE = "gone"
    """The destination runs it; its RAM is still served from here."""
    RELEASED = "released"
    """The destination holds everything; the emulator here may end."""


class Destination(enum.Enum):
    """Where the guest goes."""

    ASKED = "asked"
    """Recorded before the source is told to begin. The state is on its way, or the source's word is."""
    LOADED = "loaded"
    """The emulator has its state; the source's word is missing. Not recorded."""
    PROMISED = "promised"
    """The source's word is here; the emulator still loads, or even waits for the rest of its state."""
    MINE = "mine"
    """The guest runs here."""
    WHOLE = "whole"
    """The same, and all of its RAM is here."""
    DONE = "done"
    """The same, and the source has let go."""
    REFUSED = "refused"
    """It will never run here by this hand-over."""
    YIELDED = "yielded"
    """It ran here, and the source says that it took the guest back, by hand: it stands."""


MAY_RUN: frozenset[Source | Destination] = frozenset(
    {Source.OURS, Source.MOVING, Destination.MINE, Destination.WHOLE, Destination.DONE}
)
"""The states in which a side may run the guest. The two sides are never both in one of them, except by hand."""

OUTLASTS: frozenset[Source | Destination] = frozenset({*MAY_RUN, Destination.PROMISED})
"""The states that may be the last on the disk when a host crashes on which the guest ran."""

DECIDED: frozenset[Destination] = frozenset({Destination.MINE, Destination.WHOLE, Destination.DONE})
"""The states of a destination whose guest was let run."""

UNDECIDED: frozenset[Destination] = frozenset({Destination.ASKED, Destination.LOADED, Destination.PROMISED})
"""The states of one whose guest was not."""

RECORDED: frozenset[Source | Destination] = frozenset({*Source, *Destination} - {Source.MOVING, Destination.LOADED})
"""The states that stand on the disk. The others are gone with their process."""


class Event(enum.Enum):
    """What moves a side: a message of the other one, its own emulator, the user, or its own restart."""

    # messages, said by the other side
    READY = "ready"
    RECEIVED = "received"
    GIVEN = "given"
    MINE = "mine"
    REFUSED = "refused"
    WHOLE = "whole"
    DONE = "done"
    VOID = "void"
    # what happens here
    SENT = "all of the state has left, and what is not there yet is on its way"
    BACK = "the other side is connected again"
    LOST = "the connection was lost"
    FAILED = "what was begun here failed"
    LOADED = "the emulator has its state"
    ALL_HERE = "all of the RAM is here"
    OVER = "the guest has ended in good order"
    NEVER_RAN = "the emulator was gone before it was told to run the guest"
    RECLAIM = "send --reclaim"
    TAKE = "receive --take"
    NOT_WRITTEN = "the decision could not be written to the disk"
    RESTARTED = "this process was started anew"


class Effect(enum.Enum):
    """What a side does in a move."""

    RECORD = "write the new state to the disk"
    NOTE = "write it for whoever comes after this process, and do not wait for the disk"
    MIGRATE = "let the emulator send its state"
    SERVE = "serve the frozen RAM"
    SERVE_ALL = "serve guessed pages too"
    WITHDRAW = "serve no page any more"
    RUN = "let the guest run"
    STOP = "let the guest stand"
    QUIT = "end the emulator"
    SAY_GIVEN = "given"
    SAY_VOID = "void"
    SAY_DONE = "done"
    SAY_MINE = "mine"
    SAY_REFUSED = "refused"
    SAY_WHOLE = "whole"


SAID: Mapping[Effect, Event] = {
    Effect.SAY_GIVEN: Event.GIVEN,
    Effect.SAY_VOID: Event.VOID,
    Effect.SAY_DONE: Event.DONE,
    Effect.SAY_MINE: Event.MINE,
    Effect.SAY_REFUSED: Event.REFUSED,
    Effect.SAY_WHOLE: Event.WHOLE,
}
"""The effects that are messages, and what they are to the other side."""

S = TypeVar("S", Source, Destination)


class Move(Struct, Generic[S], frozen=True):
    """Where an event leads, and what is done on the way."""

    to: S
    effects: tuple[Effect, ...] = ()


def _source() -> dict[tuple[Source, Event], Move[Source]]:
    ours, moving, given, gone, released = Source
    taken_back = Move(ours, (Effect.WITHDRAW, Effect.RECORD, Effect.RUN, Effect.SAY_VOID))
    void = Move(ours, (Effect.SAY_VOID,))
    release = Move(released, (Effect.RECORD, Effect.QUIT, Effect.SAY_DONE))
    done = Move(released, (Effect.SAY_DONE,))
    return {
        (ours, Event.READY): Move(moving, (Effect.MIGRATE,)),
        (ours, Event.RESTARTED): Move(ours, (Effect.WITHDRAW, Effect.RUN)),
        # What is still said about a hand-over that is void.
        **{(ours, event): void for event in (Event.BACK, Event.RECEIVED, Event.MINE, Event.REFUSED, Event.WHOLE)},
        (ours, Event.LOST): Move(ours),
        # The whole state has left the link, which is free for guesses; a device's load may wait for a page among them.
        # Or what is left of it takes as long as "given" takes: a destination that does not get it refuses.
        **{
            (moving, event): Move(given, (Effect.RECORD, Effect.SAY_GIVEN, Effect.SERVE_ALL))
            for event in (Event.RECEIVED, Event.SENT)
        },
        **{(state, Event.RECEIVED): Move(state) for state in (given, gone, released)},
        # Before "given" every failure lets the guest go on here; a receiver that is back was away.
        **{(moving, event): taken_back for event in (Event.FAILED, Event.LOST, Event.BACK, Event.REFUSED)},
        # Nothing was said yet: GIVEN is said behind RECORD.
        (given, Event.NOT_WRITTEN): taken_back,
        (given, Event.BACK): Move(given, (Effect.SAY_GIVEN,)),
        (given, Event.LOST): Move(given),
        (given, Event.FAILED): Move(given),
        (given, Event.RESTARTED): Move(given, (Effect.SERVE,)),
        (given, Event.MINE): Move(gone, (Effect.RECORD,)),
        (given, Event.WHOLE): release,
        (given, Event.REFUSED): taken_back,
        (given, Event.RECLAIM): taken_back,
        (gone, Event.BACK): Move(gone),
        (gone, Event.LOST): Move(gone),
        (gone, Event.FAILED): Move(gone),
        (gone, Event.MINE): Move(gone),
        (gone, Event.RESTARTED): Move(gone, (Effect.SERVE,)),
        (gone, Event.WHOLE): release,
        (released, Event.LOST): Move(released),
        (released, Event.RESTARTED): Move(released, (Effect.QUIT,)),
        **{(released, event): done for event in (Event.BACK, Event.MINE, Event.WHOLE)},
    }


def _destination() -> dict[tuple[Destination, Event], Move[Destination]]:
    asked, loaded, promised, mine, whole, done, refused, yielded = Destination
    runs = (Effect.RUN, Effect.RECORD, Effect.SAY_MINE)  # the record says since when it runs
    take = Move(mine, (Effect.RECORD, *runs))
    refuse = Move(refused, (Effect.RECORD, Effect.QUIT, Effect.SAY_REFUSED))
    yields = Move(yielded, (Effect.RECORD, Effect.STOP))
    complete = Move(whole, (Effect.RECORD, Effect.SAY_WHOLE))
    undecided = (asked, loaded, promised)
    running = (mine, whole, done)
    return {
        (asked, Event.LOADED): Move(loaded),
        # While it loads: nobody waits for the disk behind that.
        (asked, Event.GIVEN): Move(promised, (Effect.RECORD,)),
        (loaded, Event.GIVEN): take,
        (promised, Event.LOADED): Move(mine, (Effect.NOTE, *runs)),
        (promised, Event.GIVEN): Move(promised),
        (loaded, Event.TAKE): take,
        # One that was promised has not run: it is asked for once more, in case it was taken back by hand meanwhile.
        **{(state, Event.RESTARTED): Move(asked) for state in (asked, promised)},
        **{(state, event): Move(state) for state in undecided for event in (Event.LOST, Event.BACK)},
        **{(state, event): refuse for state in undecided for event in (Event.FAILED, Event.VOID)},
        (mine, Event.RESTARTED): Move(mine, (Effect.RUN, Effect.RECORD)),
        # Nothing was said yet: MINE is said behind RUN.
        (mine, Event.NEVER_RAN): refuse,
        **{(mine, event): Move(mine, (Effect.SAY_MINE,)) for event in (Event.BACK, Event.GIVEN)},
        **{(mine, event): complete for event in (Event.ALL_HERE, Event.OVER)},
        (whole, Event.RESTARTED): Move(whole, (Effect.RUN, Effect.RECORD)),
        **{(whole, event): Move(whole, (Effect.SAY_WHOLE,)) for event in (Event.BACK, Event.GIVEN)},
        **{(whole, event): Move(whole) for event in (Event.ALL_HERE, Event.OVER)},
        **{(state, Event.DONE): Move(done, (Effect.RECORD,)) for state in (mine, whole)},
        **{(state, Event.LOST): Move(state) for state in (*running, refused, yielded)},
        **{(state, Event.VOID): yields for state in running},
        **{
            (done, event): Move(done) for event in (Event.BACK, Event.DONE, Event.ALL_HERE, Event.OVER, Event.RESTARTED)
        },
        **{(refused, event): Move(refused, (Effect.SAY_REFUSED,)) for event in (Event.BACK, Event.GIVEN)},
        **{(refused, event): Move(refused) for event in (Event.VOID, Event.LOADED, Event.FAILED)},
        (refused, Event.RESTARTED): Move(refused, (Effect.QUIT,)),
        **{(yielded, event): Move(yielded) for event in (Event.VOID, Event.BACK, Event.ALL_HERE, Event.OVER)},
        (yielded, Event.RESTARTED): Move(yielded, (Effect.STOP,)),
    }


def after_host_restart(state: Destination) -> Destination:
    """What a destination's record means once its host was started anew: what was only noted is gone with that."""
    return Destination.MINE if state is Destination.PROMISED else state


SOURCE: Mapping[tuple[Source, Event], Move[Source]] = _source()
DESTINATION: Mapping[tuple[Destination, Event], Move[Destination]] = _destination()


class Side(Generic[S]):
    """One side's state. `maybe_step` moves it at once; whoever calls it carries the effects out, in their order."""

    def __init__(self, table: Mapping[tuple[S, Event], Move[S]], state: S) -> None:
        self._table: Mapping[tuple[S, Event], Move[S]] = table
        self.state: S = state

    def maybe_step(self, event: Event) -> tuple[Effect, ...] | None:
        """The effects of a legal move, else None and nothing has changed."""
        move = self._table.get((self.state, event))
        if move is None:
            return None
        self.state = move.to
        return move.effects


def source(state: Source = Source.OURS) -> Side[Source]:
    return Side(SOURCE, state)


def destination(state: Destination = Destination.ASKED) -> Side[Destination]:
    return Side(DESTINATION, state)
