"""A byte stream to the server through TLS: as `SocketTransport`, with a `TlsPipe` between us and the socket."""

from __future__ import annotations

import contextlib
import socket

import trio

from lazymem.errors import ServerUnreachableError, TlsError
from lazymem.fetch.transport import RECEIVE_BYTES, Reader, SocketTransport, lost
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import client_context
from lazymem.tls.failures import Side
from lazymem.tls.pipe import TlsPipe


class TlsTransport(SocketTransport):
    """As its base, through the pipe that shook hands over the socket.

    What is received raises TlsError, too: a server that refuses our certificate says so after the handshake.
    """

    def __init__(self, connected: socket.socket, pipe: TlsPipe) -> None:
        super().__init__(connected)
        self._pipe = pipe

    def send_nowait(self, data: bytes | memoryview) -> int:
        try:
            return self._pipe.offer((data,), self._send)
        except OSError as error:
            raise lost(error) from error

    def _send(self, ciphertext: bytes | memoryview) -> int:
        try:
            return self._socket.send(ciphertext)
        except BlockingIOError:
            return 0

    async def receive(self) -> bytes:
        while True:
            data = self._pipe.take()
            if data or self._pipe.ended:
                return data
            ciphertext = await super().receive()
            if not ciphertext:
                return b""
            self._pipe.feed(ciphertext)

    async def receive_into(self, reader: Reader) -> bytes | int:
        return await self.receive()

    def receive_nowait(self) -> bytes | None:
        ciphertext = super().receive_nowait()
        if ciphertext is None:
            return None
        self._pipe.feed(ciphertext)
        return self._pipe.take() or None


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
