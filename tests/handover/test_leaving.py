"""What a source refuses before its guest notices anything, with an emulator that only says what it is told to say."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazymem.errors import EnvironmentRefusedError, LazymemError, MonitorError, RamFileError, SnapshotError
from lazymem.handover.leaving import LeavingGuest
from lazymem.vm.migrationsettings import MigrationSettings
from lazymem.vm.qemurecorded import with_generation
from tests.support.fakeemulator import Behaviour, FakeEmulator, fake_emulator

SIZE = 1 << 20


@contextmanager
def leaving(folder: Path, **more: Any) -> Iterator[tuple[LeavingGuest, FakeEmulator]]:
    ram = folder / "ram"
    ram.touch()
    os.truncate(ram, more.pop("file_size", SIZE))
    behaviour = Behaviour(str(folder / "q"), str(ram), SIZE, **more)
    with fake_emulator(behaviour, folder) as emulator:
        guest = LeavingGuest(emulator.qmp)
        try:
            yield guest, emulator
        finally:
            guest.close()


@pytest.mark.parametrize(
    ("more", "error", "reason"),
    [
        ({"answers": {"query-migrate-capabilities": []}}, EnvironmentRefusedError, "x-ignore-shared"),
        ({"properties": {"share": False}}, RamFileError, "share=on"),
        ({"file_size": SIZE + 4096}, RamFileError, "not the same"),
        ({"status": "inmigrate"}, MonitorError, "inmigrate"),
        ({"status": "postmigrate"}, MonitorError, "may run there"),
        ({"answers": {"query-migrate": {"status": "active"}}}, MonitorError, "being migrated"),
        (
            {"answers": {"query-block": [{"device": "hd0", "inserted": {"ro": False}}]}},
            SnapshotError,
            "--disks-handled",
        ),
    ],
)
def test_refused(tmp_path: Path, more: dict[str, Any], error: type[LazymemError], reason: str) -> None:
    with leaving(tmp_path, **more) as (guest, emulator):
        with pytest.raises(error, match=reason):
            guest.look(disks_handled=False)
        assert not {"stop", "migrate", "cont", "migrate-set-capabilities"} & set(emulator.commands)


def test_disks_that_are_handled(tmp_path: Path) -> None:
    disks = {"query-block": [{"device": "hd0", "inserted": {"ro": False}}]}
    with leaving(tmp_path, answers=disks) as (guest, _):
        look = guest.look(disks_handled=True)
        assert (look.was_running, look.ram.size_bytes, look.emulator["name"]) == (True, SIZE, "qemu")


def test_a_guest_whose_migration_came_to_nothing(tmp_path: Path) -> None:
    with leaving(tmp_path, status="postmigrate") as (guest, _):
        assert not guest.look(disks_handled=False, came_back=True).was_running


def test_a_snapshots_own_ram_is_not_handed_over(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with leaving(tmp_path) as (guest, _), pytest.raises(RamFileError, match="has changed it"):
        guest.look(disks_handled=False)


def test_a_refused_migration_lets_the_guest_go_on_with_its_own_settings(tmp_path: Path) -> None:
    with leaving(tmp_path, errors={"migrate": "told to refuse"}) as (guest, emulator):
        before = guest.settings()
        with pytest.raises(MonitorError, match="told to refuse"):
            guest.send("unix:/nowhere", before, lambda _: None)
        assert guest.go_on(run=True, before=before) is None
        assert emulator.runs()
        assert emulator.commands.count("migrate-set-capabilities") == 2
        assert guest.settings() == before


@pytest.mark.parametrize("refused", ["migrate", "migrate-set-capabilities"])
@pytest.mark.parametrize("takes", [True, False])
def test_an_emulator_may_take_an_end_of_a_connection(tmp_path: Path, refused: str, *, takes: bool) -> None:
    """One that refuses to send does not keep it, and what is told is why it refused. (A real QEMU sends into it in
    `tests/system/test_qemu_screen.py`.)"""
    errors = {refused: "told to refuse", "closefd": "it is closed"}
    more: dict[str, Any] = {"errors": errors, "answers": {"getfd": {}} if takes else {}}
    ours, theirs = socket.socketpair()
    with ours, theirs, leaving(tmp_path, **more) as (guest, emulator):
        uri = guest.maybe_take(theirs)
        assert uri == ("fd:lazymem-state" if takes else None)
        with pytest.raises(MonitorError, match="told to refuse"):
            guest.send(uri or "unix:/nowhere", guest.settings(), lambda _: None)
        assert ("closefd" in emulator.commands) is takes


def test_a_setting_that_cannot_be_set_back_is_told_and_the_guest_goes_on(tmp_path: Path) -> None:
    """The other one is set back all the same."""
    more = {"errors": {"migrate-set-capabilities": "told to refuse"}, "status": "postmigrate"}
    with leaving(tmp_path, **more) as (guest, emulator):
        refusal = guest.go_on(run=True, before=MigrationSettings({"x-ignore-shared": False}, 300))
        assert refusal is not None
        assert "told to refuse" in refusal
        assert emulator.limits() == [300]
        assert emulator.runs()


def test_a_guest_whose_settings_nobody_changed_keeps_them(tmp_path: Path) -> None:
    with leaving(tmp_path, status="postmigrate") as (guest, emulator):
        assert guest.go_on(run=True, before=None) is None
        assert not {"migrate-set-capabilities", "migrate-set-parameters"} & set(emulator.commands)
        assert emulator.runs()


def test_the_ram_is_not_read_before_the_disks_are_drained(tmp_path: Path) -> None:
    """Between STOP and the answer to a question that is asked then, requests to a disk may still write to it."""
    with leaving(tmp_path) as (guest, emulator), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        asked: list[list[str]] = []
        guest.send(f"unix:{tmp_path / 's'}", guest.settings(), lambda _: asked.append(emulator.commands))
        for commands in asked:
            assert "query-status" in commands[commands.index("migrate") :]
        assert asked


@pytest.mark.parametrize(
    ("major", "kvm", "limits"), [(7, False, [0, 300]), (7, True, [10, 300]), (10, False, [0, 300])]
)
def test_a_qemu_that_loses_writes_makes_one_pass(tmp_path: Path, major: int, kvm: bool, limits: list[int]) -> None:
    """While its guest runs; the limit is the user's own again when nothing came of it."""
    answers = {
        "query-kvm": {"enabled": kvm, "present": True},
        "query-version": {"qemu": {"major": major, "minor": 2, "micro": 0}, "package": ""},
        "query-migrate-parameters": {"downtime-limit": 300},
        "query-migrate": {},
    }
    with leaving(tmp_path, answers=answers, errors={"migrate": "told to refuse"}) as (guest, emulator):
        before = guest.settings()
        with pytest.raises(MonitorError, match="told to refuse"):
            guest.send("unix:/nowhere", before, lambda _: None)
        guest.go_on(run=True, before=before)
        assert emulator.limits() == limits


def test_a_stop_of_somebody_else_freezes_nothing(tmp_path: Path) -> None:
    """The guest goes on behind it, and writes; what the destination gets is its RAM at the save's own stop."""
    with leaving(tmp_path, stopped_before=True) as (guest, emulator), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        frozen: list[tuple[int, float]] = []

        def note(moment: float) -> None:
            frozen.append((emulator.counter(), moment))

        stopped = guest.send(f"unix:{tmp_path / 's'}", guest.settings(), note)
        assert frozen
        assert {count for count, _ in frozen} == {emulator.counter()}
        assert {moment for _, moment in frozen} == {stopped}


def test_a_guest_without_a_generation_id(tmp_path: Path) -> None:
    with leaving(tmp_path, errors={"query-vm-generation-id": "VM Generation ID device not found"}) as (guest, _):
        assert guest.look(disks_handled=False).was_running


def test_a_moved_guest_keeps_its_generation(tmp_path: Path) -> None:
    guid = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"
    assert with_generation(["-device", "vmgenid,guid=auto", "-S"], guid) == ["-device", f"vmgenid,guid={guid}", "-S"]
    assert with_generation(["-device", "vmgenid,guid=auto"], None) == ["-device", "vmgenid,guid=auto"]
    assert with_generation(["-device", "e1000"], guid) == ["-device", "e1000"]
