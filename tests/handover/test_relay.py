"""The device state from one emulator's socket to the other's, over a connection that may break in the midst of it."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from lazymem.errors import MonitorError, SaveStreamError
from lazymem.handover.relay import Outgoing, bring_in, widen
from lazymem.handover.statepieces import MAX_PIECE_BYTES

STATE = random.Random(3).randbytes(700_000) + bytes(5 << 20) + b"the end"


def _listener(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(str(path))
    found.listen(1)
    return found


def _all_of(listener: socket.socket) -> bytes:
    with listener, listener.accept()[0] as connection:
        data = bytearray()
        while more := connection.recv(1 << 20):
            data += more
        return bytes(data)


def _begun(outgoing: Outgoing, folder: Path, *, takes: bool) -> socket.socket:
    """The emulator's end. `takes`: it takes one that is given to it, as QEMU does; else it connects."""
    end = outgoing.make_pair()
    if takes:
        found = end.dup()
    else:
        uri = outgoing.listen(folder / "qmp", os.geteuid())
        found = socket.socket(socket.AF_UNIX)
        found.connect(uri.removeprefix("unix:"))
    outgoing.start()
    return found


def _written(emulator: socket.socket, data: bytes) -> None:
    with emulator:
        emulator.sendall(data)


def _nothing(_: int) -> None: ...


@pytest.mark.parametrize("takes", [True, False])
async def test_all_of_it_arrives_and_both_ends_count_the_same(tmp_path: Path, *, takes: bool) -> None:
    """What has arrived is told to the source, which waits for that while the guest runs."""
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours)
    got: list[bytes] = []
    received: list[int] = []

    async def load() -> None:
        got.append(await trio.to_thread.run_sync(_all_of, listener))

    try:
        listener = _listener(tmp_path / "emulator")
        emulator = _begun(outgoing, tmp_path, takes=takes)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(load)
            nursery.start_soon(bring_in, stream, tmp_path / "emulator", received.append, outgoing.pace.arrived)
            await trio.to_thread.run_sync(_written, emulator, STATE)
            outgoing.hurry()
            assert await trio.to_thread.run_sync(outgoing.wait, 30.0) == len(STATE)
    finally:
        outgoing.close()
    assert got == [STATE]
    assert received == [len(STATE)]


@pytest.mark.parametrize("ends_with", ["hurry", "cut"])
def test_no_more_is_under_way_than_the_link_takes_until_the_guest_stands(tmp_path: Path, ends_with: str) -> None:
    """Of a destination that tells of the first pieces alone. The emulator's end holds little."""
    ours, theirs = socket.socketpair()
    widen(ours)
    outgoing = Outgoing(ours)
    emulator = _begun(outgoing, tmp_path, takes=True)
    failures: list[OSError] = []

    def write() -> None:
        try:
            emulator.sendall(random.Random(5).randbytes(4 << 20))
            emulator.shutdown(socket.SHUT_WR)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        first = _taken_until_it_waits(outgoing, theirs)
        outgoing.pace.arrived(first)
        _taken_until_it_waits(outgoing, theirs)
        assert thread.is_alive()
        assert _held(emulator) < _held(ours) // 4
        if ends_with == "cut":
            _cut(outgoing, thread)
        else:
            outgoing.hurry()
            assert _held(emulator) == _held(ours)
            while theirs.recv(1 << 20):
                pass
        thread.join(60)
        assert bool(failures) is (ends_with == "cut")
    finally:
        emulator.close()
        outgoing.close()
        theirs.close()


def _cut(outgoing: Outgoing, writer: threading.Thread) -> None:
    """In such a way that whoever waits for room goes on before the one that cuts does."""
    really_open = outgoing.pace.open

    def open_and_let_go_on() -> None:
        really_open()
        writer.join(60)

    outgoing.pace.open = open_and_let_go_on  # type: ignore[method-assign]
    outgoing.cut()


def _held(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


async def test_where_the_link_is_never_the_slower_one_more_is_held(tmp_path: Path) -> None:
    """Of zeros hardly anything is left for it."""
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours)
    emulator = _begun(outgoing, tmp_path, takes=True)
    held = _held(emulator)
    try:
        await trio.to_thread.run_sync(emulator.sendall, bytes(4 << 20))
        assert _held(emulator) > 4 * held
    finally:
        emulator.close()
        outgoing.close()
        theirs.close()


def _taken_until_it_waits(outgoing: Outgoing, theirs: socket.socket) -> int:
    """How much: one piece, which may be larger than the window, or twice that, as a link may hold more than it did."""
    taken = 0
    theirs.setblocking(False)
    while not (taken and outgoing.pace.waiting):
        time.sleep(0.001)
        with suppress(BlockingIOError):
            taken += len(theirs.recv(1 << 20))
    theirs.setblocking(True)
    assert taken <= 3 * MAX_PIECE_BYTES
    return taken


async def test_a_connection_that_ends_in_good_order_before_the_state_does(tmp_path: Path) -> None:
    """The kernel ends a killed source's so: what came is not all of it, and nobody counts it as such."""
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours)
    received: list[int] = []
    listener = _listener(tmp_path / "emulator")
    emulator = _begun(outgoing, tmp_path, takes=False)
    try:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream:
            ours.shutdown(socket.SHUT_WR)
            with pytest.raises(SaveStreamError, match="broke off after 0 bytes"):
                await bring_in(stream, tmp_path / "emulator", received.append, _nothing)
            with suppress(OSError):
                await trio.to_thread.run_sync(_written, emulator, STATE)
            with pytest.raises(MonitorError, match="the way to the destination broke"):
                await trio.to_thread.run_sync(outgoing.wait, 30.0)
    finally:
        outgoing.close()
        listener.close()
    assert not received
