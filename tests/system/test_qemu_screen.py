"""A QEMU guest that writes its framebuffer all the time: what leaves with its state is what it wrote last.

The framebuffer is a block of its own, which the emulator sends while the guest runs, and of which it has to know what
was written since. (Software emulation does not: `savestate.loses_writes`.)
"""

from __future__ import annotations

import os
import re
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.linuximage import SCREEN, build_guest
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import started
from lazymem.errors import MonitorError
from lazymem.handover.leaving import LeavingGuest
from lazymem.handover.relay import Outgoing
from lazymem.handover.screenstream import ScreenStream
from lazymem.handover.statepieces import Unpacker
from lazymem.pages import PAGE_SIZE
from lazymem.vm.guestmemory import GuestMemory, displays
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import maybe_downtime_limit, ram_left_out, save_device_state, set_downtime_limit
from lazymem.vm.savestream.format import RamFlag
from tests.support.qemu import RAM_BYTES
from tests.support.vmprocess import WAIT_SECONDS

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

VIDEO_BYTES = 16 << 20
SCREEN_BYTES = 1024 * 768 * 4
STEP_BYTES = 600_000
"""Of the stream; between two of them the guest draws."""

SCREENS = 12
"""More than it draws in 0.1 s, after which QEMU looks again what was written."""

STANDS_SECONDS = 1.0
"""Without an answer of the monitor: the emulator has stopped its guest and sends."""


class Screen:
    """The guest's, looked at over a monitor of the test's own. `drawn`: how often it was seen to be another one."""

    def __init__(self, monitor: Path) -> None:
        self._qmp = QmpClient(monitor, WAIT_SECONDS)
        found = re.search(r"BAR0: 32 bit prefetchable memory at (0x[0-9a-f]+)", self._say("info pci"))
        assert found is not None
        self.address = int(found[1], 16)
        self.drawn = 0
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _say(self, line: str) -> str:
        return str(self._qmp.command("human-monitor-command", command_line=line))

    def _look(self) -> None:
        last = ""
        while not self._is_over:
            word = self._say(f"xp /1gx {self.address:#x}")
            with self._changed:
                self.drawn += word != last
                self._changed.notify_all()
            last = word

    def wait_drawn(self, times: int) -> None:
        """Or until the guest stands."""
        with self._changed:
            target = self.drawn + times
            self._changed.wait_for(lambda: self.drawn >= target, STANDS_SECONDS)

    def bytes_now(self, file: Path) -> bytes:
        self._end_looking()
        self._qmp.command("pmemsave", val=self.address, size=SCREEN_BYTES, filename=str(file))
        return file.read_bytes()

    def _end_looking(self) -> None:
        self._is_over = True
        self._thread.join()

    def close(self) -> None:
        self._end_looking()
        self._qmp.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="lazymem-") as name:
        yield Path(name)


@pytest.fixture
def drawing(folder: Path) -> Iterator[tuple[Path, Screen]]:
    """The monitor of a guest that draws."""
    ram = folder / "ram"
    with ram.open("xb") as file:
        file.truncate(RAM_BYTES)
    guest = build_guest(folder, screen=True, random_mib=1, text_mib=1)
    more = (*SCREEN, "-qmp", f"unix:{folder}/second,server=on,wait=off")
    options = QemuOptions(ram, RAM_BYTES, folder / "first", folder / "serial", guest, more=more)
    with started(options, folder / "log") as qemu:
        qemu.serial.expect("lazymem ready", 100)
        qemu.serial.ask("draw noise", "draw")
        screen = Screen(folder / "second")
        try:
            yield folder / "first", screen
        finally:
            screen.close()


def _take_slowly(connection: socket.socket, screen: Screen, taken: bytearray) -> None:
    with connection:
        drawn_at = 0
        while data := connection.recv(1 << 16):
            taken += data
            if len(taken) - drawn_at > STEP_BYTES:
                drawn_at = len(taken)
                screen.wait_drawn(SCREENS)


def _framebuffer(stream: bytes, *, only_at_the_end: bool = False) -> dict[int, bytes]:
    """By their offsets, the pages as they were sent last. `only_at_the_end`: those of the pass behind the stop."""
    begun = stream.index(b"\x03ram")
    footer = b"\x7e" + stream[begun - 4 : begun]  # with the section's number, which is not the same in each version
    at = stream.index(footer, begun) + len(footer)
    pages: dict[int, bytes] = {}
    name = b""
    while stream[at] in (2, 3, 8):
        if stream[at] == 8:  # a command, as QEMU 10 says when it stops the guest, and its data
            at += 5 + int.from_bytes(stream[at + 3 : at + 5])
            continue
        is_counted = stream[at] == 3 or not only_at_the_end
        at += 5
        while not (word := struct.unpack_from(">Q", stream, at)[0]) & RamFlag.END_OF_SECTION:
            at += 8
            if not word & RamFlag.CONTINUE:
                name = stream[at + 1 : at + 1 + stream[at]]
                at += 1 + len(name)
            length = PAGE_SIZE if word & RamFlag.PAGE else 1
            if is_counted and name.endswith(b"/vga.vram"):
                pages[word & -PAGE_SIZE] = stream[at : at + length].ljust(PAGE_SIZE, b"\0")
            at += length
        at += 8 + 5
    return pages


def _check_found(stream: bytes, address: int) -> None:
    """Whoever looks for the screen's pages in what this emulator sends finds them, and the place to hold it at."""
    screen = ScreenStream()
    screen.watch([(address, VIDEO_BYTES)])
    last = _framebuffer(stream, only_at_the_end=True)
    for offset, data in last.items():
        screen.candidates.keep(offset, data)
    found = at = 0
    while at < len(stream):
        taken = stream[at : at + screen.room]
        at += len(taken)
        found += len(screen.take(taken)[1])
    assert found == len(last)
    assert screen.is_past


def _check(stream: bytes, screen: Screen, file: Path) -> None:
    sent, is_now = _framebuffer(stream), screen.bytes_now(file)
    old = [at for at in range(0, SCREEN_BYTES, PAGE_SIZE) if sent[at] != is_now[at : at + PAGE_SIZE]]
    assert not old, f"{len(old)} pages of {SCREEN_BYTES // PAGE_SIZE} are older than the guest's"


def test_handed_over_over_a_slow_link(drawing: tuple[Path, Screen], folder: Path) -> None:
    monitor, screen = drawing
    ours, theirs = socket.socketpair()
    taken = bytearray()
    taking = threading.Thread(target=_take_slowly, args=(ours, screen, taken))
    taking.start()
    guest = LeavingGuest(monitor)
    try:
        with theirs:
            uri = guest.maybe_take(theirs)
            assert uri is not None
            guest.send(uri, guest.settings(), lambda _: None, theirs.close)
        taking.join(WAIT_SECONDS)
        _check(bytes(taken), screen, folder / "screen")
    finally:
        guest.close()


class Destination:
    """Takes the pieces of a device state, and goes away once it has `most` bytes of it."""

    def __init__(self, connection: socket.socket, outgoing: Outgoing, most: int = 1 << 40) -> None:
        self.state = bytearray()
        self._most = most
        self._thread = threading.Thread(target=self._take, args=(connection, outgoing))
        self._thread.start()

    def _take(self, connection: socket.socket, outgoing: Outgoing) -> None:
        unpacker = Unpacker()
        arrived = 0
        with connection:
            while len(self.state) < self._most and (data := connection.recv(1 << 16)):
                arrived += len(data)
                outgoing.pace.arrived(arrived)
                for piece in unpacker.feed(data):
                    self.state += piece

    def wait(self) -> None:
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


def _memfds(guest: LeavingGuest) -> list[str]:
    folder = Path(f"/proc/{guest.pid}/fd")
    return [name for path in folder.iterdir() if (name := os.readlink(path)).startswith("/memfd:lazymem")]


def _send(guest: LeavingGuest, outgoing: Outgoing) -> None:
    uri = guest.maybe_take(outgoing.make_pair())
    assert uri is not None
    outgoing.start()
    try:
        guest.send(uri, guest.settings(), lambda _: None, outgoing.hurry, outgoing.ahead)
    finally:
        outgoing.hurry()
        outgoing.ahead.close()


def test_pages_ahead_of_the_stop_change_nothing(drawing: tuple[Path, Screen], folder: Path) -> None:
    """A destination that breaks off before the stop first; the guest goes on, and nothing is left in its emulator."""
    monitor, screen = drawing
    guest = LeavingGuest(monitor)
    before = guest.settings()
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours)
    try:
        destination = Destination(theirs, outgoing, SCREEN_BYTES)
        with pytest.raises(MonitorError):
            _send(guest, outgoing)
        destination.wait()
        guest.go_on(run=True, before=before)
        assert _memfds(guest) == []
        assert guest.look(disks_handled=False).was_running
    finally:
        outgoing.close()
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours)
    try:
        destination = Destination(theirs, outgoing)
        _send(guest, outgoing)
        assert outgoing.wait(WAIT_SECONDS) > 2 * SCREEN_BYTES
        destination.wait()
        guest.settings()  # its answer comes behind that of whatever it was asked before
        assert _memfds(guest) == []
        _check(bytes(destination.state), screen, folder / "screen")
        _check_found(bytes(destination.state), screen.address)
    finally:
        outgoing.close()
        guest.close()


def test_a_screen_is_read_over_the_monitor(drawing: tuple[Path, Screen], folder: Path) -> None:
    monitor, screen = drawing
    with QmpClient(monitor, WAIT_SECONDS) as qmp:
        assert (screen.address, VIDEO_BYTES) in displays(qmp)
        memory = GuestMemory(qmp, WAIT_SECONDS)
        assert memory.read(screen.address, 1 << 20) != memory.read(screen.address + (1 << 20), 1 << 20)
        qmp.command("stop")
        assert memory.read(screen.address, SCREEN_BYTES) == screen.bytes_now(folder / "screen")
        memory.close()


def test_saved_with_a_rate_that_is_limited(drawing: tuple[Path, Screen], folder: Path) -> None:
    """So that its first pass takes longer than QEMU waits for its next look; its user wants short last passes."""
    monitor, screen = drawing
    with QmpClient(monitor, WAIT_SECONDS) as qmp:
        set_downtime_limit(qmp, 20)
        qmp.command("migrate-set-parameters", max_bandwidth=16 << 20)
        with ram_left_out(qmp):
            save_device_state(qmp, monitor, folder / "vmstate")
        assert maybe_downtime_limit(qmp) == 20
        _check((folder / "vmstate").read_bytes(), screen, folder / "screen")
