"""A process that only waits for a command to be killed, and then takes back what that had changed.

The command tells it before it changes anything, and when nothing is left to take back; the end of the pipe between them
tells the rest. It is forked from the command before that has threads, and has nothing to load when it is its turn.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Generic, NoReturn, TypeVar

import msgspec

from lazymem.cli.background import BUG_EXIT_CODE, let_go_of_inherited
from lazymem.errors import LazymemError

_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The command's to obey."""

_MOST_BYTES = 4096  # PIPE_BUF: a write of so much comes whole

T = TypeVar("T", bound=msgspec.Struct)


class Standby(Generic[T]):
    """As a context: without an error or with one, the command has cleared up itself when that ends."""

    def __init__(self, kind: type[T], take_back: Callable[[T], None], say: Callable[[str], None]) -> None:
        """`take_back`: with the last that was noted; runs in the process that waits, and may raise LazymemError."""
        read_end, self._write_end = os.pipe()
        try:
            self._pid = os.fork()
        except OSError:  # no memory, or too many processes: then a killed command is as before
            self._pid = 0
            os.close(self._write_end)
            self._write_end = -1
        else:
            if not self._pid:
                _stand_by(read_end, self._write_end, kind, take_back, say)
        os.close(read_end)

    def __enter__(self) -> Standby[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.note(None)
        if self._pid:
            os.close(self._write_end)
            with contextlib.suppress(ChildProcessError):  # of a process that was started so, the kernel waits for them
                os.waitpid(self._pid, 0)

    def note(self, maybe_change: T | None) -> None:
        """What there is to take back from now on; None: nothing."""
        if self._pid:
            line = msgspec.json.encode(maybe_change) + b"\n"
            assert len(line) <= _MOST_BYTES
            with contextlib.suppress(BrokenPipeError):  # somebody killed it: it is as if there were none
                os.write(self._write_end, line)


def _stand_by(
    read_end: int, write_end: int, kind: type[T], take_back: Callable[[T], None], say: Callable[[str], None]
) -> NoReturn:
    code = BUG_EXIT_CODE
    try:
        os.close(write_end)  # what has the number of a standard stream is let go of nowhere else
        for number in _IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        os.setsid()
        let_go_of_inherited(read_end)
        with os.fdopen(read_end, "rb") as pipe:
            noted = pipe.read()
        lines = noted[: noted.rindex(b"\n") + 1].splitlines() if b"\n" in noted else [b"null"]
        maybe_change = msgspec.json.decode(lines[-1], type=kind | None)
        if maybe_change is not None:
            take_back(maybe_change)
        code = 0
    except LazymemError as error:
        say(str(error))
    except BaseException:  # noqa: BLE001 (the command's code is not to go on in here)
        traceback.print_exc()
    finally:
        with contextlib.suppress(AttributeError, OSError):  # there is none, or nobody reads it
            sys.stderr.flush()
        os._exit(code)
