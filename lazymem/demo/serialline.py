"""A guest's serial port as lines. QEMU connects to us; to lazymem-vm, which listens itself, we connect."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import TracebackType

from lazymem.errors import GuestCrashError

_MAX_PENDING_BYTES = 1 << 20
"""A guest that never ends its line is broken; ours write lines of under 200 bytes."""


class SilentGuestError(GuestCrashError):
    """The guest may be well, but it did not say in time what was awaited."""


class SerialLine:
    """Listens on the unix socket `path` from construction on, for one emulator: nothing that its guest says is lost.

    With `connect`, the emulator listens there already, and drops what its guest said before.
    """

    def __init__(self, path: Path, *, connect: bool = False) -> None:
        self._listener: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._pending = b""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if connect:
                self._connection = found
                found.connect(str(path))
            else:
                self._listener = found
                found.bind(str(path))
                found.listen(1)
        except OSError:
            found.close()
            raise

    def __enter__(self) -> SerialLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and stops listening; the guest's output then goes nowhere."""
        for sock in (self._listener, self._connection):
            if sock is not None:
                sock.close()

    def ask(self, command: str, answer: str, timeout_seconds: float = 60) -> str:
        """Sends a line and waits for one that starts with `answer`; returns the rest of that line, stripped."""
        self._connected(time.monotonic() + timeout_seconds).sendall(command.encode() + b"\n")
        return self.expect(answer, timeout_seconds)

    def tell(self, command: str) -> None:
        """Sends a line; the answer is awaited by `maybe_line` or `expect`."""
        self._connected(time.monotonic() + 10).sendall(command.encode() + b"\n")

    def maybe_line(self, start: str, wait_seconds: float) -> str | None:
        """As `expect`, but None when no such line came in so short a time; skipped lines are gone."""
        try:
            return self.expect(start, wait_seconds)
        except SilentGuestError:
            return None

    def expect(self, start: str, timeout_seconds: float = 60) -> str:
        """Waits for a line that starts with `start`, skips others, and returns what follows it, stripped.

        Raises:
            GuestCrashError: the guest's port closed; with the last lines that were read.
            SilentGuestError: the time is up.
        """
        deadline = time.monotonic() + timeout_seconds
        skipped: list[str] = []
        while True:
            line = self._next_line(deadline, start, skipped)
            if line.startswith(start):
                return line[len(start) :].strip()
            skipped.append(line)
            del skipped[:-20]

    def _next_line(self, deadline: float, awaited: str, skipped: list[str]) -> str:
        while b"\n" not in self._pending:
            connection = self._connected(deadline)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = connection.recv(65536)
            except TimeoutError:
                raise SilentGuestError(f"the guest did not say {awaited!r} in time{_said(skipped)}") from None
            except ConnectionResetError:
                data = b""
            self._pending += data
            if not data or len(self._pending) > _MAX_PENDING_BYTES:
                raise GuestCrashError(f"the guest's serial port ended before it said {awaited!r}{_said(skipped)}")
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace").strip("\r\0")

    def _connected(self, deadline: float) -> socket.socket:
        if self._connection is None:
            assert self._listener is not None
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self._connection, _ = self._listener.accept()
            except TimeoutError:
                raise GuestCrashError("the emulator did not open its serial port in time") from None
        return self._connection


def _said(lines: list[str]) -> str:
    return "; it said: " + " | ".join(lines) if lines else "; it said nothing"
