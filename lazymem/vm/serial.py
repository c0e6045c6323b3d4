"""Where the guest's serial line leads on the host: the terminal, a file, a unix socket, or nowhere.

One thread a line moves bytes between two bounded buffers and the host, so that the vCPU never waits for a slow reader
for long. `write` and `read` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol

from lazymem.errors import UsageError
from lazymem.vm.serialends import FileEnd, HostEnd, StdioEnd, UnixEnd

INPUT_BYTES = 4096
"""Received bytes that may wait for the guest: more stay with the sender, who is then held up."""

OUTPUT_BYTES = 1 << 16
"""Sent bytes that may wait for the host: a screenful of a slow terminal and more."""

WAIT_SECONDS = 0.1
"""How long a full output buffer holds the vCPU up before bytes are dropped."""

CLOSE_SECONDS = 1.0
"""How long `close` waits for a slow reader to take what was written."""


class SerialLine(Protocol):
    """The host's side of a UART."""

    def start(self, on_input: Callable[[], None]) -> None:
        """Begin; a client that has connected before is served from now on, without a gap.

        `on_input` is called from another thread when bytes came while none were waiting.
        """
        ...

    def write(self, data: bytes) -> None:
        """Send; waits at most `WAIT_SECONDS`, then drops."""
        ...

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes that came, or none; never waits."""
        ...

    def close(self) -> None:
        """Send what waits, as far as somebody takes it, and give everything back. A second call does nothing."""
        ...


class NullLine:
    """A line that leads nowhere."""

    def start(self, on_input: Callable[[], None]) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def read(self, limit: int) -> bytes:
        return b""

    def close(self) -> None:
        pass


class HostLine:
    """A line to a `HostEnd`. Its one thread polls; everything shared is under one lock."""

    def __init__(self, end: HostEnd) -> None:
        self._end = end
        self._lock = threading.Condition()
        self._input = bytearray()
        self._output = bytearray()
        self._stalled = False
        self._closing = False
        self._on_input: Callable[[], None] = _ignore
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread: threading.Thread | None = None
        self.dropped_bytes = 0
        """Output that nobody took: no client, or a reader slower than `WAIT_SECONDS` for a full buffer."""

    def start(self, on_input: Callable[[], None]) -> None:
        self._on_input = on_input
        self._end.open()
        if self._end.accept_fd is not None:
            # Who connected before the guest hears its first word: it may be said before the thread below has run.
            self._end.accept()
        # A daemon thread: a blocked write to somebody's stopped terminal must not keep the process alive.
        self._thread = threading.Thread(target=self._pump, name="serial", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._end.output_fd is None or self._closing:
                self.dropped_bytes += len(data)
                return
            room = self._has_room(data) or (not self._stalled and self._wait_for_room(data))
            # Having waited once is enough: until the reader moves again, a byte costs the guest nothing.
            self._stalled = not room
            if not room:
                self.dropped_bytes += len(data)
                return
            was_empty = not self._output
            self._output += data
        if was_empty:
            self._wake()

    def read(self, limit: int) -> bytes:
        with self._lock:
            was_full = len(self._input) >= INPUT_BYTES and not self._closing
            data = bytes(self._input[:limit])
            del self._input[:limit]
        if was_full and data:
            self._wake()
        return data

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join(2 * CLOSE_SECONDS)
            if self._thread.is_alive():
                # It hangs in a write; its descriptors stay its own until the process ends.
                return
        self._end.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _has_room(self, data: bytes) -> bool:
        return len(self._output) + len(data) <= OUTPUT_BYTES

    def _wait_for_room(self, data: bytes) -> bool:
        return self._lock.wait_for(lambda: self._has_room(data), WAIT_SECONDS)

    def _wake(self) -> None:
        # A full pipe wakes as well as one more byte does.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"\0")

    def _pump(self) -> None:
        deadline = None
        while True:
            with self._lock:
                if self._closing and deadline is None:
                    deadline = time.monotonic() + CLOSE_SECONDS
                if deadline is not None and (not self._output or time.monotonic() > deadline):
                    return
            self._step(timeout_ms=None if deadline is None else 50)

    def _step(self, timeout_ms: int | None) -> None:
        """Wait until something can be moved, and move it."""
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        with self._lock:
            sources, sink = self._descriptors()
        for fd in sources:
            poll.register(fd, select.POLLIN)
        if sink is not None:
            poll.register(sink, select.POLLOUT | (select.POLLIN if sink in sources else 0))
        ready = dict(poll.poll(timeout_ms))
        if self._wake_reader in ready:
            os.read(self._wake_reader, 4096)
        if self._end.accept_fd in ready:
            self._end.accept()
            return
        # A hang-up shows as neither of the two: reading finds it out.
        if self._end.input_fd in sources and ready.get(self._end.input_fd or 0, 0) & ~select.POLLOUT:
            self._receive()
        if sink is not None and sink == self._end.output_fd and ready.get(sink, 0) & ~select.POLLIN:
            self._send()

    def _descriptors(self) -> tuple[list[int], int | None]:
        """What to poll: for something to take in, while there is room for it; for sending, while something waits."""
        sources = []
        if self._end.accept_fd is not None:
            sources.append(self._end.accept_fd)
        if self._end.input_fd is not None and len(self._input) < INPUT_BYTES:
            sources.append(self._end.input_fd)
        return sources, self._end.output_fd if self._output else None

    def _receive(self) -> None:
        with self._lock:
            room = INPUT_BYTES - len(self._input)
        data = self._end.receive(room)
        with self._lock:
            first = not self._input and bool(data)
            self._input += data
            self._forget_output_without_reader()
        if first:
            self._on_input()

    def _send(self) -> None:
        with self._lock:
            data = bytes(self._output)
        sent = self._end.send(data)
        with self._lock:
            del self._output[:sent]
            if sent:
                self._stalled = False
            self._forget_output_without_reader()
            self._lock.notify_all()

    def _forget_output_without_reader(self) -> None:
        """The next client starts with what the guest says then."""
        if self._end.output_fd is None:
            self.dropped_bytes += len(self._output)
            self._output.clear()


def _ignore() -> None:
    """Nobody has started the line yet."""


def open_serial(text: str) -> SerialLine:
    """``none``, ``stdio``, ``file:PATH``, or ``unix:PATH`` (a server, as QEMU's ``unix:PATH,server=on,wait=off``, which
    is understood, too).

    Raises:
        UsageError: another word, or the file or socket cannot be made.
    """
    kind, _, path = text.partition(":")
    if text in ("none", "null"):
        return NullLine()
    if text == "stdio":
        return HostLine(StdioEnd())
    if kind == "unix":
        path = path.partition(",")[0]
    if kind not in ("file", "unix") or not path:
        raise UsageError(f"-serial takes stdio, file:PATH, unix:PATH or none, not {text!r}")
    try:
        return HostLine(FileEnd(path) if kind == "file" else UnixEnd(path))
    except OSError as error:
        raise UsageError(f"-serial {text}: {error.strerror or error}") from error
