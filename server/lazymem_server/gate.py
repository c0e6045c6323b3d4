"""Who comes in: over TCP with TLS and a certificate of our authority, over Unix sockets as a user of this host.

A stranger costs a place among the handshakes for a few seconds, and a line in the log. He learns what TLS itself tells,
and nothing about snapshots.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

import trio

from lazymem.errors import TlsError
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import Contexts
from lazymem.tls.failures import Side
from lazymem.tls.pipe import TlsPipe
from lazymem.tls.stream import TlsStream
from lazymem.wire.connection import ServerConnection
from lazymem.wire.messages import Error, ErrorCode
from lazymem_server.allowed import Allowed, CatalogForOne
from lazymem_server.catalog import Catalog, Published
from lazymem_server.ending import SessionEnd, say_last
from lazymem_server.fewlines import FewLines
from lazymem_server.handshakes import Handshakes
from lazymem_server.identity import certificate_identities, user_identities
from lazymem_server.limits import ServerLimits
from lazymem_server.output import Piece

log = logging.getLogger("lazymem.server")

RECEIVE_BYTES = 16 * 1024

TLS_BEGINS = b"\x16\x03"
"""A handshake record (RFC 8446, 5.1). A HELLO without TLS begins with its length, which is under 512."""

SPEAKS_TLS = "this server speaks TLS: give lazymem-mount --tls-cert, --tls-key and --tls-ca (lazymem pki makes them)"


class Admitted:
    """A client that may say hello. `read` and `writev` are as those of `os`, but for what TLS adds; `begun` is what it
    has said already, and `sealed` makes of a last frame what the socket has to carry."""

    def __init__(self, peer: str, published: Published) -> None:
        self.peer = peer
        self.published = published
        self.read: Callable[[int, int], bytes] = os.read
        self.writev: Callable[[int, Sequence[Piece]], int] = os.writev
        self.begun = b""
        self.sealed: Callable[[bytes], bytes] = bytes
        self.maybe_stream: TlsStream | None = None
        """Of a client that speaks another protocol than the pages'."""

    def through(self, pipe: TlsPipe) -> None:
        """The socket carries TLS. Raises TlsError."""
        self.read = partial(_read, pipe)
        self.writev = partial(_writev, pipe)
        self.begun = pipe.take()
        self.sealed = pipe.sealed


def plaintext_refusal(heard: bytes) -> bytes:
    return ServerConnection().send(Error(0, ErrorCode.UNSUPPORTED_VERSION, SPEAKS_TLS))


class Gate:
    """`stop` ends every handshake."""

    def __init__(
        self,
        tls: TlsSettings,
        allowed: Allowed,
        limits: ServerLimits,
        protocol: str = "",
        plaintext_refusal: Callable[[bytes], bytes] = plaintext_refusal,
    ) -> None:
        """`protocol`: what some clients speak instead of the pages' protocol. `plaintext_refusal`: what a client
        without TLS is told, by what it said first.

        Raises:
            UsageError: a file of `tls` cannot be used.
        """
        self._contexts = Contexts(tls, Side.SERVER, protocol)
        self._contexts.current()
        self._allowed = allowed
        self._plaintext_refusal = plaintext_refusal
        self._limits = limits
        self._log = FewLines()
        self.handshakes = Handshakes(limits.max_handshakes, limits.handshake_seconds)

    def stop(self) -> None:
        self.handshakes.end_all()

    async def maybe_admitted(
        self, stream: trio.SocketStream, host: str, peer: str, catalog: Catalog
    ) -> Admitted | None:
        """The client at the other end, if it is one; None: it was told what it could be told."""
        if stream.socket.family == socket.AF_UNIX:
            return self._local(stream, peer, catalog)
        pipe = TlsPipe(self._contexts.current(), Side.SERVER)
        with self.handshakes.begun(host) as handshake:
            if not await self._shake_hands(stream, pipe, peer):
                return None
        if handshake.scope.cancelled_caught:
            why = "too many handshakes" if handshake.evicted else f"no TLS in {self._limits.handshake_seconds:g} s"
            self._log.warning("%s: dropped: %s", peer, why)
            return None
        identities = certificate_identities(pipe.peer_certificate())
        peer = f"{peer} ({', '.join(identities) or 'no name'})"
        admitted = Admitted(peer, CatalogForOne(catalog, self._allowed, identities, peer))
        if pipe.protocol is not None:
            admitted.maybe_stream = TlsStream(stream, pipe, identities)
            return admitted
        try:
            admitted.through(pipe)
        except TlsError as error:
            self._log.warning("%s: refused: %s", peer, error)
            return None
        return admitted

    def _local(self, stream: trio.SocketStream, peer: str, catalog: Catalog) -> Admitted:
        identities = user_identities(stream.socket)  # type: ignore[arg-type]  # trio's own has the same getsockopt
        if identities is None:
            return Admitted(peer, catalog)
        peer = f"{peer} ({identities[0]})"
        return Admitted(peer, CatalogForOne(catalog, self._allowed, identities, peer))

    async def _shake_hands(self, stream: trio.SocketStream, pipe: TlsPipe, peer: str) -> bool:
        """Whether the handshake is complete; else why not is said."""
        heard = b""
        try:
            while not pipe.handshake():
                await stream.send_all(pipe.outgoing)
                data = bytes(await stream.receive_some(RECEIVE_BYTES))
                if not data:
                    log.debug("%s: left before TLS began", peer)
                    return False
                heard = heard or data
                if heard[:2] not in (TLS_BEGINS, TLS_BEGINS[:1]):
                    self._log.warning("%s: refused: it does not speak TLS", peer)
                    await say_last(stream, self._plaintext_refusal(heard), self._limits.farewell_seconds)
                    return False
                pipe.feed(data)
            await stream.send_all(pipe.outgoing)
        except TlsError as error:
            self._log.warning("%s: refused: %s", peer, error)
            await say_last(stream, pipe.outgoing, self._limits.farewell_seconds)
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("%s: left during the TLS handshake", peer)
            return False
        return True


def _read(pipe: TlsPipe, fd: int, size: int) -> bytes:
    ciphertext = os.read(fd, size)
    if not ciphertext:
        return b""
    pipe.feed(ciphertext)
    try:
        data = pipe.take()
    except TlsError as error:
        raise SessionEnd(f"dropped: {error}") from error
    if not data and not pipe.ended:
        raise BlockingIOError
    return data


def _writev(pipe: TlsPipe, fd: int, pieces: Sequence[Piece]) -> int:
    return pipe.offer(pieces, partial(_send, fd))


def _send(fd: int, ciphertext: bytes | memoryview) -> int:
    try:
        return os.write(fd, ciphertext)
    except BlockingIOError:
        return 0
