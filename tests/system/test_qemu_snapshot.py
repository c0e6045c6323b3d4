"""`lazymem snapshot` on a real QEMU with a Linux guest: the source's side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.cli import snapshot
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import started
from lazymem.errors import RamFileError, SnapshotError
from lazymem.snapshot.manifest import parse
from lazymem.snapshot.writer import write_digests
from lazymem.vm import migrationsettings
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import CAPABILITY
from tests.support.qemu import RAM_BYTES, BootedGuest, booted
from tests.support.streamreader import read_stream

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedGuest]:
    """One that all tests here use and leave running; its second monitor lets a test look on."""
    with tempfile.TemporaryDirectory(prefix="lazymem-") as sockets:
        more = ("-qmp", f"unix:{sockets}/second,server=on,wait=off")
        with booted(tmp_path_factory.mktemp("guest"), more) as running:
            yield running


def second_monitor(guest: BootedGuest) -> QmpClient:
    command = list(map(str, guest.qemu.process.args))  # type: ignore[arg-type]
    return QmpClient(Path(command[-1].removeprefix("unix:").split(",")[0]))


def test_guest_runs_on_and_the_snapshot_does_not_change(
    guest: BootedGuest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / 'it\'s a "snapshot", $HOME'
    began = time.monotonic()
    assert snapshot.main([str(guest.qemu.monitor), str(target), "--resume", "--json"]) == 0
    took = time.monotonic() - began
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["pause_seconds"] < took, "a part of the whole"
    root = write_digests(target / "pc.ram", RAM_BYTES, tmp_path / "before").tree

    # It makes the guest run on and change much of its RAM.
    changed = guest.qemu.serial.ask("write after", "written")
    assert changed != guest.checksum
    assert guest.qemu.serial.ask("sum", "sum") == changed
    guest.checksum = changed

    assert write_digests(target / "pc.ram", RAM_BYTES, tmp_path / "after").tree == root
    manifest = parse((target / "manifest.json").read_bytes())
    assert manifest.ram_root == root
    assert (tmp_path / "after").read_bytes() == (target / "pc.ram.digests").read_bytes()
    assert not os.path.samefile(target / "pc.ram", guest.ram)
    assert (target / "pc.ram").stat().st_blocks * 512 < RAM_BYTES


def test_state_holds_no_page_of_the_ram_file(guest: BootedGuest, tmp_path: Path) -> None:
    assert snapshot.main([str(guest.qemu.monitor), str(tmp_path / "snap"), "--resume"]) == 0
    data = (tmp_path / "snap" / "vmstate").read_bytes()
    stream = read_stream(data)
    names = [name for name in stream.blocks if "pc.ram" in name]
    assert len(names) == 1
    assert stream.blocks[names[0]] == RAM_BYTES
    assert stream.pages_of(names[0]) == 0
    assert stream.pages_of("pc.bios") > 0
    assert len(data) < 4 << 20


def test_manifest_names_the_versioned_machine_and_the_cpu(guest: BootedGuest, tmp_path: Path) -> None:
    assert snapshot.main([str(guest.qemu.monitor), str(tmp_path / "snap"), "--resume"]) == 0
    made_by = parse((tmp_path / "snap" / "manifest.json").read_bytes()).emulator
    assert made_by.name == "qemu"
    assert made_by.machine is not None
    assert made_by.machine.startswith("pc-i440fx-")
    assert made_by.cpu == "qemu64"
    assert made_by.options[made_by.options.index("-m") :][:2] == ("-m", "256M")
    assert not any("append" in option or str(guest.ram) in option for option in made_by.options)


def test_capability_and_run_state_are_as_before(guest: BootedGuest, tmp_path: Path) -> None:
    assert snapshot.main([str(guest.qemu.monitor), str(tmp_path / "snap"), "--resume"]) == 0
    with guest.qemu.open_monitor() as qmp:
        on = [entry["capability"] for entry in qmp.command("query-migrate-capabilities") if entry["state"]]
        assert "x-ignore-shared" not in on
        assert qmp.command("query-status")["status"] == "running"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_in_the_middle_the_guest_goes_on(
    guest: BootedGuest, tmp_path: Path, number: signal.Signals
) -> None:
    """Or killed: then the process beside it has ended, too, once nobody has its stderr any more."""
    with second_monitor(guest) as looking_on:
        set_to = migrationsettings.read(looking_on, [CAPABILITY])
        before = looking_on.command("query-migrate-parameters")["max-bandwidth"]
        looking_on.command("migrate-set-parameters", max_bandwidth=4096)
        try:
            command = [sys.executable, "-m", "lazymem.cli.snapshot", str(guest.qemu.monitor), str(tmp_path / "snap")]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                try:
                    # "completed" is the save of the test before.
                    while looking_on.command("query-migrate").get("status") != "active":
                        assert process.poll() is None
                    # The blocks that no file backs go over while the guest still runs.
                    assert looking_on.command("query-status")["status"] == "running"
                    process.send_signal(number)
                    _, error = process.communicate(timeout=60)
                finally:
                    process.kill()
        finally:
            looking_on.command("migrate-set-parameters", max_bandwidth=before)
        assert process.returncode == (130 if number == signal.SIGINT else -number), error
        assert "no snapshot was made, the guest goes on" in error
        assert migrationsettings.read(looking_on, [CAPABILITY]) == set_to
        assert looking_on.command("query-status")["status"] == "running"
    assert guest.qemu.serial.ask("sum", "sum") == guest.checksum
    left = [path.name for path in tmp_path.iterdir()]
    assert [name for name in left if not name.startswith(".snap.partial-")] == []
    assert bool(left) == (number == signal.SIGKILL)


def small(sockets: Path, ram: Path, share: bool = True, more: tuple[str, ...] = ()) -> QemuOptions:
    """A guest of 16 MiB that only runs its firmware."""
    ram.touch()
    os.truncate(ram, 16 << 20)
    return QemuOptions(ram, 16 << 20, sockets / "qmp", sockets / "serial", share=share, more=more)


def test_without_resume_the_file_moves_and_qemu_ends(sockets: Path, tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    with started(small(sockets, ram), tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        inode = ram.stat().st_ino
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "snap")]) == 0
        assert qemu.process.wait(60) == 0
    assert (tmp_path / "snap" / "pc.ram").stat().st_ino == inode
    assert not ram.exists()
    manifest = parse((tmp_path / "snap" / "manifest.json").read_bytes())
    assert write_digests(tmp_path / "snap" / "pc.ram", 16 << 20, tmp_path / "digests").tree == manifest.ram_root


def test_private_ram_is_refused(sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(small(sockets, tmp_path / "ram", share=False), tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "snap")]) == RamFileError.exit_code
        assert "share=off" in capsys.readouterr().err


def test_ram_without_a_file_is_refused(sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("-object", "memory-backend-ram,id=other,size=16M", "-machine", "memory-backend=other")
    with started(small(sockets, tmp_path / "ram", more=more), tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "snap")]) == RamFileError.exit_code
        assert "memory backends" in capsys.readouterr().err


def test_writable_disk_needs_the_users_word(sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    drive = f"if=ide,format=raw,file={tmp_path / 'disk'}"
    with started(small(sockets, tmp_path / "ram", more=("-drive", drive)), tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "snap"), "--resume"]) == SnapshotError.exit_code
        assert "writable disks" in capsys.readouterr().err
        assert not (tmp_path / "snap").exists()
        arguments = [str(qemu.monitor), str(tmp_path / "snap"), "--resume", "--disks-handled"]
        assert snapshot.main(arguments) == 0
        assert "disks not in the snapshot" in capsys.readouterr().out
    assert parse((tmp_path / "snap" / "manifest.json").read_bytes()).disks_handled


def test_read_only_disk_is_no_matter(sockets: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    drive = f"if=none,id=d,format=raw,readonly=on,file={tmp_path / 'disk'}"
    more = ("-drive", drive, "-device", "virtio-blk-pci,drive=d")
    with started(small(sockets, tmp_path / "ram", more=more), tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "snap"), "--resume"]) == 0


def test_guest_directly_on_a_snapshot_is_refused(
    sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with started(small(sockets, tmp_path / "ram"), tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "snap")]) == 0
    options = QemuOptions(tmp_path / "snap" / "pc.ram", 16 << 20, sockets / "qmp", sockets / "serial")
    with started(options, tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "second"), "--resume"]) == RamFileError.exit_code
        assert "directly on the RAM of the snapshot" in capsys.readouterr().err
