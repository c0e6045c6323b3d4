"""Fails the Nth call of this process to the disk or the network: the real functions of `os` and `socket`, replaced.

    with Faults(monkeypatch, folder, failing=7, error=errno.EIO) as faults: ...
    faults.calls, faults.failed           # how many there were, and which one it was

Only calls that touch `folder` (by path, or by a descriptor of a file in it) count as the disk's, and only what a
client's TCP socket does as the network's, so a server and the test itself may run in the same process. What a disk
refuses to write is done to its half before: a disk that fills up takes a part. What a network refuses is a connection
that is gone, for both sides, and before it is gone its bytes may have left (`late`).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import trio

from lazymem.store import fallocate

DISK_READS = ("pread", "preadv", "fstat", "fstatvfs")
DISK_WRITES = (
    *("pwrite", "pwritev", "write", "fsync", "fdatasync", "ftruncate", "posix_fallocate"),
    *("copy_file_range", "fchmod"),
)
DISK_BY_PATH = (
    *("open", "mkdir", "rename", "replace", "truncate", "listdir"),
    *("lstat", "stat", "statvfs", "chmod", "unlink"),
)
OTHER_DISK_CALLS = ((fallocate, "_fallocate"), (fcntl, "flock"))
"""Which are not functions of `os`. (Neither is `mmap.mmap`, a class: `failing_mmap`.)"""
NETWORK = ("send", "recv")


def failing_mmap(on_map: Callable[[int], None]) -> type[mmap.mmap]:
    """In the place of `mmap.mmap`: tells `on_map` of each descriptor before it is mapped, and lets it raise."""

    class FailingMmap(mmap.mmap):
        def __new__(cls, fileno: int, *rest: Any, **more: Any) -> Self:
            on_map(fileno)
            return super().__new__(cls, fileno, *rest, **more)

    return FailingMmap


class Faults:
    """`failing`: the number of the call that fails, from 0 on; `more`: how many behind it fail too."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        failing: int,
        error: int,
        *,
        late: bool = False,
        more: int = 0,
    ) -> None:
        self.calls = 0
        self.failed = ""
        self._folder = f"{folder}/"
        self._failing = range(failing, failing + 1 + more)
        self._error = error
        self._late = late
        self._armed = False
        self._lock = threading.Lock()
        network = error in (errno.ECONNRESET, errno.ETIMEDOUT)
        if network:
            for name in NETWORK:
                monkeypatch.setattr(socket.socket, name, self._on_socket(name, getattr(socket.socket, name)))
            monkeypatch.setattr(trio, "open_tcp_stream", self._on_dial(trio.open_tcp_stream))
        else:
            for module, name in (*((os, name) for name in (*DISK_READS, *DISK_WRITES)), *OTHER_DISK_CALLS):
                monkeypatch.setattr(module, name, self._on_descriptor(name.lstrip("_"), getattr(module, name)))
            for name in DISK_BY_PATH:
                monkeypatch.setattr(os, name, self._on_path(name, getattr(os, name)))
            monkeypatch.setattr(mmap, "mmap", failing_mmap(self._on_map))

    def __enter__(self) -> Faults:
        self._armed = True
        return self

    def __exit__(self, *_: object) -> None:
        self._armed = False

    def _fails(self, name: str) -> bool:
        if not self._armed:
            return False
        with self._lock:
            number = self.calls
            self.calls += 1
        if number not in self._failing:
            return False
        self.failed = self.failed or f"{name}, call {number}"
        return True

    def _refusal(self) -> OSError:
        return OSError(self._error, f"injected: {os.strerror(self._error)}")

    def _on_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any) -> Any:
            if not self._armed or not self._is_ours(descriptor) or not self._fails(name):
                return real(descriptor, *rest)
            if name == "pwrite":
                data, offset = rest
                real(descriptor, bytes(data)[: len(data) // 2], offset)
            raise self._refusal()

        return call

    def _on_map(self, descriptor: int) -> None:
        if self._armed and self._is_ours(descriptor) and self._fails("mmap"):
            raise self._refusal()

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._folder)
        except OSError:
            return False

    def _on_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if self._armed and str(path).startswith(self._folder) and self._fails(name):
                raise self._refusal()
            return real(path, *rest, **more)

        return call

    def _on_socket(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(sock: socket.socket, *rest: Any) -> Any:
            if not self._armed or sock.family != socket.AF_INET or not self._fails(name):
                return real(sock, *rest)
            if self._late and name == "send":
                real(sock, *rest)
            sock.shutdown(socket.SHUT_RDWR)
            raise self._refusal()

        return call

    def _on_dial(self, real: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*arguments: Any, **more: Any) -> Any:
            if self._fails("connect"):
                await trio.lowlevel.checkpoint()
                raise self._refusal()
            return await real(*arguments, **more)

        return call
