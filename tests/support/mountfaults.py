"""Fails the Nth call of a mount's daemons, or of a page server, to the disk or the network: of real ones, told from
outside which one.

    with control(folder) as faults:                # for what is started with `faults.environment()`
        faults.arm(Kind("disk error", errno.EIO), 7)
        ...
        faults.disarm()
        faults.failed                              # "fsync, call 7", or "" if there were fewer calls

A daemon and those that follow it count on in the same file, so that one can die of its seventh call and the next one's
are the eighth and ninth. Calls that touch `folder` (by path, or by a descriptor of a file in it) are the disk's, what a
TCP socket does is the network's. A refused write has been done to its half before, as on a disk that fills up; a
network that refuses is a connection that is gone, for both sides.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import errno
import io
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.faults import DISK_BY_PATH, DISK_READS, DISK_WRITES, OTHER_DISK_CALLS, failing_mmap

NETWORK = ("send", "sendall", "sendmsg", "recv", "recv_into", "connect")

_CONTROL_BYTES = 4096
_WORDS = struct.Struct("<7q")
"""Whether armed; the error; whether late; the first number that fails; how many do; calls so far; whose."""
_CALLS_AT = 5 * 8
_FAILED_AT = 1024


HALF, END = -1, -2
"""In the place of an error: a read that gets half of what it asks for, and one that finds the file's end."""

SHORT_READS = ("pread", "preadv")
"""What can come short."""


class Whose(enum.IntEnum):
    """Which processes' calls count."""

    DAEMONS = 0
    """With what they fork."""
    FILLERS = 1
    SERVERS = 2


class Kind(NamedTuple):
    """`late`: what is sent has left before the connection is gone."""

    name: str
    error: int
    late: bool = False

    @property
    def of_network(self) -> bool:
        return self.error == errno.ECONNRESET


KINDS = {
    kind.name: kind
    for kind in (
        Kind("connection reset", errno.ECONNRESET),
        Kind("connection reset behind what was sent", errno.ECONNRESET, late=True),
        Kind("disk error", errno.EIO),
        Kind("disk full", errno.ENOSPC),
    )
}


class Control:
    """The test's end."""

    def __init__(self, file: Path, mapped: mmap.mmap) -> None:
        self._file = file
        self._mapped = mapped

    def environment(self) -> dict[str, str]:
        here = Path(__file__).parent
        return {"PYTHONPATH": f"{here / 'faulty'}:{here.parents[1]}", "LAZYMEM_TEST_FAULTS": str(self._file)}

    def arm(self, kind: Kind, number: int, count: int = 1, whose: Whose = Whose.DAEMONS) -> None:
        """From here on, the calls `number` to `number` + `count` - 1 of that kind fail."""
        self._mapped[_FAILED_AT:] = bytes(_CONTROL_BYTES - _FAILED_AT)
        _WORDS.pack_into(self._mapped, 0, 0, kind.error, kind.late, number, count, 0, whose)
        self._mapped[0] = 1

    def disarm(self) -> None:
        self._mapped[0] = 0

    @property
    def failed(self) -> str:
        """The first call that failed."""
        return self._mapped[_FAILED_AT:].rstrip(b"\0").decode()

    @property
    def calls(self) -> int:
        return int(_WORDS.unpack_from(self._mapped)[5])


@contextlib.contextmanager
def control(folder: Path) -> Iterator[Control]:
    """For daemons whose files are in `folder`."""
    file = folder / "faults"
    file.write_bytes(bytes(_CONTROL_BYTES))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), _CONTROL_BYTES) as mapped:
        yield Control(file, mapped)


# ---- the daemon's end


def install(file: str, *, server: bool) -> None:
    """In a daemon, or a server, before it has begun."""
    with open(file, "r+b") as opened:
        _Faults(mmap.mmap(opened.fileno(), _CONTROL_BYTES), f"{os.path.dirname(file)}/", server)


class _Faults:
    def __init__(self, control: mmap.mmap, folder: str, server: bool) -> None:
        self._control = control
        self._folder = folder
        self._server = server
        self._lock = threading.Lock()
        for module, name in (*((os, name) for name in (*DISK_READS, *DISK_WRITES)), *OTHER_DISK_CALLS):
            setattr(module, name, self._on_descriptor(name.lstrip("_"), getattr(module, name)))
        for name in DISK_BY_PATH:
            setattr(os, name, self._on_path(name, getattr(os, name)))
        mmap.mmap = failing_mmap(self._on_map)  # type: ignore[misc]
        builtins.open = io.open = self._on_path("open", io.open)
        for name in NETWORK:
            setattr(socket.socket, name, self._on_socket(name, getattr(socket.socket, name)))

    def _armed(self, *, network: bool) -> bool:
        armed, error, _, _, _, _, whose = _WORDS.unpack_from(self._control)
        if not armed or (error == errno.ECONNRESET) is not network or (whose == Whose.SERVERS) is not self._server:
            return False
        # A filling process becomes that first of all.
        return whose != Whose.FILLERS or os.sched_getscheduler(0) == os.SCHED_BATCH

    def _maybe_short(self, name: str, real: Callable[..., Any], descriptor: int, rest: tuple[Any, ...]) -> Any:
        """What a read returns that fails without an error; None: it does not."""
        what = _WORDS.unpack_from(self._control)[1]
        if what not in (HALF, END):
            return None
        first = rest[0]  # how many bytes, or the buffers
        if name == "pread":
            return real(descriptor, first // 2 if what == HALF else 0, *rest[1:])
        view = memoryview(first[0])
        return real(descriptor, [view[: len(view) // 2 if what == HALF else 0]], *rest[1:])

    def _maybe_error(self, name: str) -> OSError | None:
        with self._lock:
            _, error, _, first, count, number, _ = _WORDS.unpack_from(self._control)
            struct.pack_into("<q", self._control, _CALLS_AT, number + 1)
            if not first <= number < first + count:
                return None
            if not self._control[_FAILED_AT]:
                said = f"{name}, call {number}".encode()
                self._control[_FAILED_AT : _FAILED_AT + len(said)] = said
        return OSError(error, f"injected: {os.strerror(abs(error))}")

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._folder)
        except OSError:
            return False

    def _on_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any) -> Any:
            if not self._armed(network=False) or not self._is_ours(descriptor):
                return real(descriptor, *rest)
            if _WORDS.unpack_from(self._control)[1] in (HALF, END) and name not in SHORT_READS:
                return real(descriptor, *rest)
            maybe_error = self._maybe_error(name)
            if maybe_error is None:
                return real(descriptor, *rest)
            maybe_short = self._maybe_short(name, real, descriptor, rest)
            if maybe_short is not None:
                return maybe_short
            if name == "pwrite":
                data, offset = rest
                real(descriptor, bytes(data)[: len(data) // 2], offset)
            raise maybe_error

        return call

    def _on_map(self, descriptor: int) -> None:
        if self._armed(network=False) and self._is_ours(descriptor):
            maybe_error = self._maybe_error("mmap")
            if maybe_error is not None:
                raise maybe_error

    def _on_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if self._armed(network=False) and str(path).startswith(self._folder):
                maybe_error = self._maybe_error(name)
                if maybe_error is not None:
                    raise maybe_error
            return real(path, *rest, **more)

        return call

    def _on_socket(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(sock: socket.socket, *rest: Any) -> Any:
            if sock.family != socket.AF_INET or not self._armed(network=True):
                return real(sock, *rest)
            maybe_error = self._maybe_error(name)
            if maybe_error is None:
                return real(sock, *rest)
            late = _WORDS.unpack_from(self._control)[2]
            if late and name == "send":
                real(sock, *rest)
            with contextlib.suppress(OSError):  # not connected yet
                sock.shutdown(socket.SHUT_RDWR)
            raise maybe_error

        return call
