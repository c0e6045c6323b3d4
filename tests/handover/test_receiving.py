"""What a destination does where its emulator, or the source, does not do as it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from lazymem.errors import MonitorError, StoreError
from lazymem.handover import emulatorhere, messages, receiving
from lazymem.handover.arrival import Arriving
from lazymem.handover.arriving import NeverToldError
from lazymem.handover.journal import Journal, read
from lazymem.handover.receiving import Receiver
from lazymem.handover.states import Destination, Effect, Event
from lazymem.vm.qmpclient import CommandError

ID = "00" * 16


class Link:
    """A source that hears everything, or (`away`) is never there again."""

    handover = ID
    endpoint = "h:1"
    clock_ahead_seconds = 0.0
    let_go = False
    connected = True
    objection = ""
    tries_begun = 0

    @property
    def tries_ended(self) -> int:
        """Each look is a try."""
        self.tries_begun += 1
        return self.tries_begun

    def __init__(self) -> None:
        self.said: list[messages.Message] = []

    async def say(self, message: messages.Message) -> None:
        self.said.append(message)

    async def run(self, *_: object) -> None:
        pass


class Guest:
    """Stands with its state, and refuses or does what it is told; `began` is what it says then."""

    def __init__(self, error: MonitorError | None = None, *, gone: bool = False, silent: int = 0) -> None:
        """`silent`: so many questions are not answered in time."""
        self._error = error
        self.gone = gone
        self._silent = silent
        self.ran = 0

    def status(self) -> str:
        self._silent -= 1
        if self.gone or self._silent >= 0:
            raise MonitorError("gone, or silent")
        return "paused"

    def has_state(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def run(self) -> float:
        if self.gone:
            raise NeverToldError("gone")
        if self._error is not None:
            raise self._error
        self.ran += 1
        return 100.0


class Host:
    def __init__(self, *, gone: bool = False) -> None:
        self.ended = self.asked = 0
        self._gone = gone

    def end_emulator(self) -> None:
        self.ended += 1

    def maybe_exit_code(self) -> int | None:
        return 0 if self.ended or self._gone else None

    def is_whole(self) -> bool:
        return False

    def maybe_not_kept(self) -> str | None:
        return None

    def maybe_reader(self) -> str | None:
        return None

    def is_mounted(self) -> bool:
        self.asked += 1
        return not self._gone


@contextmanager
def receiver(
    folder: Path, guest: Guest, state: Destination = Destination.ASKED
) -> Iterator[tuple[Receiver, Link, Host]]:
    link, host = Link(), Host(gone=guest.gone)
    arriving = Arriving("h:1", "/mnt", "/qmp", "/sockets", 1, "1", 4096)
    with Journal(folder / "j", "destination") as journal:
        journal.write(ID, state.value, {})
        made: Callable[..., Receiver] = cast(Any, Receiver)
        yield made(journal, link, guest, arriving, host, lambda _: None, lambda _: None, state=state), link, host


@pytest.mark.parametrize(("ahead", "stopped", "down"), [(0.0, 98.0, 2.0), (5.0, 103.0, 2.0), (-5.0, 93.0, 2.0)])
async def test_the_downtime_is_told_by_one_clock(tmp_path: Path, ahead: float, stopped: float, down: float) -> None:
    """The guest ran at 100 by the clock here, and stopped at `stopped` by the source's, which is that much ahead."""
    with receiver(tmp_path, Guest()) as (found, link, _):
        link.clock_ahead_seconds = ahead
        found._stopped = stopped
        await found._step(Event.LOADED)
        await found._step(Event.GIVEN)
        assert messages.Mine(down) in link.said


@pytest.mark.parametrize("guest", [Guest(CommandError("cont", "GenericError", "a disk is locked")), Guest(gone=True)])
async def test_a_guest_that_could_not_be_let_run_is_refused(tmp_path: Path, guest: Guest) -> None:
    """The source has it as it was, and takes it back."""
    with receiver(tmp_path, guest) as (found, link, host):
        await found._step(Event.LOADED)
        await found._step(Event.GIVEN)
        assert found.state is Destination.REFUSED
        assert [type(message) for message in link.said] == [messages.Refused]
        assert host.ended == 1
        record = read(tmp_path / "j")
        assert record is not None
        assert record.state == "refused"


async def test_a_monitor_that_outlives_its_lazymem_vm_is_not_told_to_run(tmp_path: Path) -> None:
    """That of a QEMU, which goes in a moment."""
    guest = Guest()
    with receiver(tmp_path, guest) as (found, link, host):
        host._gone = True
        await found._step(Event.LOADED)
        await found._step(Event.GIVEN)
        assert (found.state, guest.ran) == (Destination.REFUSED, 0)
        assert [type(message) for message in link.said] == [messages.Refused]


async def test_a_guest_that_was_promised_runs_before_that_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is read there by whoever comes next in this boot."""
    guest = Guest()
    seen: list[str] = []

    def run() -> float:
        record = read(tmp_path / "j")
        assert record is not None
        seen.append(record.state)
        return 100.0

    monkeypatch.setattr(guest, "run", run)
    with receiver(tmp_path, guest) as (found, _, _host):
        write = found._journal.write

        def written(handover: str, state: str, details: dict[str, Any]) -> Any:
            seen.append(f"{state} written")
            return write(handover, state, details)

        monkeypatch.setattr(found._journal, "write", written)
        await found._step(Event.GIVEN)
        await found._step(Event.LOADED)
        assert found.state is Destination.MINE
    assert seen == ["promised written", "mine", "mine written"]


@pytest.mark.parametrize("refused", [Destination.PROMISED, Destination.MINE])
async def test_a_guest_that_runs_though_the_disk_refuses_that_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Destination
) -> None:
    """Its source's user could take it for dead, since nobody answers here any more."""
    guest, said = Guest(), list[str]()
    with receiver(tmp_path, guest) as (found, link, _):
        write = found._journal.write

        def written(handover: str, state: str, details: dict[str, Any]) -> Any:
            if state == refused.value:
                raise StoreError("the disk is full")
            return write(handover, state, details)

        monkeypatch.setattr(found._journal, "write", written)
        monkeypatch.setattr(found, "_say", said.append)
        if refused is Destination.MINE:
            await found._step(Event.GIVEN)
        with pytest.raises(StoreError):
            await found._step(Event.LOADED if refused is Destination.MINE else Event.GIVEN)
    assert guest.ran == (refused is Destination.MINE)
    assert [line.partition(",")[0] for line in said] == ["the guest runs here"] * guest.ran
    assert link.said == []
    record = read(tmp_path / "j")
    assert record is not None
    assert record.state == ("mine" if guest.ran else "asked")


@pytest.mark.parametrize("state", [Destination.ASKED, Destination.MINE])
async def test_what_a_load_reads_is_brought_before_it_wants_it(tmp_path: Path, state: Destination) -> None:
    """As far as it makes sense, and once; nothing for a guest that is loaded. And the mount has answered by then."""
    read: list[int] = []
    with receiver(tmp_path, Guest(), state) as (found, _, host):
        cast(Any, host).read_ahead = read.extend
        found._arriving.ram_bytes = 300 * 4096
        async with trio.open_nursery() as found._nursery:
            found._when_stopped([202, -1, 300, 203, *range(20)])
            found._when_stopped([7])
        assert read == ([202, 203, 0, 1, 2, 3] if state is Destination.ASKED else [])
        assert host.asked == (state is Destination.ASKED)


async def test_a_guest_that_was_promised_to_the_process_before_is_asked_for_again(tmp_path: Path) -> None:
    """It has not run, and may have been taken back by hand meanwhile."""
    guest = Guest()
    with receiver(tmp_path, guest, Destination.PROMISED) as (found, link, _):
        await found._step(Event.RESTARTED)
        await found._step(Event.LOADED)
        assert (found.state, guest.ran) == (Destination.LOADED, 0)
        await found._step(Event.VOID)
        assert (found.state, guest.ran) == (Destination.REFUSED, 0)
        assert [type(message) for message in link.said] == [messages.Refused]


async def test_a_guest_that_is_promised_waits_for_no_mount_and_its_rest_is_not_waited_for_for_ever(
    tmp_path: Path,
) -> None:
    """The mount is asked when the guest is to run."""
    with receiver(tmp_path, Guest()) as (found, _, host):
        awaited = trio.Event()

        async def await_rest() -> None:
            awaited.set()

        cast(Any, found._incoming).await_rest = await_rest
        async with trio.open_nursery() as found._nursery:
            await found._take(Event.GIVEN, messages.Given(1.0, 6))
        assert (found.state, host.asked, awaited.is_set()) == (Destination.PROMISED, 0, True)
        host._gone = True
        async with trio.open_nursery() as found._nursery:
            await found._take(Event.LOADED, None)
            found._nursery.cancel_scope.cancel()
        assert (found.state, host.asked) == (Destination.REFUSED, 1)


async def test_a_state_of_another_length_is_refused(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest()) as (found, link, _):
        found._incoming._count = 5
        async with trio.open_nursery() as found._nursery:
            await found._take(Event.GIVEN, messages.Given(1.0, 6))
            found._nursery.cancel_scope.cancel()
        assert found.state is Destination.REFUSED
        assert link.said == [messages.Refused("of 6 bytes of device state 5 arrived")]


async def test_a_load_that_ended_waits_for_the_end_of_the_state(tmp_path: Path) -> None:
    """Only then it is known that it has what was sent."""
    guest = Guest()
    cast(Any, guest).wait_loaded = lambda: None
    with receiver(tmp_path, guest) as (found, _, _host):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found._wait_loaded)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not found._events._events
            found._incoming._whole.set()
            assert await found._events.take() == (Event.LOADED, None)


async def test_a_guest_that_may_have_run_is_not_refused(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest(gone=True), Destination.MINE) as (found, _, host):
        await found._step(Event.RESTARTED)
        assert (found.state, host.ended) == (Destination.MINE, 0)


async def test_a_guest_that_stood_is_left_standing(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest(MonitorError("was told to run"))) as (found, link, _):
        found._arriving.runs = False
        await found._step(Event.LOADED)
        await found._step(Event.GIVEN)
        assert found.state is Destination.MINE
        assert link.said == [messages.Mine(None)]
        assert not found._arriving.ran


@pytest.mark.parametrize(
    ("connected", "objection", "let_go", "taken", "text"),
    [
        (True, "", False, False, "decides by itself"),
        (False, "this sender knows nothing of that hand-over", True, False, "h:1 somebody answers (this sender knows"),
        (False, "its certificate has expired", False, False, "may run there"),
        (False, "", False, True, "'mine' here"),
        (False, "", True, True, "see that it does not run there, too"),
    ],
)
async def test_a_guest_is_taken_by_hand_only_while_nobody_answers(
    tmp_path: Path, *, connected: bool, objection: str, let_go: bool, taken: bool, text: str
) -> None:
    """A sender that lives and does not know, or not believe, us may have let its guest go on."""
    guest = Guest()
    with receiver(tmp_path, guest) as (found, link, _):
        await found._step(Event.LOADED)
        link.connected, link.objection, link.let_go = connected, objection, let_go

        async def decide() -> None:
            event, _ = await found._events.take()
            found._acting = True
            await found._step(event)
            found._acting = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(decide)
            done, told = await found.taking.take()
            assert (done, guest.ran) == (taken, taken)  # not before it runs
            assert text in told
            nursery.cancel_scope.cancel()


async def test_no_downtime_is_told_by_a_process_that_does_not_know_it(tmp_path: Path) -> None:
    for restarted, expected in ((False, 1.5), (True, None)):
        with receiver(tmp_path, Guest()) as (found, _, _host):
            found._restarted, found._stopped = restarted, 98.5
            await found._step(Event.LOADED)
            await found._step(Event.GIVEN)
            assert found._arriving.downtime_seconds == expected


async def test_a_refusal_that_nobody_hears_does_not_hold_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "_TELL_SECONDS", 0.05)
    with receiver(tmp_path, Guest(gone=True), Destination.REFUSED) as (found, _, _host):
        outcome = await found.run(None)
    assert (outcome.state, outcome.text) == (Destination.REFUSED, "it was refused here before")
    record = read(tmp_path / "j")
    assert record is not None
    assert record.details["over"] is False


async def test_a_silent_emulator_is_not_taken_for_a_gone_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a page, in whatever state an earlier process left the guest; then it is let run."""
    monkeypatch.setattr(emulatorhere, "_LOOK_SECONDS", 0.001)
    for state, events in ((Destination.MINE, ()), (Destination.ASKED, (Event.LOADED, Event.GIVEN))):
        guest = Guest(silent=2)
        monkeypatch.setattr(emulatorhere, "maybe_arrived", lambda _, guest=guest: guest)
        with receiver(tmp_path, guest, state) as (found, link, host):
            found._emulator._guest = None
            if state is Destination.MINE:
                await found._step(Event.RESTARTED)
            else:
                await found._look_loaded()
                assert await found._events.take() == (Event.LOADED, None)
                for event in events:
                    await found._step(event)
                assert link.said == [messages.Mine(None)]
            assert (found.state, guest.ran, host.ended) == (Destination.MINE, 1, 0)


@pytest.mark.parametrize("effect", [Effect.RUN, Effect.STOP])
async def test_an_emulator_that_does_not_answer_holds_nobody_who_ends_this(tmp_path: Path, effect: Effect) -> None:
    """It may wait for a page whose source never comes back; the guest is where it is decided to be, also without us."""
    asked, answered = threading.Event(), threading.Event()

    def silent() -> float:
        asked.set()
        answered.wait(20)
        return 0.0

    guest = Guest()
    cast(Any, guest).run = cast(Any, guest).stop = silent
    try:
        with receiver(tmp_path, guest, Destination.MINE) as (found, _, _host):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(found._act, effect)
                assert await trio.to_thread.run_sync(asked.wait, 60)
                nursery.cancel_scope.cancel()
            assert nursery.cancel_scope.cancelled_caught, "it waited for the answer"
    finally:
        answered.set()


async def test_an_emulator_that_was_never_begun_is_not_waited_for(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest()) as (found, _, _host):
        found._arriving.monitor = ""
        await found._look_loaded()
        event, _ = await found._events.take()
        assert event is Event.FAILED


async def test_a_mount_that_has_just_answered_is_not_asked_when_it_is_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its daemon is busy then, and the guest stands."""
    monkeypatch.setattr(receiving, "_MOUNTED_SECONDS", 3600.0)  # a disk may take long for what is decided
    with receiver(tmp_path, Guest()) as (found, _, host):
        async with trio.open_nursery() as found._nursery:
            found._nursery.start_soon(found._is_mounted)
            await found._take(Event.LOADED, None)
            await found._take(Event.GIVEN, messages.Given())
            assert (found.state, host.asked) == (Destination.MINE, 1)
            found._nursery.cancel_scope.cancel()


async def test_a_mount_that_is_gone_is_asked_again(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest()) as (found, _, host):
        host._gone = True
        assert not await found._is_mounted()
        host._gone = False
        assert await found._is_mounted()
        assert host.asked == 2


async def test_what_an_earlier_process_counted_is_counted_on(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest(), Destination.MINE) as (found, _, host):
        found._arriving.state_bytes, found._arriving.began = 4711, time.monotonic() - 3600
        cast(Any, host).figures = lambda: {"mount_restarts": 0}
        await found._make_report()
        assert found._report["state_bytes"] == 4711
        assert found._report["total_seconds"] >= 3600


class ReadHost(Host):
    """Its guest's RAM is read in these times, seconds of that clock."""

    def __init__(self, clock: MockClock, *times: tuple[float, float]) -> None:
        super().__init__()
        self._clock = clock
        self._times = times
        self.looks: list[tuple[float, bool]] = []

    def maybe_reader(self) -> str | None:
        now = self._clock.current_time()
        is_read = any(begin <= now < end for begin, end in self._times)
        self.looks.append((now, is_read))
        return "lazymem send reads it" if is_read else None


@pytest.mark.parametrize(
    ("times", "last_read"),
    [
        ([(0.0, 3.0)], 3.0),
        ([(0.0, 3.0), (10.0, 12.0)], 12.0),  # killed, and started again by its guardian
        ([(0.0, 3.0), (13.0, 14.0)], 3.0),  # somebody else's: it is let go of by then
    ],
)
async def test_a_reader_that_was_seen_may_come_again(
    tmp_path: Path, autojump_clock: MockClock, times: list[tuple[float, float]], last_read: float
) -> None:
    """Only then is the guest's RAM let go of: 8 s after it was last seen to be read."""
    with receiver(tmp_path, Guest(), Destination.MINE) as (found, _, _host):
        host = ReadHost(autojump_clock, *times)
        found._host = cast(Any, host)
        said: list[str] = []
        found._say = said.append
        await found._wait_unread()
        assert len(said) == 1
        seen = max(moment for moment, is_read in host.looks if is_read)
        end = host.looks[-1][0]
        assert last_read - receiving._LOOK_SECONDS <= seen < last_read
        assert seen + 8.0 < end <= seen + 8.0 + 2 * receiving._LOOK_SECONDS


async def test_what_nobody_reads_is_let_go_of_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    with receiver(tmp_path, Guest(), Destination.MINE) as (found, _, _host):
        host = ReadHost(autojump_clock)
        found._host = cast(Any, host)
        await found._wait_unread()
        assert len(host.looks) == 1
