"""`lazymem snapshot` on a file system with reflinks: the copy shares the guest's blocks, and is still a copy.

Where none can be mounted a copy stands in for FICLONE: what is shared is not shown then.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazymem.cli import snapshot
from lazymem.demo import vmrun
from lazymem.snapshot.manifest import parse
from lazymem.snapshot.writer import write_digests
from lazymem.vm.guests import build_guest
from tests.support import skips
from tests.support.qemu import RAM_BYTES, booted
from tests.support.reflinks import (
    CloneStandIn,
    NoLoopDeviceError,
    clone_stand_in,
    digest,
    reflink_disk,
    stored_pages,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

VM_RAM_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Guest:
    """A running guest with much in its RAM. `change` rewrites a good part of it, `check` finds all in order."""

    monitor: Path
    ram: Path
    ram_bytes: int
    change: Callable[[], None]
    check: Callable[[], None]


@contextmanager
def lazymem_vm(folder: Path) -> Iterator[Guest]:
    ram = folder / "ram"
    ram.touch()
    os.truncate(ram, VM_RAM_BYTES)
    with tempfile.TemporaryDirectory(prefix="lazymem-") as sockets:
        place = vmrun.VmGuest(ram, VM_RAM_BYTES, Path(sockets, "q"), Path(sockets, "s"), build_guest("pages", folder))
        with vmrun.started(place, folder / "log") as vm:
            with vm.open_monitor() as qmp:
                qmp.command("cont")
            vm.serial.expect("ready")
            vm.serial.ask("fill 7", "filled")

            def change() -> None:
                assert vm.serial.ask("rewrite 8000 3", "rewrote") == "8000"

            def check() -> None:
                assert " bad 0 " in vm.serial.ask("verify", "verified")

            yield Guest(vm.monitor, ram, VM_RAM_BYTES, change, check)


@contextmanager
def qemu(folder: Path) -> Iterator[Guest]:
    with booted(folder) as linux:

        def change() -> None:
            before, linux.checksum = linux.checksum, linux.qemu.serial.ask("write after", "written")
            assert linux.checksum != before

        def check() -> None:
            assert linux.qemu.serial.ask("sum", "sum") == linux.checksum

        yield Guest(linux.qemu.monitor, linux.ram, RAM_BYTES, change, check)


@dataclass(frozen=True, slots=True)
class Disk:
    """Where FICLONE works. `stand_in`: what does it, if not the file system; `why`: there is none that can."""

    folder: Path
    stand_in: CloneStandIn | None = None
    why: str = ""

    def told(self, test: pytest.Item) -> CloneStandIn | None:
        if self.stand_in is not None:
            skips.stood_in(test, f"a copy for FICLONE: no file system with reflinks can be mounted: {self.why}")
        return self.stand_in


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("reflinks")
    with contextlib.ExitStack() as stack:
        try:
            found = Disk(stack.enter_context(reflink_disk(folder / "btrfs")))
        except NoLoopDeviceError as error:
            (folder / "plain").mkdir()
            found = Disk(folder / "plain", stack.enter_context(clone_stand_in(folder / "plain")), str(error))
        yield found


@pytest.fixture(scope="module", params=[lazymem_vm, qemu])
def guest(request: pytest.FixtureRequest, disk: Disk) -> Iterator[Guest]:
    """Its RAM file, and so all beside it, is on the disk with reflinks."""
    start: Callable[[Path], AbstractContextManager[Guest]] = request.param
    with start(Path(tempfile.mkdtemp(dir=disk.folder))) as running:
        yield running


def taken(guest: Guest, target: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert snapshot.main([str(guest.monitor), str(target), "--resume", "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def unchanged(folder: Path, ram_bytes: int, scratch: Path) -> bool:
    """Whether its RAM still is what its digests were made from."""
    root = parse((folder / "manifest.json").read_bytes()).ram_root
    return write_digests(folder / "pc.ram", ram_bytes, scratch).tree == root


def test_shared_blocks_and_a_guest_that_runs_on(
    guest: Guest, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    stand_in = disk.told(request.node)
    beside = guest.ram.parent
    first, copy = beside / "reflink", tmp_path / "copy"  # another file system has no block of this one
    for target in (first, copy):
        result = taken(guest, target, capsys)
        assert result["ram_way"] == target.name
        assert result["pause_seconds"] > 0
    if stand_in is None:
        check_changed = shares_its_blocks(guest, first / "pc.ram", copy / "pc.ram")
    else:
        check_changed = was_cloned(guest, first / "pc.ram", stand_in)

    guest.change()
    guest.check()
    check_changed()
    assert unchanged(first, guest.ram_bytes, tmp_path / "again")
    assert unchanged(copy, guest.ram_bytes, tmp_path / "again-too")


def shares_its_blocks(guest: Guest, clone: Path, copy: Path) -> Callable[[], None]:
    """What it returns is to be called once the guest has changed much."""
    pages = stored_pages(clone)
    shared = pages & stored_pages(guest.ram)
    assert len(shared) > 0.9 * len(pages), "all but what the guest wrote since"
    assert copy.stat().st_dev != guest.ram.stat().st_dev
    assert copy.stat().st_blocks * 512 <= len(pages) * 4096, "and the copy is sparse"

    def check_changed() -> None:
        assert stored_pages(clone) == pages, "the guest's new pages went elsewhere"
        assert len(pages & stored_pages(guest.ram)) < len(shared)

    return check_changed


def was_cloned(guest: Guest, clone: Path, stand_in: CloneStandIn) -> Callable[[], None]:
    """The same, as far as it can be seen where nothing is shared: the file is what FICLONE made of the guest's RAM."""
    made = stand_in.digests[clone.stat().st_ino]
    assert digest(clone) == made

    def check_changed() -> None:
        assert digest(clone) == made
        assert digest(guest.ram) != made

    return check_changed


def test_the_result_says_how_and_how_long(
    guest: Guest, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """As a person reads it, on the same file system and on another."""
    disk.told(request.node)
    for way, parent in (("reflink", guest.ram.parent), ("copy", tmp_path)):
        assert snapshot.main([str(guest.monitor), str(parent / "told"), "--resume"]) == 0
        said = capsys.readouterr().out
        assert f"stored ({way})" in said
        assert "guest stood " in said
