"""The monitor, with a machine that has no CPU. QEMU's own client is the judge at the end."""

from __future__ import annotations

import asyncio
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from qemu.qmp import EventListener, ExecuteError, QMPClient

from lazymem.errors import MonitorError
from lazymem.vm.migration import Migrations
from lazymem.vm.monitor import MAX_CLIENTS, Monitor
from lazymem.vm.qmp import MAX_COMMAND_BYTES
from lazymem.vm.ram import MemFile
from tests.support.fakemachine import RAM_BYTES, FakeMachine
from tests.support.monitored import serving
from tests.support.streamreader import read_stream


async def test_greeting_and_negotiation(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        assert stat.S_IMODE((await trio.Path(vm.path).stat()).st_mode) == 0o600
        client = await vm.connect(negotiate=False)
        kind, text = await client.refused("query-status")
        assert (kind, text) == ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        assert "no capabilities" in (await client.refused("qmp_capabilities", enable=["oob"]))[1]
        assert await client.ask("qmp_capabilities", enable=[]) == {}
        assert "already complete" in (await client.refused("qmp_capabilities"))[1]
        assert await client.refused("nonsense") == ("CommandNotFound", "The command nonsense has not been found")
        assert await client.refused("query-status", x=1) == ("GenericError", "Parameter 'x' is unexpected")
        version = await client.ask("query-version")
        assert version["package"].startswith("lazymem-vm ")
        assert {"name": "migrate"} in await client.ask("query-commands")


async def test_stop_and_cont_with_events(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        client, other = await vm.connect(), await vm.connect()
        silent = await vm.connect(negotiate=False)
        status = await client.ask("query-status")
        assert status == {"status": "prelaunch", "running": False, "singlestep": False}
        await client.ask("cont")
        assert (await client.ask("query-status"))["running"] is True
        assert "timestamp" in await client.event("RESUME")
        await client.ask("cont")  # Running already: fine, and no event.
        await client.ask("stop")
        await client.ask("stop")
        assert (await client.ask("query-status"))["status"] == "paused"
        assert [event["event"] for event in client.events] == ["STOP"]
        await other.ask("query-status")
        assert [event["event"] for event in other.events] == ["RESUME", "STOP"]
        await silent.ask("qmp_capabilities")
        assert silent.events == []


async def test_it_answers_while_a_vcpu_waits_for_a_page(tmp_path: Path) -> None:
    page = threading.Event()
    machine = FakeMachine()
    machine.on_stop = lambda: void(page.wait(30))
    async with serving(tmp_path, machine) as vm:
        client, waiting = await vm.connect(), await vm.connect()
        await client.ask("cont")
        await waiting.send("stop")
        for _ in range(20):
            assert (await client.ask("query-status"))["status"] == "running"
        assert "quit" in {entry["name"] for entry in await client.ask("query-commands")}
        page.set()
        await waiting.event("STOP")
        assert (await client.ask("query-status"))["status"] == "paused"


def void(_: object) -> None:
    """For lambdas whose value nobody wants."""


async def test_memory_and_what_the_snapshot_command_asks(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(RAM_BYTES))
    async with serving(tmp_path, FakeMachine([MemFile("pc.ram", ram)])) as vm:
        client = await vm.connect()
        (backend,) = await client.ask("query-memdev")
        assert {key: backend[key] for key in ("id", "size", "share", "filename")} == {
            "id": "pc.ram",
            "size": RAM_BYTES,
            "share": True,
            "filename": str(ram),
        }
        told = {
            name: await client.ask("qom-get", path="/objects/pc.ram", property=name)
            for name in ("size", "share", "mem-path")
        }
        assert told == {"size": RAM_BYTES, "share": True, "mem-path": str(ram)}
        assert (await client.refused("qom-get", path="/objects/pc.rom", property="size"))[0] == "DeviceNotFound"
        assert (await client.refused("qom-get", path="/objects/pc.ram", property="offset"))[0] == "GenericError"
        assert (await client.refused("qom-get", path="/objects/vga.vram", property="mem-path"))[0] == "GenericError"
        machine = (await client.ask("query-machines"))[0]["name"]
        assert await client.ask("qom-get", path="/machine", property="type") == f"{machine}-machine"
        assert await client.ask("query-block") == []
        (cpu,) = await client.ask("query-cpus-fast")
        assert "x86_64" in await client.ask("qom-get", path=cpu["qom-path"], property="type")


async def test_capabilities(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        client = await vm.connect()

        def to(state: object, name: str = "x-ignore-shared") -> list[dict[str, object]]:
            return [{"capability": name, "state": state}]

        assert await client.ask("migrate-set-capabilities", capabilities=to(True)) == {}
        off = to(False, "x-lazymem-leave-unsynced")
        assert await client.ask("query-migrate-capabilities") == to(True) + off
        on = to(True, "x-lazymem-leave-unsynced")
        assert await client.ask("migrate-set-capabilities", capabilities=on) == {}
        assert await client.ask("query-migrate-capabilities") == to(True) + on
        assert "cannot be switched off" in (await client.refused("migrate-set-capabilities", capabilities=to(False)))[1]
        assert (
            "does not accept value" in (await client.refused("migrate-set-capabilities", capabilities=to(True, "x")))[1]
        )
        for nonsense in (list[object]([1]), list[object]([{}]), to(1)):
            assert (await client.refused("migrate-set-capabilities", capabilities=nonsense))[0] == "GenericError"


async def test_quit_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        client = await vm.connect()
        assert await client.ask("quit") == {}
        assert vm.quit.is_set()


async def test_an_overlong_command_ends_the_connection_and_no_other(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        client, other = await vm.connect(), await vm.connect()
        await client.stream.send_all(b'{"execute": "' + b"x" * (MAX_COMMAND_BYTES + 1))
        assert "over 65536 bytes" in (await client.answer())["error"]["desc"]
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await client.message()
        assert (await other.ask("query-status"))["running"] is False


async def test_nonsense_is_answered_and_the_connection_lives(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        client = await vm.connect()
        for nonsense in (b"hello\n", b"[]\n", b'{"execute": 5}\n', b"\xff\xfe\n", b"}\n"):
            await client.stream.send_all(nonsense)
            assert (await client.answer())["error"]["class"] == "GenericError"
        assert (await client.ask("query-status"))["running"] is False


@pytest.mark.parametrize("depth", [64, 900, 980, 990, 1000, 20_000])
async def test_nesting_that_could_be_read_but_not_answered(tmp_path: Path, depth: int) -> None:
    """An answer's id is the command's, and Python's reader goes a little deeper than its writer."""
    async with serving(tmp_path) as vm:
        client = await vm.connect()
        await client.stream.send_all(b'{"execute": "query-status", "id": ' + b"[" * depth + b"]" * depth + b"}")
        assert (await client.answer())["error"]["desc"].startswith("JSON parse error")
        assert (await client.ask("query-status"))["running"] is False


async def test_a_bug_in_a_command_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as vm:
        client = await vm.connect()
        monkeypatch.setattr(Migrations, "cancel", lambda _: 1 // 0)
        assert "a bug in lazymem-vm: ZeroDivisionError" in (await client.refused("migrate_cancel"))[1]
        assert (await client.ask("query-status"))["running"] is False


async def test_a_client_that_hangs_up_costs_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        for _ in range(3 * MAX_CLIENTS):
            client = await vm.connect()
            await client.send("query-status")
            await client.stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
        client = await vm.connect()
        assert (await client.ask("query-status"))["running"] is False


async def test_too_many_clients_are_turned_away(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        clients = [await vm.connect() for _ in range(MAX_CLIENTS)]
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await vm.connect()
        assert (await clients[0].ask("query-status"))["running"] is False


async def test_a_client_that_reads_no_events_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        deaf = await vm.connect()
        listeners = len(vm.runstate._listeners)
        for _ in range(100_000):
            vm.runstate.emit("NOISE", {"text": "x" * 1000})
            if len(vm.runstate._listeners) < listeners:
                break
            await trio.lowlevel.checkpoint()
        else:
            pytest.fail("nobody was cut off")
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await deaf.event("NEVER")


async def test_a_client_that_reads_no_answers_is_cut_off(tmp_path: Path) -> None:
    """An answer repeats its command's id, which may be 64 KiB; the answers that wait are bounded in bytes."""
    async with serving(tmp_path) as vm:
        deaf = await vm.connect()
        command = b'{"execute": "query-status", "id": "' + b"x" * 60_000 + b'"}'

        async def send_on() -> None:
            for _ in range(100):
                await deaf.stream.send_all(command)
                await trio.testing.wait_all_tasks_blocked()

        with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
            await send_on()
        assert (await (await vm.connect()).ask("query-status"))["running"] is False


async def test_a_live_monitors_socket_is_not_taken(tmp_path: Path) -> None:
    async with serving(tmp_path) as vm:
        with pytest.raises(MonitorError, match=r"cannot listen for the monitor on .*in use"):
            await Monitor.listen(vm.path, vm.runstate)
        assert (await (await vm.connect()).ask("query-status"))["running"] is False


async def test_a_dead_monitors_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "qmp"))
    async with serving(tmp_path) as vm:
        assert await (await vm.connect()).ask("query-block") == []


async def test_qemus_own_client(tmp_path: Path) -> None:
    async def use() -> list[str]:
        seen: list[str] = []
        client = QMPClient("test")
        await client.connect(str(tmp_path / "qmp"))
        try:
            with client.listener() as events:
                await client.execute("cont")
                await client.execute("migrate", {"uri": f"file:{tmp_path}/vmstate"})
                seen += await collect(events, lambda event: event.get("data") == {"status": "completed"})
            with pytest.raises(ExecuteError, match="has not been found"):
                await client.execute("nonsense")
            memory = await client.execute("query-memdev")
            assert isinstance(memory, list)
            assert len(memory) == 1
        finally:
            await client.disconnect()
        return seen

    async with serving(tmp_path):
        seen = await trio.to_thread.run_sync(asyncio.run, use())
    assert seen == ["RESUME", "MIGRATION", "MIGRATION", "STOP", "MIGRATION"]
    assert read_stream(await trio.Path(tmp_path / "vmstate").read_bytes()).pages_of("pc.ram") == RAM_BYTES // 4096


async def collect(events: EventListener, last: Callable[[Any], bool]) -> list[str]:
    found = []
    async for event in events:
        found.append(str(event["event"]))
        if last(event):
            break
    return found
