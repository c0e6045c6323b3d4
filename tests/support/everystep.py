"""One `pages` guest through hand-overs in which something dies at every given step, until each step was one.

A process that died is started again with the same words, and dies at the next of the steps that it comes to. A
hand-over that came to nothing is tried again, and a guest that was handed over is handed on. What is looked at all the
time: the guest never runs on both sides. After each hand-over: it runs on the one side on which it has to, its memory
is what it wrote, and it writes more.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from lazymem.vm.guests import build_guest
from tests.support.forkedcommands import ForkServer
from tests.support.handover import Command, Pair
from tests.support.vmprocess import WAIT_SECONDS, connected, wait_until

RAM_MIB = 4
_POLL_SECONDS = 0.02
_MOST_STARTS = 60
_MOST_PAIRS = 20
_LAST_WORD_SECONDS = 1.0
"""For a destination to hear that the source has let go, which may be what was cut."""


class Steps:
    """Those that are left. `prefix`: what dies there, as `dyingcommand` has it; `other`: the same of the other side."""

    def __init__(self, side: str, prefix: str, words: Collection[str], other: str = "") -> None:
        self._side = side
        self._prefix = prefix
        self._other = other
        self.left = list(dict.fromkeys(words))

    def die_at(self, side: str) -> str:
        return f"{self._prefix}{','.join(self.left)}" if side == self._side else self._other

    def kills(self, part: str) -> bool:
        """Of the command, only that part."""
        return self._prefix.endswith(f"{part}:")

    def note(self, pair: Pair) -> None:
        """Those that were reached meanwhile are done."""
        command = pair.send if self._side == "send" else pair.receive
        done = {line[1:] for line in command.was_at() if line.startswith("!")}
        self.left = [word for word in self.left if word not in done]


class Guest:
    """One that runs here, wherever that is by now."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, forks: ForkServer) -> None:
        ram = folder / "ram"
        ram.touch()
        os.truncate(ram, RAM_MIB << 20)
        self.monitor = folder / "qmp"
        words = ["-m", RAM_MIB, "--pcram-file", ram, "-kernel", build_guest("pages", folder)]
        words += ["-serial", f"unix:{folder}/serial", "-qmp", f"unix:{self.monitor},server=on,wait=off"]
        process = forks.start_vm([str(word) for word in words], folder / "log")
        stack.callback(process.wait)
        stack.callback(process.kill)
        self.line = connected(folder / "serial")
        stack.callback(lambda: self.line.close())
        self.line.expect("tick")  # it listens from "ready" on, which may be past
        self.line.ask("fill 7", "filled")
        self._seed = 0

    def moved(self, folder: Path, monitor: Path) -> None:
        self.line.close()
        self.line = connected(folder / "serial")
        self.monitor = monitor

    def check(self) -> None:
        """Its memory is what it wrote; it writes more."""
        assert " bad 0 " in self.line.ask("verify", "verified")
        self._seed += 1
        self.line.ask(f"rewrite 20 {self._seed}", "rewrote")


class Pairs:
    """The commands, in one folder for each guest that is handed over and for each time that it is."""

    def __init__(self, folder: Path, steps: Steps, stack: contextlib.ExitStack, forks: ForkServer) -> None:
        self._folder = folder
        self._forks = forks
        self._steps = steps
        self._stack = stack
        self.all: list[Pair] = []

    def run(self, guest: Guest, when_moved: Callable[[], None] = lambda: None) -> None:
        """Until no step is left. The guest must live through all of it. `when_moved` is called each time that it is
        seen at a destination."""
        while self._steps.left:
            pair = self.next_pair(guest)
            Attempts(pair, self._steps, guest, when_moved).run()
            pair.never_both()
            if not pair.runs()[1]:
                return
            guest.moved(pair.folder, pair.there)
            guest.check()

    def hand_on(self, guest: Guest, source_dies: str = "") -> Pair:
        """Once, and nothing is in its way; then its RAM lies on a mount."""
        pair = self.next_pair(guest)
        pair.begin(source_dies=source_dies)
        assert pair.wait_settled() == (False, True), pair.tell()
        guest.moved(pair.folder, pair.there)
        return pair

    def next_pair(self, guest: Guest) -> Pair:
        folder = self._next_folder()
        pair = Pair(folder, guest.monitor, "-serial", f"unix:{folder}/serial", maybe_forks=self._forks)
        self._stack.callback(pair.clean_up)
        self.all.append(pair)
        return pair

    def _next_folder(self) -> Path:
        assert len(self.all) < _MOST_PAIRS, f"never reached: {self._steps.left}"
        folder = self._folder / str(len(self.all) + 1)
        folder.mkdir()
        return folder


class Attempts:
    """One pair of commands, started again whenever they end, until the guest is handed over or no step is left."""

    def __init__(self, pair: Pair, steps: Steps, guest: Guest, when_moved: Callable[[], None]) -> None:
        self._pair = pair
        self._when_moved = when_moved
        self._steps = steps
        self._guest = guest
        self._said = 0
        self._words = list(pair.receive.arguments)
        self._receives = 0
        pair.send.out.touch()

    def run(self) -> None:
        left, give_up = self._steps.left, time.monotonic() + 2 * WAIT_SECONDS
        while True:
            runs = self._pair.runs()
            assert runs != (True, True), f"both run; {self._pair.tell()}"
            self._steps.note(self._pair)
            if runs[1]:
                self._when_moved()
            if runs[1] and self._is_released():
                return
            if self._has_ended(self._pair.receive):
                self._check_here()
                if not self._steps.left:
                    return
            self._keep_up()
            if left != self._steps.left:
                left, give_up = self._steps.left, time.monotonic() + 2 * WAIT_SECONDS
            assert time.monotonic() < give_up, f"left: {self._steps.left}; {self._pair.tell()}"
            time.sleep(_POLL_SECONDS)

    def _is_released(self) -> bool:
        """The source has ended, and the destination has heard of it or will not."""
        pair = self._pair
        if not self._has_ended(pair.send):
            return False
        deadline = time.monotonic() + _LAST_WORD_SECONDS
        while "AT done" not in pair.receive.was_at() and pair.receive.code() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._steps.note(pair)
        if pair.receive.code() is not None:
            pair.receive.start(die_at="")
        return True

    def _has_ended(self, command: Command) -> bool:
        """By itself."""
        return command.code() not in (None, -signal.SIGKILL)

    def _check_here(self) -> None:
        """It came to nothing: the guest goes on here, and nowhere else."""

        def goes_on() -> bool:
            runs = self._pair.runs()
            assert not runs[1], self._pair.tell()
            if self._pair.send.code() is not None:
                self._start_send()
            return runs[0]

        wait_until(goes_on, "the guest to go on at the source")
        self._guest.check()

    def _keep_up(self) -> None:
        pair = self._pair
        if pair.send.code() is not None or pair.send.process is None:
            self._start_send()
        if pair.receive.code() is not None or pair.receive.process is None:
            address = self._address()
            if address is not None:
                pair.receive.arguments = [*self._words, address, str(pair.mountpoint), *pair.vm_options]
                self._receives += 1
                assert self._receives < _MOST_STARTS, f"left: {self._steps.left}; {pair.tell()}"
                pair.receive.start(die_at=self._steps.die_at("receive"))

    def _start_send(self) -> None:
        if self._pair.send.code() == -signal.SIGKILL:
            self._check_what_was_left()
        self._said = len(self._listening())
        self._pair.send.start(die_at=self._steps.die_at("send"))

    def _check_what_was_left(self) -> None:
        """A killed child is started again by its guardian, and one whose guardian was killed does not leave a guest
        that was not given standing."""
        pair = self._pair
        assert not self._steps.kills("worker"), pair.tell()
        if self._steps.kills("guardian") and pair.states()[0] == "ours":
            assert pair.runs() == (True, False), pair.tell()

    def _address(self) -> str | None:
        """Where the present process listens, once it does."""
        lines = self._listening()
        return None if len(lines) <= self._said else str(json.loads(lines[-1])["listening"])

    def _listening(self) -> list[str]:
        return [line for line in self._pair.send.out.read_text().splitlines(keepends=True) if '"listening"' in line]


@contextlib.contextmanager
def every_step(steps: Steps, forks: ForkServer) -> Iterator[tuple[Pairs, Guest]]:
    with contextlib.ExitStack() as stack:
        # A short path: there are sockets in it.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazymem-")))
        (folder / "guest").mkdir()
        yield Pairs(folder, steps, stack, forks), Guest(folder / "guest", stack, forks)
