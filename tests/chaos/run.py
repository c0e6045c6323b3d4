"""Rounds of chaos: fresh mounts, faults at random while they are used, then everything is mended and looked at."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lazymem.fs import mountinfo, session
from lazymem.pages import PAGE_SIZE
from tests.chaos.faults import INSIDE, OUTSIDE, Faults, choose
from tests.chaos.guests import CheckingGuest, SavedGuest, checking, save_guest
from tests.chaos.report import Report
from tests.chaos.world import World, within, world
from tests.support import ackwriter
from tests.support.mounts import Mounted, drop_kernel_cache
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.writers import Writer

ROUND_SECONDS = 20.0
"""Of faults: after that most pages are here, and a new round has none again."""

TLS_SHARE = 0.4
"""Of the rounds: there a flipped bit ends a connection, and a next daemon needs certificates, too."""

WEB_PAGES = 8192
"""32 MiB for the writer."""

PAUSES_SECONDS = (0.0, 0.8)
"""Between faults."""

SETTLE_SECONDS = 120.0
"""After everything was mended, for whoever stalls to go on: far more than any back-off."""

Say = Callable[[str], None]


def run(folder: Path, seed: int, seconds: float, *, with_guest: bool, say: Say, tls_share: float = TLS_SHARE) -> Report:
    """All of it; `folder` is empty, and may be removed afterwards unless there are problems."""
    report = Report(seed)
    web = make_snapshot(folder / "web", WEB_PAGES, seed=seed)
    maybe_saved = save_guest(folder) if with_guest else None
    folders = [web.folder, *([maybe_saved.folder] if maybe_saved else [])]
    rng = random.Random(seed)
    started_at = time.monotonic()
    while report.passed and (left := seconds - (time.monotonic() - started_at)) > 0:
        report.rounds += 1
        place = folder / f"round{report.rounds}"
        place.mkdir()
        tls = rng.random() < tls_share
        report.rounds_over_tls += tls
        with world(folders, place, rng.randrange(1 << 30), tls=tls) as made:
            _round(made, web, maybe_saved, rng, min(left, ROUND_SECONDS), report)
            report.flipped_on_the_wire += made.flips
        report.seconds = time.monotonic() - started_at
        say(
            f"round {report.rounds}{' (TLS)' if tls else ''}: {report.faults.total()} faults, "
            f"{report.writes_acknowledged} writes, longest stall {report.longest_stall_seconds:.1f} s"
        )
    return report


def _round(
    made: World, web: BuiltSnapshot, maybe_saved: SavedGuest | None, rng: random.Random, seconds: float, report: Report
) -> None:
    place = made.stage.folder
    prefetch = rng.choice(["all", "all", "none"])
    mounted = made.mount("web", "--state", place / "state", "--prefetch", prefetch, at="web")
    with contextlib.ExitStack() as opened:
        maybe_guest = None
        if maybe_saved is not None:
            guests = made.mount("guest", "--prefetch", prefetch, at="guest")
            maybe_guest = opened.enter_context(checking(guests, maybe_saved, place / "qemu.log", report))
        errors = opened.enter_context((place / "writer.log").open("w+b"))
        writer = Writer(mounted.ram_path, rng.randrange(1 << 30), web.folder / "pc.ram", errors=errors)
        opened.callback(_end, writer)

        def is_well() -> bool:
            return writer.process.poll() is None and (maybe_guest is None or maybe_guest.is_well)

        _storm(made, rng, time.monotonic() + seconds, report, is_well)
        made.mend()
        _settle(made, writer, maybe_guest, report, is_well)
        _end(writer)
        report.writes_acknowledged += writer.count
        report.stalled(writer.longest_seconds, "a step of the writer")
        errors.seek(0)
        report.problems += [f"the writer: {line.decode().strip()}" for line in errors]
    _look_at(made, report)
    if report.passed:
        _compare(mounted, writer.expected(web.ram), "on the mount", report)
        _remount(made, mounted, writer.expected(web.ram), place, report)


def _storm(made: World, rng: random.Random, until: float, report: Report, is_well: Callable[[], bool]) -> None:
    """Two at a time: one fault outside, one on the mounts' host."""
    counts: list[Counter[str]] = [Counter(), Counter()]
    threads = [
        threading.Thread(
            target=_inject, args=(made, faults, random.Random(rng.randrange(1 << 30)), until, is_well, count)
        )
        for faults, count in zip((OUTSIDE, INSIDE), counts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread, count in zip(threads, counts, strict=True):
        thread.join()
        report.faults += count


def _inject(
    made: World, faults: Faults, rng: random.Random, until: float, is_well: Callable[[], bool], count: Counter[str]
) -> None:
    while time.monotonic() < until and is_well():
        name = choose(faults, rng)
        _, inject = faults[name]
        if inject(made, rng):
            count[name] += 1
        time.sleep(rng.uniform(*PAUSES_SECONDS))


def _settle(
    made: World, writer: Writer, maybe_guest: CheckingGuest | None, report: Report, is_well: Callable[[], bool]
) -> None:
    """Everybody goes on."""
    mended_at = time.monotonic()
    wanted = writer.count + 1
    if not _wait(made, report, is_well, lambda: writer.count >= wanted):
        return
    report.longest_recovery_seconds = max(report.longest_recovery_seconds, time.monotonic() - mended_at)
    if maybe_guest is not None:
        guest, checks = maybe_guest, maybe_guest.checks + 1
        _wait(made, report, is_well, lambda: guest.checks >= checks)


def _wait(made: World, report: Report, is_well: Callable[[], bool], is_done: Callable[[], bool]) -> bool:
    """For something that happens by itself; False: it does not."""
    give_up = time.monotonic() + SETTLE_SECONDS
    while not is_done():
        if not is_well():
            report.problems.append("the writer or the guest has ended")
            return False
        if time.monotonic() > give_up:
            report.problems.append(f"stuck: {SETTLE_SECONDS:.0f} s after everything was mended somebody does not go on")
            report.problems += _states(made)
            _abort(made)
            return False
        time.sleep(0.02)
    return True


def _end(writer: Writer) -> None:
    """Its error, if any, is in its log."""
    if writer.process.poll() is None or not writer.process.stdout.closed:  # type: ignore[union-attr]
        with contextlib.suppress(AssertionError):
            writer.stop()


def _states(made: World) -> list[str]:
    found = []
    for victim in made.victims:
        status = victim.maybe_status()
        found.append(f"{victim.mounted.path}: {status['connection'] if status else 'does not answer'}")
    return found


def _abort(made: World) -> None:
    """Let go of who stands in the kernel: this run has failed."""
    for victim in made.victims:
        mounted = mountinfo.maybe_mount_at(mountinfo.real_path(str(victim.mounted.path)))
        if mounted is not None:
            session.abort(mounted.minor)


def _look_at(made: World, report: Report) -> None:
    for victim in made.victims:
        status = within(30, victim.mounted.status)
        if status is None:
            report.problems.append(f"{victim.mounted.path} does not answer")
            continue
        report.reconnects += status["reconnects"]
        report.daemon_restarts += status["survival"]["restarts"]


def _compare(mounted: Mounted, expected: bytes, where: str, report: Report) -> None:
    """The whole RAM, as the daemon has it."""
    drop_kernel_cache(mounted.ram_path)
    found = mounted.ram_path.read_bytes()
    if found == expected:
        return
    stamp_bytes = ackwriter.STAMP.size
    for at in range(0, len(expected), PAGE_SIZE):
        here, wanted = found[at : at + PAGE_SIZE], expected[at : at + PAGE_SIZE]
        if here != wanted:
            lost = here[:stamp_bytes] != wanted[:stamp_bytes]
            report.writes_lost += lost
            report.bytes_wrong += sum(a != b for a, b in zip(here, wanted, strict=True))
            report.problems.append(
                f"page {at // PAGE_SIZE} is not right {where}{' (its write is lost)' if lost else ''}"
            )


def _remount(made: World, mounted: Mounted, expected: bytes, place: Path, report: Report) -> None:
    """What was acknowledged is in the state folder, too."""
    mounted.unmount()
    again = made.mount_again("web", "--state", place / "state", at="again")
    _compare(again, expected, "in the state folder", report)
    again.unmount()


def say_nothing(line: str) -> None:
    """For tests."""


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def new_seed() -> int:
    return int.from_bytes(os.urandom(3), "little")
