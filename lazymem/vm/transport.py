"""Where save streams go to and come from: file:PATH, tcp:HOST:PORT, unix:PATH.

A file is written under another name beside its place and renamed when it is whole and on storage: a stream is there
whole or not at all. A stream that comes in is held in memory, bounded by what the machine's stream can be at most.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import trio

from lazymem.errors import LazymemError, MonitorError, SaveStreamError
from lazymem.vm.uri import FileUri, TcpUri, UnixUri, Uri

_CHUNK_BYTES = 256 * 1024


def _reason(error: OSError | ValueError) -> str:
    """ValueError: a path with a NUL, a host name that cannot be one (UnicodeError), a text that is no path."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


class Output(Protocol):
    """Where a stream goes. `commit` when it is whole, `abort` when not: exactly one of them, as the last call."""

    async def send(self, data: bytes) -> None: ...

    async def commit(self) -> None: ...

    async def abort(self) -> None: ...


async def open_output(uri: Uri) -> Output:
    """Open or connect.

    Raises:
        MonitorError: with the reason.
    """
    try:
        if isinstance(uri, FileUri):
            return await trio.to_thread.run_sync(FileOutput, uri.path)
        if isinstance(uri, UnixUri):
            return StreamOutput(await trio.open_unix_socket(str(uri.path)))
        return StreamOutput(await trio.open_tcp_stream(uri.host, uri.port))
    except (OSError, ValueError) as error:
        raise MonitorError(f"cannot save to {uri}: {_reason(error)}") from error


class FileOutput:
    """A file, whole or absent. What is there and is no regular file (a FIFO, /dev/fd/N) is written directly."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial: Path | None = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                self._partial = None
        if self._partial is None:
            self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        else:
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    async def send(self, data: bytes) -> None:
        await trio.to_thread.run_sync(self._write, data)

    async def commit(self) -> None:
        await trio.to_thread.run_sync(self._finish)

    async def abort(self) -> None:
        os.close(self._fd)
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _finish(self) -> None:
        if self._partial is not None:
            os.fsync(self._fd)
            os.rename(self._partial, self._path)
        os.close(self._fd)


class StreamOutput:
    """A socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise MonitorError("the receiving side went away") from error

    async def commit(self) -> None:
        await self._stream.aclose()

    async def abort(self) -> None:
        await trio.aclose_forcefully(self._stream)


Address = dict[str, str]
"""As in QMP's query-migrate: {"type": "inet", "host", "port"} or {"type": "unix", "path"}."""


async def receive(uri: Uri, max_bytes: int, on_listening: Callable[[Address], None]) -> bytes:
    """A whole stream. Sockets: waits for one peer, without bound as QEMU does, and reads until it closes.

    Raises:
        MonitorError: no such file, cannot listen.
        SaveStreamError: longer than `max_bytes`, or the peer broke off.
    """
    try:
        if isinstance(uri, FileUri):
            return await trio.to_thread.run_sync(_read_file, uri.path, max_bytes)
        listener = await _listen(uri)
    except (OSError, ValueError) as error:
        raise MonitorError(f"cannot read the save stream from {uri}: {_reason(error)}") from error
    try:
        on_listening(_address(listener, uri))
        stream = await listener.accept()
    finally:
        # First, since closing is a checkpoint: a cancellation would leave the socket there.
        if isinstance(uri, UnixUri):
            uri.path.unlink(missing_ok=True)
        await listener.aclose()
    async with stream:
        return await _read_all(stream, max_bytes)


def _read_file(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise _too_long(max_bytes)
    return data


async def _read_all(stream: trio.SocketStream, max_bytes: int) -> bytes:
    data = bytearray()
    try:
        while chunk := await stream.receive_some(_CHUNK_BYTES):
            data += chunk
            if len(data) > max_bytes:
                raise _too_long(max_bytes)
    except trio.BrokenResourceError as error:
        raise SaveStreamError(f"the save stream broke off after {len(data)} bytes") from error
    return bytes(data)


def _too_long(max_bytes: int) -> LazymemError:
    return SaveStreamError(f"the save stream has more than the {max_bytes} bytes that any of this machine has")


async def _listen(uri: TcpUri | UnixUri) -> trio.SocketListener:
    if isinstance(uri, UnixUri):
        return await listen_unix(uri.path)
    return (await trio.open_tcp_listeners(uri.port, host=uri.host))[0]


async def listen_unix(path: Path) -> trio.SocketListener:
    """A listening unix socket for this user only. One that a dead process left is replaced, a live one is not.

    Raises:
        OSError: the path is in use, or cannot be made.
    """
    await _refuse_live(path)
    # Under another name until it listens: who waits for the path to appear can connect at once.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.bind(str(unfinished))
        os.chmod(unfinished, 0o600)
        sock.listen(8)
        os.rename(unfinished, path)
    except BaseException:
        sock.close()
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    return trio.SocketListener(sock)


async def _refuse_live(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode) or await _somebody_listens(path):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


async def _somebody_listens(path: Path) -> bool:
    try:
        stream = await trio.open_unix_socket(str(path))
    except ConnectionRefusedError:
        return False
    await stream.aclose()
    return True


def _address(listener: trio.SocketListener, uri: TcpUri | UnixUri) -> Address:
    if isinstance(uri, UnixUri):
        return {"type": "unix", "path": str(uri.path)}
    host, port = listener.socket.getsockname()[:2]
    return {"type": "inet", "host": str(host), "port": str(port)}
