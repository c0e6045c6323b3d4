"""The Nth call to the disk or the network fails in the daemon of a real mount, for every N until none fails: while it
fetches pages and stores what a guest writes, and while one daemon follows another one that was killed or upgraded.

The guest is a process of its own that maps the file, writes to it, syncs and reads back. Each time: it lives, each byte
is right, nothing it wrote is lost (neither here nor for the next mount over the same folders), no read and no write
ends in an error; a sync may, where the disk failed below it.

A few N are taken, LAZYMEM_SWEEP=wide takes all, and also several calls in a row (`make sweep`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazymem.digests import LEAF_PAGES
from lazymem.pages import PAGE_SIZE
from tests.support import skips, sweptguest
from tests.support.mountfaults import KINDS, Control, control
from tests.support.mounts import Mounted, Stage, command, stage, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

WIDE = os.environ.get("LAZYMEM_SWEEP") == "wide"

IN_A_ROW = (1, 2, 6) if WIDE else (1,)

SOME = {"connection reset": 3, "connection reset behind what was sent": 4, "disk error": 5, "disk full": 9}
"""Every how many calls one fails, where not all do."""

LEAVES = 96 if WIDE else 16
"""One for each step: with its first page come its digests."""

ENOUGH = 3
"""So many N of which no call failed, and all have: how many calls a step makes is not the same each time."""

MOST = 500

SYNCS = ("fsync", "fdatasync", "pread", "pwrite")
"""What a sync does: a step whose fault was another one must have synced."""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("sweep") / "web", pages=LEAVES * LEAF_PAGES, seed=3)


class Run:
    """One mount with its guest. `model`: what its RAM has to be."""

    def __init__(self, mounts: Stage, faults: Control, snapshot: BuiltSnapshot, address: str, number: int) -> None:
        self._mounts = mounts
        self._address = address
        self._snapshot = snapshot
        self.state = mounts.folder / f"state{number}"
        self.model = bytearray(snapshot.ram)
        self._faults = faults
        mounts.cache = mounts.folder / f"cache{number}"
        self.mount = self._mounted(f"mnt{number}")
        self._guest = subprocess.Popen(
            command("tests.support.sweptguest", self.mount.ram_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self._leaves = list(range(LEAVES))
        self.first = 0
        self.unsynced = ""

    def _mounted(self, name: str) -> Mounted:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in self._faults.environment().items():
                patch.setenv(variable, value)
            return self._mounts.mount(self._address, "--prefetch", "none", "--state", self.state, name=name)

    @property
    def is_used_up(self) -> bool:
        return not self._leaves

    def begin(self) -> None:
        """Have the guest do its next step."""
        self.first = self._leaves.pop() * LEAF_PAGES
        assert self._guest.stdin is not None
        self._guest.stdin.write(f"{self.first}\n")
        self._guest.stdin.flush()

    def finish(self) -> None:
        """The step's end: all that it saw was right, and what it refused was a sync."""
        assert self._guest.stdout is not None
        line = self._guest.stdout.readline()
        assert line, f"the guest ended with {self._guest.wait()}; {self.told()}"
        said: dict[str, Any] = json.loads(line)
        before = bytes(self.model)
        for at, data in sweptguest.written(self.first).items():
            self.model[at : at + len(data)] = data
        self._compare(said["fetched"], before)
        self._compare(said["back"], self.model)
        self.unsynced = said["unsynced"]

    def _compare(self, found: dict[str, str], model: bytes | bytearray) -> None:
        wrong = [number for number, digest in found.items() if digest != sweptguest.digest(_page(model, int(number)))]
        assert not wrong, f"pages {wrong} are wrong; {self.told()}"

    def told(self) -> str:
        return f"failed: {self._faults.failed or 'nothing'}\n{self.mount.log.read_text()}"

    def end(self) -> None:
        """All of it through the mount, and once more through the next one over the same folders."""
        assert self._guest.stdin is not None
        self._guest.stdin.close()
        assert self._guest.wait(30) == 0, self.told()
        assert self._guest.stdout is not None
        self._guest.stdout.close()
        self._compare_all()
        assert "Traceback" not in self.mount.log.read_text(), self.told()
        self.mount.unmount()
        self.mount = self._mounted(f"{self.mount.path.name}-again")
        self._compare_all()
        self.mount.unmount()

    def _compare_all(self) -> None:
        found = self.mount.ram_path.read_bytes()
        wrong = [
            number for number in range(len(found) // PAGE_SIZE) if _page(found, number) != _page(self.model, number)
        ]
        assert not wrong, f"pages {wrong} are wrong; {self.told()}"

    def kill_guest(self) -> None:
        self._guest.kill()
        self._guest.wait()
        for end in (self._guest.stdin, self._guest.stdout):
            with contextlib.suppress(OSError):  # a line that it never took
                assert end is not None
                end.close()


def _page(ram: bytes | bytearray, number: int) -> bytes:
    return bytes(ram[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])


class Runs:
    """One after the other: a new one where the one before has no page left, or a disk that lost something."""

    def __init__(self, mounts: Stage, faults: Control, snapshot: BuiltSnapshot) -> None:
        self._server = mounts.serve(snapshot.folder)
        self._mounts, self.faults, self._snapshot = mounts, faults, snapshot
        self._count = 0
        self.current = self._new()

    def _new(self) -> Run:
        self._count += 1
        return Run(self._mounts, self.faults, self._snapshot, self._server.address, self._count)

    def next(self) -> Run:
        """One that has a step left, and no sync that failed, behind which none may be believed. (Nothing fails at its
        mount, which is another sweep's.)"""
        if self.current.unsynced or self.current.is_used_up:
            self.current.end()
            self.current = self._new()
        return self.current


@pytest.fixture
def runs(tmp_path: Path, snapshot: BuiltSnapshot) -> Iterator[Runs]:
    with stage(tmp_path) as mounts, control(tmp_path) as faults:
        made = Runs(mounts, faults, snapshot)
        try:
            yield made
        finally:
            faults.disarm()
            made.current.kill_guest()


def numbers(every: int, faults: Control) -> Iterable[int]:
    """N, until no call fails any more."""
    spared = 0
    for number in itertools.count(step=1 if WIDE else every):
        assert number < MOST
        yield number
        spared = 0 if faults.failed else spared + 1
        if spared >= (ENOUGH if WIDE else 1):
            assert number > every, "hardly any call failed"
            return


@pytest.mark.parametrize("count", IN_A_ROW)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_of_a_fetch_or_a_write_back_fails(runs: Runs, kind: str, count: int) -> None:
    faults = runs.faults
    for number in numbers(SOME[kind], faults):
        run = runs.next()
        faults.arm(KINDS[kind], number, count)
        run.begin()
        run.finish()
        run.mount.wait_kept()
        faults.disarm()
        may_fail = faults.failed.startswith(SYNCS if count == 1 else "") and bool(faults.failed)
        may_fail = may_fail and not KINDS[kind].of_network
        assert may_fail or not run.unsynced, f"{run.unsynced}: {run.told()}"
        assert run.mount.status()["pid"] == run.mount.pid, f"the daemon died; {run.told()}"
    runs.current.end()


WAYS = ("killed", "upgraded")
FEW = {("killed", "disk error"): 9, ("upgraded", "disk full"): 13, ("killed", "connection reset"): 2}
"""What else is done of these: every so many calls of a next daemon."""


@skips.needs_resend
@pytest.mark.parametrize("count", IN_A_ROW)
@pytest.mark.parametrize(("way", "kind"), list(itertools.product(WAYS, KINDS)) if WIDE else FEW)
def test_a_call_of_a_next_daemon_fails(runs: Runs, way: str, kind: str, count: int) -> None:
    """In the midst of a step of the guest's; who dies of it is followed by another one."""
    faults = runs.faults
    for number in numbers(FEW.get((way, kind), 1), faults):
        run = runs.next()
        before = run.mount.status()["pid"]
        faults.arm(KINDS[kind], number, count)
        run.begin()
        if way == "killed":
            os.kill(before, signal.SIGKILL)
        else:
            words = [sys.executable, "-m", "lazymem.cli.main", "mount", "--upgrade", str(run.mount.path)]
            subprocess.run(words, capture_output=True, check=False, timeout=120)  # it may be refused, in a line
        run.finish()
        if way == "killed":
            wait_until(lambda run=run, before=before: run.mount.status()["pid"] != before, "a next daemon")  # type: ignore[misc]
        run.mount.wait_kept()
        faults.disarm()
        may_fail = bool(faults.failed) and not KINDS[kind].of_network
        assert may_fail or not run.unsynced, f"{run.unsynced}: {run.told()}"
    runs.current.end()
