"""A guest handed over with its pages ahead of it: right ones are used, changed ones are not, no death does harm."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lazymem.cli.status import read_status
from lazymem.handover.runningram import RunningRam
from lazymem.pages import PAGE_SIZE
from lazymem.vm.guests import build_guest
from tests.support import skips
from tests.support.handover import Pair, pair
from tests.support.mounts import Stage
from tests.support.smalldisks import small_disk
from tests.support.snapshots import make_snapshot
from tests.support.vmprocess import Start, connected, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

RAM_MIB = 8
WARM_SECONDS = 60.0
"""It ends long before, when little changes any more."""


class Guest:
    """One with all of its RAM in use, at a serial line."""

    def __init__(self, start: Start, folder: Path, serial: Path, stack: ExitStack) -> None:
        ram = folder / "ram"
        ram.touch()
        os.truncate(ram, RAM_MIB << 20)
        kernel = build_guest("pages", folder)
        self.process = start("--pcram-file", ram, "-kernel", kernel, "-serial", f"unix:{serial}")
        self.line = stack.enter_context(connected(serial))
        self.line.expect("tick")
        self.filled = int(self.line.ask("fill 7", "filled"))

    @property
    def monitor(self) -> Path:
        return self.process.monitor


@pytest.fixture
def guest(start: Start, tmp_path: Path, sockets: Path) -> Iterator[Guest]:
    with ExitStack() as stack:
        yield Guest(start, tmp_path, sockets / "here", stack)


def is_right_there(path: Path, *commands: str) -> None:
    """All of its memory is what it wrote. What it was last told on the other side it may answer here."""
    with connected(path) as line:
        for command in commands:
            line.ask(command, "rewrote")
        assert " bad 0 " in line.ask("verify", "verified")


def left_over(two: Pair) -> list[str]:
    """Candidates that still have a name."""
    return [str(path) for path in (two.folder / "cache").rglob(".candidates-*")]


def test_its_pages_go_ahead_of_it(guest: Guest, tmp_path: Path, sockets: Path) -> None:
    with pair(tmp_path, guest.monitor, "-serial", f"unix:{sockets}/there", warm=WARM_SECONDS) as two:
        two.begin(destination_dies="hold:RECORD asked")
        two.receive.wait_at("RECORD asked")
        assert "came ahead of the guest" in two.receive.said()
        assert two.touched_pages() == 0  # nothing of that is in its kernel's memory of the RAM
        assert read_status(str(two.mountpoint))["pages_held"] == 0
        two.receive.let_go_on()
        assert two.wait_settled() == (False, True)
        assert two.send.wait() == 0, two.tell()
        report = two.report()
        assert report["state"] == "released"
        assert report["candidates_used"] > guest.filled * 0.9
        assert report["warmed_bytes"] > report["wire_received_bytes"] > 0
        assert "came ahead of the guest" in two.receive.said()
        assert "went ahead of the guest" in two.send.said()
        is_right_there(sockets / "there", "rewrite 50 3")
        assert left_over(two) == []


def test_it_writes_meanwhile(guest: Guest, tmp_path: Path, sockets: Path) -> None:
    """All the time, and over what went already: some of it was right, some was not, and none of that is ever seen."""
    with pair(tmp_path, guest.monitor, "-serial", f"unix:{sockets}/there", warm=WARM_SECONDS) as two:
        two.begin(source_dies="hold:WENT", destination_dies="hold:RECORD asked")
        two.send.wait_at("WENT")
        assert guest.line.ask("rewrite 500 1", "rewrote") == "500"
        two.send.let_go_on()
        for seed in range(2, 12):  # a pass sees pages from before and from after
            guest.line.ask(f"rewrite 20 {seed}", "rewrote")
        two.receive.wait_at("RECORD asked")
        assert guest.line.ask("rewrite 300 1000", "rewrote") == "300"
        two.receive.let_go_on()
        assert two.wait_settled() == (False, True)
        is_right_there(sockets / "there")
        assert two.send.wait() == 0, two.tell()
        report = two.report()
        assert report["candidates_used"] > 0
        assert report["candidates_refused"] > 0  # the others were touched, and so fetched, before they were decided
        is_right_there(sockets / "there", "rewrite 50 3")


@pytest.mark.parametrize(
    ("source_dies", "destination_dies"),
    [("WENT", ""), ("", "MADE"), ("", "CAME")],
    ids=["the source", "the destination before its mount", "the destination"],
)
def test_one_is_killed_meanwhile(
    source_dies: str, destination_dies: str, guest: Guest, tmp_path: Path, sockets: Path
) -> None:
    """The guest runs on where it was, nothing is left, and the next try moves it."""
    with pair(tmp_path, guest.monitor, "-serial", f"unix:{sockets}/there", warm=WARM_SECONDS) as two:
        two.begin(source_dies=source_dies, destination_dies=destination_dies)
        dead, other = (two.send, two.receive) if source_dies else (two.receive, two.send)
        assert dead.wait() == -signal.SIGKILL
        assert two.runs() == (True, False)
        assert " bad 0 " in guest.line.ask("verify", "verified")
        if destination_dies:
            two.receive.start()  # finds that it came to nothing, and clears away
        assert two.receive.wait() != 0, two.tell()
        assert two.runs() == (True, False)
        assert not os.path.ismount(two.mountpoint)
        assert left_over(two) == []
        _again(two)
        assert two.wait_settled() == (False, True)
        assert other.code() is None or other.code() == 0
        is_right_there(sockets / "there", "rewrite 50 3")
        assert two.send.wait() == 0, two.tell()
        assert two.report()["candidates_used"] > 0


@skips.needs_resend
def test_the_mounts_daemon_is_killed_before_they_are_used(guest: Guest, tmp_path: Path, sockets: Path) -> None:
    """The next one does without."""
    with pair(tmp_path, guest.monitor, "-serial", f"unix:{sockets}/there", warm=WARM_SECONDS) as two:
        two.begin(destination_dies="daemon:EVENT GIVEN")
        assert two.wait_settled() == (False, True)
        assert "!EVENT GIVEN" in two.receive.was_at()
        is_right_there(sockets / "there", "rewrite 50 3")
        assert two.send.wait() == 0, two.tell()
        assert two.report()["mount_restarts"] == 1
        assert two.report()["candidates_used"] == 0


def _again(two: Pair) -> None:
    """From the source on, where that has ended."""
    if two.send.code() is not None:
        starts = two.send.out.read_text().count("listening")
        two.send.start()
        wait_until(lambda: two.send.out.read_text().count("listening") > starts, "the sender to listen again")
    lines = [line for line in two.send.out.read_text().splitlines() if "listening" in line]
    words = two.receive.arguments
    words[words.index(str(two.mountpoint)) - 1] = str(json.loads(lines[-1])["listening"])
    offers = two.send.was_at().count("OFFERED")

    def is_offered() -> bool:
        """A sender that was started again listens a moment before it offers anything."""
        if two.receive.code() is not None:
            two.receive.start()
        return two.send.was_at().count("OFFERED") > offers

    wait_until(is_offered, "an offer")


@pytest.mark.parametrize("side", ["source", "destination"])
def test_it_is_interrupted_meanwhile(side: str, guest: Guest, tmp_path: Path, sockets: Path) -> None:
    """Nothing has happened."""
    with pair(tmp_path, guest.monitor, "-serial", f"unix:{sockets}/there", warm=WARM_SECONDS) as two:
        two.begin(source_dies="hold:WENT")
        two.send.wait_at("WENT")
        command, other = (two.send, two.receive) if side == "source" else (two.receive, two.send)
        command.process.terminate()  # type: ignore[union-attr]
        assert command.wait() == 130
        if side == "source":
            assert two.receive.wait() != 0
        else:
            assert other.code() is None  # for another receiver
        assert two.runs() == (True, False)
        assert left_over(two) == []
        assert not os.path.ismount(two.mountpoint)


@pytest.mark.needs_root("a disk of its own, which gets full")
def test_a_disk_that_gets_full(guest: Guest, tmp_path: Path, sockets: Path, request: pytest.FixtureRequest) -> None:
    """No more pages come ahead, and the hand-over goes on."""
    with small_disk(tmp_path / "small", 48 << 20, request.node) as disk:
        found = os.statvfs(disk)
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - (7 << 20))
        more = ("--cache", disk / "cache", "--force", "-serial", f"unix:{sockets}/there")
        with pair(tmp_path, guest.monitor, *more, warm=WARM_SECONDS) as two:
            two.begin(destination_dies="hold:RECORD asked")
            two.receive.wait_at("RECORD asked")
            assert "no more pages are kept ahead of the guest" in two.receive.said()
            (disk / "filler").unlink()
            two.receive.let_go_on()
            assert two.wait_settled() == (False, True)
            assert two.send.wait() == 0, two.tell()
            assert two.report()["candidates_used"] < guest.filled  # how many, the mount's reserve has a say in
            is_right_there(sockets / "there", "rewrite 50 3")


def test_a_chain_fetches_nothing_for_it(guest: Guest, tmp_path: Path, sockets: Path) -> None:
    """The middle has not all pages yet: those that it has go ahead, the others come through when they are wanted."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    with (
        pair(tmp_path / "1", guest.monitor, "-serial", f"unix:{sockets}/middle") as first,
        pair(tmp_path / "2", first.there, "-serial", f"unix:{sockets}/there", warm=WARM_SECONDS) as second,
    ):
        first.begin(source_dies="half")
        assert first.wait_settled() == (False, True)
        second.begin(destination_dies="hold:RECORD asked")
        second.receive.wait_at("RECORD asked")
        run = json.loads(os.getxattr(first.mountpoint, "user.lazymem.run"))
        assert not run["whole"]
        status = json.loads(os.getxattr(first.mountpoint, "user.lazymem.status"))
        assert status["pages_held"] < guest.filled
        second.receive.let_go_on()
        assert second.wait_settled() == (False, True)
        first.send.let_go_on()
        assert first.send.wait() == 0, first.tell()
        assert second.send.wait() == 0, second.tell()
        assert second.report()["candidates_used"] > 0
        is_right_there(sockets / "there", "rewrite 50 3")


def test_to_look_again_and_again_fetches_nothing(mounts: Stage) -> None:
    """Where the kernel has read ahead for the guest, read(2) would have it go on from there at each pass."""
    snapshot = make_snapshot(mounts.folder / "snapshot", pages=4096, seed=3)
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--prefetch", "none")
    with mount.ram_path.open("r+b", buffering=0) as file:
        for _ in range(8):
            file.read(PAGE_SIZE)
        waiting = Path(f"/sys/fs/fuse/connections/{os.minor(os.stat(mount.path).st_dev)}/waiting")
        wait_until(lambda: waiting.read_text() == "0\n", "what was read ahead is here")
        before = mount.requests()
        ram = RunningRam(file.fileno(), snapshot.pages * PAGE_SIZE)
        assert any(ram.frames())
        for _ in range(5):
            assert not any(ram.frames()), "nothing changes, and nothing more comes into memory"
        assert mount.requests() == before


def test_a_time_that_is_too_long(guest: Guest, tmp_path: Path) -> None:
    with pair(tmp_path, guest.monitor) as two:
        done = two.send.run("--warm", "7200")
        assert done.returncode == 2
        assert "from 0 to 3600 seconds" in done.stderr
