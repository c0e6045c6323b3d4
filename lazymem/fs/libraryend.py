"""The socket pair between the channel and pyfuse3, which takes its end for `/dev/fuse` (record 0006).

What is not the channel's goes there whole, and whatever comes back goes to the kernel. All state belongs to trio's
thread.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable

import trio

from lazymem.fs import fuseabi
from lazymem.fs.agreement import Agreement

log = logging.getLogger(__name__)

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python has no name for it


def _let_send(end: socket.socket, size: int) -> None:
    """Messages of `size` bytes: what is larger than its buffer a socket refuses, and that READ would have no answer."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
    except OSError:  # no CAP_NET_ADMIN: as much as the host allows, 416 KiB by default
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


class LibraryEnd:
    """`maybe_agreement`: what another daemon agreed on with the kernel. `send`: gives the kernel an answer."""

    def __init__(
        self, maybe_agreement: Agreement | None, send: Callable[[tuple[bytes | memoryview, ...]], None]
    ) -> None:
        self._agreement = maybe_agreement
        self._send = send
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        _let_send(self._theirs, 2 * fuseabi.REQUEST_BYTES)

    def take_descriptor(self) -> int:
        """What pyfuse3 takes for `/dev/fuse`; it closes it. To be called once."""
        return self._theirs.detach()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def hand_over(self, opcode: int, request: bytes, nursery: trio.Nursery | None) -> None:
        """A whole request of the kernel's. Names and attributes depend on nothing and change nothing, so those that
        find no room may come later than others."""
        if opcode == fuseabi.INIT:
            maybe_answer = self._agreement.maybe_answer(request) if self._agreement is not None else None
            if maybe_answer is not None:
                self._send((maybe_answer,))
                return
            request = fuseabi.without_splice(request)
        try:
            self._ours.send(request)
        except BlockingIOError:
            if nursery is not None:
                nursery.start_soon(self._hand_over_later, request)
        except OSError as error:
            log.error("pyfuse3 takes no request any more: %s", error)

    def repeat(self, init: bytes) -> None:
        """Have pyfuse3 agree again on what a daemon before us agreed on."""
        self._ours.send(fuseabi.without_splice(init))

    async def bring_answers(self) -> None:
        """Until cancelled: what pyfuse3 answers goes to the kernel."""
        view = memoryview(bytearray(fuseabi.REQUEST_BYTES))
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            with contextlib.suppress(BlockingIOError):
                length = self._ours.recv_into(view)
                if length and not (self._agreement is not None and self._agreement.takes(view[:length])):
                    self._send((view[:length],))

    async def _hand_over_later(self, request: bytes) -> None:
        while True:
            await trio.lowlevel.wait_writable(self._ours)
            try:
                self._ours.send(request)
                return
            except BlockingIOError:
                continue
