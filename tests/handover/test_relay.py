"""The device state from one emulator's socket to the other's, over a connection that may break in the midst of it."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest
import trio

from lazymem.errors import MonitorError, SaveStreamError
from lazymem.handover.relay import Outgoing, bring_in

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


def _write(path: Path, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as emulator:
        emulator.connect(str(path))
        emulator.sendall(data)


async def test_all_of_it_arrives_and_both_ends_count_the_same(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours, tmp_path / "qmp", os.geteuid())
    got: list[bytes] = []
    received: list[int] = []

    async def load() -> None:
        got.append(await trio.to_thread.run_sync(_all_of, listener))

    try:
        listener = _listener(tmp_path / "emulator")
        async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(load)
            nursery.start_soon(bring_in, stream, tmp_path / "emulator", received.append)
            await trio.to_thread.run_sync(_write, outgoing.path, STATE)
            assert await trio.to_thread.run_sync(outgoing.wait, 30.0) == len(STATE)
    finally:
        outgoing.close()
    assert got == [STATE]
    assert received == [len(STATE)]


async def test_a_connection_that_ends_in_good_order_before_the_state_does(tmp_path: Path) -> None:
    """The kernel ends a killed source's so: what came is not all of it, and nobody counts it as such."""
    ours, theirs = socket.socketpair()
    outgoing = Outgoing(ours, tmp_path / "qmp", os.geteuid())
    received: list[int] = []
    listener = _listener(tmp_path / "emulator")
    try:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream:
            ours.shutdown(socket.SHUT_WR)
            with pytest.raises(SaveStreamError, match="broke off after 0 bytes"):
                await bring_in(stream, tmp_path / "emulator", received.append)
            await trio.to_thread.run_sync(_write_in_vain, outgoing.path)
            with pytest.raises(MonitorError, match="the way to the destination broke"):
                await trio.to_thread.run_sync(outgoing.wait, 30.0)
    finally:
        outgoing.close()
        listener.close()
    assert not received


def _write_in_vain(path: Path) -> None:
    try:
        _write(path, STATE)
    except OSError:
        return
