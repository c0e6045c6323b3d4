"""A hand-over as its tables see it: both sides' processes, disks and emulators, and the network. Nothing is random.

`moves` are all that can happen next; some of them are troubles (a cut, a kill, a failure). Effects are carried out one
at a time, so a kill may fall between any two. What survives a kill is what really does: the record, and the emulators,
which are processes of their own. A host that crashes takes its emulator along, and what was only noted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lazymem.handover.states import (
    DECIDED,
    SAID,
    Destination,
    Effect,
    Event,
    Side,
    Source,
    after_host_restart,
    destination,
    source,
)


@dataclass
class Emulator:
    """`alive`; `has_state`: there is a guest in it; `running`: its vCPUs do; `ran`: they did, though it may be dead."""

    running: bool
    has_state: bool
    alive: bool = True
    ran: bool = False

    def run(self) -> None:
        self.running = self.alive and self.has_state
        self.ran |= self.running

    def key(self) -> tuple[bool, ...]:
        return self.running, self.has_state, self.alive, self.ran


@dataclass
class Process:
    """One side: its state, what it still has to do, what the other one said to it, what is on its disk, and what
    another process would read there."""

    state: Source | Destination
    disk: Source | Destination
    read: Source | Destination
    alive: bool = True
    todo: tuple[tuple[Effect, Source | Destination], ...] = ()
    heard: tuple[Event, ...] = ()

    def take(self, event: Event) -> None:
        side: Side[Source] | Side[Destination]
        side = source(self.state) if isinstance(self.state, Source) else destination(self.state)
        effects = side.maybe_step(event) or ()
        self.state = side.state
        self.todo += tuple((effect, self.state) for effect in effects)

    def next(self) -> tuple[Effect, Source | Destination]:
        (first, *rest) = self.todo
        self.todo = tuple(rest)
        return first

    def record(self, state: Source | Destination) -> None:
        self.disk = self.read = state

    def kill(self) -> None:
        self.alive, self.todo = False, ()

    def restart(self) -> None:
        """What it reads it writes once more, first of all."""
        self.record(self.read)
        self.alive, self.state = True, self.read
        self.take(Event.RESTARTED)

    @property
    def idle(self) -> bool:
        return self.alive and not self.todo

    def key(self) -> tuple[object, ...]:
        return self.state, self.disk, self.read, self.alive, self.todo, self.heard


@dataclass(frozen=True)
class Step:
    """What may happen next."""

    name: str
    act: Callable[[World], None]
    is_trouble: bool = False


@dataclass
class World:
    """`sent`: the whole device state; `arrived`: there. `broken`: a stream that was cut never becomes whole."""

    source: Process = field(default_factory=lambda: _begins(Source.OURS, Event.READY))
    destination: Process = field(default_factory=lambda: _begins(Destination.ASKED))
    here: Emulator = field(default_factory=lambda: Emulator(running=True, has_state=True))
    there: Emulator = field(default_factory=lambda: Emulator(running=False, has_state=False))
    connected: bool = True
    sent: bool = False
    arrived: bool = False
    broken: bool = False
    serving: bool = False
    may_have_run_there: bool = False
    """For all that the present process there knows."""
    crashed_there: bool = False
    """That host; once."""
    by_hand: bool = False
    """Somebody has decided it; once."""

    def key(self) -> tuple[object, ...]:
        parts = (self.source, self.destination, self.here, self.there)
        flags = (self.connected, self.sent, self.arrived, self.broken, self.serving)
        return (*(part.key() for part in parts), *flags, self.may_have_run_there, self.crashed_there, self.by_hand)

    def after(self, step: Step) -> World:
        """This one stays as it is."""
        made = copy.copy(self)
        made.source, made.destination = copy.copy(self.source), copy.copy(self.destination)
        made.here, made.there = copy.copy(self.here), copy.copy(self.there)
        step.act(made)
        return made

    def moves(self) -> Iterator[Step]:
        yield from self._of_the_network()
        yield from self._of_processes()
        yield from self._of_emulators()

    def _of_the_network(self) -> Iterator[Step]:
        if not self.connected:
            if self.source.idle and self.destination.idle:
                yield Step("connect", World._connect)
            if not self.by_hand:
                yield from self._by_hand()
            return
        yield Step("cut", World._cut, is_trouble=True)
        if self.source.heard and self.source.idle:
            yield Step(f"the source hears {self.source.heard[0].name}", lambda world: _hear(world.source))
        if self.destination.heard and self.destination.idle:
            yield Step(
                f"the destination hears {self.destination.heard[0].name}", lambda world: _hear(world.destination)
            )

    def _by_hand(self) -> Iterator[Step]:
        """Refused while the other side answers."""
        if self.source.idle and self.source.state is Source.GIVEN:
            yield Step("send --reclaim", World._reclaim, is_trouble=True)
        if self.destination.idle and self.destination.state is Destination.LOADED:
            yield Step("receive --take", World._take, is_trouble=True)

    def _of_processes(self) -> Iterator[Step]:
        if not self.source.alive:
            yield Step("the source is restarted", lambda world: world.source.restart())
            yield Step("the source cannot begin again", World._cannot_begin, is_trouble=True)
        else:
            yield Step("the source ends by an error", lambda world: world.end_by_error(), is_trouble=True)
            yield Step("the source is killed", World._kill_source, is_trouble=True)
        if not self.destination.alive:
            yield Step("the destination is restarted", World._restart_destination)
        else:
            yield Step("the destination is killed", World._kill_destination, is_trouble=True)
        if not self.crashed_there:
            yield Step("the destination's host crashes", World._crash_there, is_trouble=True)
        if self.source.todo:
            effect, state = self.source.todo[0]
            yield Step(f"the source: {effect.name}", World._source_acts)
            if effect is Effect.RECORD and state is Source.GIVEN and self.source.disk is Source.OURS:
                yield Step("its disk refuses", lambda world: world._cannot_write(kept=False), is_trouble=True)
                yield Step("its disk refuses, and keeps", lambda world: world._cannot_write(kept=True), is_trouble=True)
        if self.destination.todo:
            effect, _ = self.destination.todo[0]
            yield Step(f"the destination: {effect.name}", World._destination_acts)
            if effect in (Effect.RECORD, Effect.NOTE):
                yield Step("its disk refuses", lambda world: world.cannot_write_there(kept=False), is_trouble=True)
                yield Step(
                    "its disk refuses, and keeps", lambda world: world.cannot_write_there(kept=True), is_trouble=True
                )

    def _of_emulators(self) -> Iterator[Step]:
        if self.source.idle and self.source.state is Source.MOVING:
            yield Step("the migration fails", World._migration_fails, is_trouble=not self.broken)
            if self.connected and not (self.sent or self.broken):
                yield Step("the guest stops, its state is sent", World._send)
            if self.sent:  # and may have broken just now, of which nobody knows here yet
                yield Step("its end is on its way", lambda world: world.source.take(Event.SENT))
        if self.sent and self.destination.alive and not (self.arrived or self.broken):
            # Over a connection of its own, which may last longer than that over which they speak.
            yield Step("the state arrives", World._arrive)
            yield Step("the state's connection breaks", World._break, is_trouble=True)
        if self.destination.idle and self.there.alive and not self.there.has_state:
            if self.arrived:
                yield Step("it is loaded", World._load)
            yield Step("it cannot be loaded", World._cannot_load, is_trouble=not self.broken)
        if self.there.alive and self.there.has_state and not self.there.running:
            yield Step("the emulator dies before it ran", lambda world: _die(world.there), is_trouble=True)
        if self.there.running and self.destination.idle and self.destination.state is Destination.MINE:
            yield Step("all is there", lambda world: world.destination.take(Event.ALL_HERE))

    # ---- what they do

    def _connect(self) -> None:
        self.connected = True
        self.source.take(Event.BACK)
        self.destination.take(Event.BACK)

    def _disconnect(self) -> None:
        self.connected = False
        self.source.heard = self.destination.heard = ()

    def _cut(self) -> None:
        self._disconnect()
        for process in (self.source, self.destination):
            if process.alive:
                process.take(Event.LOST)

    def _kill_source(self) -> None:
        """What is in its kernel may arrive or not."""
        self.source.kill()
        self.broken |= not self.sent
        self._lose(self.destination)

    def _cannot_begin(self) -> None:
        """No port, no certificate: no process is there then, and the guest goes on if the disk says that it is here."""
        if self.source.read is Source.OURS:
            self.here.run()
            self.serving = False

    def end_by_error(self) -> None:
        """Between any two effects, and lets its guest go on by the same word."""
        self._kill_source()
        self._cannot_begin()

    def _kill_destination(self) -> None:
        self.destination.kill()
        self.broken |= not self.arrived
        if not self.there.has_state:
            _die(self.there)  # its state ends in the middle, or it has never got any
        self._lose(self.source)

    what_counts_then = staticmethod(after_host_restart)

    def _crash_there(self) -> None:
        self.crashed_there = True
        self._kill_destination()
        _die(self.there)
        assert isinstance(self.destination.disk, Destination)
        self.destination.record(self.what_counts_then(self.destination.disk))

    def _lose(self, other: Process) -> None:
        was_connected = self.connected
        self._disconnect()
        if was_connected and other.alive:
            other.take(Event.LOST)

    def _restart_destination(self) -> None:
        self.destination.restart()
        self.may_have_run_there = self.destination.state in DECIDED
        if self.destination.state is Destination.ASKED:
            whole = self.there.alive and self.there.has_state
            self.destination.take(Event.LOADED if whole else Event.FAILED)

    def _reclaim(self) -> None:
        self.by_hand = True
        self.source.take(Event.RECLAIM)

    def _take(self) -> None:
        self.by_hand = True
        self.destination.take(Event.TAKE)

    def _source_acts(self) -> None:
        effect, state = self.source.next()
        if effect in SAID:
            self._say(self.destination, effect)
        elif effect is Effect.RECORD:
            self.source.record(state)
        elif effect is Effect.RUN:
            self.here.run()
            self.broken |= not self.arrived
        elif effect is Effect.QUIT:
            _die(self.here)
        elif effect in (Effect.SERVE, Effect.WITHDRAW):
            self.serving = effect is Effect.SERVE

    def _cannot_write(self, *, kept: bool) -> None:
        """`kept`: a restarted process would read it all the same."""
        if kept:
            self.source.record(Source.GIVEN)
        self.source.todo = ()
        self.source.take(Event.NOT_WRITTEN)

    def cannot_write_there(self, *, kept: bool) -> None:
        """Its process ends by that, and nothing that stood behind it is done."""
        _, state = self.destination.next()
        if kept:
            self.destination.read = state
        self._kill_destination()

    def _destination_acts(self) -> None:
        effect, state = self.destination.next()
        if effect in SAID:
            self._say(self.source, effect)
        elif effect is Effect.RECORD:
            self.destination.record(state)
        elif effect is Effect.NOTE:
            self.destination.read = state
        elif effect is Effect.RUN:
            self.there.run()
            if not self.there.running and not self.may_have_run_there:
                self.destination.todo = ()
                self.destination.take(Event.NEVER_RAN)
        elif effect is Effect.STOP:
            self.there.running = False
        elif effect is Effect.QUIT:
            _die(self.there)

    def _say(self, other: Process, effect: Effect) -> None:
        if self.connected:
            other.heard += (SAID[effect],)

    def _migration_fails(self) -> None:
        self.broken |= not self.arrived
        self.source.take(Event.FAILED)

    def _break(self) -> None:
        self.broken = True

    def _send(self) -> None:
        self.here.running = False
        self.sent = self.serving = True

    def _arrive(self) -> None:
        self.arrived = True
        if self.connected:
            self.source.heard += (Event.RECEIVED,)

    def _load(self) -> None:
        self.there.has_state = True
        self.destination.take(Event.LOADED)

    def _cannot_load(self) -> None:
        self.there.alive = False
        self.destination.take(Event.FAILED)


def _begins(state: Source | Destination, *heard: Event) -> Process:
    return Process(state, state, state, heard=heard)


def _hear(process: Process) -> None:
    event, *rest = process.heard
    process.heard = tuple(rest)
    process.take(event)


def _die(emulator: Emulator) -> None:
    emulator.alive = emulator.running = False
