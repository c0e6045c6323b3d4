"""Debian's unmodified memtest86+: boots on lazymem-vm, is saved in the middle of a test, and goes on off a mount.

It is the judge of the RAM's way: it knows what it wrote before the save, and one flipped bit is an error on its screen.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyte
import pytest

from lazymem.cli.main import main as lazymem
from tests.support.memtest import misread_clock
from tests.support.mounts import Stage
from tests.support.vmprocess import Process, Start, wait_until

pytestmark = pytest.mark.system

KERNEL = Path("/boot/memtest86+x64.bin")
OPTIONS = "console=ttyS0,115200 nosmp nobench nosm nomch nopause noehci keyboard=legacy"
"""`nomch`, for 7.x (Debian 13): it takes the CPU for one with a memory controller to ask, and this PC has no PCI."""
RAM_MIB = 16
TESTED = r"Testing: +4MB - +16MB"
"""On the screen while it tests what lies above its own place; its code moves when the lowest 4 MiB are tested."""

FLIPPED_MIB = range(6, 10)

STEP_PERCENT = 4
"""Of a pass: with less the next save might come before the look that finds it."""

ROUNDS = 100
"""At most, and the test's time limit comes before: while memtest86+ fills memory it overwrites a flipped bit, and then
there is nothing to find."""


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


def progress(text: str) -> tuple[int, int]:
    """Passes done, and percent of the present one."""
    passes, percent = re.search(r"Pass: +(\d+)", text), re.search(r"Pass +(\d+)%", text)
    assert passes, text
    assert percent, text
    return int(passes[1]), int(percent[1])


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


def wait_in_a_test(process: Process, *before: Path) -> None:
    """`before`: serial logs of the processes that it was in before this one."""

    def testing() -> bool:
        text = screen(*before, process.serial)
        under_way = re.search(TESTED, text) and re.search(r"Test +([2-8]\d)%", text)
        return bool(under_way) or misread_clock(text) or process.process.poll() is not None

    wait_until(testing, "a test to be under way")
    assert process.process.poll() is None, process.end()


def stop_in_a_test(process: Process, *before: Path) -> None:
    with process.qmp() as qmp:
        qmp.command("stop")
        while not re.search(TESTED, screen(*before, process.serial)):
            # It went on to its own memory between the look and the stop: flips there would hit its code.
            qmp.command("cont")
            wait_in_a_test(process, *before)
            qmp.command("stop")


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
    process, logs = in_a_test, [in_a_test.serial]
    for number in range(ROUNDS):
        stop_in_a_test(process, *logs[:-1])
        before = progress(screen(*logs))
        process.save(f"file:{tmp_path}/vmstate")
        process.quit()
        flip_bits(tmp_path / "ram", number % 8)
        process = start("--pcram-file", tmp_path / "ram", "-incoming", f"file:{tmp_path}/vmstate")
        logs.append(process.serial)
        with process.qmp() as qmp:
            qmp.wait_status(lambda status: status == "paused")
            qmp.command("cont")
        wait_news(process, logs, before)
        if errors(screen(*logs)):
            break
    assert errors(screen(*logs)) > 0


def wait_news(process: Process, logs: list[Path], before: tuple[int, int]) -> None:
    """Until there is an error, or so much progress since `before` that there will be none."""
    passes, percent = before

    def news() -> bool:
        text = screen(*logs)
        return (
            errors(text) > 0 or progress(text) >= (passes, percent + STEP_PERCENT) or process.process.poll() is not None
        )

    wait_until(news, "an error, or a step")
    assert process.process.poll() is None, process.end()


def flip_bits(ram: Path, bit: int) -> None:
    """`bit`: 0 to 7. Not the same twice in a row: what nobody has looked at since would be right again."""
    with ram.open("r+b") as file:
        for mib in FLIPPED_MIB:
            file.seek((mib << 20) + 0x123)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ (1 << bit)]))
