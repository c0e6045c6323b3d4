"""What a destination does where its emulator, or the source, does not do as it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from lazymem.errors import MonitorError
from lazymem.handover import messages, receiving
from lazymem.handover.journal import Journal, read
from lazymem.handover.receiving import Arriving, Receiver
from lazymem.handover.states import Destination, Event
from lazymem.vm.qmpclient import CommandError

ID = "00" * 16


class Link:
    """A source that hears everything, or (`away`) is never there again."""

    handover = ID
    clock_ahead_seconds = 0.0
    let_go = False
    connected = True

    def __init__(self) -> None:
        self.said: list[messages.Message] = []

    async def say(self, message: messages.Message) -> None:
        self.said.append(message)

    async def run(self, _: object) -> None:
        pass


class Guest:
    """Stands with its state, and refuses or does what it is told; `began` is what it says then."""

    def __init__(self, error: MonitorError | None = None, *, gone: bool = False) -> None:
        self._error = error
        self._gone = gone

    def status(self) -> str:
        if self._gone:
            raise MonitorError("gone")
        return "paused"

    def run(self) -> float:
        if self._error is not None:
            raise self._error
        return 100.0


class Host:
    def __init__(self) -> None:
        self.ended = 0

    def end_emulator(self) -> None:
        self.ended += 1

    def maybe_exit_code(self) -> int | None:
        return 0 if self.ended else None


@contextmanager
def receiver(
    folder: Path, guest: Guest, state: Destination = Destination.ASKED
) -> Iterator[tuple[Receiver, Link, Host]]:
    link, host = Link(), Host()
    arriving = Arriving("h:1", "/mnt", "/qmp", "/sockets", 1, "1", 4096)
    with Journal(folder / "j", "destination") as journal:
        journal.write(ID, state.value, {})
        made: Callable[..., Receiver] = cast(Any, Receiver)
        yield made(journal, link, guest, arriving, host, lambda _: None, lambda _: None, state=state), link, host


@pytest.mark.parametrize("guest", [Guest(CommandError("cont", "GenericError", "a disk is locked")), Guest(gone=True)])
async def test_a_guest_that_could_not_be_let_run_is_refused(tmp_path: Path, guest: Guest) -> None:
    """The source has it as it was, and takes it back."""
    with receiver(tmp_path, guest) as (found, link, host):
        await found._step(Event.LOADED)
        await found._step(Event.GIVEN)
        assert found.state is Destination.REFUSED
        assert [type(message) for message in link.said] == [messages.Refused]
        assert host.ended == 1
        record = read(tmp_path / "j")
        assert record is not None
        assert record.state == "refused"


async def test_a_guest_that_may_have_run_is_not_refused(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest(gone=True), Destination.MINE) as (found, _, host):
        await found._step(Event.RESTARTED)
        assert (found.state, host.ended) == (Destination.MINE, 0)


async def test_a_guest_that_stood_is_left_standing(tmp_path: Path) -> None:
    with receiver(tmp_path, Guest(MonitorError("was told to run"))) as (found, link, _):
        found._arriving.runs = False
        await found._step(Event.LOADED)
        await found._step(Event.GIVEN)
        assert found.state is Destination.MINE
        assert link.said == [messages.Mine(None)]
        assert not found._arriving.ran


async def test_no_downtime_is_told_by_a_process_that_does_not_know_it(tmp_path: Path) -> None:
    for restarted, expected in ((False, 1.5), (True, None)):
        with receiver(tmp_path, Guest()) as (found, _, _host):
            found._restarted, found._stopped = restarted, 98.5
            await found._step(Event.LOADED)
            await found._step(Event.GIVEN)
            assert found._arriving.downtime_seconds == expected


async def test_a_refusal_that_nobody_hears_does_not_hold_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "_TELL_SECONDS", 0.05)
    with receiver(tmp_path, Guest(gone=True), Destination.REFUSED) as (found, _, _host):
        outcome = await found.run(None)
    assert (outcome.state, outcome.text) == (Destination.REFUSED, "it was refused here before")
    record = read(tmp_path / "j")
    assert record is not None
    assert record.details["over"] is False
