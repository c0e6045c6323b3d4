"""The host's ends of a serial line, as descriptors that can be polled: terminal, file, unix socket. No threads here.

A peer that goes away is not an error: its bytes are dropped, and a unix socket waits for the next one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import termios
from pathlib import Path
from typing import Any, Protocol

from lazymem.errors import BusyError

_PIECE_BYTES = 4096
"""At most this much in one write: what a pipe that polls as writable takes without blocking (PIPE_BUF)."""


class HostEnd(Protocol):
    """Descriptors are None where there is nothing to poll for.

    Whoever starts the pump's thread calls `open`, and `accept` where there is an `accept_fd`; then only that thread
    calls; `close` comes last.
    """

    @property
    def accept_fd(self) -> int | None: ...

    @property
    def input_fd(self) -> int | None: ...

    @property
    def output_fd(self) -> int | None: ...

    def open(self) -> None:
        """Called once, before anything else."""
        ...

    def accept(self) -> None:
        """Take the client that waits, if one does; never waits for one itself."""
        ...

    def receive(self, limit: int) -> bytes: ...

    def send(self, data: bytes) -> int:
        """Returns how many bytes need not be sent again."""
        ...

    def close(self) -> None: ...


class StdioEnd:
    """Standard input and output. A terminal gets no line editing and no echo while the guest has it; Ctrl-C stays."""

    accept_fd = None

    def __init__(self, input_fd: int = 0, output_fd: int = 1) -> None:
        self.input_fd: int | None = input_fd
        self.output_fd: int | None = output_fd
        self._terminal: tuple[int, list[Any]] | None = None

    def open(self) -> None:
        if self.input_fd is None or not os.isatty(self.input_fd):
            return
        settings = termios.tcgetattr(self.input_fd)
        self._terminal = (self.input_fd, settings)
        changed = list(settings)
        changed[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(self.input_fd, termios.TCSADRAIN, changed)

    def accept(self) -> None:
        """Never called."""

    def receive(self, limit: int) -> bytes:
        data = b""
        with contextlib.suppress(OSError):
            assert self.input_fd is not None
            data = os.read(self.input_fd, limit)
        if not data:
            self.input_fd = None
        return data

    def send(self, data: bytes) -> int:
        assert self.output_fd is not None
        try:
            return os.write(self.output_fd, data[:_PIECE_BYTES])
        except BlockingIOError:
            return 0
        except OSError:
            self.output_fd = None
            return len(data)

    def close(self) -> None:
        if self._terminal is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._terminal[0], termios.TCSADRAIN, self._terminal[1])


class FileEnd(StdioEnd):
    """Output to a file, which is emptied first; no input.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        super().__init__(output_fd=self._fd)
        self.input_fd = None

    def close(self) -> None:
        os.close(self._fd)


class UnixEnd:
    """A listening unix socket (0600); one client at a time, the next one waits in the kernel's queue of one.

    Raises:
        OSError: it cannot be made.
        BusyError: somebody listens there already. A socket that nobody serves any more is replaced.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._client: socket.socket | None = None
        _remove_stale(self._path)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(path)
            # Before listen nobody can connect: no moment with wider rights.
            self._path.chmod(0o600)
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            raise
        self._listener.setblocking(False)
        self._inode = self._path.stat().st_ino

    @property
    def accept_fd(self) -> int | None:
        return self._listener.fileno() if self._client is None else None

    @property
    def input_fd(self) -> int | None:
        return None if self._client is None else self._client.fileno()

    @property
    def output_fd(self) -> int | None:
        return self.input_fd

    def open(self) -> None:
        """Nothing: it listens since it was made, so that a client may come before the guest."""

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            client.setblocking(False)
            self._client = client

    def receive(self, limit: int) -> bytes:
        assert self._client is not None
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self._client.recv(limit)
        if not data:
            self._drop_client()
        return data

    def send(self, data: bytes) -> int:
        assert self._client is not None
        try:
            return self._client.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._drop_client()
            return len(data)

    def close(self) -> None:
        self._drop_client()
        self._listener.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _remove_stale(path: Path) -> None:
    """Remove a socket that its server left behind; anything else at `path` is left, and bind will say so."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        # A server whose queue is full must not hold us up.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise BusyError(f"{path}: somebody listens there already")
