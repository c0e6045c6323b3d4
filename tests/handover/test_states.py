"""The hand-over's tables: whatever is delivered, lost, killed and restarted in whatever order, at most one side runs.

Effects are carried out one at a time, and a kill may fall between any two. What survives a kill is what really does:
the record on the disk, and the emulators, which are processes of their own.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import booleans

from lazymem.handover.states import (
    DESTINATION,
    MAY_RUN,
    RECORDED,
    SAID,
    SOURCE,
    Destination,
    Effect,
    Event,
    Side,
    Source,
    destination,
    source,
)


def test_what_acts_on_a_decision_stands_behind_its_record() -> None:
    for table in (SOURCE, DESTINATION):
        for (state, event), move in table.items():
            if move.to is state or move.to not in RECORDED:
                continue
            if {Effect.RUN, Effect.QUIT, *SAID} & set(move.effects):
                record = move.effects.index(Effect.RECORD)
                for effect in (Effect.RUN, Effect.QUIT, *SAID):
                    if effect in move.effects:
                        assert record < move.effects.index(effect), (state, event)


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


class Emulator:
    """`alive`; `has_state`: there is a guest in it; `running`: its vCPUs do."""

    def __init__(self, *, running: bool) -> None:
        self.alive = True
        self.has_state = running
        self.running = running


class Process:
    """One side: its machine, what it still has to do, and what is on its disk."""

    def __init__(self, side: Side[Source] | Side[Destination]) -> None:
        self.side = side
        self.disk = side.state
        self.todo: deque[tuple[Effect, Source | Destination]] = deque()
        self.alive = True

    def take(self, event: Event) -> None:
        effects = self.side.maybe_step(event)
        for effect in effects or ():
            self.todo.append((effect, self.side.state))

    def kill(self) -> None:
        self.alive = False
        self.todo.clear()


class HandOver(RuleBasedStateMachine):
    """Both sides, a network that loses connections, and kills; no hand of the user."""

    @initialize()
    def begin(self) -> None:
        self.source = Process(source())
        self.destination = Process(destination())
        self.here = Emulator(running=True)
        self.there = Emulator(running=False)
        self.to_source: deque[Event] = deque([Event.READY])
        self.to_destination: deque[Event] = deque()
        self.connected = True
        self.sent = False  # the whole device state
        self.arrived = False
        self.broken = False  # a stream that was cut never becomes whole
        self.frozen_serving = False
        self.restarted_there = False

    # ---- the network

    @precondition(lambda self: self.connected and self.to_source and not self.source.todo)
    @rule()
    def deliver_to_source(self) -> None:
        self.source.take(self.to_source.popleft())

    @precondition(lambda self: self.connected and self.to_destination and not self.destination.todo)
    @rule()
    def deliver_to_destination(self) -> None:
        self.destination.take(self.to_destination.popleft())

    @precondition(lambda self: self.connected)
    @rule()
    def cut(self) -> None:
        self._disconnect()
        for process in (self.source, self.destination):
            if process.alive:
                process.take(Event.LOST)

    @precondition(lambda self: not self.connected and self.source.alive and self.destination.alive)
    @rule()
    def connect(self) -> None:
        if self.source.todo or self.destination.todo:
            return
        self.connected = True
        self.source.take(Event.BACK)
        self.destination.take(Event.BACK)

    def _disconnect(self) -> None:
        self.connected = False
        self.to_source.clear()
        self.to_destination.clear()
        self.broken |= not self.arrived

    # ---- processes

    @precondition(lambda self: self.source.alive)
    @rule()
    def kill_source(self) -> None:
        self.source.kill()
        self._disconnect()
        if self.destination.alive:
            self.destination.take(Event.LOST)

    @precondition(lambda self: self.destination.alive)
    @rule()
    def kill_destination(self) -> None:
        self.destination.kill()
        self._disconnect()
        if self.source.alive:
            self.source.take(Event.LOST)

    @precondition(lambda self: not self.source.alive)
    @rule()
    def restart_source(self) -> None:
        assert isinstance(self.source.disk, Source)
        self.source = Process(source(self.source.disk))
        self.source.take(Event.RESTARTED)

    @precondition(lambda self: not self.destination.alive)
    @rule()
    def restart_destination(self) -> None:
        assert isinstance(self.destination.disk, Destination)
        self.restarted_there = True
        self.destination = Process(destination(self.destination.disk))
        self.destination.take(Event.RESTARTED)
        if self.destination.side.state is Destination.ASKED:
            whole = self.there.alive and self.there.has_state
            self.destination.take(Event.LOADED if whole else Event.FAILED)

    @precondition(lambda self: self.source.alive and self.source.todo)
    @rule()
    def source_acts(self) -> None:
        effect, state = self.source.todo.popleft()
        if effect in SAID:
            if self.connected:
                self.to_destination.append(SAID[effect])
        elif effect is Effect.RECORD:
            self.source.disk = state
        elif effect is Effect.RUN:
            self.here.running = self.here.alive
        elif effect is Effect.QUIT:
            self.here.alive = self.here.running = False
        elif effect in (Effect.SERVE, Effect.WITHDRAW):
            self.frozen_serving = effect is Effect.SERVE

    @precondition(lambda self: self.source.alive and self.source.todo)
    @rule(kept=booleans())
    def source_cannot_write_that_it_gives(self, *, kept: bool) -> None:
        """`kept`: a restarted process would read it all the same."""
        effect, state = self.source.todo[0]
        if effect is Effect.RECORD and state is Source.GIVEN and self.source.disk is Source.OURS:
            if kept:
                self.source.disk = state
            self.source.todo.clear()
            self.source.take(Event.NOT_WRITTEN)

    @precondition(lambda self: self.destination.alive and self.destination.todo)
    @rule()
    def destination_acts(self) -> None:
        effect, state = self.destination.todo.popleft()
        if effect in SAID:
            if self.connected:
                self.to_source.append(SAID[effect])
        elif effect is Effect.RECORD:
            self.destination.disk = state
        elif effect is Effect.RUN:
            self.there.running = self.there.alive and self.there.has_state
            if not self.there.running and not self.restarted_there:
                self.destination.todo.clear()
                self.destination.take(Event.NEVER_RAN)
        elif effect is Effect.STOP:
            self.there.running = False
        elif effect is Effect.QUIT:
            self.there.alive = self.there.running = False

    # ---- emulators

    @precondition(lambda self: self.source.alive and self.source.side.state is Source.MOVING and not self.source.todo)
    @rule()
    def source_stops_and_sends(self) -> None:
        if not self.broken and self.connected:
            self.here.running = False
            self.sent = True
            self.frozen_serving = True

    @precondition(lambda self: self.source.alive and self.source.side.state is Source.MOVING and not self.source.todo)
    @rule()
    def migration_fails(self) -> None:
        self.broken = self.broken or not self.arrived
        self.source.take(Event.FAILED)

    @precondition(lambda self: self.sent and self.connected and self.destination.alive and not self.broken)
    @rule()
    def stream_arrives(self) -> None:
        if not self.arrived:
            self.arrived = True
            self.to_source.append(Event.RECEIVED)

    @precondition(lambda self: self.arrived and self.there.alive and self.destination.alive)
    @rule()
    def load_ends(self) -> None:
        if not self.there.has_state and not self.destination.todo:
            self.there.has_state = True
            self.destination.take(Event.LOADED)

    @precondition(lambda self: self.destination.alive and not self.there.has_state and not self.destination.todo)
    @rule()
    def load_fails(self) -> None:
        if self.there.alive:
            self.there.alive = False
            self.destination.take(Event.FAILED)

    @precondition(lambda self: self.there.alive and self.there.has_state and not self.there.running)
    @rule()
    def emulator_dies_before_it_ran(self) -> None:
        self.there.alive = False

    @precondition(lambda self: self.there.running and self.destination.alive and not self.destination.todo)
    @rule()
    def everything_is_there(self) -> None:
        self.destination.take(Event.ALL_HERE)

    # ---- what must hold

    @invariant()
    def at_most_one_runs(self) -> None:
        if hasattr(self, "here"):
            assert not (self.here.running and self.there.running)

    @invariant()
    def nobody_fetches_what_changes(self) -> None:
        if hasattr(self, "here"):
            assert not (self.here.running and self.frozen_serving) or self.source.side.state is Source.MOVING

    def teardown(self) -> None:
        """When everybody is back and nothing is lost any more, exactly one side runs."""
        if not hasattr(self, "here"):
            return
        if not self.source.alive:
            self.restart_source()
        if not self.destination.alive:
            self.restart_destination()
        for _ in range(100):
            while self.source.todo:
                self.source_acts()
            while self.destination.todo:
                self.destination_acts()
            if not self.connected:
                self.connect()
            elif self.to_source:
                self.deliver_to_source()
            elif self.to_destination:
                self.deliver_to_destination()
            elif self.source.side.state is Source.MOVING and self.broken:
                self.migration_fails()
            elif self.source.side.state is Source.MOVING and not self.sent:
                self.source_stops_and_sends()
            elif self.sent and not self.arrived and not self.broken:
                self.stream_arrives()
            elif self.arrived and self.there.alive and not self.there.has_state:
                self.load_ends()
            self.at_most_one_runs()
        if self.source.side.state is Source.OURS and self.destination.side.state is Destination.ASKED:
            return  # it was never begun: the process that would say READY is the one that was killed
        if self.there.has_state and not self.there.alive and self.destination.side.state is not Destination.REFUSED:
            return  # its emulator died, and nobody can know whether it had run before
        assert self.here.running != self.there.running, (self.source.side.state, self.destination.side.state)


HandOver.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestHandOver = HandOver.TestCase
