"""A machine with a monitor, as cli/vm puts them together, and a client of few words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from lazymem.vm.commands import Commands
from lazymem.vm.migration import Migrations
from lazymem.vm.monitor import Monitor
from lazymem.vm.runstate import RunState
from tests.support.fakemachine import FakeMachine


class Vm:
    """What `serving` gives."""

    def __init__(self, machine: FakeMachine, path: Path, incoming: bool, start_paused: bool) -> None:
        self.machine = machine
        self.path = path
        self.runstate = RunState(machine, incoming=incoming)
        self.notices: list[str] = []
        self.migrations = Migrations(self.runstate, start_paused=start_paused, notice=self.notices.append)
        self.quit = trio.Event()
        self.clients: list[Client] = []

    async def connect(self, negotiate: bool = True) -> Client:
        """A new client; `serving` closes it at the end."""
        client = Client(await trio.open_unix_socket(str(self.path)))
        self.clients.append(client)
        assert "QMP" in await client.message()
        if negotiate:
            assert await client.ask("qmp_capabilities") == {}
        return client


@asynccontextmanager
async def serving(
    folder: Path, machine: FakeMachine | None = None, *, incoming: bool = False, start_paused: bool = False
) -> AsyncIterator[Vm]:
    vm = Vm(machine or FakeMachine(), folder / "qmp", incoming, start_paused)
    monitor = await Monitor.listen(vm.path, vm.runstate)
    async with trio.open_nursery() as nursery:
        commands = Commands(vm.runstate, vm.migrations, nursery.start_soon, vm.quit.set)
        nursery.start_soon(monitor.serve, commands)
        try:
            yield vm
            await monitor.finish()
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                for client in vm.clients:
                    await trio.aclose_forcefully(client.stream)
    vm.machine.blocks.close()
    assert not await trio.Path(vm.path).exists()


class Client:
    """A client of few words: sends a command, gives back its answer, keeps events."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.events: list[dict[str, Any]] = []
        self._pending = b""

    async def message(self) -> dict[str, Any]:
        while b"\n" not in self._pending:
            data = await self.stream.receive_some(65536)
            if not data:
                raise EOFError
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    async def answer(self) -> dict[str, Any]:
        while "event" in (found := await self.message()):
            self.events.append(found)
        return found

    async def send(self, command: str, **arguments: Any) -> None:
        await self.stream.send_all(json.dumps({"execute": command, "arguments": arguments}).encode())

    async def ask(self, command: str, **arguments: Any) -> Any:
        await self.send(command, **arguments)
        answer = await self.answer()
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["return"]

    async def refused(self, command: str, **arguments: Any) -> tuple[str, str]:
        await self.send(command, **arguments)
        error = (await self.answer())["error"]
        return error["class"], error["desc"]

    async def event(self, name: str, **data: Any) -> dict[str, Any]:
        """The next event of that name and data, among those that came or come."""
        while True:
            for at, event in enumerate(self.events):
                if event["event"] == name and event.get("data", {}) == data:
                    del self.events[: at + 1]
                    return event
            message = await self.message()
            assert "event" in message, message
            self.events.append(message)


async def wait_migrated(client: Client) -> dict[str, Any]:
    """query-migrate's answer once it is over."""
    while (info := await client.ask("query-migrate"))["status"] not in ("completed", "failed", "cancelled"):
        await trio.lowlevel.checkpoint()
    assert isinstance(info, dict)
    return info
