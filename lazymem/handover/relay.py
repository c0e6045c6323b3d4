"""Device state on its way from emulator to emulator: through both processes of a hand-over, never on a disk.

The source's emulator writes into a unix socket; a thread hands that on to the connection, in compressed pieces
(`statepieces`), and not faster than they arrive while the guest runs (`pace`). At the destination a task reads ahead of
the emulator there, which may wait for a page of RAM in the middle of its load while the source still waits to have sent
everything.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from lazymem.errors import MonitorError, SaveStreamError
from lazymem.handover.candidates import Reference
from lazymem.handover.channel import Stream
from lazymem.handover.pace import Pace
from lazymem.handover.screenahead import ScreenAhead
from lazymem.handover.screenstream import ScreenStream
from lazymem.handover.statepieces import Packer, Unpacker
from lazymem.tls.stream import TlsSocket, TlsStream

_READ_BYTES = 64 * 1024
"""Of a connection at a time."""

_MAX_SOCKET_PATH = 107

_HELD_BYTES = 16 * 1024
"""Between the source's emulator and us while its guest runs: what is in there when it stops is in the way of what has
to go then."""

_HELD_BYTES_FAST = 104 * 1024
"""The same as long as the link was never the slower one: fewer turns of two processes. As much as any socket has (the
kernel doubles both for its own needs)."""

_FAST_PIECES = 8
"""So many without a wait for the link, and it is fast. A guest without a screen is done by then."""

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python names it from 3.13 on
_AHEAD_BYTES = 4 << 20
"""In the kernel, before an emulator that loads: a screen."""

_AHEAD_CHUNKS = 256
"""64 MiB at most between the two sockets of the receiver, and much less of what comes as it is, by segments: devices
are some MiB, and a framebuffer is taken at once."""


class Outgoing:
    """Hands what one emulator sends on to `target`, which it then owns: at a `pace` as long as the guest runs.

    The emulator gets an end of `make_pair`, or makes a connection itself to where this does `listen`; then `start`.
    """

    def __init__(self, target: socket.socket | TlsSocket) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._target = target
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._connection: socket.socket | None = None
        self._emulators: socket.socket | None = None
        self._packer = Packer()
        self._thread = threading.Thread(target=self._relay, name="device state", daemon=True)
        self._switching = threading.Lock()
        self.pace = Pace()
        self.sent_bytes = 0
        self.failure: OSError | None = None
        self._screen = ScreenStream()
        self.ahead = ScreenAhead(self._screen, self.pace, self._let_emulator_write)
        self._free_pieces = 0
        self._packed_bytes = 0
        self._is_wide = False

    def make_pair(self) -> socket.socket:
        """The end that an emulator may have a copy of."""
        self._connection, self._emulators = socket.socketpair()
        self._hold(_HELD_BYTES)
        return self._emulators

    def listen(self, beside: Path, for_user: int) -> str:
        """The URI of a fresh unix socket, for an emulator that takes nothing of `make_pair`. As much as the kernel
        gives to any such connection is held there, 208 KiB.

        Raises:
            MonitorError: there can be none.
        """
        self._close_pair()
        path = self._path = self._choose_path(beside)
        listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            os.chmod(path, 0o600)
            if os.geteuid() == 0 and for_user != 0:
                os.chown(path, for_user, -1)
            listener.listen(1)
        except OSError as error:
            raise MonitorError(f"cannot take the emulator's state at {path}: {error.strerror}") from error
        return f"unix:{path}"

    def start(self) -> None:
        self._thread.start()

    def hurry(self) -> None:
        """The guest stands, or nothing more is to come: all goes as fast as it can. Also a second time."""
        self.pace.open()
        self.ahead.let_go()
        with self._switching:
            if self._emulators is not None:
                widen(self._emulators)
                self._emulators.close()  # its copy is the emulator's alone now, whose end is that of the connection
                self._emulators = None

    def _let_emulator_write(self) -> None:
        """All that is left of its state, whether or not we read."""
        with self._switching:
            self._is_wide = True
            if self._emulators is not None:
                widen(self._emulators)

    def _choose_path(self, beside: Path) -> Path:
        """Beside the monitor's, a folder that the emulator sees, too."""
        path = Path(os.path.abspath(beside)).parent / f".lazymem-send-{secrets.token_hex(4)}"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH and os.access(path.parent, os.W_OK):
            return path
        self._folder = tempfile.TemporaryDirectory(prefix="lazymem-", dir="/tmp")
        os.chmod(self._folder.name, 0o711)
        return Path(self._folder.name, "state")

    def _relay(self) -> None:
        try:
            if self._connection is None:
                assert self._listener is not None
                self._connection, _ = self._listener.accept()
            is_ahead_sent = False
            while data := self._connection.recv(self._screen.room):
                self._hand_on(*self._screen.take(data))
                if self._screen.is_past and not is_ahead_sent:
                    self.ahead.hold(self._packed_bytes, self._hand_on_ahead)
                    is_ahead_sent = True
            self._hand_on(self._screen.rest(), [])
            self._target.sendall(self._packer.end())
            self._target.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.failure = error
            # The emulator has to notice, and lets its guest go on.
            for sock in (self._connection, self._target):
                if sock is not None:
                    _shut_down(sock)

    def _hand_on(self, data: bytes, found: Sequence[Reference]) -> None:
        """Of the stream; `found`: candidates in it."""
        if not data:
            return
        piece = self._packer.pack_referring(data, found) if found else self._packer.pack(data)
        waited = self.pace.begin(len(piece))
        self._free_pieces += 1
        if waited or self._free_pieces == _FAST_PIECES:
            self._hold(_HELD_BYTES if waited or self._screen.is_watched else _HELD_BYTES_FAST)
            self._free_pieces = _FAST_PIECES
        self._target.sendall(piece)
        self._packed_bytes += len(piece)
        self.sent_bytes += len(data)

    def _hand_on_ahead(self, offset: int, data: bytes) -> int:
        """Pages of the screen, as candidates; how many bytes that was."""
        piece = self._packer.pack_candidates(offset, data)
        self.pace.begin(len(piece))
        self._target.sendall(piece)
        self._screen.candidates.keep(offset, data)
        return len(piece)

    def _hold(self, count: int) -> None:
        """At most so much between the emulator and us, as long as we have its end."""
        with self._switching:
            if self._emulators is not None and not self._is_wide:
                self._emulators.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, count)

    def wait(self, seconds: float) -> int:
        """Once all is handed on: how many bytes.

        Raises:
            MonitorError: the connection broke, or it takes too long.
        """
        self._thread.join(seconds)
        if self.failure is not None:
            raise MonitorError(f"the way to the destination broke: {self.failure.strerror or self.failure}")
        if self._thread.is_alive():
            raise MonitorError("the emulator did not end its state")
        return self.sent_bytes

    def is_all_but_there(self, seconds: float) -> bool:
        """As of `pace`, once all is handed on."""
        return self.failure is None and self.pace.is_all_but_there(seconds)

    def cut(self) -> None:
        """End it now, from another thread: whoever writes or waits gets an error."""
        for sock in (self._listener, self._connection, self._target):
            if sock is not None:
                _shut_down(sock)
        self.pace.open()  # behind that: who waits there is to find it shut
        self.ahead.let_go()

    def close(self) -> None:
        self.cut()
        if self._thread.ident is not None:
            self._thread.join()
        self._close_pair()
        self._target.close()
        if self._listener is not None:
            self._listener.close()
        with suppress(OSError):  # a socket's name that is left is no reason to end in an error
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            if self._folder is not None:
                self._folder.cleanup()

    def _close_pair(self) -> None:
        for sock in (self._connection, self._emulators):
            if sock is not None:
                sock.close()
        self._connection = self._emulators = None


def _shut_down(sock: socket.socket | TlsSocket) -> None:
    with suppress(OSError):  # not connected, or closed: then nobody waits in it
        sock.shutdown(socket.SHUT_RDWR)


def as_plain_socket(stream: Stream) -> socket.socket | TlsSocket:
    """The stream's socket, blocking and on its own; the stream is of no more use."""
    if isinstance(stream, TlsStream):
        return stream.as_plain_socket()
    plain = socket.socket(fileno=os.dup(stream.socket.fileno()))
    plain.setblocking(True)
    return plain


async def bring_in(
    source: Stream, emulator: Path, on_received: Callable[[int], None], on_arrived: Callable[[int], None]
) -> None:
    """All that comes, into the emulator that listens on the unix socket. `on_received` gets the number of bytes when
    the last one is here, which may be long before the emulator has taken it; `on_arrived` after each piece how much has
    come over the connection by then.

    Raises:
        SaveStreamError: the connection broke.
        MonitorError: the emulator does not listen there.
    """
    try:
        target = await trio.open_unix_socket(str(emulator))
    except OSError as error:
        raise MonitorError(f"the emulator does not take its state: {error.strerror}") from error
    widen(target.socket)
    send, receive = trio.open_memory_channel[bytes](_AHEAD_CHUNKS)
    broke: BaseException | None = None
    pieces = Unpacker()
    count = arrived = 0
    async with target, trio.open_nursery() as nursery:
        nursery.start_soon(_feed, receive, target)
        async with send:
            try:
                while not pieces.ended:
                    data = await source.receive_some(_READ_BYTES)
                    if not data:
                        raise SaveStreamError("its connection ended")
                    arrived += len(data)
                    on_arrived(arrived)
                    for piece in pieces.feed(data):
                        count += len(piece)
                        await send.send(piece)
            except (trio.BrokenResourceError, trio.ClosedResourceError, SaveStreamError) as error:
                broke = error
        if broke is None:
            on_received(count)
        else:
            nursery.cancel_scope.cancel()  # the emulator sees its state end in the middle
    if broke is not None:
        raise SaveStreamError(f"the device state broke off after {count} bytes: {broke}") from broke


def widen(target: trio.socket.SocketType | socket.socket) -> None:
    """Let it hold more than the kernel's 208 KiB, after which two processes would take turns. As much as we may."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        with suppress(OSError):
            target.setsockopt(socket.SOL_SOCKET, option, _AHEAD_BYTES)
            return


async def _feed(receive: trio.MemoryReceiveChannel[bytes], target: trio.SocketStream) -> None:
    """An emulator that takes no more has refused its state, or has all that it wants: whoever waits for it knows."""
    async with receive:
        takes = True
        async for data in receive:
            if takes:
                takes = await _taken(target.send_all(data))
        if takes:
            await _taken(target.send_eof())


async def _taken(step: Awaitable[None]) -> bool:
    try:
        await step
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    return True
