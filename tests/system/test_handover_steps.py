"""At every step of a hand-over each process is killed, and the connection is cut: at most one side ever runs the guest.

The steps are read off the tables; `support/everystep` says what is looked at.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from lazymem.errors import IdentityError
from lazymem.handover.states import DESTINATION, SOURCE, Destination, Effect, Move, Source
from tests.support import skips
from tests.support.everystep import Steps, every_step
from tests.support.forkedcommands import ForkServer, fork_server
from tests.support.handover import Pair
from tests.support.handoversteps import (
    ASKS,
    DESTINATION_LOADS_LATE,
    DESTINATION_MISSES_THE_END,
    DESTINATION_REFUSES,
    DESTINATION_TAKES,
    DESTINATION_YIELDS,
    OFFERS,
    PREPARES,
    SERVES_AGAIN,
    SOURCE_GIVES,
    SOURCE_GIVES_SOON,
    SOURCE_GIVES_WHAT_TEARS,
    SOURCE_TAKES_BACK,
)
from tests.support.vmprocess import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

GIVES, TAKES_BACK = OFFERS + SOURCE_GIVES[0], SOURCE_TAKES_BACK[0]
TAKES, LOADS_LATE, REFUSES = ASKS + DESTINATION_TAKES[0], DESTINATION_LOADS_LATE[0], DESTINATION_REFUSES[0]
GIVES_SOON, GIVES_WHAT_TEARS = SOURCE_GIVES_SOON[0], SOURCE_GIVES_WHAT_TEARS[0]
MISSES_THE_END = DESTINATION_MISSES_THE_END[0]
YIELDS = [step for step in DESTINATION_YIELDS[0] if step != "AT yielded"]
"""After that it ends."""
BEFORE_IT_RUNS = TAKES[: TAKES.index("RUN") + 1]
REFUSED = "early;emulator:RECORDED asked;"
"""The destination's emulator dies, which makes it refuse the guest."""


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    with fork_server() as server:
        yield server


def test_no_state_and_no_effect_is_left_out() -> None:
    source = (SOURCE_GIVES, SOURCE_TAKES_BACK)
    assert {state for _, states in source for state in states} == set(Source)
    assert _effects(SOURCE) <= {step for steps, _ in source for step in steps} | set(SERVES_AGAIN)
    destination = (DESTINATION_TAKES, DESTINATION_LOADS_LATE, DESTINATION_REFUSES, DESTINATION_YIELDS)
    assert {state for _, states in destination for state in states} == set(Destination)
    assert _effects(DESTINATION) <= {step for steps, _ in destination for step in steps}


def _effects(table: Mapping[Any, Move[Any]]) -> set[str]:
    return {effect.name for move in table.values() for effect in move.effects} - {Effect.RECORD.name}


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(lambda: Steps("send", "", GIVES + SERVES_AGAIN), id="source"),
        pytest.param(lambda: Steps("send", "", TAKES_BACK, "emulator:EVENT GIVEN"), id="source that takes back"),
        pytest.param(lambda: Steps("send", "", GIVES_SOON, "soon;"), id="source that gives soon"),
        pytest.param(lambda: Steps("send", "", GIVES_WHAT_TEARS, "torn;"), id="source whose state tears"),
        pytest.param(lambda: Steps("receive", "early;", PREPARES + TAKES), id="destination"),
        pytest.param(lambda: Steps("receive", "late;", LOADS_LATE), id="destination that loads late"),
        pytest.param(lambda: Steps("receive", "torn;", MISSES_THE_END), id="destination that misses the end"),
        pytest.param(lambda: Steps("receive", REFUSED, REFUSES), id="destination that refuses"),
    ],
)
def test_a_command_is_killed(steps: Callable[[], Steps], forks: ForkServer) -> None:
    _through(steps(), forks)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(lambda: Steps("send", "cut:", GIVES), id="source"),
        pytest.param(lambda: Steps("send", "cut:", TAKES_BACK, "emulator:EVENT GIVEN"), id="source that takes back"),
        pytest.param(lambda: Steps("send", "cut:", GIVES_SOON, "soon;"), id="source that gives soon"),
        pytest.param(lambda: Steps("send", "cut:", GIVES_WHAT_TEARS, "torn;"), id="source whose state tears"),
        pytest.param(lambda: Steps("receive", "early;cut:", TAKES), id="destination"),
        pytest.param(lambda: Steps("receive", "late;cut:", LOADS_LATE), id="destination that loads late"),
        pytest.param(lambda: Steps("receive", "torn;cut:", MISSES_THE_END), id="destination that misses the end"),
        pytest.param(lambda: Steps("receive", f"{REFUSED}cut:", REFUSES), id="destination that refuses"),
    ],
)
def test_the_connection_is_cut(steps: Callable[[], Steps], forks: ForkServer) -> None:
    _through(steps(), forks)


@skips.needs_resend
def test_the_destinations_mount_daemon_is_killed(forks: ForkServer) -> None:
    """At every event and effect. What follows it is Python's start each time, so not on both sides of each record."""
    words = [step for step in TAKES if step.partition(" ")[0] not in ("RECORD", "AT")]
    _through(Steps("receive", "early;daemon:", words), forks)


def test_the_destinations_emulator_is_killed_before_it_runs(forks: ForkServer) -> None:
    """Then nobody has run the guest, and the source takes it back; the same guest each time."""
    _through(Steps("receive", "early;emulator:", BEFORE_IT_RUNS), forks)
    _through(Steps("receive", "late;emulator:", ["AT promised"]), forks)


@pytest.mark.parametrize("state", ["mine", "whole", "done"])
def test_the_destinations_emulator_is_killed_when_it_runs(state: str, forks: ForkServer) -> None:
    """That is a guest's crash: nobody takes it for not having run."""
    with every_step(Steps("receive", "emulator:", [f"AT {state}"]), forks) as (pairs, guest):
        pair = pairs.next_pair(guest)
        pair.begin(destination_dies=f"emulator:AT {state}")
        wait_until(lambda: _never_both(pair) and pair.receive.code() is not None, "the crash to be noticed")
        assert pair.runs() == (False, False), pair.tell()
        assert pair.states()[0] in ("given", "gone", "released"), pair.tell()
        assert pair.send.code() in (None, 0), pair.tell()


@pytest.mark.parametrize("step", ["OFFERED", "AT moving"])
def test_the_sources_emulator_is_killed_before_it_has_given(step: str, forks: ForkServer) -> None:
    """A guest's crash, too, and both sides say so."""
    with every_step(Steps("send", "emulator:", [step]), forks) as (pairs, guest):
        pair = pairs.next_pair(guest)
        pair.begin(source_dies=f"emulator:{step}")
        wait_until(lambda: _never_both(pair) and None not in (pair.send.code(), pair.receive.code()), "both to end")
        assert pair.runs() == (False, False), pair.tell()
        assert "cannot go on here" in pair.send.said(), pair.tell()


@pytest.mark.parametrize("state", ["given", "gone", "released"])
def test_the_sources_emulator_is_killed_once_it_has_given(state: str, forks: ForkServer) -> None:
    """What is left of it is its RAM, and that is what is wanted of it."""
    with every_step(Steps("send", "emulator:", [f"RECORDED {state}"]), forks) as (pairs, guest):
        pairs.run(guest)


def test_a_destination_that_yields_is_killed(forks: ForkServer) -> None:
    """The guest was taken back by hand while it ran there: only until the destination hears of it."""
    with every_step(Steps("receive", "", YIELDS), forks) as (pairs, guest):
        pair = pairs.next_pair(guest)
        pair.begin(source_dies="cut:EVENT MINE", destination_dies="SAY_MINE")
        wait_until(lambda: pair.receive.code() == -signal.SIGKILL, "the destination to die")
        assert pair.send.run("--reclaim").returncode == 0, pair.tell()
        pair.send.wait()
        pair.send.start()
        for step in YIELDS:
            pair.receive.start(die_at=step)
            assert pair.receive.wait() == -signal.SIGKILL, (step, pair.tell())
        pair.receive.start()
        assert pair.receive.wait() == IdentityError.exit_code, pair.tell()
        assert pair.states() == ("ours", "yielded")
        assert pair.runs() == (True, False), pair.tell()
        guest.check()


def _through(steps: Steps, forks: ForkServer) -> None:
    with every_step(steps, forks) as (pairs, guest):
        pairs.run(guest)


def _never_both(pair: Pair) -> bool:
    assert pair.runs() != (True, True), pair.tell()
    return True
