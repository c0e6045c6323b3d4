"""A guest's serial port as lines: we listen, the emulator connects, so that nothing the guest says is lost."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import TracebackType

from lazymem.errors import GuestCrashError

_MAX_PENDING_BYTES = 1 << 20
"""A guest that never ends its line is broken; ours write lines of under 200 bytes."""


class SerialLine:
    """Listens on the unix socket `path` from construction on; one emulator connects."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._pending = b""

    def __enter__(self) -> SerialLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and stops listening; the guest's output then goes nowhere."""
        self._listener.close()
        if self._connection:
            self._connection.close()

    def ask(self, command: str, answer: str, timeout_seconds: float = 60) -> str:
        """Sends a line and waits for one that starts with `answer`; returns the rest of that line, stripped."""
        self._connected(time.monotonic() + timeout_seconds).sendall(command.encode() + b"\n")
        return self.expect(answer, timeout_seconds)

    def expect(self, start: str, timeout_seconds: float = 60) -> str:
        """Waits for a line that starts with `start`, skips others, and returns what follows it, stripped.

        Raises:
            GuestCrashError: the guest's port closed, or the time is up; with the last thing that was read.
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
                raise GuestCrashError(f"the guest did not say {awaited!r} in time{_said(skipped)}") from None
            except ConnectionResetError:
                data = b""
            self._pending += data
            if not data or len(self._pending) > _MAX_PENDING_BYTES:
                raise GuestCrashError(f"the guest's serial port ended before it said {awaited!r}{_said(skipped)}")
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace").strip("\r\0")

    def _connected(self, deadline: float) -> socket.socket:
        if self._connection is None:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self._connection, _ = self._listener.accept()
            except TimeoutError:
                raise GuestCrashError("the emulator did not open its serial port in time") from None
        return self._connection


def _said(lines: list[str]) -> str:
    return "; it said: " + " | ".join(lines) if lines else "; it said nothing"
