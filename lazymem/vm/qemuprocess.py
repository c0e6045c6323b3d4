"""A QEMU as a child of this process: signals go on to it, its exit status is ours, and it never outlives us."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from lazymem.errors import EnvironmentRefusedError, MonitorError
from lazymem.vm.qemuchild import preparation

_END_SECONDS = 10.0
"""For QEMU to end when its guest was refused."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends QEMU in an orderly way."""


class Child:
    """A QEMU, the signals that go on to it, and its end."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        """`notice` gets the lines that a person should read."""
        self._notice = notice
        self._process: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []

    @contextlib.contextmanager
    def started(
        self,
        words: Sequence[str],
        inherited: Sequence[int],
        huge_pages_off: int | None,
        maybe_template: Path | None = None,
    ) -> Iterator[Child]:
        """Ended on the way out, if it has not by itself. The last two: `qemuchild.preparation`'s."""
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup's word holds
        heard = [number for number in _SIGNALS if number != signal.SIGHUP or not ignored]
        before = {number: signal.signal(number, self._forward) for number in heard}
        try:
            self._process = self._start(words, inherited, preparation(huge_pages_off, maybe_template))
            for number in self._signals:
                self._process.send_signal(number)
            yield self
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(
        self, words: Sequence[str], inherited: Sequence[int], prepare: Callable[[], None]
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(words, pass_fds=inherited, preexec_fn=prepare)
        except OSError as error:
            raise EnvironmentRefusedError(f"cannot run {words[0]}: {error.strerror}") from error

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """The second one ends a QEMU that waits for a page of its RAM, and so cannot end itself."""
        self._signals.append(number)
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL if len(self._signals) > 1 else number)

    def wait(self) -> int:
        """Its exit status, as ours."""
        assert self._process is not None
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def ended_early(self, error: MonitorError) -> int:
        """Its monitor is gone, or has refused something: its exit status, once it has said itself what was wrong.

        Raises:
            MonitorError: the one given, where QEMU knows of nothing wrong.
        """
        assert self._process is not None
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            raise error from None
        code = self.wait()
        if code == 0 and not self._signals:
            raise error
        if not self._signals:
            self._notice(f"QEMU ended with status {code} before its guest could run; it says why itself, above")
        return code

    def _end(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
