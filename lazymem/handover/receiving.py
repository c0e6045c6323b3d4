"""The destination of a hand-over: takes the device state, decides once, and asks the source until it has let go.

As at the source (`sending`), one task takes events in order and carries out what the table says. What belongs to this
host (mount, emulator process) is behind `Host`; its emulator and its mount outlive this process, so that a restarted
one finds them again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from msgspec import to_builtins

from lazymem.errors import LazymemError, MonitorError, SaveStreamError, StoreError
from lazymem.handover import messages
from lazymem.handover.arrival import RUNS_UNATTENDED, Arriving, Host, Outcome
from lazymem.handover.arriving import ArrivingGuest
from lazymem.handover.channel import Stream
from lazymem.handover.emulatorhere import EmulatorHere, NotRunError
from lazymem.handover.eventqueue import EventQueue
from lazymem.handover.incoming import Incoming
from lazymem.handover.journal import Journal, Record
from lazymem.handover.polling import until
from lazymem.handover.source_link import SourceLink
from lazymem.handover.states import DECIDED, SAID, UNDECIDED, Destination, Effect, Event, destination
from lazymem.handover.taking import Taking
from lazymem.pages import PAGE_SIZE

_LOOK_SECONDS = 0.2
"""Between two looks at the mount (is all here?) and at the emulator (does it live?)."""

_READ_AGAIN_SECONDS = 8.0
"""For a lazymem send that hands the guest on from here, and was killed, to be started again: its guardian pauses for up
to 5 s."""

_DONE_SECONDS = 5.0
"""After the guest's end, for the source to say that it has let go."""

_TELL_SECONDS = 20.0
"""For a source to hear that its guest is refused here; it asks as long."""

_MOUNTED_SECONDS = 1.0
"""So long it is taken for granted that a mount that answered is there."""

_QUEUE = 256

Say = Callable[[str], None]


class Receiver:
    """One guest's hand-over to here, from the moment at which its emulator waits for the state."""

    def __init__(
        self,
        journal: Journal,
        link: SourceLink,
        guest: ArrivingGuest | None,
        arriving: Arriving,
        host: Host,
        say: Say,
        report: Callable[[dict[str, Any]], None],
        *,
        state: Destination = Destination.ASKED,
    ) -> None:
        """`guest` None: an earlier process started it. `state`: what a journal told. `report` gets the figures when
        all is here."""
        self._journal = journal
        self._link = link
        self._emulator = EmulatorHere(guest, arriving, host, say)
        self._arriving = arriving
        self._host = host
        self._say = say
        self._on_report = report
        self._side = destination(state)
        self._stopped = 0.0
        self._restarted = False
        self._may_have_run = state in DECIDED
        self._gave_up = False
        self._acting = self._has_read_ahead = False
        self._asking_mount = trio.Lock()
        self._mounted_until = -math.inf
        self._reason = ""
        self._exit_code: int | None = None
        self._report: dict[str, Any] = {}
        self._events = EventQueue[tuple[Event, object]](_QUEUE)
        self._incoming = Incoming(link.say, self._fail)
        self.taking = Taking(self, journal.folder)

    @property
    def link(self) -> SourceLink:
        return self._link

    @property
    def state(self) -> Destination:
        return self._side.state

    # ---- life

    async def run(self, incoming: tuple[Stream, Path] | None) -> Outcome:
        """Until the guest has ended here, or is to run elsewhere. `incoming`: the connection that brings the state, and
        the socket on which the emulator takes it; None in a restarted process.

        Raises:
            StoreError: a decision could not be written.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if incoming is None:
                await self._resume()
            else:
                await self._record(Destination.ASKED)
                nursery.start_soon(self._bring_in, *incoming)
                nursery.start_soon(self._wait_loaded)
                await self._link.say(messages.Ready())
            nursery.start_soon(self._link.run, self._from_source, self._when_stopped)
            nursery.start_soon(self._watch_emulator)
            nursery.start_soon(self.taking.asked.watch)
            while not self._is_over():
                await self._take(*await self._events.take())
            await self._finish()
            await self.taking.asked.answered()  # as at the source
            nursery.cancel_scope.cancel()
        return Outcome(self.state, self._reason, self._exit_code)

    def interrupt(self) -> bool:
        """The user wants it to end. False: the guest runs here, so it is its emulator that is to end."""
        if self.state not in UNDECIDED:
            return False
        self._fail("interrupted")
        return True

    def _fail(self, reason: str) -> None:
        self._events.put_now((Event.FAILED, reason))

    async def _resume(self) -> None:
        self._restarted = True
        self._say(f"going on where an earlier lazymem receive was: {self.state.value}")
        await self._step(Event.RESTARTED)
        if self.state is Destination.REFUSED:
            self._reason = "it was refused here before"
            self._nursery.start_soon(self._give_up_later)
        elif self.state is Destination.YIELDED:
            await self._tell()
        elif self.state is Destination.ASKED:
            self._nursery.start_soon(self._look_loaded)
        elif self.state is Destination.MINE:
            self._nursery.start_soon(self._watch_pages)

    def _is_over(self) -> bool:
        if self.state is Destination.REFUSED:
            return self._link.let_go or self._gave_up
        if self.state is Destination.YIELDED:
            return True
        return self.state in DECIDED and self._exit_code is not None

    async def _finish(self) -> None:
        """The guest has ended here in good order: the source hears of it before we go."""
        if self.state is Destination.WHOLE:
            with trio.move_on_after(_DONE_SECONDS):
                while self.state is Destination.WHOLE:
                    await self._take(*await self._events.take())
        self._arriving.over = self.state is not Destination.YIELDED and not self._gave_up
        await self._record(self.state)

    # ---- what happens

    async def _from_source(self, event: Event, message: object) -> None:
        await self._events.put((event, message))

    def _when_stopped(self, load_reads: list[int]) -> None:
        """What the end of the load would wait for begins while the state is on its way. Once: each time is a thread."""
        if self.state is Destination.ASKED and not self._has_read_ahead:
            self._has_read_ahead = True
            self._nursery.start_soon(self._read_ahead, load_reads[: messages.MAX_LOAD_READS])

    async def _read_ahead(self, load_reads: list[int]) -> None:
        end = self._arriving.ram_bytes // PAGE_SIZE
        pages = [page for page in load_reads if 0 <= page < end]
        await trio.to_thread.run_sync(self._host.read_ahead, pages, abandon_on_cancel=True)
        await self._is_mounted()

    async def _bring_in(self, stream: Stream, emulator: Path) -> None:
        def received(count: int) -> None:
            self._arriving.state_bytes = count
            self._nursery.start_soon(self._link.say, messages.Received(count))
            # Before the decision, so that nobody waits for its busy daemon then.
            self._nursery.start_soon(self._is_mounted)

        try:
            await self._incoming.bring(stream, emulator, received)
        except* (SaveStreamError, MonitorError) as group:
            failure = str(group.exceptions[0])
            await self._events.put((Event.FAILED, failure))

    async def _wait_loaded(self) -> None:
        try:
            await self._emulator.wait_loaded()
            await self._incoming.wait_whole()
        except LazymemError as error:
            await self._events.put((Event.FAILED, str(error)))
        else:
            await self._events.put((Event.LOADED, None))

    async def _look_loaded(self) -> None:
        """Whether the emulator got all of its state under the process before. It may be loading still, and wait for a
        page: the source is listened to meanwhile."""
        await self._events.put(
            (Event.LOADED, None)
            if await self._emulator.has_state()
            else (Event.FAILED, "an earlier lazymem receive ended in the middle")
        )

    async def _watch_emulator(self) -> None:
        while (code := await trio.to_thread.run_sync(self._host.maybe_exit_code)) is None:  # noqa: ASYNC110
            await trio.sleep(_LOOK_SECONDS)
        if self.state in UNDECIDED:
            said = await trio.to_thread.run_sync(self._host.complaint)
            await self._events.put((Event.FAILED, f"the emulator ended with status {code}{': ' if said else ''}{said}"))
            await self._events.put((Event.LOST, code))  # it may have been decided meanwhile
        else:
            await self._wait_unread()
            if await trio.to_thread.run_sync(self._host.is_whole):
                await self._events.put((Event.ALL_HERE, None))  # the other look is a moment later
            # After a crash before all of its RAM is here the source keeps what it has, until somebody says otherwise.
            await self._events.put((Event.OVER if code == 0 else Event.LOST, code))

    async def _wait_unread(self) -> None:
        """The guest may have gone on to another host, which still wants pages of it, also some that come from our
        source."""
        read_at = -math.inf
        while True:
            maybe_reader = await trio.to_thread.run_sync(self._host.maybe_reader)
            now = trio.current_time()
            if maybe_reader is None and now > read_at + _READ_AGAIN_SECONDS:
                return
            if maybe_reader is not None and read_at == -math.inf:
                self._say(f"the emulator has ended, and the guest's RAM is still needed: {maybe_reader}")
            read_at = read_at if maybe_reader is None else now
            await trio.sleep(_LOOK_SECONDS)

    async def _watch_pages(self) -> None:
        told = False
        while not await trio.to_thread.run_sync(self._host.is_whole):
            maybe_reason = await trio.to_thread.run_sync(self._host.maybe_not_kept)
            if maybe_reason is not None and not told:
                self._say(f"the guest still needs its source: its RAM cannot be kept here: {maybe_reason}")
            told = maybe_reason is not None
            await trio.sleep(_LOOK_SECONDS)
        await self._events.put((Event.ALL_HERE, None))

    async def let_be_taken(self) -> None:
        """As `taking.Takeable`."""
        await self._events.put((Event.TAKE, None))
        await until(lambda: self.state is not Destination.LOADED and not self._acting)

    # ---- events and effects

    async def _take(self, event: Event, payload: object) -> None:
        before = self.state
        decides = event in (Event.GIVEN, Event.LOADED, Event.TAKE) and before in UNDECIDED
        promises = event is Event.GIVEN and before is Destination.ASKED  # and it is decided when all is loaded
        if isinstance(payload, messages.Given):
            self._stopped = payload.stopped
            maybe_difference = self._incoming.expect(payload.state_bytes)
            if decides and maybe_difference is not None:
                event, payload = Event.FAILED, maybe_difference
        if decides and not promises and not await self._is_mounted():
            event, payload = Event.FAILED, "the mount of the guest's RAM is gone"
        if isinstance(payload, messages.Void) and before in UNDECIDED:
            self._reason = self._reason or f"the source kept its guest{': ' if payload.text else ''}{payload.text}"
        elif event is Event.FAILED and before in UNDECIDED:
            self._reason = str(payload)
        elif event in (Event.ALL_HERE, Event.OVER) and before is Destination.MINE:
            await self._make_report()
        self._acting = True
        known = await self._step(event)
        self._acting = False
        if not known and isinstance(payload, messages.Message):
            self._say(f"the source said {event.value!r}, which makes no sense where the guest is {before.value!r}")
            await self._link.drop()
        if isinstance(payload, int):
            self._exit_code = payload
        if before is not self.state:
            await self._tell()

    async def _is_mounted(self) -> bool:
        async with self._asking_mount:  # who asks already, asks for all
            if time.monotonic() < self._mounted_until:
                return True
            mounted = await trio.to_thread.run_sync(self._host.is_mounted)
            if mounted:
                self._mounted_until = time.monotonic() + _MOUNTED_SECONDS
            return mounted

    async def _give_up_later(self) -> None:
        """A source that cannot be told in all this time is told by the next lazymem receive, or takes its guest back by
        hand."""
        await trio.sleep(_TELL_SECONDS)
        self._say(
            "the source could not be told that its guest is refused here; if it stands there: lazymem send --reclaim"
        )
        self._gave_up = True
        await self._events.put((Event.LOST, None))

    async def _tell(self) -> None:
        if self.state is Destination.MINE:
            how = "runs here" if self._arriving.runs else "is here, and stands as it did at its source"
            self._say(f"the guest {how}; the rest of its RAM follows")
            self._nursery.start_soon(self._watch_pages)
        elif self.state is Destination.PROMISED:
            self._nursery.start_soon(self._incoming.await_rest)
        elif self.state is Destination.WHOLE and self._report:
            self._on_report(self._report)
        elif self.state is Destination.REFUSED:
            self._say(self._reason)
            self._nursery.start_soon(self._give_up_later)
        elif self.state is Destination.YIELDED:
            self._reason = "the source took the guest back, by hand: it stands here"

    async def _make_report(self) -> None:
        figures = await trio.to_thread.run_sync(self._host.figures)
        self._report = {
            "downtime_seconds": self._arriving.downtime_seconds,
            "total_seconds": time.monotonic() - self._arriving.began,
            "rest_seconds": None if self._arriving.ran_at is None else time.monotonic() - self._arriving.ran_at,
            "warm_seconds": self._arriving.warmed_seconds,
            "warmed_bytes": self._arriving.warmed_bytes,
            "ram_bytes": self._arriving.ram_bytes,
            "state_bytes": self._arriving.state_bytes,
            **figures,
        }

    async def _step(self, event: Event) -> bool:
        """Whether there is such a move."""
        effects = self._side.maybe_step(event)
        for effect in effects or ():
            if effect in SAID:
                await self._speak(effect)
            elif not await self._act(effect):
                # What would have been done behind it is not: it is known that the guest never ran here.
                return await self._step(Event.NEVER_RAN)
        return effects is not None

    async def _act(self, effect: Effect) -> bool:
        if effect is Effect.RECORD:
            try:
                await self._record(self.state)
            except StoreError:
                if self.state is Destination.MINE and self._arriving.ran:
                    self._say(RUNS_UNATTENDED)
                raise
        elif effect is Effect.NOTE:
            await self._write(self._journal.note, self.state)
        elif effect is Effect.RUN:
            return await self._run_guest()
        elif effect is Effect.STOP:
            await self._emulator.stop()
        elif effect is Effect.QUIT:
            await trio.to_thread.run_sync(self._host.end_emulator)
        return True

    async def _speak(self, effect: Effect) -> None:
        message: messages.Message = messages.Refused(messages.short(self._reason))
        if effect is Effect.SAY_MINE:
            message = messages.Mine(self._arriving.downtime_seconds)
        elif effect is Effect.SAY_WHOLE:
            message = messages.Whole(self._report)
        await self._link.say(message)

    async def _record(self, state: Destination) -> None:
        await self._write(self._journal.write, state)

    async def _write(self, write: Callable[[str, str, dict[str, Any]], Record], state: Destination) -> None:
        await trio.to_thread.run_sync(write, self._link.handover, state.value, to_builtins(self._arriving))

    async def _run_guest(self) -> bool:
        """The last step. False: it is sure that the guest has not run.

        One that was let run by a process that died since is left as it is: somebody may have stopped it for a reason.
        """
        if self._arriving.ran:
            return True
        try:
            maybe_began = await self._emulator.run(ask=self._restarted)
        except NotRunError as error:
            self._reason = f"the guest cannot run here: {error}"
            self._say(self._reason)
            return self._may_have_run  # under the process before
        if maybe_began is not None:
            if self._stopped and not self._restarted:  # else when it began, and the other clock, are not known
                downtime = maybe_began + self._link.clock_ahead_seconds - self._stopped
                self._arriving.downtime_seconds = max(0.0, downtime)
            self._arriving.ran, self._arriving.ran_at = True, time.monotonic()
        return True
