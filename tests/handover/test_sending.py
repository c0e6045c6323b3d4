"""Who a source lets in: the next receiver after a hand-over that came to nothing, in this process or before it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from msgspec import to_builtins

from lazymem.errors import BusyError, MonitorError, StoreError
from lazymem.handover import messages, requests, sending
from lazymem.handover.departure import Leaving, Outcome
from lazymem.handover.devicestate import StateSending
from lazymem.handover.journal import Journal, read
from lazymem.handover.offers import Offers
from lazymem.handover.polling import until
from lazymem.handover.receivers import Receivers
from lazymem.handover.sending import Sender
from lazymem.handover.states import Event, Source
from lazymem.snapshot.liveram import Served
from tests.support.standinsource import OLD, Disk, Guest, Pages, hello, leaving_in, sender


class Hearing:
    """A receiver's connection, as `channel.Channel`: what is said to it is in `said`."""

    def __init__(self, said: list[messages.Message]) -> None:
        self._said = said

    async def send(self, message: messages.Message) -> None:
        await trio.lowlevel.checkpoint()
        self._said.append(message)


@pytest.fixture
def leaving(tmp_path: Path) -> Leaving:
    return leaving_in(tmp_path)


async def test_after_a_hand_over_that_came_to_nothing_the_next_is_offered(tmp_path: Path, leaving: Leaving) -> None:
    """With what the guest is now; whoever comes back for the old one hears that it is void."""
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "ours", to_builtins(leaving))
    now = Leaving(**(to_builtins(leaving) | {"emulator": {"name": "now"}}))
    guest = Guest()
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, guest, leaving, lambda: now)
        assert isinstance(found.admit(hello(), occupied=False), messages.No)  # the guest may not go on yet
        outcomes: list[Outcome] = []

        async def run() -> None:
            outcomes.append(await found.run())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await until(lambda: found._offers.are_open)
            assert guest.went_on == 1
            assert isinstance(found.admit(hello(OLD), occupied=False), messages.Void)
            assert found.admit(hello(), occupied=False) is None
            offer = await found.offer()
            assert (offer.handover, offer.emulator) == (found.handover, {"name": "now"})
            assert offer.handover != OLD
            assert found.interrupt()
    assert [(outcome.state, outcome.stands) for outcome in outcomes] == [(Source.OURS, None)]


async def test_what_came_to_nothing_is_void_for_every_later_process(tmp_path: Path, leaving: Leaving) -> None:
    """Whoever has its state may come back after several others: that the source goes on is not forgotten."""
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "ours", to_builtins(leaving))
    made = [OLD]
    for _ in range(3):
        with Journal(tmp_path / "j", "source") as journal:
            found = sender(journal, Guest(), leaving, lambda: leaving)
            await found._step(Event.RESTARTED)
            found._offers.are_open = True
            for handover in made:
                assert isinstance(found.admit(hello(handover), occupied=False), messages.Void), handover
            assert found.admit(hello(), occupied=False) is None
            made.append((await found.offer()).handover)
    with Journal(tmp_path / "j", "source") as journal:  # of another guest, at the same monitor
        found = sender(journal, Guest(), leaving)
        for handover in made:
            assert isinstance(found.admit(hello(handover), occupied=False), messages.Void), handover
        unknown = found.admit(hello("11" * 16), occupied=False)
        assert isinstance(unknown, messages.No)
        assert unknown.unknown


@pytest.mark.parametrize("version", [messages.COMES_BACK_VERSION, messages.VERSION])
async def test_a_receiver_of_the_version_before_may_come_back(tmp_path: Path, leaving: Leaving, version: int) -> None:
    """The source's lazymem was exchanged while the guest was given. If that one could not say that it has the guest,
    --reclaim would take it for dead."""

    def comes(handover: str) -> messages.Message | None:
        return found.admit(messages.Hello(version, "another host", handover), occupied=False)

    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "given", to_builtins(leaving))
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving, lambda: leaving)
        assert comes(OLD) is None
        await found._take(Event.RECLAIM, None, None)
        assert isinstance(comes(OLD), messages.Void)
        found._offers.are_open = True
        assert (comes("") is None) is (version == messages.VERSION)


def test_what_is_void_is_bounded_and_the_oldest_goes_first() -> None:
    offers = Offers(f"{number:032x}" for number in range(100))
    offers.set_void(f"{50:032x}")
    assert len(offers.void) == 64
    assert offers.void[-2:] == [f"{99:032x}", f"{50:032x}"]


async def test_a_receiver_that_was_replaced_before_anything_began_hears_so(tmp_path: Path, leaving: Leaving) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        assert found.admit(hello(), occupied=False) is None
        first = found.handover
        assert found.admit(hello(), occupied=False) is None
        assert isinstance(found.admit(hello(first), occupied=False), messages.Void)


async def test_a_ram_file_that_is_gone_is_told_to_both(tmp_path: Path, leaving: Leaving) -> None:
    leaving.ram_path += ".gone"
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        answer = found.admit(hello(), occupied=False)
        assert isinstance(answer, messages.No)
        assert "cannot read the RAM file" in answer.text
        assert (await found.run()).text == answer.text


async def test_a_guest_that_does_not_go_on_is_not_said_to(tmp_path: Path, leaving: Leaving) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "given", to_builtins(leaving))
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(MonitorError("gone")), leaving, lambda: leaving)
        await found._take(Event.RECLAIM, None, None)
        assert found.state is Source.OURS
        assert found.stands == "the guest cannot go on here: gone"
        record = read(tmp_path / "j")
        assert record is not None
        assert (record.handover, record.state) == (OLD, "ours")


async def test_a_second_interrupt_comes_behind_the_word_that_the_guest_is_given(
    tmp_path: Path, leaving: Leaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would run it: the disk says that it is given, and the destination has not heard so."""
    said: list[messages.Message] = []
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found.receivers.peer = peer = cast(Any, Hearing(said))
        found._side.state = Source.MOVING
        found._device_state.sent_bytes = 5
        write = journal.write
        async with trio.open_nursery() as found._nursery:

            def interrupted(*record: Any) -> Any:
                """The user, twice, while the disk is at it."""
                trio.from_thread.run_sync(found._nursery.cancel_scope.cancel)
                return write(*record)

            monkeypatch.setattr(journal, "write", interrupted)
            await found._take(Event.RECEIVED, peer, messages.Received(5))
    record = read(tmp_path / "j")
    assert record is not None
    assert record.state == "given"
    assert [type(message) for message in said] == [messages.Given]


@pytest.mark.parametrize(
    ("under_way", "counted", "given"), [(1000, True, True), (1001, True, False), (0, False, False)]
)
async def test_what_is_all_but_there_is_given(
    tmp_path: Path, leaving: Leaving, *, under_way: int, counted: bool, given: bool
) -> None:
    """Not before the emulator has sent it all. The link takes 1,000 bytes in the time that a decision takes."""

    class State(StateSending):
        def is_all_but_there(self, seconds: float) -> bool:
            assert 0 < seconds < 1
            return self.sent_bytes is not None and under_way <= 1000

    said: list[messages.Message] = []
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "ours", to_builtins(leaving))
        found = sender(journal, Guest(), leaving)
        found.receivers.peer = cast(Any, Hearing(said))
        found._device_state, found._side.state = State(), Source.MOVING
        found._ram = cast(Any, SimpleNamespace(serve=lambda _: None))
        async with trio.open_nursery() as found._nursery:
            if counted:
                await found._take(Event.RECEIVED, None, 7)
            found.arrived(1)
            found.arrived(2)
            assert (list(found._events._events) != []) is given
            if given:
                await found._take(*await found._events.take())
                assert not found._events._events, "told once"
                await found._take(Event.RECEIVED, found.receivers.peer, messages.Received(7))
            found._nursery.cancel_scope.cancel()
    assert found.state is (Source.GIVEN if given else Source.MOVING)
    assert [message.state_bytes for message in said if isinstance(message, messages.Given)] == [7] * given


async def test_whoever_comes_back_is_not_told_what_an_earlier_version_does_not_know(
    tmp_path: Path, leaving: Leaving
) -> None:
    """It would take the word for nonsense, each time, and the guest would stand on both sides."""
    leaving.stopped, leaving.state_bytes = 5.0, 7
    said: list[messages.Message] = []
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found.receivers.peer, found._side.state = cast(Any, Hearing(said)), Source.GIVEN
        await found._take(Event.BACK, found.receivers.peer, None)
    assert [messages.encode(message)[4:] for message in said] == [b'{"say":"given","stopped":5.0}']


async def test_what_failed_is_not_given_because_it_left(tmp_path: Path, leaving: Leaving) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found._side.state = Source.OURS
        assert not await found._take(Event.SENT, None, None)
        assert found.state is Source.OURS


async def test_a_mount_that_does_not_answer_does_not_hold_a_guest_whose_hand_over_ends(
    tmp_path: Path, leaving: Leaving
) -> None:
    """Its RAM is looked at before anything leaves."""
    looks, answers = threading.Event(), threading.Event()

    def look() -> None:
        looks.set()
        answers.wait()

    async def connection(_: str) -> None:
        await trio.lowlevel.checkpoint()

    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found._ram, found._side.state = cast(Any, SimpleNamespace(look_for_load_reads=look)), Source.MOVING
        cast(Any, found.receivers).state_connection = connection
        found._device_state.begin()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found._migrate)
            await trio.to_thread.run_sync(looks.wait)
            found._device_state.cut()
            with trio.move_on_after(30) as held:
                await found._device_state.wait_over()
            answers.set()
        assert not held.cancelled_caught
        event, _, reason = await found._events.take()
    assert (event, reason) == (Event.FAILED, "the device state was not sent: it was broken off before")


async def test_a_receiver_that_left_does_not_keep_the_next_ones_state_connection_out() -> None:
    class Door:
        handover = "first"

    async def put(*_: object) -> None:
        pass

    door = cast(Any, Door())
    receivers = Receivers(door, put)
    receivers.peer = cast(Any, object())
    first, again, second = (cast(Any, object()) for _ in range(3))
    ended = []

    async def keep(stream: Any, handover: str) -> None:
        await receivers.keep_for_state(stream, handover)
        ended.append(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep, first, "first")
        assert await receivers.state_connection("first") is first
        await keep(again, "first")
        assert ended == [again]
        door.handover = "second"
        with trio.fail_after(60):
            nursery.start_soon(keep, second, "second")
            assert await receivers.state_connection("second") is second
            await until(lambda: ended == [again, first])
        receivers.close()


@pytest.mark.parametrize(("event", "payload"), [(Event.RECEIVED, messages.Received(7)), (Event.SENT, None)])
@pytest.mark.parametrize("kept", [False, True])
async def test_a_guest_that_cannot_be_given_on_the_disk_goes_on_here(
    tmp_path: Path, leaving: Leaving, event: Event, payload: object, *, kept: bool
) -> None:
    """And a restarted process reads that it is here."""
    with Disk(tmp_path / "j", "source") as journal:
        journal.write(OLD, "ours", to_builtins(leaving))
        journal.refuse("given", 1, kept=kept)
        guest = Guest()
        found = sender(journal, guest, leaving)
        found._offers.handover = OLD
        found._side.state = Source.MOVING
        found._device_state.sent_bytes = 7
        assert await found._take(event, None, payload)
        assert (found.state, guest.went_on) == (Source.OURS, 1)
        assert found._reason == "the disk is full"
        record = read(tmp_path / "j")
        assert record is not None
        assert record.state == "ours"


@pytest.mark.parametrize("is_taken", [True, False])
async def test_what_nobody_waits_for_is_not_served_while_the_guest_is_loaded(
    tmp_path: Path, leaving: Leaving, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    """But not withheld for good: a load may wait for a page that was asked for as a guess."""
    monkeypatch.setattr(sending, "_LOAD_SECONDS", 1000.0 if is_taken else 0.001)
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found._offers.handover, found._side.state = OLD, Source.MOVING
        found._device_state.sent_bytes = 7
        served: list[Served] = []
        found._ram = cast(Any, SimpleNamespace(serve=served.append))
        async with trio.open_nursery() as found._nursery:
            await found._take(Event.RECEIVED, None, messages.Received(7))
            if is_taken:
                assert not served
                await found._take(Event.MINE, None, messages.Mine())
        assert served == [Served.ALL]


async def test_guesses_are_not_served_of_a_guest_that_was_taken_back(tmp_path: Path, leaving: Leaving) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found._offers.handover, found._side.state = OLD, Source.MOVING
        found._device_state.sent_bytes = 7
        served: list[Served] = []
        found._ram = cast(Any, SimpleNamespace(serve=served.append))
        async with trio.open_nursery() as found._nursery:
            await found._take(Event.RECEIVED, None, messages.Received(7))
            await found._take(Event.REFUSED, None, messages.Refused())
        assert served == [Served.NOTHING]


async def test_a_guest_goes_on_here_though_the_disk_takes_nothing(tmp_path: Path, leaving: Leaving) -> None:
    """As long as what stands there lets it: what was never given is not asked about twice."""
    with Disk(tmp_path / "j", "source") as journal:
        journal.write(OLD, "ours", to_builtins(leaving))
        journal.refuse("ours", 9, kept=False)
        guest = Guest()
        found = sender(journal, guest, leaving)
        found._side.state = Source.MOVING
        assert await found._take(Event.FAILED, None, "broken")
        assert guest.went_on == 1
        journal.refuse("", 0, kept=False)
        journal.write(OLD, "given", to_builtins(leaving))
        journal.refuse("ours", 9, kept=False)
        found._side.state = Source.GIVEN
        with pytest.raises(StoreError):
            await found._take(Event.REFUSED, None, None)
        assert guest.went_on == 1


async def test_an_interrupt_is_heard_however_much_a_receiver_says(tmp_path: Path, leaving: Leaving) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.05):
                while True:
                    await found._put_event(Event.BACK, cast(Any, object()), None)
            assert found.interrupt()
            with trio.fail_after(60):
                assert (await found.run()).text == "interrupted"
            nursery.cancel_scope.cancel()


async def test_whoever_asks_for_the_guest_is_told_before_the_end(tmp_path: Path, leaving: Leaving) -> None:
    """The answer is the last that a process does whose guest was taken back."""
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found._side.state = Source.GIVEN
        found._offers.handover = OLD
        answers: list[requests.Answer] = []

        async def ask() -> None:
            answers.append(await trio.to_thread.run_sync(requests.ask, tmp_path / "j", "reclaim", 30.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(found.run)
        assert answers == [requests.Answer(done=True, text="the guest goes on here")]
    with pytest.raises(BusyError, match="has ended meanwhile"):
        requests.ask(tmp_path / "j", "reclaim", 30.0)


async def test_pages_go_ahead_of_a_guest_that_is_here_and_offered(tmp_path: Path, leaving: Leaving) -> None:
    """To the receiver that it is offered to; they end when that is ready, or gone."""
    went: list[str] = []

    class Ahead:
        seconds = 7.0
        cuts = 0

        async def send(self, ram: Path, stream: object, handover: str) -> None:
            await trio.lowlevel.checkpoint()
            went.append(handover)

        def cut(self) -> None:
            self.cuts += 1

    ahead = Ahead()
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found._warming = cast(Any, ahead)
        assert found.admit(hello(), occupied=False) is None
        assert (await found.offer()).warm_seconds == 7.0
        stream = cast(Any, object())
        await found.receivers.warm(stream, found.handover)
        assert went == []  # nobody is there
        found.receivers.peer = cast(Any, object())
        await found.receivers.warm(stream, OLD)
        assert went == []
        await found.receivers.warm(stream, found.handover)
        assert went == [found.handover]
        found.receivers.peer = None
        await found._take(Event.LOST, None, "gone")
        assert ahead.cuts == 1
        found.receivers.peer = cast(Any, object())
        found._offers.are_open = False  # it is ready: its state goes
        await found.receivers.warm(stream, found.handover)
        assert len(went) == 1


async def test_to_whoever_comes_back_later_no_pages_go_ahead(tmp_path: Path, leaving: Leaving) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "given", to_builtins(leaving))
    with Journal(tmp_path / "j", "source") as journal:
        made = cast(Any, Sender)
        found = made(journal, Guest(), leaving, Pages(), lambda _: None, maybe_look=lambda: leaving, warm_seconds=5.0)
        assert (await found.offer()).warm_seconds == 0.0
