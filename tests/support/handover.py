"""Both ends of a hand-over as processes on this host: started by the real commands, killed, started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lazymem.cli.receivehost import _began
from lazymem.cli.status import read_status
from lazymem.cli.umount import end_mount
from lazymem.errors import LazymemError
from lazymem.fs import mountinfo
from lazymem.handover.journal import read
from tests.support.emulatorwatch import EmulatorWatch, both_ran, stopped_and_resumed
from tests.support.forkedcommands import Forked, ForkServer
from tests.support.networkhosts import NetworkHost
from tests.support.ports import KeptPort
from tests.support.processtree import descendants_of, is_gone
from tests.support.residency import cached_pages
from tests.support.vmprocess import WAIT_SECONDS, wait_until


class Command:
    """`lazymem send` or `lazymem receive`, its output in files; one process after the other."""

    def __init__(
        self,
        folder: Path,
        name: str,
        environment: dict[str, str],
        *arguments: object,
        maybe_forks: ForkServer | None = None,
        on: Sequence[str] = (),
    ) -> None:
        """`on`: what to put before a command so that it is on another host."""
        self._folder = folder
        self._on = on
        self._maybe_forks = maybe_forks
        self._name = name
        self._environment = environment
        self.arguments = [str(argument) for argument in arguments]
        self.steps = folder / f"{name}.steps"
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        self.process: subprocess.Popen[bytes] | Forked | None = None

    def start(self, *more: object, die_at: str = "") -> None:
        words = [*self.arguments, *map(str, more)]
        self.out.touch()
        if self._maybe_forks is not None:
            command = [str(self.steps), die_at, self._name, *words]
            self.process = self._maybe_forks.start(command, self.out, self.err, self._environment)
            return
        command = [*self._on, sys.executable, "-m", "tests.support.dyingcommand", str(self.steps), die_at, self._name]
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen([*command, *words], stdout=out, stderr=err, env=self._environment)

    def code(self) -> int | None:
        """Once all of it has ended: a source's guardian may be gone before the process that does the work."""
        code = None if self.process is None else self.process.poll()
        return code if code is None or is_gone(self.worker) else None

    @property
    def worker(self) -> int:
        """The process that came to a step last; 0: none has."""
        path = self.steps.with_suffix(".pid")
        return int(path.read_text() or "0") if path.exists() else 0

    def wait(self) -> int:
        assert self.process is not None
        code = self.process.wait(WAIT_SECONDS)
        wait_until(lambda: is_gone(self.worker), "the process that does the work")
        return code

    def said(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def let_go_on(self) -> None:
        """From where it was told to hold."""
        self.steps.with_suffix(".go").touch()

    def wait_at(self, step: str) -> None:
        wait_until(lambda: step in self.was_at(), step)

    def run(self, *more: object, arguments: Sequence[object] | None = None) -> subprocess.CompletedProcess[str]:
        """The same command beside the one that runs (with other `arguments`, if any), to its end."""
        words = [str(word) for word in (*(self.arguments if arguments is None else arguments), *more)]
        command = [sys.executable, "-m", "lazymem.cli.main", self._name, *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=self._environment, check=False, timeout=2 * WAIT_SECONDS
        )

    def was_at(self) -> list[str]:
        return self.steps.read_text().splitlines() if self.steps.exists() else []

    def read_until(self, step: str) -> int:
        """Bytes of files that it had read when it came to that step, the last time."""
        lines = self.steps.with_suffix(".read").read_text().splitlines()
        return next(int(words[0]) for words in (line.split(" ", 1) for line in reversed(lines)) if words[1] == step)

    def kill(self) -> None:
        """All of it; a guardian first, which would start another."""
        if self.process is not None:
            work = [pid for pid in descendants_of(self.process.pid) if self._name == "send"]
            self.process.kill()
            self.process.wait()
            for pid in {*work, *([self.worker] if self.worker and not is_gone(self.worker) else [])}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: is_gone(self.worker), "the process that does the work")


class Pair:
    """A guest's both ends. The source emulator's monitor is `monitor`; the destination's `there`."""

    def __init__(
        self,
        folder: Path,
        monitor: Path,
        *vm_options: object,
        there: Path | None = None,
        maybe_forks: ForkServer | None = None,
        hosts: tuple[NetworkHost, NetworkHost] | None = None,
        warm: float = 0.0,
    ) -> None:
        """`there`: the destination emulator's monitor, a short path. `hosts`: where the two commands run. `warm`:
        seconds."""
        self.folder = folder
        self.monitor, self.there = monitor, there or folder / "there.qmp"
        self._watches = EmulatorWatch(self.monitor), EmulatorWatch(self.there)
        self._shares = there is None
        """The emulators' monitors have room for a watch."""
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        journals = folder / "send.journal", folder / "receive.journal"
        on = ((), ()) if hosts is None else (hosts[0].on, hosts[1].on)
        self._place = KeptPort()
        listen = f"127.0.0.1:{self._place.number}" if hosts is None else f"{hosts[0].address}:0"
        insecure = () if hosts is None else ("--insecure",)
        words = (*insecure, "--qmp", monitor, "--listen", listen, "--journal", journals[0], "--json")
        words += ("--warm", f"{warm:g}") if warm else ()
        self.send = Command(folder, "send", environment, *words, maybe_forks=maybe_forks, on=on[0])
        more = ("--json", "--journal", journals[1])
        self.receive = Command(folder, "receive", environment, *more, maybe_forks=maybe_forks, on=on[1])
        self.vm_options = ("-qmp", f"unix:{self.there}", *map(str, vm_options))
        self.journals = journals

    def watch_at(self, here: Path, there: Path) -> None:
        """With QEMU: monitors of the two emulators that nobody else uses, as one of its serves one client."""
        self._watches, self._shares = (EmulatorWatch(here), EmulatorWatch(there)), True

    def stop_watching(self) -> None:
        """Somebody else is to have those monitors. What was told until now stays known."""
        self.never_both()
        for watch in self._watches:
            watch.close()
        self._shares = False

    def begin(self, *, source_dies: str = "", destination_dies: str = "") -> None:
        """When the source, and when the destination, comes to that step, it dies."""
        self.begin_at(self.mountpoint, source_dies, destination_dies)

    def begin_at(self, mountpoint: Path, source_dies: str = "", destination_dies: str = "") -> None:
        self.runs()  # from here on it tells when its guest stops
        self.send.start(die_at=source_dies)
        address = self.address()
        self.receive.arguments = [*self.receive.arguments, address, str(mountpoint), *self.vm_options]
        self.receive.start(die_at=destination_dies)

    def address(self) -> str:
        """Where it listened first, which is where each of its next processes does."""
        wait_until(lambda: b"\n" in self.send.out.read_bytes() or self.send.code() is not None, "an address")
        return str(json.loads(self.send.out.read_text().splitlines()[0])["listening"])

    def states(self) -> tuple[str | None, str | None]:
        """What stands in both journals."""
        here, there = (read(folder) for folder in self.journals)
        return None if here is None else here.state, None if there is None else there.state

    def runs(self) -> tuple[bool, bool]:
        """Whether the guest runs here, and there, as far as the emulators answer."""
        there = self._watches[1].runs()  # first: what stops here meanwhile may run there a moment later
        if not self._shares:
            self._watches[1].close()
            return False, there
        return self._watches[0].runs(), there

    def never_both(self) -> None:
        """By the times that both emulators tell, it never ran on both sides at once."""
        if self._shares:
            self.runs()
        assert not both_ran(*self._watches), f"{both_ran(*self._watches)}; {self.tell()}"

    def downtime_seconds(self) -> float:
        """As both emulators tell it; the destination's has to have been asked whether it runs before it did."""
        stopped, resumed = self.stopped_and_resumed()
        return resumed - stopped

    def stopped_and_resumed(self) -> tuple[float, float]:
        """The moments of that, Unix time."""
        self.runs()
        return stopped_and_resumed(*self._watches)

    def touched_pages(self) -> int:
        """By whoever maps the mount at the destination, or maps and waits: what is in memory of it, and faults."""
        status = read_status(str(self.mountpoint))
        return int(cached_pages(self.mountpoint / "pc.ram") + status["demand_faults"])

    def events_here(self) -> list[str]:
        """The names of what the source's emulator told, in that order."""
        return self._watches[0].names()

    def restart_the_dead(self) -> None:
        for command in (self.send, self.receive):
            if command.code() == -signal.SIGKILL:
                command.start()

    def wait_settled(self) -> tuple[bool, bool]:
        """Until exactly one side runs, and never both; which."""
        assert self._shares, "with QEMU, this needs watch_at"
        give_up = time.monotonic() + WAIT_SECONDS
        while True:
            runs = self.runs()
            assert runs != (True, True), f"both run; {self.tell()}"
            if any(runs) and self._is_decided(runs):
                self.never_both()
                return runs
            assert time.monotonic() < give_up, self.tell()
            self.restart_the_dead()
            time.sleep(0.02)

    def _is_decided(self, runs: tuple[bool, bool]) -> bool:
        """There, or here with no way there any more."""
        return runs[1] or self.receive.code() not in (None, -signal.SIGKILL)

    def tell(self) -> str:
        return f"states {self.states()}, runs {self.runs()}\n{self.send.said()}\n{self.receive.said()}"

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.send.out.read_text().splitlines()[-1])
        return found

    def clean_up(self) -> None:
        for watch in self._watches:
            watch.close()
        for command in (self.send, self.receive):
            command.kill()
        record = read(self.journals[1])
        if record is not None:
            pid, began = record.details["emulator_pid"], record.details["emulator_began"]
            if pid and _began(pid) == began:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            sockets = Path(record.details["sockets"])  # of a command that was killed, or whose guest was
            if sockets.name.startswith("lazymem-") and sockets.parent == Path(tempfile.gettempdir()):
                shutil.rmtree(sockets, ignore_errors=True)
        path = mountinfo.real_path(str(self.mountpoint))
        if mountinfo.maybe_mount_at(path) is not None:
            with contextlib.suppress(LazymemError):
                end_mount(path, force=True)


@contextlib.contextmanager
def pair(
    folder: Path,
    monitor: Path,
    *vm_options: object,
    there: Path | None = None,
    hosts: tuple[NetworkHost, NetworkHost] | None = None,
    warm: float = 0.0,
) -> Iterator[Pair]:
    made = Pair(folder, monitor, *vm_options, there=there, hosts=hosts, warm=warm)
    try:
        yield made
        made.never_both()
    finally:
        made.clean_up()
