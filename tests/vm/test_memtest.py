"""Debian's unmodified memtest86+ on lazymem-vm: it boots, tests its RAM, goes on in another process, finds a bad bit.

Its kernel is the package memtest86+'s, is started by the Linux boot protocol and draws on a serial terminal.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyte
import pytest

from tests.support.memtest import misread_clock
from tests.support.streamreader import read_stream
from tests.support.vmprocess import Process, Start, wait_until

KERNEL = Path("/boot/memtest86+x64.bin")
APPEND = "console=ttyS0,115200 nosmp nobench nosm nomch nopause noehci keyboard=legacy"
"""`nomch`, for 7.x (Debian 13): it takes the CPU for one with a memory controller to ask, and this PC has no PCI."""
RAM_MIB = 8
"""memtest86+ 6.10 does not start with 4."""

FLIPPED = [half + offset for half in (0, 4 << 20) for offset in range(0x180000, 0x3C0000, 0x8000)]
"""Addresses whose bits are flipped: in both halves of RAM, since one is tested while the program is in the other."""

ROUNDS = 100
"""At most, and the test's time limit comes before: while memtest86+ fills memory it overwrites a flipped bit, and then
there is nothing to find."""

pytestmark = pytest.mark.timeout(240)


class Screen:
    """What a terminal at the guest's serial line shows, across processes: each one's output follows the one before."""

    def __init__(self) -> None:
        self._screen = pyte.Screen(80, 25)
        self._stream = pyte.ByteStream(self._screen)
        self._read: dict[Path, int] = {}

    def clear(self) -> None:
        """For a process that goes on with nothing."""
        self._screen.reset()

    def look(self, process: Process) -> str:
        assert process.process.poll() is None, process.end()
        path = process.serial
        data = path.read_bytes() if path.exists() else b""
        self._stream.feed(data[self._read.get(path, 0) :])
        self._read[path] = len(data)
        return "\n".join(self._screen.display)

    def progress(self, process: Process) -> tuple[int, int]:
        """Passes done, and percent of the present one; (-1, -1) before there is any."""
        text = self.look(process)
        passes, percent = re.search(r"Pass: +(\d+)", text), re.search(r"Pass +(\d+)%", text)
        return (int(passes[1]), int(percent[1])) if passes and percent else (-1, -1)

    def wait_news(self, process: Process, before: tuple[int, int]) -> None:
        """Until there is an error, or more progress than `before`."""
        wait_until(lambda: self.errors(process) > 0 or self.progress(process) > before, "an error, or a step")

    def bad_addresses(self, process: Process) -> set[int]:
        return {int(word, 16) for word in re.findall(r"\b([0-9a-f]{12}) \(", self.look(process))}

    def errors(self, process: Process) -> int:
        found = re.search(r"Errors: +(\d+)", self.look(process))
        return int(found[1]) if found else 0


def boot(start: Start, ram: Path, screen: Screen) -> Process:
    """A memtest86+ that is in the middle of a test."""
    ram.touch()
    with ram.open("r+b") as file:
        file.truncate(RAM_MIB << 20)
    process = start("-kernel", KERNEL, "-append", APPEND, "--pcram-file", ram)
    wait_until(
        lambda: screen.progress(process) >= (0, 1) or misread_clock(screen.look(process)), "a test to be under way"
    )
    if misread_clock(screen.look(process)):
        process.quit()
        screen.clear()  # or the next one would be taken for this one
        return boot(start, ram, screen)
    return process


def save(process: Process, vmstate: Path) -> None:
    """Save and quit."""
    process.save(f"file:{vmstate}")
    process.quit()
    assert read_stream(vmstate.read_bytes()).pages_of("pc.ram") == 0


def resume(start: Start, ram: Path, vmstate: Path) -> Process:
    return start("--pcram-file", ram, "-incoming", f"file:{vmstate}")


def flip_bits(ram: Path, bit: int) -> None:
    """`bit`: 0 to 7. Not the same twice in a row: what nobody has looked at since would be right again."""
    with ram.open("r+b") as file:
        for address in FLIPPED:
            file.seek(address)
            byte = file.read(1)[0]
            file.seek(address)
            file.write(bytes([byte ^ (1 << bit)]))


class Shown:
    """In the place of a process: what it has drawn."""

    def __init__(self, folder: Path, text: str) -> None:
        self.serial = folder / f"{len(list(folder.iterdir()))}"
        self.serial.write_text(text)
        self.process = SimpleNamespace(poll=lambda: None)
        self.was_ended = False

    def quit(self) -> None:
        self.was_ended = True


def test_one_that_misread_its_clock_is_followed_by_one_that_is_looked_at_itself(tmp_path: Path) -> None:
    """And not taken for the one before it, whose screen is what is seen until it draws its own."""
    started: list[Shown] = []

    def start(*_: object) -> Process:
        megahertz, text = (9999, "") if len(started) < 2 else (1000, "Pass:  0  Pass  5%")
        started.append(Shown(tmp_path, f"CLK/Temp: {megahertz} MHz {text}"))
        return cast(Process, started[-1])

    boot(start, tmp_path / "ram", Screen())
    assert [shown.was_ended for shown in started] == [True, True, False]


def test_goes_on_in_another_process_without_an_error(start: Start, tmp_path: Path) -> None:
    screen, vmstate = Screen(), tmp_path / "vmstate"
    process = boot(start, tmp_path / "ram", screen)
    passes, percent = screen.progress(process)
    save(process, vmstate)
    # A copy, as on another machine: nothing of the first process's memory can help.
    shutil.copyfile(tmp_path / "ram", tmp_path / "copy")
    process = resume(start, tmp_path / "copy", vmstate)
    wait_until(lambda: screen.progress(process) >= (passes, percent + 2), "two more percent")
    assert "Testing" in screen.look(process)
    assert screen.errors(process) == 0


def test_a_bit_flipped_on_the_way_is_found(start: Start, tmp_path: Path) -> None:
    screen, vmstate, ram = Screen(), tmp_path / "vmstate", tmp_path / "ram"
    process = boot(start, ram, screen)
    for number in range(ROUNDS):
        before = screen.progress(process)
        save(process, vmstate)
        flip_bits(ram, number % 8)
        process = resume(start, ram, vmstate)
        screen.wait_news(process, before)
        if screen.errors(process):
            break
    wait_until(lambda: bool(screen.bad_addresses(process)), "where the errors are: the count comes first")
    assert screen.bad_addresses(process) <= set(FLIPPED), screen.look(process)
