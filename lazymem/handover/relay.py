"""Device state on its way from emulator to emulator: through both processes of a hand-over, never on a disk.

The source's emulator writes into a unix socket; a thread hands that on to the connection, in compressed pieces
(`statepieces`). At the destination a task reads ahead of the emulator there, which may wait for a page of RAM in the
middle of its load while the source still waits to have sent everything.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio

from lazymem.errors import MonitorError, SaveStreamError
from lazymem.handover.channel import Stream
from lazymem.handover.statepieces import MAX_PIECE_BYTES, Packer, Unpacker
from lazymem.tls.stream import TlsSocket, TlsStream

_READ_BYTES = 64 * 1024
"""Of a connection at a time."""

_MAX_SOCKET_PATH = 107

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python names it from 3.13 on
_AHEAD_BYTES = 4 << 20
"""In the kernel, before an emulator that loads: a screen."""

_AHEAD_CHUNKS = 256
"""64 MiB at most between the two sockets of the receiver: devices are some MiB, and a framebuffer is taken at once."""


class Outgoing:
    """Listens on a fresh unix socket for one emulator, and hands what it sends on to `target`, which it then owns."""

    def __init__(self, target: socket.socket | TlsSocket, beside: Path, for_user: int) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._target = target
        self._connection: socket.socket | None = None
        self._packer = Packer()
        self.sent_bytes = 0
        self.failure: OSError | None = None
        self.path = self._choose_path(beside)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._relay, name="device state", daemon=True)
        try:
            self._listener.bind(str(self.path))
            os.chmod(self.path, 0o600)
            if os.geteuid() == 0 and for_user != 0:
                os.chown(self.path, for_user, -1)
            self._listener.listen(1)
        except OSError as error:
            self._remove()
            raise MonitorError(f"cannot take the emulator's state at {self.path}: {error.strerror}") from error
        self._thread.start()

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
            self._connection, _ = self._listener.accept()
            while data := self._connection.recv(MAX_PIECE_BYTES):
                self._target.sendall(self._packer.pack(data))
                self.sent_bytes += len(data)
            self._target.sendall(self._packer.end())
            self._target.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.failure = error
            # The emulator has to notice, and lets its guest go on.
            for sock in (self._connection, self._target):
                if sock is not None:
                    _shut_down(sock)

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

    def cut(self) -> None:
        """End it now, from another thread: whoever writes or waits gets an error."""
        for sock in (self._listener, self._connection, self._target):
            if sock is not None:
                _shut_down(sock)

    def close(self) -> None:
        self.cut()
        self._thread.join()
        for sock in (self._connection, self._target):
            if sock is not None:
                sock.close()
        self._remove()

    def _remove(self) -> None:
        self._listener.close()
        self.path.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()


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


async def bring_in(source: Stream, emulator: Path, on_received: Callable[[int], None]) -> None:
    """All that comes, into the emulator that listens on the unix socket. `on_received` gets the number of bytes when
    the last one is here, which may be long before the emulator has taken it.

    Raises:
        SaveStreamError: the connection broke.
        MonitorError: the emulator does not listen there.
    """
    try:
        target = await trio.open_unix_socket(str(emulator))
    except OSError as error:
        raise MonitorError(f"the emulator does not take its state: {error.strerror}") from error
    _widen(target.socket)
    send, receive = trio.open_memory_channel[bytes](_AHEAD_CHUNKS)
    broke: BaseException | None = None
    pieces = Unpacker()
    count = 0
    async with target, trio.open_nursery() as nursery:
        nursery.start_soon(_feed, receive, target)
        async with send:
            try:
                while not pieces.ended:
                    data = await source.receive_some(_READ_BYTES)
                    if not data:
                        raise SaveStreamError("its connection ended")
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


def _widen(target: trio.socket.SocketType) -> None:
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
