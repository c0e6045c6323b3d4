"""Finding QEMU, its version, and what that lacks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazymem.errors import EnvironmentRefusedError, UsageError
from lazymem.vm import qemufind
from lazymem.vm.qemufind import Qemu, Search, machine_types, refuse_newer_machine, versioned_machine
from tests.support.fakeqemu import FakeQemu


def test_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeQemu(tmp_path, version="QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)")
    assert Search(str(fake.program)).result() == Qemu(fake.program, (7, 2, 22))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Search("fake-qemu").result().program == fake.program


def test_none_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentRefusedError, match="no program /nowhere/qemu"):
        Search("/nowhere/qemu")
    monkeypatch.setattr(qemufind, "PROGRAMS", ("no-such-qemu", str(tmp_path / "none")))
    with pytest.raises(EnvironmentRefusedError, match="no QEMU here: install"):
        Search()


def test_what_is_no_qemu_or_too_old(tmp_path: Path) -> None:
    for version, reason in (("busybox", "does not tell a version"), ("QEMU emulator version 4.2.1", "5.0.0 and newer")):
        with pytest.raises(EnvironmentRefusedError, match=reason):
            Search(str(FakeQemu(tmp_path, version=version).program)).result()


def test_a_program_that_cannot_run(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    with pytest.raises(EnvironmentRefusedError, match="cannot run"):
        Search(str(program))


def test_a_search_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    program = tmp_path / "slow"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    search = Search(str(program))
    search.close()
    with pytest.raises(EnvironmentRefusedError, match="does not tell a version"):
        search.result()


def test_machine_types_and_aliases(tmp_path: Path) -> None:
    listing = "Supported machines are:\nq35  Standard PC (alias of pc-q35-7.2)\npc-q35-7.2   Standard PC\nnone  empty\n"
    assert machine_types(listing) == {"q35": "pc-q35-7.2", "pc-q35-7.2": "pc-q35-7.2", "none": "none"}
    qemu = Qemu(FakeQemu(tmp_path).program, (9, 9, 0))
    assert versioned_machine(qemu, "pc") == "pc-i440fx-9.9"
    with pytest.raises(UsageError, match="no machine type toaster"):
        versioned_machine(qemu, "toaster")


def test_machines_that_a_later_qemu_brought() -> None:
    qemu = Qemu(Path("q"), (7, 2, 22))
    for machine in ("pc-i440fx-9.0", "pc-q35-7.3", "pc-q35-10.0.1"):
        with pytest.raises(EnvironmentRefusedError, match="brought that"):
            refuse_newer_machine(qemu, machine)
    for machine in ("pc-i440fx-7.2", "pc-q35-4.0.1", "microvm", "pc-i440fx-jammy"):
        refuse_newer_machine(qemu, machine)
