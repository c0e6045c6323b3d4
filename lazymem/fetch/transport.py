"""A byte stream to the server that can also send without a task switch: TCP or unix socket.

The demand path sends from the reader's own task, so a transport takes bytes synchronously when the kernel has room
(`send_nowait`). trio's own socket always passes its scheduler once, which costs more than the system call. OSErrors end
here: callers see `ServerUnreachableError`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Protocol

import trio

from lazymem.errors import ServerUnreachableError, TlsError
from lazymem.settings import Endpoint, LinkSettings, TcpEndpoint, UnixEndpoint

RECEIVE_BYTES = 256 * 1024
"""One read of the socket: large enough that a bulk answer costs few system calls, small beside the wire's bounds."""

MOST_IN_A_ROW = 8
"""Reads of a stream that brings more than we use, before other tasks have a turn: a few milliseconds' work. Asking the
event loop each time whether there is more costs as much as a read."""

WAKE_BYTES = 16 * 1024
"""Of the rest of a large frame: a slow link brings it in packets, and waking up for each of them took half a processor
at 100 Mb/s. (Whoever suspects that nothing comes looks for less.)"""

BETWEEN_BYTES = 32 * 1024
"""Behind a large frame: the next one's header and a leaf of digests. The rest of it comes to where it belongs."""

_KEEPALIVE_PROBES = 3


class Reader(Protocol):
    """Who takes the bytes of a stream, and knows what comes."""

    @property
    def missing(self) -> int:
        """So many bytes have to come before there is something to do; at least one."""
        ...

    def maybe_room(self) -> memoryview | None:
        """Where the next bytes belong, if that is known of many."""
        ...


class Transport(Protocol):
    """One connected byte stream. One task may receive while others send."""

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Hand over what fits now; returns how many bytes that was (0: would block). What was not taken is offered
        again, first and unchanged.

        Raises:
            ServerUnreachableError: the stream is broken.
        """
        ...

    async def send_all(self, data: bytes | memoryview) -> None:
        """Hand over everything. Only one task at a time. Raises as `send_nowait`."""
        ...

    async def receive(self) -> bytes:
        """The next bytes; empty at the end of the stream. Raises as `send_nowait`."""
        ...

    async def receive_into(self, reader: Reader) -> bytes | int:
        """As `receive`. Or, where `reader` has room for what comes: how many bytes came into that; 0 at the end."""
        ...

    def receive_nowait(self) -> bytes | None:
        """What is here already, None if that is nothing. Never the end of the stream: `receive` tells that.

        Raises as `send_nowait`.
        """
        ...

    def fileno(self) -> int:
        """Readable when `receive_nowait` would find something; -1: closed, or there is none."""
        ...

    def close(self) -> None:
        """Drop the stream. Every task that waits in it gets an error. May be called twice."""
        ...


class SocketTransport:
    """A connected, non-blocking socket; owns it."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._most = RECEIVE_BYTES
        self._in_a_row = 0
        self._woken_from = 1

    def send_nowait(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise lost(error) from error

    async def send_all(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                await trio.lowlevel.wait_writable(self._socket)
                view = view[self.send_nowait(view) :]
        except (trio.ClosedResourceError, OSError) as error:
            raise lost(error) from error

    async def receive(self) -> bytes:
        try:
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                try:
                    return self._socket.recv(RECEIVE_BYTES)
                except BlockingIOError:
                    continue
        except (trio.ClosedResourceError, OSError, ValueError) as error:  # ValueError: closed, so its number is -1
            raise lost(error) from error

    async def receive_into(self, reader: Reader) -> bytes | int:
        try:
            if self._in_a_row >= MOST_IN_A_ROW:
                self._in_a_row = 0
                # Not until it is readable: from how many bytes on it is called so was an earlier frame's.
                await trio.lowlevel.checkpoint()
            while True:
                room = reader.maybe_room()
                try:
                    self._in_a_row += 1
                    return self._receive_some(room)
                except BlockingIOError:
                    self._in_a_row = 0
                    self._wake_from(min(reader.missing, WAKE_BYTES))
                    await trio.lowlevel.wait_readable(self._socket)
        except (trio.ClosedResourceError, OSError, ValueError) as error:  # as in `receive`
            raise lost(error) from error

    def _wake_from(self, count: int) -> None:
        """Be called readable when so many bytes are here, or the end."""
        if count != self._woken_from:
            self._woken_from = count
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _receive_some(self, maybe_room: memoryview | None) -> bytes | int:
        if maybe_room is None:
            most, self._most = self._most, RECEIVE_BYTES
            return self._socket.recv(most)
        self._most = BETWEEN_BYTES
        return self._socket.recv_into(maybe_room)

    def receive_nowait(self) -> bytes | None:
        try:
            self._wake_from(1)  # what this takes may be what `receive_into` waits for the rest of
            return self._socket.recv(RECEIVE_BYTES) or None
        except BlockingIOError:
            return None
        except OSError as error:
            raise lost(error) from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


async def dial(endpoint: Endpoint, link: LinkSettings, maybe_connecting: socket.socket | None = None) -> Transport:
    """Connect a socket, over TCP with TLS if `link` says so. `maybe_connecting`: one that began to, taken over.

    Raises:
        ServerUnreachableError: no answer in `link.connect_timeout_seconds`, or refused.
        TlsError, UsageError: no TLS with whoever answers; as `tlstransport.secure`.
    """
    try:
        with trio.fail_after(link.connect_timeout_seconds):
            if maybe_connecting is not None:
                connected = await _connected(maybe_connecting)
            elif isinstance(endpoint, UnixEndpoint):
                return await _dial_unix(endpoint.path)
            else:
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
                connected = socket.socket(fileno=stream.socket.detach())
            if isinstance(endpoint, UnixEndpoint):
                return SocketTransport(connected)
            _tune(connected, link)
        return SocketTransport(connected) if link.tls is None else await _secure(connected, endpoint, link)
    except trio.TooSlowError as error:
        raise ServerUnreachableError(f"{endpoint}: no connection within {link.connect_timeout_seconds:g} s") from error
    except OSError as error:
        raise ServerUnreachableError(f"{endpoint}: {_reason(error)}") from error
    except UnicodeError as error:  # the resolver's, for a label that is empty or longer than 63 characters
        raise ServerUnreachableError(f"{endpoint}: no host can have this name") from error


async def _secure(connected: socket.socket, endpoint: TcpEndpoint, link: LinkSettings) -> Transport:
    from lazymem.fetch.tlstransport import secure  # who has no use for TLS does not load it

    assert link.tls is not None
    try:
        with trio.fail_after(link.handshake_timeout_seconds):
            return await secure(connected, link.tls, endpoint.host)
    except trio.TooSlowError as error:
        seconds = link.handshake_timeout_seconds
        raise ServerUnreachableError(f"{endpoint}: connected, but no TLS handshake within {seconds:g} s") from error
    except (ServerUnreachableError, TlsError) as error:
        raise type(error)(f"{endpoint}: {error}") from error


async def _connected(connecting: socket.socket) -> socket.socket:
    """Raises OSError: as connect(2)."""
    try:
        await trio.lowlevel.wait_writable(connecting)
        with contextlib.suppress(BlockingIOError):  # or an error, but behind what was said before it
            connecting.recv(1, socket.MSG_PEEK)
    except BaseException:
        connecting.close()
        raise
    return connecting


async def _dial_unix(path: str) -> Transport:
    unix = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await unix.connect(path)
    except BaseException:
        unix.close()
        raise
    return SocketTransport(socket.socket(fileno=unix.detach()))


def is_on_this_host(descriptor: int) -> bool:
    """Whether the other end of a socket is, by the addresses of both; or a tunnel's end is. -1: False."""
    if descriptor < 0:
        return False
    try:
        with socket.socket(fileno=os.dup(descriptor)) as same:
            ours, theirs = same.getsockname(), same.getpeername()
            return same.family == socket.AF_UNIX or ours[0] == theirs[0]
    except OSError:  # it is no socket, or not connected any more
        return False


def _tune(tcp: socket.socket, link: LinkSettings) -> None:
    """No Nagle; the kernel too notices a dead peer, also while only it has something to send."""
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval = max(1, round(link.ping_interval_seconds))
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    timeout_seconds = link.ping_interval_seconds + link.ping_timeout_seconds
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(timeout_seconds * 1000))


def lost(error: Exception) -> ServerUnreachableError:
    """What a broken connection is called."""
    return ServerUnreachableError(f"connection lost: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """One cause in words; open_tcp_stream wraps those of several addresses into one."""
    cause: BaseException = error
    while isinstance(cause.__cause__, OSError | BaseExceptionGroup) or isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__ or cause
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    if isinstance(cause, OSError) and cause.strerror:  # of the resolver, whose numbers are its own
        return cause.strerror
    return str(cause) or type(cause).__name__
