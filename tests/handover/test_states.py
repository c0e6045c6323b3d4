"""The hand-over's tables: whatever is delivered, lost, killed and restarted in whatever order, at most one side runs.

In every order there is, and not in some: `handoverworld` has what can happen, and all of it is gone through.
"""

from __future__ import annotations

from collections import deque

import pytest

from lazymem.handover.states import (
    DESTINATION,
    MAY_RUN,
    OUTLASTS,
    RECORDED,
    SAID,
    SOURCE,
    Destination,
    Effect,
    Event,
    Source,
)
from tests.support.handoverworld import World


def test_what_acts_on_a_decision_stands_behind_its_record() -> None:
    for table in (SOURCE, DESTINATION):
        for (state, event), move in table.items():
            if move.to is state or move.to not in RECORDED:
                continue
            if {Effect.RUN, Effect.QUIT, *SAID} & set(move.effects):
                record = min(map(move.effects.index, {Effect.RECORD, Effect.NOTE} & set(move.effects)))
                for effect in (Effect.RUN, Effect.QUIT, *SAID):
                    if effect in move.effects:
                        assert record < move.effects.index(effect), (state, event)


def test_what_is_noted_only_stands_before_a_record_and_behind_one_that_outlasts_it() -> None:
    for table in (SOURCE, DESTINATION):
        for (state, event), move in table.items():
            if Effect.NOTE in move.effects:
                assert state in RECORDED & OUTLASTS, event
                assert Effect.RECORD in move.effects[move.effects.index(Effect.NOTE) :], event


def test_nothing_runs_where_it_may_not() -> None:
    for table in (SOURCE, DESTINATION):
        for move in table.values():
            assert Effect.RUN not in move.effects or move.to in MAY_RUN


def test_pages_are_withdrawn_before_the_guest_changes_them() -> None:
    for (_, event), move in SOURCE.items():
        if Effect.RUN in move.effects:
            assert move.effects.index(Effect.WITHDRAW) < move.effects.index(Effect.RUN), event


def test_every_state_survives_a_restart() -> None:
    """A process that comes back finds a state with a move for that."""
    assert all((state, Event.RESTARTED) in SOURCE for state in Source if state in RECORDED)
    assert all((state, Event.RESTARTED) in DESTINATION for state in Destination if state in RECORDED)


Way = tuple[str, ...]


def every_order(start: World) -> set[Source | Destination]:
    """Go through all that can happen, the shortest ways first; the states that both sides come to."""
    known = {start.key()}
    seen: set[Source | Destination] = set()
    waiting: deque[tuple[World, Way]] = deque([(start, ())])
    while waiting:
        world, way = waiting.popleft()
        check(world, way)
        seen |= {world.source.state, world.destination.state}
        moves = list(world.moves())
        if all(step.is_trouble for step in moves):
            check_end(world, way)
        for step in moves:
            then = world.after(step)
            if then.key() not in known:
                known.add(then.key())
                waiting.append((then, (*way, step.name)))
    return seen


def check(world: World, way: Way) -> None:
    here, there = world.here.running, world.there.running
    assert world.by_hand or not (here and there), way
    assert world.by_hand or not (here and world.there.ran), way
    # What a restarted process would read: a guest is stopped before that says that it may not run, and let run after
    # it says that it may.
    assert not here or world.source.disk in MAY_RUN, way
    yielded = {Destination.YIELDED} if world.by_hand else set()
    assert not there or world.destination.read in MAY_RUN | yielded, way
    assert not there or world.destination.disk in OUTLASTS | yielded, way
    assert not (here and world.serving) or world.source.state is Source.MOVING, way


def check_end(world: World, way: Way) -> None:
    """Everybody is back and nothing goes wrong any more: exactly one side runs."""
    assert world.connected, way
    assert world.destination.state is not Destination.REFUSED or not world.there.alive, way
    if world.may_have_run_there and not world.there.alive and world.destination.state is not Destination.REFUSED:
        return  # its emulator died, and nobody can know whether it had run under the process before
    assert world.here.running != world.there.running, (world.source.state, world.destination.state, way)


def test_at_most_one_side_runs_in_every_order() -> None:
    """However often something goes wrong: there are some thousand situations, and no more. Where somebody decided it by
    hand, who knew no better, one of the two stands again as soon as they hear of each other."""
    assert every_order(World()) == {*Source, *Destination}


class GoesByWhatItWas(World):
    """A source that lets its guest go on at every error, since it was here when its process began."""

    def end_by_error(self) -> None:
        self.source.kill()
        self.here.running = self.here.alive


def test_that_would_see_one_that_does_not_look_at_its_disk() -> None:
    with pytest.raises(AssertionError, match="ends by an error"):
        every_order(GoesByWhatItWas())


class TakesWhatWasPromisedForNotRun(World):
    """A destination that goes by its disk alone after a crash of its host, though what it noted is gone with that."""

    what_counts_then = staticmethod(lambda state: state)


def test_that_would_see_one_whose_note_is_lost() -> None:
    with pytest.raises(AssertionError, match="ran=True"):
        every_order(TakesWhatWasPromisedForNotRun())


class GoesOnThoughItsDiskRefuses(World):
    """A destination that takes what it could not write for written."""

    def cannot_write_there(self, *, kept: bool) -> None:
        self.destination.next()


def test_that_would_see_one_that_goes_on_without_a_record() -> None:
    with pytest.raises(AssertionError, match=r"not True or <Destination\.ASKED"):
        every_order(GoesOnThoughItsDiskRefuses())
