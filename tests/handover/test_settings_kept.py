"""An emulator's migration settings in a hand-over: whoever lets the guest go on sets back what the first one found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from msgspec import convert, to_builtins

from lazymem.handover import messages
from lazymem.handover.departure import Leaving, void_of
from lazymem.handover.journal import Journal, read
from lazymem.handover.states import Event, Source
from lazymem.vm.migrationsettings import MigrationSettings
from tests.support.standinsource import BEFORE, OLD, Disk, Guest, hello, leaving_in, sender


@pytest.fixture
def leaving(tmp_path: Path) -> Leaving:
    return leaving_in(tmp_path)


def settings_in(folder: Path) -> object:
    """What stands in the journal of them."""
    record = read(folder)
    assert record is not None
    return record.details["settings_before"]


async def test_an_emulators_settings_are_on_the_disk_before_they_are_changed(tmp_path: Path, leaving: Leaving) -> None:
    """And stay there until they are set back: a second look, at what is changed by then, is not believed."""
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(), leaving)
        found._side.state = Source.MOVING
        assert await found._here.remember(leaving) == BEFORE
        assert settings_in(tmp_path / "j") == to_builtins(BEFORE)
        changed = cast(Any, found._here.guest)
        changed.settings = lambda: MigrationSettings({"x-ignore-shared": True, "events": True}, 0)
        assert await found._here.remember(leaving) == BEFORE


async def test_settings_that_cannot_be_written_down_are_not_changed(tmp_path: Path, leaving: Leaving) -> None:
    """The guest goes on, and nobody has touched its emulator."""
    with Disk(tmp_path / "j", "source") as journal:
        journal.write(OLD, "ours", to_builtins(leaving))
        guest = Guest()
        found = sender(journal, guest, leaving)
        found._offers.handover, found._side.state = OLD, Source.MOVING
        sent: list[object] = []
        cast(Any, guest).send = sent.append
        cast(Any, found).receivers = SimpleNamespace(state_connection=connection)
        journal.refuse("ours", 1, kept=False)
        await found._migrate()
        event, _, reason = await found._events.take()
        assert (event, reason) == (Event.FAILED, "the disk is full")
        assert sent == []


async def connection(_: str) -> object:
    await trio.lowlevel.checkpoint()
    return object()


@pytest.mark.parametrize(
    ("state", "event"),
    [("ours", Event.RESTARTED), ("given", Event.RECLAIM), ("given", Event.REFUSED)],
)
async def test_a_guest_that_goes_on_here_has_its_own_settings(
    tmp_path: Path, leaving: Leaving, state: str, event: Event
) -> None:
    """Under a process that has changed nothing itself: those that an earlier one has found. Once they are back they are
    the user's to change, and nobody sets them a second time."""
    leaving.settings_before = BEFORE
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, state, to_builtins(leaving))
    guest = Guest()
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, guest, convert(journal.found.details, Leaving), lambda: leaving)  # type: ignore[union-attr]
        await found._step(event)
        assert (found.state, guest.went_on, guest.set_to) == (Source.OURS, 1, [BEFORE])
        assert settings_in(tmp_path / "j") is None
        assert OLD in found._offers.void
    with Journal(tmp_path / "j", "source") as journal:
        assert journal.found is not None
        assert OLD in void_of(journal.found)
        found = sender(journal, guest, convert(journal.found.details, Leaving), lambda: leaving)
        await found._step(Event.RESTARTED)
        assert (guest.went_on, guest.set_to) == (2, [BEFORE])


async def test_settings_that_could_not_be_set_back_are_not_taken_for_the_users(
    tmp_path: Path, leaving: Leaving
) -> None:
    """They are tried again, and the next hand-over finds what it would take for them."""
    leaving.settings_before = BEFORE
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "ours", to_builtins(leaving))
    now = Leaving(**(to_builtins(leaving) | {"settings_before": None}))
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, Guest(refusal="told to refuse"), leaving, lambda: now)
        assert not await found._resume()
        assert settings_in(tmp_path / "j") == to_builtins(BEFORE)
        assert found.admit(hello(), occupied=False) is None
        await found.offer()
        assert settings_in(tmp_path / "j") == to_builtins(BEFORE)
        assert await found._here.remember(found._leaving) == BEFORE


@pytest.mark.parametrize("restarted", [False, True])
async def test_settings_are_set_back_where_the_guest_has_gone_from(
    tmp_path: Path, leaving: Leaving, *, restarted: bool
) -> None:
    """Its user may let it go on there by hand, when it has crashed at the destination."""
    leaving.settings_before = BEFORE
    with Journal(tmp_path / "j", "source") as journal:
        journal.write(OLD, "gone" if restarted else "given", to_builtins(leaving))
    guest = Guest()
    with Journal(tmp_path / "j", "source") as journal:
        found = sender(journal, guest, leaving, lambda: leaving)
        cast(Any, found)._ram = SimpleNamespace(
            publish=lambda *_: None, serve_again=lambda *_: None, serve=lambda _: None
        )
        if restarted:
            assert not await found._resume()
        else:
            await found._take(Event.MINE, None, messages.Mine())
        assert (found.state, guest.went_on, guest.set_to) == (Source.GONE, 0, [BEFORE])


def test_a_journal_of_an_older_version_is_read(leaving: Leaving) -> None:
    old = to_builtins(leaving)
    del old["settings_before"]
    assert convert(old, Leaving) == leaving
