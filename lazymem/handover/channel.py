"""A control connection: messages over a socket, each side heard from every few seconds or taken for gone."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

import trio

from lazymem.errors import RemoteProtocolError, ServerUnreachableError, TlsError
from lazymem.handover.messages import Message, Ping, Pong, Receiver, encode
from lazymem.settings import Endpoint, TcpEndpoint, TlsSettings
from lazymem.tls.stream import TlsStream, secured

Stream = trio.SocketStream | TlsStream

PROTOCOL = "lazymem-handover"
"""By ALPN: a page client at the same address names none."""

PING_SECONDS = 2.0
SILENCE_SECONDS = 10.0
"""Both sides say something each two seconds: five times nothing is a side that is gone, or a way that is."""

DIAL_SECONDS = 10.0
_CHUNK_BYTES = 16 * 1024

_NETWORK = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


class Channel:
    """Owns the stream. One task receives; any may send.

    A message that was sent in part only (the time ran out, or its sender was cancelled) is the connection's end:
    whatever came behind it would be read as its rest.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._receiver = Receiver()
        self._waiting: deque[Message] = deque()
        self._sending = trio.Lock()
        self._heard = trio.Event()

    async def send(self, message: Message) -> None:
        """
        Raises:
            ServerUnreachableError: the other side is gone, or takes nothing.
        """
        try:
            with trio.fail_after(SILENCE_SECONDS):
                async with self._sending:
                    await self._send_whole(encode(message))
        except (*_NETWORK, trio.TooSlowError) as error:
            raise ServerUnreachableError("the other side of the hand-over is gone") from error

    async def _send_whole(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except BaseException:
            await trio.aclose_forcefully(self._stream)  # whoever receives notices
            raise

    async def receive(self, silence_seconds: float = SILENCE_SECONDS) -> Message:
        """The next message that is no ping; pings are answered.

        Raises:
            ServerUnreachableError: the other side is gone, or silent for too long.
            TlsError: it does not believe us.
            RemoteProtocolError: it speaks something else.
        """
        while True:
            while self._waiting:
                message = self._waiting.popleft()
                if isinstance(message, Ping):
                    await self.send(Pong())
                elif not isinstance(message, Pong):
                    return message
            try:
                with trio.fail_after(silence_seconds):
                    data = await self._stream.receive_some(_CHUNK_BYTES)
            except (*_NETWORK, trio.TooSlowError) as error:
                if isinstance(error.__cause__, TlsError):
                    raise error.__cause__ from error
                raise ServerUnreachableError("the other side of the hand-over is gone, or silent") from error
            if not data:
                raise ServerUnreachableError("the other side of the hand-over ended the connection")
            self._heard.set()
            self._heard = trio.Event()
            self._waiting.extend(self._receiver.feed(data))

    async def wait_heard(self) -> None:
        """Until something comes that another task receives."""
        await self._heard.wait()

    async def keep_alive(self) -> None:
        """Say something each few seconds, until the connection is gone."""
        with suppress(ServerUnreachableError):
            while True:
                await trio.sleep(PING_SECONDS)
                await self.send(Ping())

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


async def dial(endpoint: Endpoint, greeting: bytes, tls: TlsSettings | None = None) -> Stream:
    """A new connection, of the kind that `greeting` says; over TCP with `tls`, if any.

    Raises:
        ServerUnreachableError: nobody there.
        TlsError: not the one that is meant.
    """
    try:
        with trio.fail_after(DIAL_SECONDS):
            if not isinstance(endpoint, TcpEndpoint):
                stream: Stream = await trio.open_unix_socket(endpoint.path)
            elif tls is None:
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
            else:
                stream = await _dial_tls(endpoint, tls)
            await stream.send_all(greeting)
    except trio.TooSlowError as error:
        raise ServerUnreachableError(f"{endpoint} does not answer") from error
    except (*_NETWORK, ValueError) as error:
        raise ServerUnreachableError(f"{endpoint}: {getattr(error, 'strerror', None) or error}") from error
    return stream


async def _dial_tls(endpoint: TcpEndpoint, tls: TlsSettings) -> TlsStream:
    stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
    try:
        return await secured(stream, tls, endpoint.host, PROTOCOL)
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, TlsError | ServerUnreachableError):
            raise type(error)(f"{endpoint}: {error}") from error
        raise


async def first_bytes(stream: Stream, count: int, seconds: float = DIAL_SECONDS) -> bytes:
    """So many bytes, no more, from a connection's begin.

    Raises:
        RemoteProtocolError: it ended or fell silent before.
    """
    data = b""
    try:
        with trio.fail_after(seconds):
            while len(data) < count:
                more = await stream.receive_some(count - len(data))
                if not more:
                    break
                data += more
    except (*_NETWORK, trio.TooSlowError):
        pass
    if len(data) < count:
        raise RemoteProtocolError("a connection ended, or fell silent, before it said what it is")
    return data
