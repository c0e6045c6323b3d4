"""A command's work in a child process that is started again when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

import pytest

from tests.support.processtree import is_gone
from tests.support.vmprocess import wait_until

pytestmark = pytest.mark.timeout(60)

LONG = 1000.0
AGAIN = "the process that did the work was ended by SIGKILL: it is started again\n"


class Guardian:
    def __init__(self, kind: str, pause: float) -> None:
        command = [sys.executable, "-m", "tests.support.guardedwork", kind, str(pause)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )

    @property
    def is_read(self) -> bool:
        return self._out.closed

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it says until then."""
        out, error = self.process.communicate()
        return self.process.returncode, out, error

    def child(self, *, again: bool) -> int:
        """It has begun."""
        words = self._out.readline().split()
        assert words[::2] == ["child", "again"], words
        assert words[3] == str(again)
        return int(words[1])

    def says(self, *lines: str) -> None:
        for line in lines:
            assert self._out.readline() == f"{line.removesuffix(chr(10))}\n"


@pytest.fixture
def guardian(request: pytest.FixtureRequest) -> Iterator[Guardian]:
    kind, pause = request.param
    made = Guardian(kind, pause)
    yield made
    with suppress(ProcessLookupError):
        os.killpg(made.process.pid, signal.SIGKILL)
    if not made.is_read:
        made.end()


def of(kind: str, pause: float = 0.0) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("guardian", [(kind, pause)], indirect=True)


@of("wait")
def test_a_killed_child_is_followed_by_another(guardian: Guardian) -> None:
    child = guardian.child(again=False)
    guardian.says("waits")
    os.kill(child, signal.SIGKILL)
    guardian.says(AGAIN)
    assert guardian.child(again=True) != child
    guardian.says("waits")
    for number in (1, 2):
        guardian.process.terminate()
        guardian.says(f"interrupt {number}")
    assert guardian.process.wait() == 7


@of("wait")
def test_a_terminals_signal_to_both_is_one(guardian: Guardian) -> None:
    """A third one would have been heard before the second's word."""
    guardian.child(again=False)
    guardian.says("waits")
    for number in (1, 2):
        os.killpg(guardian.process.pid, signal.SIGINT)
        guardian.says(f"interrupt {number}")
    assert guardian.end() == (7, "", "")


@of("wait")
def test_a_terminal_that_is_closed_is_an_interrupt(guardian: Guardian) -> None:
    guardian.child(again=False)
    guardian.says("waits")
    os.killpg(guardian.process.pid, signal.SIGHUP)
    guardian.says("interrupt 1")


@of("wait")
def test_a_child_alone_takes_signals_itself(guardian: Guardian) -> None:
    child = guardian.child(again=False)
    guardian.says("waits")
    os.kill(child, signal.SIGTERM)  # while it is not alone, that is nothing
    guardian.process.kill()
    guardian.says("alone")
    for number in (1, 2):
        os.kill(child, signal.SIGTERM)
        guardian.says(f"interrupt {number}")
    wait_until(lambda: is_gone(child), "the child to end")


@of("once")
def test_the_first_is_followed_at_once(guardian: Guardian) -> None:
    child = guardian.child(again=False)
    guardian.says(AGAIN)
    assert guardian.child(again=True) != child
    guardian.says("waits")


@of("dies", LONG)
def test_an_interrupt_between_two_is_the_nexts_to_take(guardian: Guardian) -> None:
    """And one more than that is the end: nobody lives long enough to take them."""
    guardian.child(again=False)
    guardian.says(AGAIN)
    guardian.child(again=True)
    guardian.says(AGAIN)
    guardian.process.terminate()
    guardian.child(again=True)
    guardian.says(AGAIN)
    guardian.process.terminate()
    assert guardian.end() == (130, "", "")


@of("bug")
def test_a_bug_is_not_met_for_ever(guardian: Guardian) -> None:
    code, out, error = guardian.end()
    assert code == 1
    assert out.count("child") == error.count("RuntimeError: a bug") == 3
    assert out.count("ended by a bug: it is started again") == 2
