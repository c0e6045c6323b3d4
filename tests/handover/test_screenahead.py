"""An emulator that is held near the end of its first pass goes on, whatever becomes of what goes ahead meanwhile."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from lazymem.errors import MonitorError
from lazymem.handover import screenahead
from lazymem.handover.leaving import LeavingGuest
from lazymem.handover.pace import Pace
from lazymem.handover.pagerecords import Block
from lazymem.handover.relay import Outgoing, bring_in
from lazymem.handover.screenahead import ScreenAhead
from lazymem.handover.screenrhythm import Drawing, Rest
from lazymem.handover.screenstream import ScreenStream
from lazymem.pages import PAGE_SIZE
from tests.support.fakeemulator import Behaviour, fake_emulator
from tests.support.ramstream import beginning, one_pass
from tests.support.vmprocess import WAIT_SECONDS

DISPLAY = Block(b"vga.vram", 16 << 20, 0xFD000000)
FIRMWARE = Block(b"pc.bios", 256 << 10, 0)
PLACES = [(DISPLAY.address, DISPLAY.size)]
PAGES = 300

NOISE = random.Random(1).randbytes(PAGES * PAGE_SIZE)

LONG = 10 * WAIT_SECONDS
"""Nothing in here takes so long but what has gone wrong."""

CYCLE_SECONDS = 0.012
"""Of a screen that is drawn at once."""


class Memory:
    """Of a guest that draws by the clock. `fails_at`: the number of a reading that fails, from 1."""

    def __init__(self, *, is_drawn: bool = True, is_plain: bool = False, fails_at: int = 0) -> None:
        self._is_drawn = is_drawn
        self._fails_at = fails_at
        self._is_plain = is_plain
        self.readings = self.closed = 0

    def read(self, address: int, size: int) -> bytes:
        self.readings += 1
        if self.readings == self._fails_at:
            raise MonitorError("told to fail")
        begin = (address - DISPLAY.address) // PAGE_SIZE
        return b"".join(self.page(number) for number in range(begin, begin + size // PAGE_SIZE))

    def page(self, number: int) -> bytes:
        picture = int(time.monotonic() / CYCLE_SECONDS) if self._is_drawn else 0
        return (number << 32 | picture).to_bytes(8, "big") + self._rest(number)

    def _rest(self, number: int) -> bytes:
        return bytes(PAGE_SIZE - 8) if self._is_plain else NOISE[PAGE_SIZE * number + 8 : PAGE_SIZE * (number + 1)]

    def close(self) -> None:
        self.closed += 1


def listener(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(str(path))
    found.listen(1)
    return found


def emulate(connection: socket.socket, memory: Memory, sent: list[bytes]) -> None:
    """Its first pass, with a screen that it sends while that is drawn on; then what the screen is when it stops."""
    with connection:
        for is_last in (False, True):
            screen = [(DISPLAY.name, number * PAGE_SIZE, memory.page(number)) for number in range(PAGES)]
            firmware = (
                [] if is_last else [(FIRMWARE.name, at, b"f" * PAGE_SIZE) for at in range(0, 256 << 10, PAGE_SIZE)]
            )
            begin = b"" if is_last else beginning([DISPLAY, FIRMWARE])
            sent.append(begin + one_pass([*screen, *firmware], is_last=is_last))
            connection.sendall(sent[-1])
        sent.append(b"\4devices")
        connection.sendall(sent[-1])


def run_at_monitor(ahead: ScreenAhead, is_over: threading.Event) -> None:
    """As whoever waits for the emulator's events does it."""
    while not is_over.is_set():
        ahead.run_if_held()
        is_over.wait(0.001)


async def handed_over(folder: Path, memory: Memory, maybe_counts: list[int] | None = None) -> tuple[bytes, bytes]:
    """What an emulator has sent, and what the other one got. `maybe_counts`: of the bytes that went over the link."""
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours)
    sent: list[bytes] = []
    got = bytearray()
    is_over = threading.Event()

    def load() -> None:
        with listening, listening.accept()[0] as connection:
            while data := connection.recv(1 << 20):
                got.extend(data)

    def arrived(count: int) -> None:
        if maybe_counts is not None:
            maybe_counts.append(count)
        outgoing.pace.arrived(count)

    async def emulator() -> None:
        await trio.to_thread.run_sync(emulate, end, memory, sent)
        outgoing.hurry()
        await trio.to_thread.run_sync(outgoing.wait, 60.0)
        is_over.set()

    listening = listener(folder / "emulator")
    end = outgoing.make_pair().dup()
    outgoing.ahead.taken_seconds = outgoing.ahead.silent_seconds = LONG
    outgoing.ahead.begin(PLACES, memory)
    outgoing.start()
    try:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, load)
            nursery.start_soon(trio.to_thread.run_sync, run_at_monitor, outgoing.ahead, is_over)
            nursery.start_soon(emulator)
            await bring_in(stream, folder / "emulator", lambda _: None, arrived)
    finally:
        is_over.set()
        outgoing.ahead.close()
        outgoing.close()
    assert memory.closed == 1
    return b"".join(sent), bytes(got)


async def test_what_arrives_is_what_was_sent(tmp_path: Path) -> None:
    """Of a screen that is drawn meanwhile; whether anything went ahead is a matter of time."""
    memory = Memory()
    sent, got = await handed_over(tmp_path, memory)
    assert got == sent
    assert memory.readings > 1


class Redrawn(Memory):
    """Drawn anew once, before anybody reads it."""

    def page(self, number: int) -> bytes:
        return bytes([self.readings > 0]) + NOISE[PAGE_SIZE * number + 1 : PAGE_SIZE * (number + 1)]


async def test_what_went_ahead_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rest that is long enough for all of it."""
    monkeypatch.setattr(Drawing, "maybe_rest", lambda _: Rest(time.monotonic(), LONG, LONG))
    counts: list[int] = []
    sent, got = await handed_over(tmp_path, Redrawn(), counts)
    assert got == sent
    screen = PAGES * PAGE_SIZE
    assert len(sent) > 2 * screen
    assert 2 * screen < counts[-1] < 2.1 * screen  # once in its pass, once ahead; as references next to nothing


async def test_nothing_goes_ahead_of_a_screen_at_rest(tmp_path: Path) -> None:
    """It is read once."""
    memory = Memory(is_drawn=False)
    sent, got = await handed_over(tmp_path, memory)
    assert got == sent
    assert memory.readings == 2  # a MiB, and the rest


async def test_a_screen_that_compresses_well_is_not_looked_at(tmp_path: Path) -> None:
    memory = Memory(is_plain=True)
    sent, got = await handed_over(tmp_path, memory)
    assert got == sent
    assert memory.readings == 0


@pytest.mark.parametrize("reading", [1, 2, 3, 5, 20, 60])
async def test_a_memory_that_cannot_be_read_is_no_reason_to_wait(tmp_path: Path, reading: int) -> None:
    memory = Memory(fails_at=reading)
    sent, got = await handed_over(tmp_path, memory)
    assert got == sent


async def test_nothing_is_read_when_there_is_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenahead, "_HELD_SECONDS", -1.0)
    memory = Memory()
    sent, got = await handed_over(tmp_path, memory)
    assert got == sent
    assert memory.readings == 0


@pytest.fixture
def outgoing() -> Iterator[Outgoing]:
    """To somebody who does not read."""
    ours, theirs = socket.socketpair()
    found = Outgoing(ours)
    with theirs:
        yield found
        found.close()


class Stalled(Memory):
    """Of an emulator that does not answer until `goes_on`. `is_read`: it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read, self.goes_on = threading.Event(), threading.Event()

    def read(self, address: int, size: int) -> bytes:
        self.is_read.set()
        assert self.goes_on.wait(WAIT_SECONDS)
        raise MonitorError("told to fail")


class Held:
    """A relay that waits behind a first pass; where the candidates went."""

    def __init__(self, memory: Memory, *, taken_seconds: float = LONG, silent_seconds: float = LONG) -> None:
        stream = ScreenStream()
        self.ahead = ScreenAhead(stream, Pace(), lambda: None)
        self.ahead.begin(PLACES, memory)
        self.ahead.taken_seconds, self.ahead.silent_seconds = taken_seconds, silent_seconds
        stream.take(beginning([DISPLAY, FIRMWARE]) + one_pass([(DISPLAY.name, 0, b"s" * PAGE_SIZE)], is_last=False))
        self.offsets: list[int] = []
        self._thread = threading.Thread(target=self.ahead.hold, args=(1 << 20, self._send), daemon=True)
        self._thread.start()

    def _send(self, offset: int, data: bytes) -> int:
        self.offsets.append(offset)
        return len(data)

    def wait_over(self) -> None:
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        assert not self.ahead.is_awaited
        assert self.offsets == []


@contextmanager
def stalled(**seconds: float) -> Iterator[Held]:
    """One whose monitor's thread waits for an answer."""
    memory, is_over = Stalled(), threading.Event()
    held = Held(memory, **seconds)
    monitor = threading.Thread(target=run_at_monitor, args=(held.ahead, is_over))
    monitor.start()
    try:
        assert memory.is_read.wait(WAIT_SECONDS)
        yield held
    finally:
        memory.goes_on.set()
        is_over.set()
        monitor.join(WAIT_SECONDS)


@pytest.mark.parametrize("how", ["let_go", "close"])
def test_it_is_let_go_by_whoever_wants_it(how: str) -> None:
    with stalled() as held:
        end: Callable[[], None] = getattr(held.ahead, how)
        end()
        held.wait_over()
        end()


def test_it_goes_on_without_a_word_of_the_monitor() -> None:
    with stalled(silent_seconds=0.01) as held:
        held.wait_over()


def test_it_goes_on_without_anybody_at_the_monitor() -> None:
    """Who is to be there may wait for an answer of an emulator that has stopped its guest, and waits for the relay."""
    Held(Memory(), taken_seconds=0.01).wait_over()


def test_nothing_is_held_that_was_let_go_before(outgoing: Outgoing) -> None:
    outgoing.ahead.begin(PLACES, Memory())
    outgoing.hurry()
    outgoing.ahead.hold(1 << 20, lambda _, data: len(data))
    assert not outgoing.ahead.is_awaited


DISPLAYS = [{"devices": [{"class_info": {"class": 0x300}, "regions": [{"type": "memory", "address": 1, "size": 2}]}]}]


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"query-pci": []},
        {"query-pci": [{"devices": [{"class_info": {"class": 0x200}, "regions": []}]}]},
        {"query-pci": [{"devices": [{}]}]},
        {"query-pci": DISPLAYS},
        {"query-pci": DISPLAYS, "getfd": {}},
    ],
)
def test_an_emulator_whose_screen_cannot_be_read_is_not_held(
    tmp_path: Path, outgoing: Outgoing, answers: dict[str, object]
) -> None:
    """It has no display, or takes no descriptor, or only says that it did: then it is not asked to write into it."""
    (tmp_path / "ram").write_bytes(random.randbytes(PAGE_SIZE))
    more = {"query-kvm": {"enabled": False, "present": True}, **answers}
    behaviour = Behaviour(str(tmp_path / "q"), str(tmp_path / "ram"), PAGE_SIZE, answers=more)
    with fake_emulator(behaviour, tmp_path) as emulator:
        guest = LeavingGuest(emulator.qmp)
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(MonitorError):
            guest.send("unix:/nowhere", guest.settings(), lambda _: None, maybe_ahead=outgoing.ahead)
        assert set(os.listdir("/proc/self/fd")) == before
        guest.close()
        assert "pmemsave" not in emulator.commands
        assert ("query-pci" in emulator.commands) is True
    assert not outgoing.ahead.is_awaited
