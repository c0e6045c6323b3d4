"""What lies in the time in which a guest of lazymem-vm stands that is handed over: no pass over its RAM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import Struct

from lazymem.handover.journal import read
from lazymem.vm.guests import build_guest
from tests.support.handover import Command, Pair, pair
from tests.support.ramreads import forget_touched, read_bytes, touched_bytes
from tests.support.vmprocess import Process, starting

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

RAM_MIB = 64
BOOT_MIB = 8
"""Of that, the guest's own; the rest is written before it starts."""

WORTH_THE_NAME = (RAM_MIB << 20) // 8
"""Bytes. Less is no pass over the RAM: the guest's own pages, and the kernel's read-ahead around them."""


class Emulator(Struct):
    """One side's process, and what it had read of files when it was looked at first."""

    pid: int
    ram: Path
    read_before: int

    def looked_at(self) -> dict[str, int]:
        """Bytes since then: of any file by read(2), and of the RAM through its map."""
        return {"read": read_bytes(self.pid) - self.read_before, "map": touched_bytes(self.pid, self.ram)}


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Process]:
    kernel = build_guest("heartbeat", tmp_path)
    with (tmp_path / "ram").open("wb") as file:
        file.truncate(BOOT_MIB << 20)
        file.seek(0, os.SEEK_END)
        file.write(os.urandom((RAM_MIB - BOOT_MIB) << 20))
    with starting(tmp_path, RAM_MIB) as start:
        process = start("--pcram-file", tmp_path / "ram", "-kernel", kernel)
        process.wait_ticks(2)
        yield process


def test_no_pass_over_its_ram_lies_in_it(guest: Process, tmp_path: Path) -> None:
    """By no process that could make one: the source's emulator from the word to begin on until "given" is on the disk,
    the destination's until its guest runs, and the two commands until their decisions are carried out."""
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(source_dies="hold:EVENT READY,RECORDED given")
        two.send.wait_at("EVENT READY")
        assert two.runs() == (True, False)
        here, there = _watched(two, guest)
        two.send.let_go_on()
        two.send.wait_at("RECORDED given")
        assert two.runs() == (False, False)
        looked_at = {"source's emulator": here.looked_at()}  # before others want all of its RAM
        two.send.let_go_on()
        assert two.wait_settled() == (False, True)
        looked_at["destination's emulator"] = there.looked_at()
        assert two.send.wait() == 0, two.tell()
        looked_at["commands"] = {
            "send": _read_between(two.send, "EVENT READY", "RECORDED given"),
            "receive": _read_between(two.receive, "RECORDED asked", "SAY_MINE"),
        }
    counts = [count for side in looked_at.values() for count in side.values()]
    assert len(counts) == 6
    assert max(counts) < WORTH_THE_NAME, looked_at


def _watched(two: Pair, guest: Process) -> tuple[Emulator, Emulator]:
    """Both emulators. That of the destination waits for its state."""
    record = read(two.journals[1])
    assert record is not None
    sides = ((guest.process.pid, two.folder / "ram"), (record.details["emulator_pid"], two.mountpoint / "pc.ram"))
    for pid, _ in sides:
        forget_touched(pid)
    here, there = (Emulator(pid, ram, read_bytes(pid)) for pid, ram in sides)
    return here, there


def _read_between(command: Command, begin: str, end: str) -> int:
    return command.read_until(end) - command.read_until(begin)
