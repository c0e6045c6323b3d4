"""`lazymem snapshot` on a running lazymem-vm: its guest runs on, and each snapshot goes on from where it was taken."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.cli import snapshot
from lazymem.demo.streamscan import scan
from lazymem.demo.vmrun import Vm, VmGuest, started
from lazymem.errors import RamFileError
from lazymem.snapshot.manifest import parse
from lazymem.snapshot.writer import write_digests
from lazymem.vm.guests import build_guest

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

RAM_BYTES = 16 << 20


@pytest.fixture
def vm(tmp_path: Path, sockets: Path) -> Iterator[Vm]:
    """A lazymem-vm whose guest has filled its RAM and runs."""
    ram = tmp_path / "source.ram"
    with ram.open("xb") as file:
        file.truncate(RAM_BYTES)
    kernel = build_guest("pages", tmp_path)
    with started(VmGuest(ram, RAM_BYTES, sockets / "qmp", sockets / "serial", kernel), tmp_path / "log") as running:
        with running.open_monitor() as qmp:
            qmp.command("cont")
        running.serial.expect("ready")
        running.serial.ask("fill 7", "filled")
        yield running


def verify(vm: Vm) -> str:
    return vm.serial.ask("verify", "verified").split(" first_bad")[0]


def resume(vm: Vm, vmstate: Path) -> None:
    with vm.open_monitor() as qmp:
        qmp.command("migrate-incoming", uri=f"file:{vmstate}")
        assert qmp.wait_status(lambda status: status != "inmigrate") == "running"


def test_two_snapshots_of_one_guest_that_runs_on(vm: Vm, tmp_path: Path, sockets: Path) -> None:
    whole = verify(vm)
    assert whole.endswith(" bad 0")
    assert snapshot.main([str(vm.monitor), str(tmp_path / "first"), "--resume"]) == 0
    root = parse((tmp_path / "first" / "manifest.json").read_bytes()).ram_root
    assert vm.serial.ask("rewrite 50 3", "rewrote") == "50"
    assert verify(vm) == whole
    assert snapshot.main([str(vm.monitor), str(tmp_path / "second")]) == 0
    assert vm.process.wait(60) == 0
    assert write_digests(tmp_path / "first" / "pc.ram", RAM_BYTES, tmp_path / "again").tree == root
    for name, generation in (("first", "0"), ("second", "1")):
        data = (tmp_path / name / "vmstate").read_bytes()
        assert scan(data).of_block("pc.ram") == 0
        # Beside its manifest a snapshot's RAM is refused for sharing, so the guest gets a copy without one.
        copy = tmp_path / f"copy-of-{name}"
        shutil.copy(tmp_path / name / "pc.ram", copy)
        place = VmGuest(copy, RAM_BYTES, sockets / f"{name}-q", sockets / f"{name}-s")
        with started(place, tmp_path / "log") as resumed:
            resume(resumed, tmp_path / name / "vmstate")
            assert verify(resumed) == whole
            assert f"generation {generation}" in resumed.serial.ask("status", "status")


def test_manifest_of_lazymem_vm(vm: Vm, tmp_path: Path) -> None:
    began = time.monotonic()
    assert snapshot.main([str(vm.monitor), str(tmp_path / "snap"), "--resume"]) == 0
    took = time.monotonic() - began
    manifest = parse((tmp_path / "snap" / "manifest.json").read_bytes())
    assert manifest.emulator.name == "lazymem-vm"
    assert manifest.emulator.machine is not None
    assert manifest.pause_seconds is not None
    assert 0 < manifest.pause_seconds < took, "a part of the whole"


def test_ram_file_that_became_a_snapshots_is_refused(
    vm: Vm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert snapshot.main([str(vm.monitor), str(tmp_path / "snap"), "--resume"]) == RamFileError.exit_code
    assert "directly on the RAM of the snapshot" in capsys.readouterr().err
    assert verify(vm).endswith(" bad 0")
