"""A command's work in a child process that is started again when it is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from tests.support.processtree import is_gone, sleeps
from tests.support.vmprocess import wait_until

pytestmark = pytest.mark.timeout(60)

LONG = 1000.0
AGAIN = "the process that did the work was ended by SIGKILL: it is started again\n"


class Guardian:
    def __init__(self, kind: str, pause: float, *, tells_at: str = "stdout") -> None:
        command = [sys.executable, "-m", "tests.support.guardedwork", kind, str(pause)]
        if tells_at != "stdout":
            command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, process_group=0)
        self._tells_at = tells_at

    @property
    def is_read(self) -> bool:
        return self._out.closed

    @property
    def _out(self) -> IO[str]:
        found = self.process.stdout if self._tells_at == "stdout" else self.process.stderr
        assert found is not None
        return found

    def give_line(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

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

    def line(self) -> str:
        return self._out.readline().removesuffix("\n")

    def says(self, *lines: str) -> None:
        for line in lines:
            assert self.line() == line.removesuffix("\n")


@pytest.fixture
def guardian(request: pytest.FixtureRequest) -> Iterator[Guardian]:
    kind, pause, tells_at = request.param
    made = Guardian(kind, pause, tells_at=tells_at)
    yield made
    with suppress(ProcessLookupError):
        os.killpg(made.process.pid, signal.SIGKILL)
    if not made.is_read:
        made.end()


def of(kind: str, pause: float = 0.0, tells_at: str = "stdout") -> pytest.MarkDecorator:
    return pytest.mark.parametrize("guardian", [(kind, pause, tells_at)], indirect=True)


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
    wait_until(lambda: sleeps(child), "the child to have taken it")
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


@of("late")
def test_what_is_done_is_not_interrupted_any_more(guardian: Guardian) -> None:
    guardian.child(again=False)
    assert guardian.end() == (7, "", "")


@of("bug")
def test_a_bug_is_not_met_for_ever(guardian: Guardian) -> None:
    code, out, error = guardian.end()
    assert code == 1
    assert out.count("child") == error.count("RuntimeError: a bug") == 3
    assert out.count("ended by a bug: it is started again") == 2


CANNOT = f"it cannot be started yet: {os.strerror(errno.EAGAIN)}"


@of("wait:fork:2,3")
def test_a_fork_is_tried_again_where_there_was_a_child(guardian: Guardian) -> None:
    """What killed it, a want of memory, may be why."""
    child = guardian.child(again=False)
    guardian.says("waits")
    os.kill(child, signal.SIGKILL)
    guardian.says(AGAIN, CANNOT, CANNOT)
    assert guardian.child(again=True) != child
    guardian.says("waits")


@of("wait:fork:1")
def test_the_first_fork_is_not_tried_again(guardian: Guardian) -> None:
    """Nothing is begun, and whoever has started the command is there to see it."""
    code, out, error = guardian.end()
    assert (code, out) == (1, "")
    assert os.strerror(errno.EAGAIN) in error


@of("wait:fork:2,3", LONG)
def test_an_interrupt_is_why_a_fork_is_tried_at_once(guardian: Guardian) -> None:
    """And is then the next child's to take; where there is none, a second one is the end."""
    child = guardian.child(again=False)
    guardian.says("waits")
    os.kill(child, signal.SIGKILL)
    guardian.says(AGAIN, CANNOT)
    guardian.process.terminate()
    guardian.says(CANNOT)
    guardian.process.terminate()
    assert guardian.end() == (130, "", "")


@of("wait")
def test_a_terminal_that_is_closed_twice_is_one_interrupt(guardian: Guardian) -> None:
    """Else there would be no child after the killed one: two are the end."""
    child = guardian.child(again=False)
    guardian.says("waits")
    guardian.process.send_signal(signal.SIGHUP)
    guardian.says("interrupt 1")
    guardian.process.send_signal(signal.SIGHUP)
    os.kill(child, signal.SIGKILL)
    guardian.says(AGAIN)
    guardian.child(again=True)
    guardian.says("interrupt 1", "waits")


@of("counts")
def test_a_child_alone_takes_a_terminal_that_is_closed_twice_for_one(guardian: Guardian) -> None:
    child = guardian.child(again=False)
    guardian.says("waits")
    guardian.process.kill()
    guardian.says("alone")
    for number, count in ((signal.SIGHUP, 1), (signal.SIGTERM, 2)):
        os.kill(child, number)
        guardian.says(f"interrupt {count}")
        os.kill(child, signal.SIGHUP)
    guardian.give_line()
    guardian.says("in all 2")
    wait_until(lambda: is_gone(child), "the child to end")


@of("counts")
def test_a_terminal_is_closed_on_what_the_guardian_was_already_interrupted_for(guardian: Guardian) -> None:
    child = guardian.child(again=False)
    guardian.says("waits")
    guardian.process.terminate()
    guardian.says("interrupt 1")
    guardian.process.kill()
    guardian.says("alone")
    os.kill(child, signal.SIGHUP)
    guardian.give_line()
    guardian.says("in all 1")
    wait_until(lambda: is_gone(child), "the child to end")


@of("slow")
def test_the_first_child_is_ended_at_once_before_it_watches(guardian: Guardian) -> None:
    """It has done nothing that would have to be undone."""
    guardian.child(again=False)
    guardian.process.terminate()
    guardian.process.wait()  # before its stdin is closed, at whose end the child would go on
    assert guardian.end() == (130, "", "")


@of("slow")
def test_a_second_child_is_not_ended_before_it_watches(guardian: Guardian) -> None:
    """It may find a guest that stands, and hears of the interrupt when it has seen to that."""
    os.kill(guardian.child(again=False), signal.SIGKILL)
    guardian.says(AGAIN)
    child = guardian.child(again=True)
    guardian.process.terminate()
    wait_until(lambda: is_gone(child) or _is_pending(child, signal.SIGUSR1), "the guardian to hand it on")
    guardian.give_line()
    assert {guardian.line(), guardian.line()} == {"interrupt 1", "waits"}
    guardian.process.terminate()
    assert guardian.end() == (7, "interrupt 2\n", "")


def _is_pending(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask & 1 << number - 1 for mask in masks)


@of("wait", tells_at="stderr")
def test_nobody_needs_a_stdout(guardian: Guardian) -> None:
    child = guardian.child(again=False)
    guardian.says("waits")
    os.kill(child, signal.SIGKILL)
    guardian.says(AGAIN)
    guardian.child(again=True)
    guardian.says("waits")
    for number in (1, 2):
        guardian.process.terminate()
        guardian.says(f"interrupt {number}")
    assert guardian.end() == (7, "", "")
