"""TLS for what is no page client: a trio stream over a pipe, and the same in a thread with a blocking socket."""

from __future__ import annotations

import os
import socket

import trio

from lazymem.errors import ServerUnreachableError, TlsError
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import client_context
from lazymem.tls.failures import Side
from lazymem.tls.pipe import TlsPipe

_RECEIVE_BYTES = 64 * 1024


class TlsStream(trio.abc.HalfCloseableStream):
    """After the handshake. As `trio.SocketStream`: one task may send while another one receives.

    `identities`: who is at the other end, by its certificate; a server's end has them.
    """

    def __init__(self, stream: trio.SocketStream, pipe: TlsPipe, identities: tuple[str, ...] = ()) -> None:
        self.identities = identities
        self._stream = stream
        self._pipe = pipe
        self._taken = b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(self._pipe.sealed(bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As a `trio.abc.ReceiveStream`'s; a peer that refuses us or speaks no TLS any more is a broken stream.

        Raises:
            trio.BrokenResourceError: its `__cause__` says why.
        """
        try:
            while not self._taken:
                self._taken = self._pipe.take()
                if self._taken or self._pipe.ended:
                    break
                ciphertext = bytes(await self._stream.receive_some(_RECEIVE_BYTES))
                if not ciphertext:
                    return b""
                self._pipe.feed(ciphertext)
        except TlsError as error:
            raise trio.BrokenResourceError(str(error)) from error
        found, self._taken = self._taken[:max_bytes], self._taken[max_bytes:] if max_bytes is not None else b""
        return found

    async def aclose(self) -> None:
        await self._stream.aclose()

    def as_plain_socket(self) -> TlsSocket:
        """For another thread, blocking and on its own; the stream is of no more use."""
        plain = socket.socket(fileno=os.dup(self._stream.socket.fileno()))
        plain.setblocking(True)
        return TlsSocket(plain, self._pipe)


class TlsSocket:
    """What a thread needs that only sends: a socket's methods of these names."""

    def __init__(self, plain: socket.socket, pipe: TlsPipe) -> None:
        self._plain = plain
        self._pipe = pipe

    def sendall(self, data: bytes) -> None:
        """Blocking; only one thread at a time. Raises OSError."""
        self._plain.sendall(self._pipe.sealed(data))

    def shutdown(self, how: int) -> None:
        """Also from another thread: whoever sends gets an error."""
        self._plain.shutdown(how)

    def close(self) -> None:
        self._plain.close()


async def secured(stream: trio.SocketStream, settings: TlsSettings, host: str, protocol: str) -> TlsStream:
    """Shake hands as a client that speaks `protocol`; the caller closes `stream`, also where this fails.

    Raises:
        TlsError: the server is not who it should be, or speaks no TLS 1.3, or not this protocol.
        ServerUnreachableError: it ended the connection instead.
        trio.BrokenResourceError: it broke.
    """
    pipe = TlsPipe(client_context(settings, protocol), Side.CLIENT, settings.name or host.partition("%")[0])
    while not pipe.handshake():
        await stream.send_all(pipe.outgoing)
        ciphertext = bytes(await stream.receive_some(_RECEIVE_BYTES))
        if not ciphertext:
            raise ServerUnreachableError("it ended the connection instead of the TLS handshake")
        pipe.feed(ciphertext)
    await stream.send_all(pipe.outgoing)
    if pipe.protocol != protocol:
        raise TlsError("it speaks TLS, and is something else than what is looked for")
    return TlsStream(stream, pipe)
