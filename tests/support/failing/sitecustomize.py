"""For commands that a test starts with this folder in PYTHONPATH: the Nth call to the disk or the network fails.

LAZYMEM_TEST_FAILS is ``WORD KIND N FILE``: in the process whose command line has WORD, as one of its words, the Nth
call (from 0) of KIND fails, if FILE is not there yet; FILE is then made and says which it was, so that a process that
is started again goes on. ``disk``: of what is done to files in FILE's folder and below it, by path or by descriptor:
the journal, the RAM, sockets, folders; not to those that tell the test of the command, nor to the mount. ``network``:
of what is done to TCP sockets, whose connection is then gone. Python imports a module of this name at its start, before
any other has taken the functions that are replaced here.
"""

import builtins
import contextlib
import errno
import fcntl
import io
import os
import socket
import sys
import threading
from typing import Any

DISK = (
    *("open", "mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "stat", "lstat", "listdir"),
    *("pread", "preadv", "pwrite", "ftruncate", "fsync", "fdatasync"),
)
TELLING = (".steps", ".pid", ".read", ".go", ".out", ".err")
NETWORK = ("send", "recv", "recv_into", "sendall", "connect", "connect_ex", "accept")


class _Faults:
    def __init__(self, kind: str, number: int, file: str) -> None:
        self._number = number
        self._file = file
        self._calls = 0
        self._lock = threading.Lock()
        if kind == "disk":
            for name in DISK:
                setattr(os, name, self._disk(name, getattr(os, name)))
            fcntl.flock = self._disk("flock", fcntl.flock)
            builtins.open = io.open = self._disk("open", io.open)
        else:
            for name in NETWORK:
                setattr(socket.socket, name, self._network(name, getattr(socket.socket, name)))

    def _fails(self, name: str) -> bool:
        with self._lock:
            number = self._calls
            self._calls += 1
            if number != self._number or os.path.exists(self._file):
                return False
        with open(self._file, "w") as file:
            file.write(f"{name}, call {number}")
        return True

    def _disk(self, name: str, real: Any) -> Any:
        def call(where: Any, *rest: Any, **more: Any) -> Any:
            if self._is_ours(where) and self._fails(name):
                raise OSError(errno.EIO, "injected")
            return real(where, *rest, **more)

        return call

    def _is_ours(self, where: Any) -> bool:
        try:
            path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else os.fsdecode(where)
        except (OSError, TypeError):  # closed; a file object
            return False
        folder = os.path.dirname(self._file)
        below = path.startswith(f"{folder}/") and not path.startswith(f"{folder}/mnt")
        return below and path != self._file and not path.endswith(TELLING)

    def _network(self, name: str, real: Any) -> Any:
        def call(sock: socket.socket, *rest: Any) -> Any:
            if sock.family != socket.AF_INET or not self._fails(name):
                return real(sock, *rest)
            if name != "accept":
                with contextlib.suppress(OSError):  # not connected yet
                    sock.shutdown(socket.SHUT_RDWR)
            raise OSError(errno.ECONNRESET if name != "accept" else errno.ECONNABORTED, "injected")

        return call


def _install() -> None:
    word, kind, number, file = os.environ["LAZYMEM_TEST_FAILS"].split()
    if word in sys.orig_argv:
        _Faults(kind, int(number), file)


if "LAZYMEM_TEST_FAILS" in os.environ:
    _install()
