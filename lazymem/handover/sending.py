"""The source of a hand-over: offers the guest to one receiver, lets it go, and serves its RAM until that is all there.

One task takes events in the order in which they come and carries out what the table (`states`) says, each effect whole
before the next. Connections (`receivers`), the emulator's sending, and the user's requests only put events into its
queue.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from msgspec import to_builtins

from lazymem.errors import LazymemError, StoreError
from lazymem.handover import messages
from lazymem.handover.channel import Channel, Stream
from lazymem.handover.departure import Leaving, Outcome, PageServer, void_of
from lazymem.handover.devicestate import StateSending
from lazymem.handover.eventqueue import EventQueue
from lazymem.handover.guesthere import GuestHere
from lazymem.handover.journal import Journal, read
from lazymem.handover.leaving import LeavingGuest
from lazymem.handover.leavingram import LeavingRam
from lazymem.handover.offers import Offers
from lazymem.handover.polling import until
from lazymem.handover.receivers import Receivers
from lazymem.handover.reclaiming import Reclaiming
from lazymem.handover.states import SAID, Effect, Event, Source, source
from lazymem.handover.warming import Warming
from lazymem.snapshot.liveram import Served

_LINGER_SECONDS = 3.0
"""For the last word to be taken; a receiver that misses it asks again, and finds nobody: it needs nothing more."""

_LOAD_SECONDS = 0.05
"""For a destination that was given its guest to load it, before what nobody waits for takes its processors and its
link. Not for longer: a device's load may wait for a page that is already asked for as such."""

_QUEUE = 256
"""Events that wait: a receiver that says more at once is not read from."""

_MOST_WRITE_SECONDS = 0.02
"""A disk that takes longer for a decision is not trusted to take as long again."""

_GIVES = (Event.RECEIVED, Event.SENT)

Say = Callable[[str], None]


class Sender:
    """One guest's hand-over from here."""

    def __init__(
        self,
        journal: Journal,
        guest: LeavingGuest | None,
        leaving: Leaving,
        pages: PageServer,
        say: Say,
        *,
        maybe_look: Callable[[], Leaving] | None = None,
        warm_seconds: float = 0.0,
        offers: bool = True,
    ) -> None:
        """`guest` None: its emulator is gone, only its RAM is left to serve. `maybe_look`: go on as the journal says;
        looks at a guest that is still here once more, and raises what speaks against offering it again.
        `warm_seconds`: for so long its pages go ahead of it. `offers`: else a guest that is here only goes on."""
        self._warming = Warming(warm_seconds, say)
        self._journal = journal
        self._here = GuestHere(guest, lambda: self._record(Source.OURS), say)
        self._leaving = leaving
        self._ram = LeavingRam(pages)
        self._say = say
        found = journal.found if maybe_look is not None else None
        self._maybe_look = maybe_look
        self._restarted = found is not None
        self._is_to_offer = offers
        self._opened = trio.Event()
        self._side = source(Source(found.state) if found is not None else Source.OURS)
        self._offers = Offers(() if journal.found is None else void_of(journal.found))
        # Not before what was begun is undone, and once only: whatever comes of it is this process's end.
        self._offers.are_open = found is None
        if found is not None and self.state is Source.OURS:
            self._offers.set_void(found.handover)
        elif found is not None:
            self._offers.handover = found.handover
        self._acting = False
        self._is_taken = trio.Event()
        """The destination runs the guest."""
        self.stands: str | None = None
        self._recording = trio.Lock()
        self._device_state = StateSending()
        self._reason = ""
        self._report: dict[str, Any] = {}
        self._events = EventQueue[tuple[Event, Channel | None, object]](_QUEUE)
        self.receivers = Receivers(self, self._put_event)
        self.reclaiming = Reclaiming(self, journal.folder)

    @property
    def state(self) -> Source:
        return self._side.state

    @property
    def handover(self) -> str:
        """As `receivers.Door`."""
        return self._offers.handover

    @property
    def state_bytes(self) -> int:
        return self._leaving.state_bytes

    # ---- life

    async def run(self) -> Outcome:
        """Until the guest is whole elsewhere, or is to stay here.

        Raises:
            LazymemError: a decision could not be written, or the RAM is not served any more; the guest stands as the
                decision before says.
        """
        async with trio.open_nursery() as self._nursery:
            over = await self._resume() if self._restarted else False
            if not over:
                self._opened.set()
            self._nursery.start_soon(self.reclaiming.asked.watch)
            while not over:
                over = await self._take(*await self._events.take())
            await self._linger()
            await self.reclaiming.asked.answered()  # it may be this very end that was asked for
            self._nursery.cancel_scope.cancel()
        return Outcome(self.state, self._reason, self._report, self.stands)

    async def _linger(self) -> None:
        """Let the last word be heard: by a receiver that goes then, or comes back for it."""
        with trio.move_on_after(_LINGER_SECONDS):
            await until(lambda: self.receivers.peer is None and (not self._offers.is_untold))

    def close(self) -> None:
        self.receivers.close()
        self._device_state.close()

    async def wait_open(self) -> None:
        """Until whoever comes is served: what was begun before is undone, or goes on."""
        await self._opened.wait()

    def interrupt(self) -> bool:
        """The user wants it to end. False: the guest is given, and this process is needed."""
        if self.state in (Source.GIVEN, Source.GONE):
            return False
        self._fail("interrupted")
        return True

    async def wait_moved(self) -> None:
        """Until no move is being made: what was decided is written, and said to whoever is there."""
        await until(lambda: not self._acting)

    async def _resume(self) -> bool:
        """What a restarted process finds in its journal; whether nothing is left to do."""
        if self.state in (Source.GIVEN, Source.GONE):
            self._open_ram()
            self._say(f"going on where an earlier lazymem send was: the guest is {self.state.value}")
        await self._step(Event.RESTARTED)
        if self.state is Source.GONE:
            await self._here.settle(self._leaving)
        if self.state is Source.OURS and not self._is_to_offer:
            self._reason = "taken back by hand"
            return True
        if self.state is Source.OURS:
            assert self._maybe_look is not None
            before, self._leaving = self._leaving, await trio.to_thread.run_sync(self._maybe_look)
            self._leaving.settings_before = before.settings_before  # if they could not be set back
            self._offers.are_open = True
        return self.state is Source.RELEASED

    # ---- the door

    def admit(self, hello: messages.Hello, *, occupied: bool) -> messages.Message | None:
        """As `receivers.Door`."""
        is_free = not occupied and self.state is Source.OURS
        refusal = self._offers.maybe_refusal(hello, is_free=is_free)
        if refusal is not None or hello.handover:
            return refusal
        self._offers.begin()
        try:
            self._open_ram()
        except LazymemError as error:
            self._fail(str(error))
            return messages.No(str(error))
        return None

    async def offer(self) -> messages.Offer:
        """As `receivers.Door`. On the disk before anything can begin: a restarted process knows who comes back."""
        if self.state is Source.OURS:
            try:
                await self._record(Source.OURS)
            except LazymemError as error:
                self._fail(str(error))
                raise
        found = self._leaving
        return messages.Offer(
            messages.VERSION,
            self.handover,
            found.ram_bytes,
            found.emulator,
            found.boot_id,
            found.ram_path,
            found.was_running,
            self._warming.seconds if self.state is Source.OURS else 0.0,
        )

    def arrived(self, stream_bytes: int) -> None:
        """As `receivers.Door`."""
        self._device_state.arrived(stream_bytes)
        self._look_sent()

    async def warm(self, stream: Stream) -> None:
        """As `receivers.Door`. While the guest is here, and nothing was begun."""
        if self.state is Source.OURS and self._offers.are_open:
            await self._warming.send(Path(self._leaving.ram_path), stream, self.handover)

    def _open_ram(self) -> None:
        self._ram.publish(Path(self._leaving.ram_path), self.handover)

    # ---- events

    async def _put_event(self, event: Event, peer: Channel | None, payload: object) -> None:
        await self._events.put((event, peer, payload))

    def _fail(self, reason: str) -> None:
        self._events.put_now((Event.FAILED, None, reason))

    async def _take(self, event: Event, peer: Channel | None, payload: object) -> bool:
        """Whether nothing is left to do."""
        if peer is not None and peer is not self.receivers.peer and event is not Event.LOST:
            return False  # of a connection that another one has replaced
        if event is Event.LOST and self.receivers.peer is not None:
            return False  # it is back already
        if event is Event.RECEIVED and not self._counted(payload):
            return False
        if event is Event.SENT and self.state is not Source.MOVING:
            return False  # something else was quicker
        if event is Event.FAILED and self.state is Source.OURS:
            self._reason = str(payload)
            return True
        before, self._acting = self.state, True
        self._note(event, payload)
        # "Given" is written and said in one, whatever else ends meanwhile: else the guest would stand on both sides.
        with trio.CancelScope(shield=event in _GIVES):
            is_known = await self._step(event)
        if not is_known and isinstance(payload, messages.Message):
            self._say(f"the receiver said {event.value!r}, which makes no sense where the guest is {before.value!r}")
            await self.receivers.drop()
        self._acting = False
        self._tell(event, before)
        if self.state is Source.GONE and before is not self.state:
            await self._here.settle(self._leaving)
        return before is not self.state and self.state in (Source.OURS, Source.RELEASED)

    def _tell(self, event: Event, before: Source) -> None:
        if self.state is Source.GONE and before is not self.state:
            self._say("the guest runs at the destination; its RAM is served until all of it is there")
        elif event is Event.LOST and self.state is Source.GIVEN:
            self._say("the destination is away and the guest was given to it: it stands until the destination answers")
        elif event is Event.LOST and self.state is Source.GONE:
            self._say("the destination is away; its guest's RAM goes on being served")

    def _counted(self, payload: object) -> bool:
        """Given is what both sides have counted to be whole, and only once the emulator here says the same."""
        both = self._device_state.count(payload)
        self._leaving.state_bytes = self._device_state.sent_bytes or 0
        if both and (difference := self._device_state.maybe_difference) is not None:
            self._fail(difference)
            return False
        if not both:
            self._look_sent()
        return both

    def _look_sent(self) -> None:
        """What is under way may be there when "given" is, which is on the disk and heard of by then."""
        seconds = min(self._journal.write_seconds, _MOST_WRITE_SECONDS)
        if self.state is Source.MOVING and self._device_state.is_all_but_there(seconds):
            self._events.put_now((Event.SENT, None, None))

    def _note(self, event: Event, payload: object) -> None:
        if event in (Event.MINE, Event.WHOLE):
            self._is_taken.set()
        if isinstance(payload, messages.Refused):
            self._reason = f"the destination refused the guest: {payload.text or 'it does not say why'}"
        elif isinstance(payload, messages.Whole):
            self._report = payload.report
        elif event in (Event.FAILED, Event.LOST) and self.state is Source.MOVING:
            self._reason = str(payload)
        elif event is Event.LOST:
            self._warming.cut()  # whoever comes next is to have it all

    # ---- taken back by hand

    async def take_back(self) -> None:
        """As `reclaiming.Reclaimable`."""
        self._reason = "taken back by hand"
        self._leaving.reclaimed = True
        await self._put_event(Event.RECLAIM, None, None)
        await until(lambda: self.state is not Source.GIVEN and not self._acting)

    # ---- effects

    async def _step(self, event: Event) -> bool:
        """Whether there is such a move."""
        effects = self._side.maybe_step(event)
        for effect in effects or ():
            if effect in SAID:
                await self._speak(effect, event)
            elif effect is Effect.RECORD:
                if not await self._decide(event):
                    return True  # another move was made instead
            else:
                await self._act(effect)
        return effects is not None

    async def _decide(self, event: Event) -> bool:
        """Record where the move has led. False: it could not be, and was undone.

        Raises:
            StoreError: it could not be, and a restarted process would read something else.
        """
        try:
            await self._record(self.state)
        except StoreError as error:
            if event in _GIVES:
                self._reason = str(error)
                await self._step(Event.NOT_WRITTEN)
                return False
            if self.state is not Source.OURS or await trio.to_thread.run_sync(self._maybe_read) != Source.OURS.value:
                raise
            self._say(f"{error}; what stands there says the same")
        return True

    def _maybe_read(self) -> str | None:
        """What a restarted process would find."""
        found = read(self._journal.folder)
        return None if found is None else found.state

    async def _act(self, effect: Effect) -> None:
        if effect is Effect.MIGRATE:
            self._offers.are_open = False
            self._warming.cut()
            self._device_state.begin()
            self._nursery.start_soon(self._migrate)
        elif effect is Effect.SERVE:
            self._ram.serve_again(self._leaving.ram_path, self._leaving.signature)
        elif effect is Effect.RUN:
            await self._let_go_on()
        elif effect is Effect.QUIT:
            await self._end_emulator()
        elif effect is Effect.SERVE_ALL:
            self._nursery.start_soon(self._serve_all)
        else:
            self._ram.serve(Served.NOTHING)

    async def _serve_all(self) -> None:
        with trio.move_on_after(_LOAD_SECONDS):
            await self._is_taken.wait()
        if self.state in (Source.GIVEN, Source.GONE):
            self._ram.serve(Served.ALL)

    async def _speak(self, effect: Effect, event: Event) -> None:
        message: messages.Message = messages.Done()
        if effect is Effect.SAY_GIVEN:
            stopped = self._leaving.stopped if self._leaving.was_running else 0.0
            # Whoever comes back may be of an earlier version, which knows of no number there.
            message = messages.Given(stopped, self._leaving.state_bytes if event in _GIVES else 0)
        elif effect is Effect.SAY_VOID:
            message = messages.Void(messages.short(self._reason))
            self._offers.is_untold &= self.receivers.peer is None
        await self.receivers.say(message)

    async def _record(self, state: Source) -> None:
        async with self._recording:  # an offer's, too
            self._leaving.void = self._offers.void
            details = to_builtins(self._leaving)
            await trio.to_thread.run_sync(self._journal.write, self.handover, state.value, details)

    async def _migrate(self) -> None:
        event: tuple[Event, object]
        try:
            event = Event.RECEIVED, await self._send_state()
        except LazymemError as error:
            event = Event.FAILED, str(error)
        finally:
            self._device_state.end()  # before the queue, which whoever waits for this may have let become full
        await self._put_event(event[0], None, event[1])

    async def _send_state(self) -> int:
        """How many bytes it was."""
        token = trio.lowlevel.current_trio_token()

        def stopped(seconds: float) -> None:
            # In the emulator's thread: a device's load may want pages before this loop has heard of the stop.
            is_first, self._leaving.stopped = self._leaving.stopped != seconds, seconds
            self._leaving.signature = self._ram.freeze()
            token.run_sync_soon(self._stands, is_first)

        async def connect() -> Stream:
            stream = await self.receivers.state_connection(self.handover)
            # A mount that does not answer must not keep its guest from going on.
            await trio.to_thread.run_sync(self._ram.look_for_load_reads, abandon_on_cancel=True)
            self._say("the guest's device state is on its way; the guest runs on until the end of that")
            return stream

        remember = partial(self._here.remember, self._leaving)
        return await self._device_state.send(self._here.guest, connect, remember, stopped)

    def _stands(self, is_first: bool) -> None:
        self._ram.look_again()
        if is_first:
            self._nursery.start_soon(self.receivers.say, messages.Stopped(self._ram.load_reads))

    async def _let_go_on(self) -> None:
        self._device_state.cut()
        self._offers.set_void(self.handover)
        await self._device_state.wait_over()
        self.stands = await self._here.go_on(self._leaving)

    async def _end_emulator(self) -> None:
        await self._here.end()
        self._leaving.over = True
        with suppress(StoreError):  # "released" stands there: whoever comes next finds the emulator gone
            await self._record(self.state)
