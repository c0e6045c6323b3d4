"""What is killed in a hand-over besides a whole command: a part of it, an emulator, and what a mount is made of.

As `tests/system/test_handover_steps` has it: at most one side ever runs the guest, by what the emulators tell of their
stops and starts; whatever is killed before it is given, it runs on at its source, and after that in the end at one
side, with its memory as it wrote it. Only a guest whose emulator was killed while it was its own is gone.

LAZYMEM_SWEEP=wide takes every step, some minutes; else some that differ are taken.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.everystep import Pairs, Steps, every_step
from tests.support.forkedcommands import ForkServer, fork_server
from tests.support.handover import Pair
from tests.support.handoversteps import (
    ASKS,
    DESTINATION_TAKES,
    OFFERS,
    SERVES_AGAIN,
    SOURCE_GIVES,
    SOURCE_SETS,
    SOURCE_STANDS,
    SOURCE_TAKES_BACK,
)
from tests.support.mounts import Stage, stage
from tests.support.processtree import fillers_of
from tests.support.slowlink import slow_link
from tests.support.snapshotguest import running_on, saved
from tests.support.stopping import stop
from tests.support.vmprocess import connected, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

WIDE = os.environ.get("LAZYMEM_SWEEP") == "wide"

GIVES = OFFERS + SOURCE_GIVES[0] + SOURCE_SETS + SOURCE_STANDS
BEFORE_ALL_IS_THERE = [*SOURCE_SETS, *SOURCE_STANDS, *GIVES[: GIVES.index("EVENT WHOLE")]]
TAKES_BACK = SOURCE_TAKES_BACK[0]
TAKES = ASKS + DESTINATION_TAKES[0]
GONE_BEFORE_IT_RUNS = "emulator:EVENT GIVEN"


RAM_BYTES = 4 << 20


def chosen(every: Sequence[str], *few: str) -> Sequence[str]:
    assert set(few) <= set(every), "no such step"
    return list(dict.fromkeys(every)) if WIDE else few


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    with fork_server() as server:
        yield server


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as made:
        yield made


@contextmanager
def ended(pair: Pair) -> Iterator[None]:
    """Whatever is left of it at the end."""
    try:
        yield
    finally:
        pair.clean_up()


def kills(pairs: Pairs, kind: str) -> int:
    """How often there was one of the kind."""
    return sum(command.was_at().count(f"={kind}") for pair in pairs.all for command in (pair.send, pair.receive))


def through(steps: Steps, forks: ForkServer, kind: str, *, at_least: int, from_a_mount: bool = False) -> None:
    """`from_a_mount`: one that is not whole when the guest is handed on from it the first time."""
    with every_step(steps, forks) as (pairs, guest):
        if from_a_mount:
            first = pairs.hand_on(guest, "half")
            pairs.run(guest, when_moved=first.send.let_go_on)
            assert first.send.wait() == 0, first.tell()
        else:
            pairs.run(guest)
        guest.check()
        assert kills(pairs, kind) >= at_least


# ---- lazymem send


@pytest.mark.parametrize("kind", ["worker", "guardian"])
def test_a_part_of_the_source(kind: str, forks: ForkServer) -> None:
    """Nobody starts a killed worker's successor by hand. One whose guardian was killed has the guest go on before it
    ends, if it was not given, and else serves it to the end."""
    again = SERVES_AGAIN if kind == "worker" else []
    steps = chosen([*GIVES, *again], "STOPPED", "RECORD given", "RECORDED given", "RECORDED gone")
    # "AT moving" may be in one thread when "SET" or "STOPPED" is in the other, and both die of one.
    at_least = len(steps) - (1 if {"STOPPED", "AT moving"} <= set(steps) else 0)
    through(Steps("send", f"{kind}:", steps), forks, kind, at_least=at_least)


@pytest.mark.parametrize("kind", ["worker", "guardian"])
def test_a_part_of_a_source_that_takes_back(kind: str, forks: ForkServer) -> None:
    steps = chosen(TAKES_BACK, "RECORD ours", "RUN")
    through(Steps("send", f"{kind}:", steps, GONE_BEFORE_IT_RUNS), forks, kind, at_least=len(steps))


def test_all_of_the_source_when_its_guest_stands(forks: ForkServer) -> None:
    """And when it is to stand. Started again by hand; its other steps are in `test_handover_steps`."""
    through(Steps("send", "", SOURCE_SETS + SOURCE_STANDS), forks, "command", at_least=2)


# ---- the mounts


@skips.needs_resend
@pytest.mark.parametrize("kind", ["daemon", "supervisor"])
def test_of_the_sources_mount(kind: str, forks: ForkServer) -> None:
    """The guest's RAM lies on a mount, and not all of it at first."""
    steps = chosen(GIVES, "STOPPED", "RECORDED given")
    through(Steps("send", f"{kind}:", steps), forks, kind, at_least=len(steps), from_a_mount=True)


@skips.needs_resend
@pytest.mark.parametrize("kind", ["daemon", "supervisor"])
def test_of_the_destinations_mount(kind: str, forks: ForkServer) -> None:
    """It has no filling process: what its pages are held against, only its daemon knows."""
    steps = chosen(TAKES, "EVENT GIVEN", "RUN")
    through(Steps("receive", f"early;{kind}:", steps), forks, kind, at_least=len(steps))


@pytest.mark.parametrize("step", chosen(BEFORE_ALL_IS_THERE, "STOPPED"))
def test_the_filling_process_of_the_sources_mount(
    step: str, forks: ForkServer, mounts: Stage, sockets: Path, tmp_path: Path
) -> None:
    """A guest that runs from a mount of a snapshot, whose pages still come."""
    server = mounts.serve(saved(tmp_path, sockets, RAM_BYTES, "saved"))
    with slow_link(server.address, RAM_BYTES // 8) as address:
        mount = mounts.mount(address, name="from")
        (filler,) = fillers_of(mount.pid)
        stop(filler)  # or it may have brought all when its turn comes
        with running_on(mount, sockets) as vm:
            pair = Pair(tmp_path, vm.monitor, "-serial", f"unix:{sockets}/there", maybe_forks=forks)
            with ended(pair):
                pair.begin(source_dies=f"filler:{step}")
                assert pair.wait_settled() == (False, True)
                with connected(sockets / "there") as line:
                    assert " bad 0 " in line.ask("verify", "verified")
                assert pair.send.wait() == 0, pair.tell()
                assert "=filler" in pair.send.was_at(), pair.tell()
                pair.never_both()


# ---- the emulator, when the guest is between the two


@pytest.mark.parametrize("step", ["STOPPED", "EVENT RECEIVED", "RECORD given"])
def test_the_sources_emulator(step: str, forks: ForkServer) -> None:
    """Between its stop and the record of "given". Once all of its state is there, what is wanted of it is its RAM."""
    with every_step(Steps("send", "emulator:", [step]), forks) as (pairs, guest):
        pair = pairs.next_pair(guest)
        pair.begin(source_dies=f"emulator:{step}")
        wait_until(lambda: never_both(pair) and is_settled(pair), "the guest to be there, or nowhere")
        assert "=emulator" in pair.send.was_at()
        if not pair.runs()[1]:
            assert step == "STOPPED", pair.tell()
            assert "cannot go on here" in pair.send.said(), pair.tell()
            assert pair.states() == ("ours", "refused"), pair.tell()
            return
        guest.moved(pair.folder, pair.there)
        guest.check()
        assert pair.send.wait() == 0, pair.tell()


@pytest.mark.parametrize("step", chosen(["RECORD given", "RECORDED given", "RECORDED gone"], "RECORDED given"))
def test_the_sources_emulator_whose_ram_is_on_a_mount(step: str, forks: ForkServer) -> None:
    """Not all of it has come there yet: nobody takes the mount away while the guest at the destination needs it."""
    with every_step(Steps("send", "emulator:", [step]), forks) as (pairs, guest):
        first = pairs.hand_on(guest, "half")
        pair = pairs.next_pair(guest)
        pair.begin(source_dies=f"emulator:{step}")
        assert pair.wait_settled() == (False, True)
        wait_until(lambda: "=emulator" in pair.send.was_at(), "the emulator to be killed")
        wait_until(lambda: "still needed" in first.receive.said(), "its host to see what that means")
        first.send.let_go_on()
        guest.moved(pair.folder, pair.there)
        guest.check()
        assert pair.send.wait() == 0, pair.tell()
        assert first.receive.wait() == 128 + signal.SIGKILL, first.tell()
        assert first.send.wait() == 0, first.tell()
        assert not os.path.ismount(first.mountpoint)


def is_settled(pair: Pair) -> bool:
    return pair.runs()[1] or None not in (pair.send.code(), pair.receive.code())


def never_both(pair: Pair) -> bool:
    assert pair.runs() != (True, True), pair.tell()
    return True
