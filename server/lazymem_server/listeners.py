"""Where the server listens: TCP addresses, Unix sockets, and sockets handed over by systemd."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import trio

from lazymem.errors import BusyError, EnvironmentRefusedError, UsageError
from lazymem_server.socketsweep import Bound, remove_own

DEFAULT_PORT = 7411
DEFAULT_LISTEN = f"127.0.0.1:{DEFAULT_PORT}"

BACKLOG = 128
"""Connections that the kernel holds for us between two accepts; a burst of mounts after a server's restart."""

_SYSTEMD_FIRST_FD = 3


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path


def parse_listen(text: str) -> TcpAddress | UnixAddress:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``.

    Raises:
        UsageError: none of these.
    """
    if text.startswith("unix:") and len(text) > 5:
        return UnixAddress(Path(text[5:]))
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise UsageError(f"cannot listen on {text!r}: write HOST:PORT, [IPV6]:PORT or unix:PATH")
    return TcpAddress(host, int(port))


class Listeners:
    """Listening `sockets`, of which we bound `unix`. They are closed, and these removed from the disk, at the end
    of the `with` block.

    `private`: only this host's own processes may be able to reach them; anything else is refused with a UsageError.
    """

    def __init__(self, *, private: bool = False) -> None:
        self._private = private
        self.sockets: list[socket.socket] = []
        self.unix: list[Bound] = []
        self._cleanup = ExitStack()

    def open(self, addresses: Iterable[TcpAddress | UnixAddress]) -> None:
        """Bind all.

        Raises:
            BusyError: somebody listens there.
            UsageError: there is no such address here.
        """
        for address in addresses:
            if isinstance(address, UnixAddress):
                self._open_unix(address.path)
            else:
                self._open_tcp(address)

    def adopt(self, environment: Mapping[str, str] | None = None) -> int:
        """Take over sockets from systemd (LISTEN_FDS, LISTEN_PID); how many there were.

        Raises:
            EnvironmentRefusedError: what was handed over is not a listening stream socket.
        """
        environment = os.environ if environment is None else environment
        if environment.get("LISTEN_PID") != str(os.getpid()):
            return 0
        count = environment.get("LISTEN_FDS", "")
        if not (count.isascii() and count.isdigit()):
            return 0
        for fd in range(_SYSTEMD_FIRST_FD, _SYSTEMD_FIRST_FD + int(count)):
            self.add_descriptor(fd)
        return int(count)

    def add_descriptor(self, fd: int) -> None:
        """Take over one listening socket."""
        try:
            os.set_inheritable(fd, False)
            found = socket.socket(fileno=fd)
        except OSError as error:
            raise EnvironmentRefusedError(f"descriptor {fd} from systemd is not a socket: {error.strerror}") from error
        self._keep(found)
        if found.type != socket.SOCK_STREAM or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise EnvironmentRefusedError(f"descriptor {fd} from systemd is not a listening stream socket")
        self._refuse_if_open(found.family, found.getsockname())

    def _open_tcp(self, address: TcpAddress) -> None:
        where = f"{address.host}:{address.port}"
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, target = found[0]
            self._refuse_if_open(family, target)
            listener = socket.socket(family, socket.SOCK_STREAM)
            self._keep(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
            listener.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BusyError(f"somebody else listens on {where}") from error
            raise UsageError(f"cannot listen on {where}: {error.strerror}") from error

    def _open_unix(self, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._keep(listener)
        try:
            _remove_stale(path)
            before = os.umask(0o177)  # no moment at which others could connect
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            bound = path, path.stat().st_ino
            self.unix.append(bound)
            self._cleanup.callback(remove_own, *bound)
            listener.listen(BACKLOG)
        except OSError as error:
            raise UsageError(f"cannot listen on unix:{path}: {error.strerror or error}") from error

    def _refuse_if_open(self, family: int, target: Any) -> None:
        if self._private and family != socket.AF_UNIX and not _is_loopback(target[0]):
            raise UsageError(
                f"cannot listen on {target[0]} without TLS: whoever reaches it could read the guests' memory. Give "
                "--tls-cert, --tls-key and --tls-ca (lazymem pki makes them), or say --insecure"
            )

    def _keep(self, listener: socket.socket) -> None:
        self._cleanup.callback(listener.close)
        self.sockets.append(listener)

    def close(self) -> None:
        self._cleanup.close()

    def __enter__(self) -> Listeners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more; leave anything else alone."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: alive, and its backlog is full
                raise
    raise BusyError(f"somebody else listens on unix:{path}")


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def spoken_address(listener: socket.socket) -> str:
    """How to reach the socket: ``HOST:PORT`` with the real port, or ``unix:PATH``."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}"
    return f"[{name[0]}]:{name[1]}" if listener.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def tune(stream: trio.SocketStream, unsent_bytes: int) -> None:
    """Options of an accepted connection: no delay, little in the kernel that a demand could not overtake."""
    if stream.socket.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # gone already, or a kernel without it
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        allow_unsent(stream, unsent_bytes)


def allow_unsent(stream: trio.SocketStream, count: int) -> None:
    """Have the kernel take no more than `count` bytes beyond what the link has room for. Any thread may call it."""
    if stream.socket.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # as above
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, count)
