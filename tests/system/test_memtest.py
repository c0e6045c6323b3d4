"""Debian's unmodified memtest86+: boots on lazymem-vm, is saved in the middle of a test, and goes on off a mount.

It is the judge of the RAM's way: it knows what it wrote before the save, and one flipped bit is an error on its screen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest

from lazymem.cli.main import main as lazymem
from tests.support.memtest import misread_clock
from tests.support.mounts import Stage
from tests.support.vmprocess import Process, Start, starting, wait_until

pytestmark = pytest.mark.system

KERNEL = Path("/boot/memtest86+x64.bin")
OPTIONS = "console=ttyS0,115200 nosmp nobench nosm nomch nopause noehci keyboard=legacy"
"""`nomch`, for 7.x (Debian 13): it takes the CPU for one with a memory controller to ask, and this PC has no PCI."""
RAM_MIB = 16
TESTED = r"Testing: +4MB - +16MB"
"""On the screen while it tests what lies above its own place; its code moves when the lowest 4 MiB are tested."""

FLIPPED_MIB = range(6, 10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starting(tmp_path, RAM_MIB) as begin:
        yield begin


def screen(*logs: Path) -> str:
    """What memtest86+ has drawn on its terminal, by the serial output of one process after the other."""
    terminal = pyte.Screen(80, 25)
    stream = pyte.ByteStream(terminal)
    for log in logs:
        if log.exists():
            stream.feed(log.read_bytes())
    return "\n".join(terminal.display)


def clock_seconds(text: str) -> int:
    """The clock on its screen; 0 while there is none."""
    found = re.search(r"Time: +(\d+):(\d\d):(\d\d)", text)
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3]) if found else 0


def errors(text: str) -> int:
    found = re.search(r"Errors: +(\d+)", text)
    assert found, text
    return int(found[1])


@pytest.fixture
def in_a_test(start: Start, tmp_path: Path) -> Process:
    """A memtest86+ that is in the middle of a test of the memory above 4 MiB."""
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, RAM_MIB << 20)
    while True:
        process = start("--pcram-file", ram, "-kernel", KERNEL, "-append", OPTIONS)
        wait_in_a_test(process)
        if not misread_clock(screen(process.serial)):
            return process
        process.quit()


def wait_in_a_test(process: Process) -> None:
    def testing() -> bool:
        text = screen(process.serial)
        under_way = re.search(TESTED, text) and re.search(r"Test +([2-8]\d)%", text)
        return bool(under_way) or misread_clock(text) or process.process.poll() is not None

    wait_until(testing, "a test to be under way")
    assert process.process.poll() is None, process.end()


def test_it_goes_on_off_a_mount(in_a_test: Process, start: Start, mounts: Stage, tmp_path: Path) -> None:
    assert lazymem(["snapshot", str(in_a_test.monitor), str(tmp_path / "snapshot")]) == 0
    before = screen(in_a_test.serial)
    assert errors(before) == 0
    mount = mounts.mount(mounts.serve(tmp_path / "snapshot").address)
    second = start("--pcram-file", mount.ram_path, "-incoming", f"file:{mount.path}/vmstate")
    seconds = clock_seconds(before)
    wait_until(
        lambda: (
            clock_seconds(screen(in_a_test.serial, second.serial)) >= seconds + 4 or second.process.poll() is not None
        ),
        "its clock to go on",
    )
    after = screen(in_a_test.serial, second.serial)
    assert (errors(after), "Status: Testing" in after) == (0, True), after
    second.quit()


def test_it_finds_bits_that_flipped_on_the_way(in_a_test: Process, start: Start, tmp_path: Path) -> None:
    with in_a_test.qmp() as qmp:
        qmp.command("stop")
        while not re.search(TESTED, screen(in_a_test.serial)):
            # It went on to its own memory between the look and the stop: flips there would hit its code.
            qmp.command("cont")
            wait_in_a_test(in_a_test)
            qmp.command("stop")
    in_a_test.save(f"file:{tmp_path}/vmstate")
    in_a_test.quit()
    with (tmp_path / "ram").open("r+b") as file:
        for mib in FLIPPED_MIB:
            file.seek((mib << 20) + 0x123)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))
    second = start("--pcram-file", tmp_path / "ram", "-incoming", f"file:{tmp_path}/vmstate")
    with second.qmp() as qmp:
        qmp.wait_status(lambda status: status == "paused")
        qmp.command("cont")

    def found() -> bool:
        return errors(screen(in_a_test.serial, second.serial)) > 0 or second.process.poll() is not None

    wait_until(found, "an error on the screen")
    assert errors(screen(in_a_test.serial, second.serial)) > 0
