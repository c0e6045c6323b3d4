"""A command whose work is done by a child process, which is started again when something kills it.

The parent, the guardian, has next to nothing to do, so hardly anything that kills the child reaches it: it waits, and
hands on what the user sends. What the child was at is for the next one to find out, on the disk; so `work` is what the
same command does when it is started again by hand, only at once.

The user's signals are the guardian's to take: a terminal sends them to both, `kill` to one, and a service manager may
do either, so the child does not mind them and hears of each once, by `_PASSED_ON`. When the guardian is killed, which
the end of a pipe tells, the child is alone: it hears so, and takes signals itself from then on.

Linux only, and only before this process has threads: it forks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import trio
from msgspec import Struct

_PASSED_ON = signal.SIGUSR1

_BUG = 1
"""The exit code of a child that ended with an exception that nobody expected: what Python ends with then, and no
LazymemError's."""

_MOST_BUGS = 3
"""In a row. What is undone is undone by the second child; a bug that is met each time is met for ever."""

_LONG_LIFE_SECONDS = 10.0
"""A child that lived for so long is the first of a new row."""

_PAUSE_SECONDS = (0.1, 5.0)
"""Before the third in a row, and the longest; it doubles. The second is started at once: a guest may stand."""


_ENOUGH = 2
"""Interrupts while no child lives: the first is the next one's to take, and there is no next one after the second."""


class Guard(Struct, frozen=True):
    """What a child knows. `is_again`: there was one before it, which was killed. `interrupts`: so many signals the user
    has sent before there was this child. `parents_end`: a pipe that ends with the guardian; -1: there is none."""

    is_again: bool = False
    interrupts: int = 0
    parents_end: int = -1

    async def watch(self, on_interrupt: Callable[[], None], on_alone: Callable[[], None]) -> None:
        """Call `on_interrupt` each time that the user wants it to end, and `on_alone` once the guardian was killed;
        until cancelled."""
        alone = trio.Event()
        count = 0

        def interrupted() -> None:
            nonlocal count
            count += 1
            on_interrupt()

        async def wait_alone() -> None:
            await trio.lowlevel.wait_readable(self.parents_end)
            alone.set()
            on_alone()

        with trio.open_signal_receiver(*_users(), _PASSED_ON) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (_PASSED_ON,))
            async with trio.open_nursery() as nursery:
                if self.parents_end < 0:
                    alone.set()
                else:
                    nursery.start_soon(wait_alone)
                for _ in range(self.interrupts):
                    interrupted()
                async for number in signals:
                    if number == _PASSED_ON or (alone.is_set() and _counts(number, count)):
                        interrupted()


def guarded(work: Callable[[Guard], int], say: Callable[[str], None]) -> int:
    """The exit code of the first child that ended by itself. `work` runs in each."""
    return _Guardian(work, say).run()


def _users() -> tuple[signal.Signals, ...]:
    """With which a user, or a terminal that is closed, ends a command. nohup(1) has the last one ignored."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hangs_up else ()))


def _counts(number: int, interrupts: int) -> bool:
    """Whether it is one more that the user has sent. A terminal that is closed, or a session that is stopped, may say
    so twice, or of what is being ended already: that is no second thought."""
    return not (number == signal.SIGHUP and interrupts)


class _Guardian:
    def __init__(self, work: Callable[[Guard], int], say: Callable[[str], None]) -> None:
        self._work = work
        self._say = say
        self._users = _users()
        self._pipe = os.pipe()
        self._child = 0
        self._began = 0.0
        self._interrupts = 0
        self._in_a_row = 0

    def run(self) -> int:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # What is blocked waits, so none is missed between two looks; also that to a child which cannot take it yet.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*self._users, signal.SIGCHLD, _PASSED_ON))
        try:
            self._fork(is_again=False)
            while self._is_to_be_again(code := self._wait_ended()):
                self._say(f"the process that did the work was ended by {_name(code)}: it is started again")
                self._pause()
                if not self._start_again():
                    return 130
            return code
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for descriptor in self._pipe:
                os.close(descriptor)

    def _start_again(self) -> bool:
        """False: the user does not want it any more."""
        while self._interrupts < _ENOUGH:
            try:
                self._fork(is_again=True)
            except OSError as error:  # no memory, too many processes: what killed the one before may be the reason
                self._say(f"it cannot be started yet: {error.strerror}")
                self._note(signal.sigtimedwait(self._users, _PAUSE_SECONDS[1]))
            else:
                return True
        return False

    def _fork(self, *, is_again: bool) -> None:
        _flush()  # else both would write what waits there
        self._began = time.monotonic()
        self._child = os.fork()
        if not self._child:
            os.close(self._pipe[1])
            _be_child(self._work, Guard(is_again, self._interrupts, self._pipe[0]), self._users)

    def _wait_ended(self) -> int:
        """How the child ended, as of `os.waitstatus_to_exitcode`."""
        while True:
            found, status = os.waitpid(self._child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            if self._note(signal.sigwaitinfo((*self._users, signal.SIGCHLD))):
                os.kill(self._child, _PASSED_ON)  # not waited for, so it has its number yet

    def _is_to_be_again(self, code: int) -> bool:
        lived = time.monotonic() - self._began
        self._in_a_row = 1 if lived > _LONG_LIFE_SECONDS else self._in_a_row + 1
        return code < 0 or (code == _BUG and self._in_a_row < _MOST_BUGS)

    def _pause(self) -> None:
        """The user's signal ends it, and is then the next child's to take: it may have to undo something."""
        if self._in_a_row == 1:
            return
        first, longest = _PAUSE_SECONDS
        pause = min(first * 2 ** min(self._in_a_row - 2, 10), longest)
        self._note(signal.sigtimedwait(self._users, pause))

    def _note(self, maybe_found: signal.struct_siginfo | None) -> bool:
        """Whether it is one more that the user has sent."""
        number = 0 if maybe_found is None else maybe_found.si_signo
        is_one = number in self._users and _counts(number, self._interrupts)
        self._interrupts += is_one
        return is_one


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else "a bug"


def _be_child(work: Callable[[Guard], int], guard: Guard, users: tuple[signal.Signals, ...]) -> NoReturn:
    code = _BUG
    try:
        for number in users:  # not SIG_IGN, which what is started from here would inherit
            signal.signal(number, _let_be)
        signal.signal(_PASSED_ON, signal.default_int_handler)
        # One that may find something to undo is not ended before it has: it hears of an interrupt in `Guard.watch`.
        at_once = () if guard.is_again else (_PASSED_ON,)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*users, signal.SIGCHLD, *at_once))
        code = work(guard)
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001 (the parent's code is not to go on in here)
        with suppress(OSError):
            traceback.print_exc()
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, (_PASSED_ON,))  # what is done is done
        finally:
            _flush()
            os._exit(code)


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # either may be closed
        with suppress(OSError):
            stream.flush()


def _let_be(_number: int, _frame: FrameType | None) -> None:
    """The guardian has it, too."""
