"""Saving and taking over by the monitor's commands, with a machine that has no CPU."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from lazymem.errors import SaveStreamError
from lazymem.vm.ram import MemFile
from lazymem.vm.uri import FileUri
from tests.support.fakemachine import RAM_BYTES, SIZES, FakeMachine
from tests.support.monitored import Client, serving, wait_migrated
from tests.support.streamreader import read_stream


def void(_: object) -> None:
    """For lambdas whose value nobody wants."""


async def test_a_save_while_the_guest_runs(tmp_path: Path) -> None:
    """The ordinary memory goes while it runs; what it writes until it stands is in the stream all the same."""
    machine = FakeMachine()
    machine.blocks["vga.vram"].write(0, b"early")
    machine.on_stop = lambda: machine.blocks["vga.vram"].write(4, b"late")
    async with serving(tmp_path, machine) as vm:
        client = await vm.connect()
        assert await client.ask("query-migrate") == {}
        await client.ask("cont")
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        for status in ("setup", "active"):
            await client.event("MIGRATION", status=status)
        await client.event("STOP")
        await client.event("MIGRATION", status="completed")
        info = await wait_migrated(client)
        assert info["ram"]["total"] == sum(dict(SIZES).values())
        assert info["ram"]["remaining"] == 0
        assert (info["ram"]["normal"], info["ram"]["dirty-sync-count"]) == (2, 2)
        assert (await client.ask("query-status"))["status"] == "postmigrate"
        data = await trio.Path(tmp_path / "vmstate").read_bytes()
        assert info["ram"]["transferred"] == len(data)
        stream = read_stream(data)
        assert stream.memory("vga.vram")[:9] == b"earllate\0"
        assert stream.pages_of("vga.vram") == dict(SIZES)["vga.vram"] // 4096 + 1
        assert stream.device("globalstate").fields["runstate"] == b"running".ljust(100, b"\0")
        assert sorted(os.listdir(tmp_path)) == ["qmp", "vmstate"]
        await client.ask("cont")
        assert (await client.ask("query-status"))["status"] == "running"


@pytest.mark.parametrize("kind", ["file", "unix", "tcp"])
@pytest.mark.parametrize("was_running", [True, False])
async def test_saved_here_resumed_there(tmp_path: Path, kind: str, was_running: bool) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(os.urandom(RAM_BYTES))
    source = FakeMachine([MemFile("pc.ram", ram)])
    source.blocks["pc.bios"].write(0x1000, b"firmware")
    source.devices[2].values = {"mode": 5, "count": 2**32 - 1, "stamp": 0, "fifo": b"\xff" * 16}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with serving(tmp_path / "a", source) as vm:
        client = await vm.connect()
        await client.ask("cont")
        if not was_running:
            await client.ask("stop")
        uri = f"{kind}:{tmp_path}/stream"
        if kind == "file":
            await client.ask("migrate", uri=uri)
            assert (await wait_migrated(client))["status"] == "completed"
            source.blocks.close()
        target = FakeMachine([MemFile("pc.ram", ram if kind == "file" else copied(ram))])
        async with serving(tmp_path / "b", target, incoming=True) as there:
            second = await there.connect()
            assert (await second.ask("query-status"))["status"] == "inmigrate"
            await second.ask("migrate-incoming", uri="tcp:127.0.0.1:0" if kind == "tcp" else uri)
            if kind != "file":
                address = await listening(second)
                if kind == "tcp":
                    uri = f"tcp:{address['host']}:{address['port']}"
                await client.ask("migrate", uri=uri)
                assert (await wait_migrated(client))["status"] == "completed"
            info = await wait_migrated(second)
            assert info["status"] == "completed", info
            status = (await second.ask("query-status"))["status"]
            assert status == ("running" if was_running else "paused")
            assert target.blocks["pc.bios"].read(0x1000, 8) == b"firmware"
            assert [d.values for d in target.devices] == [d.values for d in source.devices]
            assert "'-incoming' was not specified" in (await second.refused("migrate-incoming", uri=uri))[1]


def copied(ram: Path) -> Path:
    copy = ram.with_name("copy")
    copy.write_bytes(ram.read_bytes())
    return copy


async def listening(client: Client) -> dict[str, str]:
    while "socket-address" not in (info := await client.ask("query-migrate")):
        await trio.lowlevel.checkpoint()
    (address,) = info["socket-address"]
    assert isinstance(address, dict)
    return address


async def test_start_paused_keeps_a_running_guests_state_standing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with serving(tmp_path / "a") as vm:
        client = await vm.connect()
        await client.ask("cont")
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        await wait_migrated(client)
    async with serving(tmp_path / "b", incoming=True, start_paused=True) as vm:
        client = await vm.connect()
        assert "not come in yet" in (await client.refused("cont"))[1]
        assert "waiting for an incoming" in (await client.refused("migrate", uri="file:/x"))[1]
        await client.ask("migrate-incoming", uri=f"file:{tmp_path}/vmstate")
        assert (await wait_migrated(client))["status"] == "completed"
        assert (await client.ask("query-status"))["status"] == "paused"
        assert vm.machine.starts == 0
        await client.ask("cont")
        assert vm.machine.starts == 1


async def test_a_bad_stream_starts_nothing_and_the_next_one_may_come(tmp_path: Path) -> None:
    good = FakeMachine()
    (tmp_path / "a").mkdir()
    async with serving(tmp_path / "a", good) as vm:
        client = await vm.connect()
        await client.ask("migrate", uri=f"file:{tmp_path}/good")
        await wait_migrated(client)
    data = await trio.Path(tmp_path / "good").read_bytes()
    await trio.Path(tmp_path / "cut").write_bytes(data[:-3000])
    await trio.Path(tmp_path / "long").write_bytes(data + bytes(10 << 20))
    async with serving(tmp_path, incoming=True) as vm:
        client = await vm.connect()
        before = [dict(device.values) for device in vm.machine.devices]
        for name, reason in (("cut", "section "), ("long", "more than the"), ("none", "No such file")):
            await client.ask("migrate-incoming", uri=f"file:{tmp_path}/{name}")
            info = await wait_migrated(client)
            assert (info["status"], reason in info["error-desc"]) == ("failed", True), info
            assert (await client.ask("query-status"))["status"] == "inmigrate"
            assert [device.values for device in vm.machine.devices] == before
            assert vm.machine.starts == 0
        await client.ask("migrate-incoming", uri=f"file:{tmp_path}/good")
        assert (await wait_migrated(client))["status"] == "completed"


async def test_a_state_that_a_device_refuses_is_named(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.devices[1].values = {**machine.devices[1].values, "mode": 0xFF}
    (tmp_path / "a").mkdir()
    async with serving(tmp_path / "a", machine) as vm:
        client = await vm.connect()
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        await wait_migrated(client)
    async with serving(tmp_path, incoming=True) as vm:
        vm.migrations.begin_take_over()
        with pytest.raises(SaveStreamError, match=r"section serial.*mode 255 is none"):
            await vm.migrations.take_over(FileUri(tmp_path / "vmstate"))
        assert vm.machine.starts == 0


async def refusing_peer(
    path: Path, after_bytes: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Takes some of a stream and hangs up. Started once it listens: the path is there before that."""
    sock = trio.socket.socket(socket.AF_UNIX)
    with sock:
        await sock.bind(str(path))
        sock.listen(1)
        task_status.started()
        peer, _ = await sock.accept()
        with peer:
            left = after_bytes
            while left > 0:
                left -= len(await peer.recv(left))


@pytest.mark.parametrize("after_bytes", [0, 100, 100_000])
async def test_a_failed_save_lets_the_guest_go_on(tmp_path: Path, after_bytes: int) -> None:
    machine = FakeMachine()
    machine.blocks["pc.bios"].write(0, os.urandom(dict(SIZES)["pc.bios"]))
    machine.blocks["pc.ram"].write(0, os.urandom(RAM_BYTES))
    async with serving(tmp_path, machine) as vm, trio.open_nursery() as nursery:
        client = await vm.connect()
        await client.ask("cont")
        await nursery.start(refusing_peer, tmp_path / "peer", after_bytes)
        await client.ask("migrate", uri=f"unix:{tmp_path}/peer")
        info = await wait_migrated(client)
        assert (info["status"], info["error-desc"]) == ("failed", "the receiving side went away")
        while (await client.ask("query-status"))["status"] != "running":
            await trio.lowlevel.checkpoint()
        assert vm.notices == [f"the save to unix:{tmp_path}/peer failed: the receiving side went away"]
        # And the next save works.
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        assert (await wait_migrated(client))["status"] == "completed"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("file:/nowhere/at/all", "No such file"),
        ("unix:/nowhere/at/all", "No such file"),
        ("tcp:127.0.0.1:1", "cannot save to tcp"),
        # Python has a ValueError for each of these, not an OSError.
        ("file:/tmp/with\0nul", "embedded null"),
        ("file:/tmp/half\ud800", "surrogates"),
        ("unix:/tmp/half\ud800", "surrogates"),
        ("tcp:two..dots:80", "label"),
        (f"tcp:{'x' * 64}.example:80", "label"),
    ],
)
async def test_a_save_to_nowhere_fails(tmp_path: Path, uri: str, reason: str) -> None:
    async with serving(tmp_path) as vm:
        client = await vm.connect()
        await client.ask("cont")
        await client.ask("migrate", uri=uri)
        info = await wait_migrated(client)
        assert info["status"] == "failed"
        assert reason in info["error-desc"]
        assert (await client.ask("query-status"))["status"] == "running"
        assert "STOP" not in [event["event"] for event in client.events]


@pytest.mark.parametrize("uri", ["", "x", "exec:cat", "tcp:host", "tcp:h:99999", "tcp:h:-1", "file:", "unix:", "fd:5"])
async def test_a_place_that_is_none_is_refused_at_once(tmp_path: Path, uri: str) -> None:
    async with serving(tmp_path) as vm:
        client = await vm.connect()
        assert "no place for a save stream" in (await client.refused("migrate", uri=uri))[1]
        assert await client.ask("query-migrate") == {}


async def test_a_save_waits_for_a_page_and_can_be_cancelled(tmp_path: Path) -> None:
    page = threading.Event()
    machine = FakeMachine()
    machine.on_stop = lambda: void(page.wait(30))
    async with serving(tmp_path, machine) as vm:
        client = await vm.connect()
        await client.ask("cont")
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        await client.event("MIGRATION", status="active")
        assert "in progress" in (await client.refused("migrate", uri=f"file:{tmp_path}/other"))[1]
        assert (await client.ask("query-migrate"))["status"] == "active"
        await client.ask("migrate_cancel")
        assert (await wait_migrated(client))["status"] == "cancelled"
        assert (await client.ask("query-status"))["status"] == "running"
        page.set()
        assert os.listdir(tmp_path) == ["qmp"]
        await client.ask("migrate_cancel")  # Nothing under way: nothing happens.


async def test_a_bug_in_a_save_does_not_end_the_guest(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.devices[1].values = {}
    async with serving(tmp_path, machine) as vm:
        client = await vm.connect()
        await client.ask("cont")
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        info = await wait_migrated(client)
        assert (info["status"], "a bug in lazymem-vm" in info["error-desc"]) == ("failed", True)
        await client.event("RESUME")
        assert (await client.ask("query-status"))["status"] == "running"
        assert os.listdir(tmp_path) == ["qmp"]


@pytest.mark.parametrize("fails", [True, False])
async def test_a_guest_that_was_stopped_during_the_first_pass_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Whoever stopped it meant it: neither a failed save nor the saved state lets it run."""
    machine = FakeMachine()
    stopped = threading.Event()
    ordinary = machine.blocks["vga.vram"]
    read = ordinary.read

    def read_when_stopped(offset: int, length: int) -> bytes:
        assert stopped.wait(30)
        return read(offset, length)

    monkeypatch.setattr(ordinary, "read", read_when_stopped)
    if fails:
        machine.devices[1].values = {}
    async with serving(tmp_path, machine) as vm:
        client = await vm.connect()
        await client.ask("cont")
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        await client.ask("stop")
        stopped.set()
        info = await wait_migrated(client)
        await trio.testing.wait_all_tasks_blocked()
        status = (await client.ask("query-status"))["status"]
        assert (info["status"], status) == (("failed", "paused") if fails else ("completed", "postmigrate"))
        if not fails:
            stream = read_stream(await trio.Path(tmp_path / "vmstate").read_bytes())
            assert stream.device("globalstate").fields["runstate"] == b"paused".ljust(100, b"\0")


async def test_saves_that_are_cancelled_over_and_over_use_nothing_up(tmp_path: Path) -> None:
    """Each waited for the same page in a thread of its own, and trio has 40 of them."""
    page = threading.Event()
    machine = FakeMachine()
    machine.on_stop = lambda: void(page.wait(30))
    async with serving(tmp_path, machine) as vm:
        client = await vm.connect()
        await client.ask("cont")
        for _ in range(50):
            await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
            while vm.migrations.progress is None or vm.migrations.progress.stopped is None:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            await client.ask("migrate_cancel")
            await client.event("MIGRATION", status="cancelled")
        assert (await client.ask("query-status"))["status"] == "running"
        with trio.fail_after(60):
            await trio.to_thread.run_sync(void, None)
        page.set()


async def test_a_guest_that_ends_during_a_save_fails_it(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.on_stop = lambda: setattr(machine, "run_state", "guest-panicked")
    async with serving(tmp_path, machine) as vm:
        client = await vm.connect()
        await client.ask("cont")
        await client.ask("migrate", uri=f"file:{tmp_path}/vmstate")
        info = await wait_migrated(client)
        assert (info["status"], "ended while it was saved" in info["error-desc"]) == ("failed", True)
        assert (await client.ask("query-status"))["status"] == "guest-panicked"
        assert "cannot go on" in (await client.refused("cont"))[1]
        assert "nothing to save" in (await client.refused("migrate", uri=f"file:{tmp_path}/vmstate"))[1]
        assert not await trio.Path(tmp_path / "vmstate").exists()
