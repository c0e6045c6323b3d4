"""A byte stream to the server through TLS: as `SocketTransport`, with a `TlsPipe` between us and the socket."""

from __future__ import annotations

import contextlib
import socket

import trio

from lazymem.errors import ServerUnreachableError, TlsError
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import client_context
from lazymem.tls.failures import Side
from lazymem.tls.pipe import TlsPipe

RECEIVE_BYTES = 256 * 1024
"""As without TLS; a few records more than that may be decrypted at a time."""


class TlsTransport:
    """A connected, non-blocking socket and the pipe that shook hands over it; owns the socket.

    What is received raises TlsError, too: a server that refuses our certificate says so after the handshake.
    """

    def __init__(self, connected: socket.socket, pipe: TlsPipe) -> None:
        self._socket = connected
        self._pipe = pipe

    def send_nowait(self, data: bytes | memoryview) -> int:
        try:
            return self._pipe.offer((data,), self._send)
        except OSError as error:
            raise _lost(error) from error

    def _send(self, ciphertext: bytes | memoryview) -> int:
        try:
            return self._socket.send(ciphertext)
        except BlockingIOError:
            return 0

    async def send_all(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                await trio.lowlevel.wait_writable(self._socket)
                view = view[self.send_nowait(view) :]
        except (trio.ClosedResourceError, OSError) as error:
            raise _lost(error) from error

    async def receive(self) -> bytes:
        try:
            while True:
                data = self._pipe.take()
                if data or self._pipe.ended:
                    return data
                await trio.lowlevel.wait_readable(self._socket)
                try:
                    ciphertext = self._socket.recv(RECEIVE_BYTES)
                except BlockingIOError:
                    continue
                if not ciphertext:
                    return b""
                self._pipe.feed(ciphertext)
        except (trio.ClosedResourceError, OSError, ValueError) as error:  # ValueError: closed, so its number is -1
            raise _lost(error) from error

    def receive_nowait(self) -> bytes | None:
        try:
            ciphertext = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _lost(error) from error
        if not ciphertext:
            return None
        self._pipe.feed(ciphertext)
        return self._pipe.take() or None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


async def secure(connected: socket.socket, settings: TlsSettings, host: str) -> TlsTransport:
    """Shake hands as a client with the server at `host`; the socket is closed on every failure, also on cancellation.

    Raises:
        TlsError: the server is not who it should be, or speaks no TLS 1.3.
        ServerUnreachableError: it ended the connection instead.
        UsageError: our own files cannot be used.
    """
    connected.setblocking(False)
    try:
        pipe = TlsPipe(client_context(settings), Side.CLIENT, settings.name or host.partition("%")[0])
        while not pipe.handshake():
            await _send_all(connected, pipe.outgoing)
            await trio.lowlevel.wait_readable(connected)
            try:
                ciphertext = connected.recv(RECEIVE_BYTES)
            except BlockingIOError:
                continue
            if not ciphertext:
                raise ServerUnreachableError("the server ended the connection instead of the TLS handshake")
            pipe.feed(ciphertext)
        await _send_all(connected, pipe.outgoing)
    except TlsError:
        with contextlib.suppress(OSError):  # so that its log says why, too
            connected.send(pipe.outgoing)
        connected.close()
        raise
    except BaseException:
        connected.close()
        raise
    return TlsTransport(connected, pipe)


async def _send_all(connected: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        await trio.lowlevel.wait_writable(connected)
        view = view[connected.send(view) :]


def _lost(error: Exception) -> ServerUnreachableError:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ServerUnreachableError(f"connection lost: {text}")
