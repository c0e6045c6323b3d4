"""As `test_handover_kills`, with QEMU below lazymem-vm: either is killed, at the destination and at the source.

LAZYMEM_SWEEP=wide takes every step; else one of each side's. One Linux guest goes through all of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lazymem.demo.serialline import SerialLine
from tests.support.handover import Pair
from tests.support.handoversteps import ASKS, DESTINATION_TAKES
from tests.support.qemu import BootedGuest, booted
from tests.support.vmprocess import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

WIDE = os.environ.get("LAZYMEM_SWEEP") == "wide"

BEFORE_IT_RUNS = ASKS + DESTINATION_TAKES[0][: DESTINATION_TAKES[0].index("RUN") + 1]
AT_DESTINATION = list(itertools.product(("emulator", "qemu"), BEFORE_IT_RUNS)) if WIDE else [("qemu", "EVENT GIVEN")]

LIVES_ON = ("EVENT RECEIVED", "RECORD given", "RECORDED given", "RECORDED gone", "RECORDED released")
AT_SOURCE = list(itertools.product(("emulator", "vm"), LIVES_ON)) if WIDE else [("vm", "RECORDED given")]

WATCH = "watch"


def monitor(path: Path) -> tuple[str, str]:
    """One serves one client: the tests have one of their own."""
    return "-qmp", f"unix:{path},server=on,wait=off"


@pytest.fixture
def guest(tmp_path: Path, sockets: Path) -> Iterator[BootedGuest]:
    with booted(tmp_path, more=monitor(sockets / f"0.{WATCH}")) as found:
        yield found


class Chain:
    """The guest, wherever it is by now: hop by hop, each with a monitor, a watch and a serial line by its number."""

    def __init__(self, guest: BootedGuest, folder: Path, sockets: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._sockets = sockets
        self._stack = stack
        self._monitor, self._watch, self._line = guest.qemu.monitor, sockets / f"0.{WATCH}", guest.qemu.serial
        self._ticks = 0
        self._hops = 0
        self._maybe_last: tuple[Pair, Path, SerialLine] | None = None
        self._checksum = guest.checksum

    def begin(self, *, source_dies: str = "", destination_dies: str = "") -> Pair:
        self._hops += 1
        name = str(self._hops)
        folder = self._folder / name
        folder.mkdir()
        watch, line = self._sockets / f"{name}.{WATCH}", self._stack.enter_context(SerialLine(self._sockets / name))
        more = ("--", "-serial", f"unix:{self._sockets}/{name}", *monitor(watch))
        pair = Pair(folder, self._monitor, *more, there=self._sockets / f"{name}.qmp")
        self._stack.callback(pair.clean_up)
        pair.watch_at(self._watch, watch)
        pair.begin(source_dies=source_dies, destination_dies=destination_dies)
        self._maybe_last = pair, watch, line
        return pair

    def has_moved(self) -> None:
        """It counts on there, and has all of its memory."""
        assert self._maybe_last is not None
        pair, self._watch, self._line = self._maybe_last
        self._monitor = pair.there
        self.counts_on()
        assert self._line.ask("sum", "sum") == self._checksum
        assert pair.send.wait() == 0, pair.tell()
        pair.stop_watching()

    def counts_on(self) -> None:
        self._ticks += 1
        assert self._line.ask("tick", "tick") == str(self._ticks)


def test_qemu_and_lazymem_vm(guest: BootedGuest, tmp_path: Path, sockets: Path) -> None:
    with ExitStack() as stack:
        chain = Chain(guest, tmp_path, sockets, stack)
        for kind, step in AT_DESTINATION:
            pair = chain.begin(destination_dies=f"early;{kind}:{step}")
            assert pair.wait_settled() == (True, False), (kind, step)
            assert f"={kind}" in pair.receive.was_at(), pair.tell()
            chain.counts_on()
            assert pair.send.wait() != 0, pair.tell()
            pair.stop_watching()
        pair = chain.begin()  # from here on the source's QEMU is a lazymem-vm's, too
        assert pair.wait_settled() == (False, True), pair.tell()
        chain.has_moved()
        for kind, step in AT_SOURCE:
            pair = chain.begin(source_dies=f"{kind}:{step}")
            assert pair.wait_settled() == (False, True), (kind, step)
            chain.has_moved()
            assert f"={kind}" in pair.send.was_at(), pair.tell()
        pair = chain.begin(source_dies="emulator:STOPPED")
        wait_until(lambda: _is_settled(pair), "the guest to be there, or nowhere")
        if pair.runs()[1]:
            chain.has_moved()
        else:
            assert "cannot go on here" in pair.send.said(), pair.tell()
            pair.never_both()


def _is_settled(pair: Pair) -> bool:
    runs = pair.runs()
    assert runs != (True, True), pair.tell()
    return runs[1] or None not in (pair.send.code(), pair.receive.code())
