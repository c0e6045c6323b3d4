"""A `lazymem send` that is started again by its guardian: what it finds, and a guest that it cannot do anything for.

With an emulator that only says what it is told to say, whose guest stands since its state was sent.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from msgspec import convert, to_builtins

from lazymem.cli import send
from lazymem.cli.guardian import Guard
from lazymem.errors import IdentityError, LazymemError, MonitorError, StoreError
from lazymem.handover import messages
from lazymem.handover.arriving import boot_id
from lazymem.handover.channel import Channel
from lazymem.handover.departure import Leaving
from lazymem.handover.journal import Journal, read
from lazymem.handover.states import Source
from lazymem.vm.migrationsettings import MigrationSettings
from tests.support.fakeemulator import Behaviour, FakeEmulator, fake_emulator
from tests.support.standinsource import Guest, hello, leaving_in, sender

SIZE = 1 << 20
ID = "00" * 16
BEFORE = MigrationSettings({"x-ignore-shared": False}, 300)
AGAIN = Guard(is_again=True)


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[FakeEmulator]:
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, SIZE)
    with fake_emulator(Behaviour(str(tmp_path / "q"), str(ram), SIZE, status="postmigrate"), tmp_path) as found:
        yield found


@pytest.fixture
def taken() -> Iterator[str]:
    """An address at which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def leaving(folder: Path, address: str = "127.0.0.1:0", pid: int | None = None, **more: Any) -> Leaving:
    known = {"name": "qemu"}
    return Leaving(
        address, f"{folder}/q", f"{folder}/ram", SIZE, known, True, boot_id(), pid, settings_before=BEFORE, **more
    )


def begun(folder: Path, state: str, what: Leaving) -> None:
    with Journal(folder / "j", "source") as journal:
        journal.write(ID, state, to_builtins(what))


def run(folder: Path, *words: str, guard: Guard = AGAIN) -> int:
    """What the work of one process comes to."""
    found: argparse.Namespace = send._parser().parse_args(["--qmp", f"{folder}/q", *words])
    return send._run(found, folder / "j", guard)


def stands_in(folder: Path) -> Leaving:
    record = read(folder / "j")
    assert record is not None
    return convert(record.details, Leaving)


def test_all_is_done_when_its_last_word_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no emulator any more, and nothing to hand over."""
    begun(tmp_path, "released", leaving(tmp_path, over=True, state_bytes=4711))
    assert run(tmp_path) == 0
    assert run(tmp_path, "--json") == 0
    said = capsys.readouterr()
    assert said.err.count("nothing is left to do: the destination has all of the guest") == 2
    told = json.loads(said.out)
    assert (told["state"], told["state_bytes"]) == ("released", 4711)


def test_who_starts_it_by_hand_then_wants_another_hand_over(tmp_path: Path) -> None:
    begun(tmp_path, "released", leaving(tmp_path, over=True))
    with pytest.raises(MonitorError, match="cannot reach the monitor"):
        run(tmp_path, guard=Guard())


def test_an_end_of_old_is_not_that_of_a_command_that_begins_now(tmp_path: Path) -> None:
    """Its first process is killed before anybody comes: the second one goes on with it."""
    begun(tmp_path, "released", leaving(tmp_path, over=True))
    for guard in (Guard(), AGAIN):
        with pytest.raises(MonitorError, match="cannot reach the monitor"):
            run(tmp_path, guard=guard)
    assert stands_in(tmp_path).over


@pytest.mark.parametrize(("state", "goes_on"), [("ours", True), ("given", False), ("gone", False), ("released", False)])
@pytest.mark.parametrize("why", ["port", "certificate"])
def test_where_it_cannot_begin_a_guest_that_is_here_goes_on(
    tmp_path: Path, emulator: FakeEmulator, taken: str, why: str, state: str, *, goes_on: bool
) -> None:
    """And no other: what was given may run elsewhere."""
    address = taken if why == "port" else "127.0.0.1:0"
    begun(tmp_path, state, leaving(tmp_path, address, emulator.pid))
    missing = [f"--tls-{name}={tmp_path}/none" for name in ("cert", "key", "ca")]
    with pytest.raises(LazymemError):
        run(tmp_path, *(["--allow=b", *missing] if why == "certificate" else []))
    assert ("cont" in emulator.commands) is goes_on
    assert ("migrate-set-capabilities" in emulator.commands) is goes_on
    assert emulator.limits() == ([300] if goes_on else [])
    assert (stands_in(tmp_path).settings_before is None) is goes_on


@pytest.mark.parametrize(("state", "goes_on"), [("ours", True), ("given", False), ("gone", False)])
@pytest.mark.parametrize("guard", [Guard(), AGAIN])
def test_what_is_on_the_disk_when_it_fails_counts(
    tmp_path: Path, emulator: FakeEmulator, monkeypatch: pytest.MonkeyPatch, guard: Guard, state: str, *, goes_on: bool
) -> None:
    """A process that found its guest here may have given it away since."""
    begun(tmp_path, "ours", leaving(tmp_path, pid=emulator.pid))

    async def failing(_: object, journal: Journal, before: Leaving, *rest: object) -> None:
        journal.write("11" * 16, state, to_builtins(before))
        raise StoreError("the disk is full")

    monkeypatch.setattr(send, "_send", failing)
    with pytest.raises(StoreError):
        run(tmp_path, guard=guard)
    assert ("cont" in emulator.commands) is goes_on


@pytest.mark.parametrize("what", ["pid", "boot", "nothing"])
def test_what_is_known_of_another_guest_says_nothing_of_this_one(
    tmp_path: Path, emulator: FakeEmulator, what: str
) -> None:
    """It stands since a migration, and may run elsewhere."""
    other = leaving(tmp_path, pid=emulator.pid + (what == "pid"))
    other.boot_id += "of old" if what == "boot" else ""
    if what != "nothing":
        begun(tmp_path, "ours", other)
    with pytest.raises(MonitorError, match="may run there"):
        run(tmp_path)
    assert not {"cont", "migrate-set-capabilities"} & set(emulator.commands)


@pytest.mark.parametrize("reclaimed", [True, False])
def test_what_a_process_that_was_killed_had_taken_back_is_told_by_the_next(
    tmp_path: Path, emulator: FakeEmulator, capsys: pytest.CaptureFixture[str], *, reclaimed: bool
) -> None:
    """And nothing else is: of a guest that was never given, the first one would have said so."""
    begun(tmp_path, "ours", leaving(tmp_path, pid=emulator.pid, reclaimed=reclaimed))
    if not reclaimed:
        with pytest.raises(IdentityError, match="nothing was given away"):
            run(tmp_path, "--reclaim")
        return
    assert run(tmp_path, "--reclaim") == 0
    assert "taken back by hand; the guest goes on here" in capsys.readouterr().err
    assert emulator.runs()


async def test_a_second_interrupt_lets_the_destination_hear_that_the_guest_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both come while that is being written. The connection to the destination ends with this process, too."""
    heard: list[messages.Message] = []

    class User:
        async def watch(self, on_interrupt: Callable[[], None], on_alone: Callable[[], None]) -> None:
            self.interrupts = on_interrupt
            await trio.sleep_forever()

    user = User()
    ends = [trio.SocketStream(end) for end in trio.socket.socketpair()]
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, cast(Any, Guest()), leaving_in(tmp_path))
        found._device_state.sent_bytes = 5
        destination = Channel(ends[1])

        async def take() -> None:
            await destination.send(hello())
            assert isinstance(await destination.receive(), messages.Offer)
            found._side.state = Source.MOVING
            write = journal.write

            def interrupted(*record: Any) -> Any:
                for _ in range(2):
                    trio.from_thread.run_sync(user.interrupts)
                return write(*record)

            monkeypatch.setattr(journal, "write", interrupted)
            await destination.send(messages.Received(5))
            heard.append(await destination.receive())
            await destination.aclose()

        async with trio.open_nursery() as both:
            both.start_soon(take)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send._watch, cast(Any, user), found, nursery.cancel_scope)
                nursery.start_soon(found.receivers.serve, ends[0])
                nursery.start_soon(found.run)
    record = read(tmp_path / "j")
    assert record is not None
    assert record.state == "given"
    assert [type(message) for message in heard] == [messages.Given]
