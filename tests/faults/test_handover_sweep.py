"""The Nth call to the disk or the network fails, in `lazymem send` or `lazymem receive`, during a hand-over of a guest.

Whoever ends of it is started again, as its user would. Each time the guest runs on one side in the end, never on both,
and counts on. LAZYMEM_SWEEP=wide takes every N until none fails, a quarter of an hour; else two are taken.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from lazymem.vm.guests import build_guest
from tests.support.handover import Pair, pair
from tests.support.vmprocess import WAIT_SECONDS, Process, Start, counts_on, starting, ticks_of, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

RAM_MIB = 4

FAILING = Path(__file__).parents[1] / "support" / "failing"

ROOT = Path(__file__).parents[2]

WIDE = os.environ.get("LAZYMEM_SWEEP") == "wide"

KINDS = list(itertools.product(("send", "receive"), ("disk", "network")))

FEW = {("send", "network"): 9, ("send", "disk"): 34, ("receive", "disk"): 14}
"""What else is done of the sweep: a call in the middle. (34: a read of the guest's RAM; 14: a decision.)"""

ENOUGH = 5
"""So many N of which no call failed, and all have: how many calls a hand-over makes is not the same each time."""


def one_guest(start: Start, folder: Path) -> Process:
    ram = folder / "ram"
    ram.touch()
    os.truncate(ram, RAM_MIB << 20)
    process = start("--pcram-file", ram, "-kernel", build_guest("heartbeat", folder))
    process.wait_ticks(2)
    return process


def hand_over(folder: Path, side: str, kind: str, number: int) -> bool:
    """Whether a call failed."""
    folder.mkdir()
    failed = folder / "failed"
    with starting(folder, RAM_MIB) as start:
        guest = one_guest(start, folder)
        with pair(folder, guest.monitor, "-serial", f"file:{folder}/there") as two:
            for command in (two.send, two.receive):
                command._environment["PYTHONPATH"] = f"{FAILING}:{ROOT}"
                command._environment["LAZYMEM_TEST_FAILS"] = f"{side} {kind} {number} {failed}"
            two.send.start()
            address = two.send.arguments[two.send.arguments.index("--listen") + 1]
            two.receive.arguments += [address, str(two.mountpoint), *map(str, two.vm_options)]
            two.receive.start()
            settle(two, guest, failed)
            wait_until(lambda: bool(ticks_of(folder / "there")), "the guest to count on")
            counts_on(guest.ticks(), ticks_of(folder / "there"))
    return failed.exists()


def settle(two: Pair, guest: Process, failed: Path) -> None:
    """Until the guest runs at the destination, which has all of it: a call that is to fail may be one of the last.
    Whoever ended on the way is started again."""
    give_up = time.monotonic() + 2 * WAIT_SECONDS
    while True:
        runs = two.runs()
        told = f"{failed.read_text() if failed.exists() else 'nothing'} failed; {two.tell()}"
        assert runs != (True, True), f"both run; {told}"
        if runs[1] and two.send.code() == 0:
            return
        assert guest.process.poll() is None or two.runs()[1], f"the source's emulator ended: {guest.end()}; {told}"
        assert time.monotonic() < give_up, told
        assert "Traceback" not in two.send.said() + two.receive.said(), told
        for command in (two.send, two.receive):
            if command.code() not in (None, 0):
                command.start()
        time.sleep(0.05)


@pytest.mark.parametrize(("side", "kind"), KINDS if WIDE else FEW)
def test_a_call_fails(tmp_path: Path, side: str, kind: str) -> None:
    if not WIDE:
        assert hand_over(tmp_path / "one", side, kind, FEW[side, kind])
        return
    spared = 0
    for number in itertools.count():
        spared = 0 if hand_over(tmp_path / str(number), side, kind, number) else spared + 1
        if spared == ENOUGH:
            assert number > 4 + ENOUGH
            return
