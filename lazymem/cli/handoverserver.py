"""One address for all of a hand-over: page clients go to the page server, the receiver to the sender."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import trio
from lazymem_server.allowed import ANY, parse_allowed
from lazymem_server.catalog import Catalog
from lazymem_server.fewlines import FewLines
from lazymem_server.gate import Gate, plaintext_refusal
from lazymem_server.limits import ServerLimits
from lazymem_server.listeners import Listeners
from lazymem_server.serving import Serving

from lazymem.errors import LazymemError, RemoteProtocolError
from lazymem.handover import messages
from lazymem.handover.channel import PROTOCOL, Channel, Stream, first_bytes
from lazymem.handover.receivers import Receivers
from lazymem.settings import TlsSettings
from lazymem.snapshot.liveram import LiveRam
from lazymem.snapshot.reader import SnapshotReader
from lazymem.tls.stream import TlsStream

_FIRST_SECONDS = 10.0
"""For a connection to say what it is."""

_MAX_CONNECTIONS = 32
"""Of receivers: one is taken, and a few may ask at a time and be told no."""

_MAX_REFUSED = 32
"""Of those that may not take the guest, while they are told so. They have no part in the receivers' places; more are
dropped without a word."""

_REFUSED_SECONDS = 3.0
"""For one of those to take its word and go: a round trip of any link, and a lost packet."""

_MAX_SILENT = 256
"""Connections that have not said yet what they are: more than clients and receivers that come at once, and fewer than
a process may have descriptors."""

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)

_MARK = messages.CONTROL[:2]
"""What no page client's first frame begins with: its length is under 512, so its second byte is 0 or 1."""


class LiveCatalog(Catalog):
    """What is handed over now, under the hand-over's id."""

    def __init__(self) -> None:
        self._readers = {}
        self._current: tuple[str, SnapshotReader] | None = None
        self._opened = ExitStack()

    def publish(self, name: str, ram: LiveRam) -> None:
        self._opened.enter_context(ram)  # those before it may still be read from
        self._current = name, ram

    def find(self, name: str) -> tuple[str, SnapshotReader] | None:
        current = self._current
        return current if current is not None and current[0] == name else None

    def close(self) -> None:
        self._opened.close()


class HandoverServer:
    """Fits `handover.departure.PageServer`. `receivers` is set before `run`."""

    def __init__(self, listeners: Listeners, tls: TlsSettings | None = None, allow: Sequence[str] = ()) -> None:
        """`allow`: with `tls`, the identities (as for lazymem-serve) that may take the guest; nobody else may."""
        self._catalog = LiveCatalog()
        self._allowed = parse_allowed(allow)
        self._allowed.check(())  # there is no name to say anything of
        gate = None if tls is None else Gate(tls, self._allowed, ServerLimits(), PROTOCOL, _plaintext_refusal)
        self.receivers: Receivers | None = None
        self._serving = Serving(self._catalog, listeners, ServerLimits(), maybe_divert=self._divert, maybe_gate=gate)
        self._few = FewLines()
        self._connections = 0
        self._refused = 0
        self._silent = 0

    @property
    def address(self) -> str:
        return self._serving.addresses[0]

    def publish(self, name: str, ram: LiveRam) -> None:
        self._catalog.publish(name, ram)

    def look_again(self) -> None:
        self._serving.look_again()

    async def run(self, *, task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await self._serving.run(task_status=task_status)
        finally:
            self._catalog.close()

    async def _divert(self, stream: Stream) -> bool:
        if isinstance(stream, TlsStream):  # it said what it is
            return await self._take(stream)
        if self._silent >= _MAX_SILENT:
            return True
        self._silent += 1
        is_receiver = None
        try:
            with trio.move_on_after(_FIRST_SECONDS):
                is_receiver = await _is_receiver(stream)
        finally:
            self._silent -= 1
        if not is_receiver:
            return is_receiver is None  # silent for too long: its end
        return await self._take(stream)

    async def _take(self, stream: Stream) -> bool:
        if isinstance(stream, TlsStream) and not self._allowed.permits(ANY, stream.identities):
            await self._refuse(stream)
            return True
        if self._connections >= _MAX_CONNECTIONS:
            return True
        self._connections += 1
        try:
            await self._serve(stream)
        except (LazymemError, *_BROKEN):
            pass  # it ended, or talked nonsense: its own affair
        finally:
            self._connections -= 1
        return True

    async def _refuse(self, stream: TlsStream) -> None:
        """Reads on until the other side has heard it: closing with unread data is a reset, which would overtake it."""
        who = ", ".join(stream.identities) or "a client without a name"
        self._few.warning("%s: refused: it may not take the guest (--allow)", who)
        if self._refused >= _MAX_REFUSED:
            return
        self._refused += 1
        try:
            with trio.move_on_after(_REFUSED_SECONDS), suppress(LazymemError, *_BROKEN):
                await Channel(stream).send(messages.No(f"{who} may not take this guest"))
                while await stream.receive_some():
                    pass
        finally:
            self._refused -= 1

    async def _serve(self, stream: Stream) -> None:
        assert self.receivers is not None
        if not isinstance(stream, TlsStream) and stream.socket.family in (socket.AF_INET, socket.AF_INET6):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = await first_bytes(stream, messages.MAGIC_BYTES)
        if kind == messages.CONTROL:
            await self.receivers.serve(stream)
        elif kind == messages.STATE:
            handover = (await first_bytes(stream, messages.ID_BYTES)).hex()
            await self.receivers.keep_for_state(stream, handover)
        elif kind == messages.WARM:
            handover = (await first_bytes(stream, messages.ID_BYTES)).hex()
            await self.receivers.warm(stream, handover)
        else:
            raise RemoteProtocolError("a connection that says nothing known")


def _plaintext_refusal(heard: bytes) -> bytes:
    if heard.startswith(_MARK):
        return messages.encode(messages.No("it speaks TLS: give lazymem receive --tls-cert, --tls-key and --tls-ca"))
    return plaintext_refusal(heard)


async def _is_receiver(stream: trio.SocketStream) -> bool:
    """By its first two bytes, which stay to be read."""
    try:
        while True:
            head = await stream.socket.recv(len(_MARK), socket.MSG_PEEK)
            if len(head) != 1 or not _MARK.startswith(head):
                return head == _MARK
            await trio.sleep(0.01)  # the second one is on its way, and nothing tells of it while the first is there
    except OSError:
        return False
