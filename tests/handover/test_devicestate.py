"""A device state that is cut: before there is a connection for it, and when its connection has just come."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from lazymem.errors import MonitorError
from lazymem.handover.channel import Stream
from lazymem.handover.devicestate import StateSending
from lazymem.vm.migrationsettings import MigrationSettings


class Guest:
    """Would be stopped by `send`."""

    peer_uid = 0

    def __init__(self, folder: Path) -> None:
        self.monitor = folder / "qmp"
        self.was_sent = False

    def maybe_take(self, end: socket.socket) -> str | None:
        return None

    def send(self, uri: str, before: MigrationSettings, *_: Callable[..., None]) -> None:
        self.was_sent = True


async def _remember() -> MigrationSettings:
    await trio.lowlevel.checkpoint()
    return MigrationSettings({})


async def _refused(sending: StateSending, guest: Guest, connect: Any, remember: Any = _remember) -> None:
    with pytest.raises(MonitorError, match="broken off before"):
        await sending.send(cast(Any, guest), connect, remember, lambda _: None)


async def test_cut_while_its_connection_is_waited_for(tmp_path: Path) -> None:
    """The guest goes on at once, and no migration begins behind that."""
    sending, guest = StateSending(), Guest(tmp_path)
    sending.begin()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refused, sending, guest, trio.sleep_forever)
        await trio.testing.wait_all_tasks_blocked()
        sending.cut()
    assert not guest.was_sent


async def test_cut_in_the_moment_in_which_its_connection_comes(tmp_path: Path) -> None:
    sending, guest = StateSending(), Guest(tmp_path)
    ours, theirs = socket.socketpair()

    async def connect() -> Stream:
        await trio.lowlevel.checkpoint()
        sending.cut()
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    sending.begin()
    with ours, theirs:
        await _refused(sending, guest, connect)
    assert not guest.was_sent


@pytest.mark.parametrize("is_written", [True, False])
async def test_cut_while_its_emulators_settings_are_written_down(tmp_path: Path, *, is_written: bool) -> None:
    sending, guest = StateSending(), Guest(tmp_path)
    ours, theirs = socket.socketpair()

    async def connect() -> Stream:
        await trio.lowlevel.checkpoint()
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def remember() -> MigrationSettings:
        sending.cut()
        if not is_written:
            await trio.sleep_forever()
        return MigrationSettings({})

    sending.begin()
    with ours, theirs:
        await _refused(sending, guest, connect, remember)
    assert not guest.was_sent
