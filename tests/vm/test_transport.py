"""Where streams go and come from: a file is whole or absent, a peer is bounded, a socket is nobody else's."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lazymem.errors import MonitorError, SaveStreamError
from lazymem.vm.transport import Address, listen_unix, open_output, receive
from lazymem.vm.uri import FileUri, TcpUri, UnixUri, Uri, parse_uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("file:/a b:c", FileUri(Path("/a b:c"))),
        ("unix:x", UnixUri(Path("x"))),
        ("tcp:host:7", TcpUri("host", 7)),
        ("tcp:[::1]:65535", TcpUri("::1", 65535)),
        ("tcp::9", TcpUri("0.0.0.0", 9)),
    ],
)
def test_places(text: str, uri: Uri) -> None:
    assert parse_uri(text) == uri


@pytest.mark.parametrize("text", ["", "file", "file:", "fd:3", "tcp:h", "tcp:h:", "tcp:h:65536", "tcp:h:+1", "tcp:h:٣"])
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(MonitorError, match="no place for a save stream"):
        parse_uri(text)


async def save(path: Path, *parts: bytes) -> None:
    output = await open_output(FileUri(path))
    try:
        for part in parts:
            await output.send(part)
        await output.commit()
    except OSError:
        await output.abort()
        raise


async def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "vmstate"
    output = await open_output(FileUri(target))
    await output.send(b"one")
    assert not await trio.Path(target).exists()
    await output.send(b"two")
    await output.commit()
    assert await trio.Path(target).read_bytes() == b"onetwo"
    assert os.listdir(tmp_path) == ["vmstate"]


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
@pytest.mark.parametrize("before", [None, b"an older stream"])
async def test_whatever_fails_the_file_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: bytes | None
) -> None:
    target = tmp_path / "vmstate"
    if before is not None:
        await trio.Path(target).write_bytes(before)
    real: Callable[..., Any] = getattr(os, name)
    calls = 0
    for failing in range(1, 4):
        calls = 0

        def fails(*arguments: Any, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, name, fails)
            try:
                await save(target, b"one", b"two")
            except OSError:
                assert os.listdir(tmp_path) == ([] if before is None else ["vmstate"])
                assert before is None or await trio.Path(target).read_bytes() == before
            else:
                assert calls < failing
                break
    assert await trio.Path(target).read_bytes() == b"onetwo"


async def test_a_fifo_is_written_directly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    await save(tmp_path / "fifo", b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)


async def received(uri: Uri, max_bytes: int, send: Callable[[trio.SocketStream], Any]) -> bytes:
    """What `receive` gets from a peer that does `send` and closes."""
    found: list[bytes] = []
    address: list[Address] = []
    listening = trio.Event()

    def on_listening(where: Address) -> None:
        address.append(where)
        listening.set()

    async with trio.open_nursery() as nursery:

        async def take() -> None:
            found.append(await receive(uri, max_bytes, on_listening))

        nursery.start_soon(take)
        await listening.wait()
        if address[0]["type"] == "unix":
            stream = await trio.open_unix_socket(address[0]["path"])
        else:
            stream = await trio.open_tcp_stream(address[0]["host"], int(address[0]["port"]))
        async with stream:
            await send(stream)
    return found[0]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_stream_comes_in_whole(tmp_path: Path, kind: str) -> None:
    uri: Uri = UnixUri(tmp_path / "s") if kind == "unix" else TcpUri("127.0.0.1", 0)
    data = os.urandom(1_000_000)
    assert await received(uri, len(data), lambda stream: stream.send_all(data)) == data
    assert os.listdir(tmp_path) == []


async def test_a_stream_without_end_is_cut_off(tmp_path: Path) -> None:
    async def pour(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(bytes(100_000))

    with pytest.RaisesGroup(pytest.RaisesExc(SaveStreamError, match="more than the 1000000 bytes")):
        await received(UnixUri(tmp_path / "s"), 1_000_000, pour)


async def test_a_peer_that_resets_is_told_of() -> None:
    async def reset(stream: trio.SocketStream) -> None:
        await stream.send_all(b"some")
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    with pytest.RaisesGroup(pytest.RaisesExc(SaveStreamError, match="broke off")):
        await received(TcpUri("127.0.0.1", 0), 1_000_000, reset)


async def test_a_file_is_bounded_too(tmp_path: Path) -> None:
    await trio.Path(tmp_path / "long").write_bytes(bytes(101))
    assert await receive(FileUri(tmp_path / "long"), 101, lambda _: None) == bytes(101)
    with pytest.raises(SaveStreamError, match="more than the 100 bytes"):
        await receive(FileUri(tmp_path / "long"), 100, lambda _: None)


async def test_a_socket_that_can_be_seen_can_be_connected_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its name only once it listens."""
    path = tmp_path / "s"
    real = os.chmod

    def chmod(where: Path, mode: int) -> None:
        assert not path.exists()
        real(where, mode)

    monkeypatch.setattr(os, "chmod", chmod)
    listener = await listen_unix(path)
    stream = await trio.open_unix_socket(str(path))
    await stream.aclose()
    await listener.aclose()
    assert os.listdir(tmp_path) == ["s"]


async def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    await trio.Path(tmp_path / "s").write_bytes(b"a file")
    with pytest.raises(OSError, match="in use"):
        await listen_unix(tmp_path / "s")
    assert await trio.Path(tmp_path / "s").read_bytes() == b"a file"
    assert os.listdir(tmp_path) == ["s"]


async def test_a_cancelled_wait_for_a_peer_leaves_no_socket(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        await receive(UnixUri(tmp_path / "state"), 100, lambda _: scope.cancel())
    assert scope.cancelled_caught
    assert os.listdir(tmp_path) == []
