"""One TLS connection without its socket: ciphertext in, bytes out, and the other way round. No sockets, no clocks.

Whatever was fed is taken out whole: after `take` nothing that could be decrypted is left inside, so a socket that is
not readable means that there is nothing to read, as without TLS. Whoever polls a descriptor may go on doing so.

A socket may take a part of a record only. The rest is kept here, and the last byte of what was offered counts as not
taken until that has left; so "all taken" means that the kernel has it all, and who waits for room needs no other rule.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence

from lazymem.errors import LazymemError
from lazymem.tls.failures import Side, translated

RECORD_BYTES = 16384
"""Most of a TLS record's plaintext (RFC 8446, 5.1): what one call can bring out."""

SEAL_BYTES = 64 * 1024
"""Encrypted at a time: all of it has to leave before anything else, so no more than a bulk frame's piece."""

Send = Callable[[bytes | memoryview], int]
"""Hands ciphertext to the kernel; how many bytes it took, 0 if it has no room. Raises OSError."""


class TlsPipe:
    """Begin with `handshake`, until that is True."""

    def __init__(self, context: ssl.SSLContext, side: Side, server_name: str | None = None) -> None:
        """`side`: whose end this is. `server_name`: what the peer's certificate must be for (a client's end)."""
        self.ended = False
        """The peer said that nothing more comes."""
        self._side = side
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=side is Side.SERVER, server_hostname=server_name
        )
        self._waiting: memoryview | None = None
        self._owed = 0

    # ---- in

    def handshake(self) -> bool:
        """Whether it is complete; else the peer has to be heard first. In any case send what is `outgoing`.

        Raises:
            TlsError: it fails for good.
        """
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise self._translated(error) from error
        return True

    def feed(self, ciphertext: bytes) -> None:
        """What came from the socket; not the end of the stream."""
        self._incoming.write(ciphertext)

    def take(self) -> bytes:
        """All that could be decrypted; nothing if that is not a whole record yet, or `ended`.

        Raises:
            TlsError: the peer refuses us, or sent what is no TLS.
        """
        incoming, read = self._incoming, self._object.read
        pieces = []
        try:
            while incoming.pending:
                data = read(RECORD_BYTES)
                if not data:
                    self.ended = True
                    break
                pieces.append(data)
        except ssl.SSLWantReadError:  # a part of a record, which is kept inside
            pass
        except ssl.SSLError as error:
            raise self._translated(error) from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def peer_certificate(self) -> dict[str, object]:
        """As `ssl.SSLSocket.getpeercert`, after the handshake."""
        return dict(self._object.getpeercert() or {})

    @property
    def protocol(self) -> str | None:
        """What both sides speak, by ALPN (RFC 7301); None: the client named nothing, or nothing that is known here."""
        return self._object.selected_alpn_protocol()

    # ---- out

    @property
    def outgoing(self) -> bytes:
        """What the handshake, or its failure, has to tell the peer. Taken by being read."""
        return self._outgoing.read()

    def sealed(self, data: bytes) -> bytes:
        """The last words: `data` and whatever was kept, encrypted, for one who sends all of it."""
        kept = bytes(self._waiting or b"")
        self._waiting = None
        if data:
            self._encrypt(memoryview(data))
        return kept + self._outgoing.read()

    def offer(self, pieces: Sequence[bytes | memoryview], send: Send) -> int:
        """As writev(2) on a socket that does not block: how many bytes of `pieces` were taken, from their beginning.

        What was not taken is offered again, first and unchanged, before anything else.

        Raises:
            OSError: from `send`.
        """
        if self._waiting is not None and not self._push(send):
            return 0
        data = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        position, self._owed = self._owed, 0
        while position < len(data):
            chunk = data[position : position + SEAL_BYTES]
            self._encrypt(chunk)
            position += len(chunk)
            self._waiting = memoryview(self._outgoing.read())
            if not self._push(send):
                self._owed = 1
                break
        return position - self._owed

    def _encrypt(self, data: memoryview) -> None:
        while data:
            data = data[self._object.write(data) :]

    def _push(self, send: Send) -> bool:
        """Whether all that was encrypted has left."""
        waiting = self._waiting
        while waiting:
            count = send(waiting)
            if not count:
                self._waiting = waiting
                return False
            waiting = waiting[count:]
        self._waiting = None
        return True

    def _translated(self, error: ssl.SSLError) -> LazymemError:
        return translated(error, self._side)
