"""lazymem-vm as a process for tests: started, talked to over its monitor, ended by its own id."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lazymem.demo.serialline import SerialLine
from lazymem.vm.qmpclient import QmpClient

WAIT_SECONDS = 60.0
"""For a condition on a busy test machine; nothing waits this long unless it is broken."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < give_up, f"waited for {what}"
        time.sleep(0.01)


def connected(path: Path) -> SerialLine:
    """A guest's serial line, once it is listened at."""
    found: list[SerialLine] = []

    def is_there() -> bool:
        with contextlib.suppress(OSError):
            found.append(SerialLine(path, connect=True))
        return bool(found)

    wait_until(is_there, "the serial line")
    return found[0]


class Process:
    """A running lazymem-vm, its serial line in a file."""

    def __init__(self, folder: Path, ram_mib: int, *arguments: object) -> None:
        self.serial = folder / "serial"
        self.monitor = folder / "qmp"
        folder.mkdir(exist_ok=True)
        serial = () if "-serial" in arguments else ("-serial", f"file:{self.serial}")
        words = ["-m", str(ram_mib), *serial, "-qmp", f"unix:{self.monitor},server=on,wait=off"]
        words += [str(argument) for argument in arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lazymem.cli.vm", *words], stderr=subprocess.PIPE, text=True
        )

    def ticks(self) -> list[int]:
        """The numbers that the guest has counted so far, of whole lines only."""
        return ticks_of(self.serial)

    def wait_ticks(self, count: int) -> None:
        wait_until(lambda: len(self.ticks()) >= count or self.process.poll() is not None, f"{count} ticks")
        assert len(self.ticks()) >= count, self.end()

    @contextlib.contextmanager
    def qmp(self) -> Iterator[QmpClient]:
        wait_until(lambda: self.monitor.exists() or self.process.poll() is not None, "the monitor")
        with QmpClient(self.monitor) as client:
            yield client

    def save(self, uri: str) -> None:
        with self.qmp() as qmp:
            qmp.command("migrate", uri=uri)
            wait_until(lambda: qmp.command("query-migrate")["status"] in ("completed", "failed"), "the save")
            assert qmp.command("query-migrate")["status"] == "completed", qmp.command("query-migrate")

    def quit(self) -> None:
        with self.qmp() as qmp:
            qmp.command("quit")
        assert self.end() == (0, "")

    def end(self) -> tuple[int, str]:
        """Exit status and what it said, once it has ended."""
        _, said = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, said

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def ticks_of(serial: Path) -> list[int]:
    """The numbers of whole lines of a guest's that counts: it may be in the middle of one, or have begun in one."""
    text = serial.read_text() if serial.exists() else ""
    return [int(number) for number in re.findall(r"^tick (\d+)\r?\n", text, re.MULTILINE)]


Start = Callable[..., Process]
"""Starts a lazymem-vm with these arguments; the fixture ends it."""


def counts_on(before: list[int], after: list[int]) -> None:
    """The guest counts in even steps; the second process's lines continue the first's, none twice, none left out.

    A line that was under way when the guest stood is finished by the second process: only its end is seen there.
    """
    step = before[1] - before[0]
    assert after[0] - before[-1] in (step, 2 * step)
    assert all(late - early == step for numbers in (before, after) for early, late in itertools.pairwise(numbers))


@contextlib.contextmanager
def starting(folder: Path, ram_mib: int) -> Iterator[Start]:
    """Starts processes in numbered folders, and ends what is left of them."""
    processes: list[Process] = []

    def begin(*arguments: object) -> Process:
        processes.append(Process(folder / f"vm{len(processes)}", ram_mib, *arguments))
        return processes[-1]

    try:
        yield begin
    finally:
        for process in processes:
            process.kill()
