"""lazymem-vm --engine qemu with real guests: booted, saved, resumed off a mount; and what QEMU refuses by itself."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazymem.cli import snapshot
from lazymem.cli.vm import main
from lazymem.demo.linuxguest import build
from lazymem.demo.processes import child, open_monitor, tail
from lazymem.demo.serialline import SerialLine
from lazymem.demo.serving import mounted, served
from lazymem.errors import IdentityError
from tests.support.qemu import RAM_BYTES
from tests.support.vmprocess import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


@dataclass(frozen=True, slots=True)
class Vm:
    """A lazymem-vm with a QEMU, its serial line connected."""

    process: subprocess.Popen[bytes]
    serial: SerialLine
    monitor: Path
    log: Path

    def wait_running(self) -> None:
        """Until it has its state: what its serial port is told before, the load of the port's state overwrites."""
        with open_monitor(self.monitor, self.process, self.log) as qmp:
            assert qmp.wait_status(lambda status: status != "inmigrate") == "running"


@contextmanager
def vm(log: Path, ram: str, *words: str, sockets: Path) -> Iterator[Vm]:
    """`sockets`: a folder with a short name. Its serial line leads to us from the guest's first byte on."""
    serial = sockets / f"serial{len(list(sockets.iterdir()))}"
    monitor = serial.with_name(f"{serial.name}.qmp")
    command = [sys.executable, "-m", "lazymem.cli.vm", "--engine", "qemu", "-m", "256", "--pcram-file", ram]
    command += ["-qmp", f"unix:{monitor}", *words]
    command += [] if "--" in words else ["--"]
    with SerialLine(serial) as line, child([*command, "-serial", f"unix:{serial}"], log) as process:
        yield Vm(process, line, monitor, log)


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lazymem-") as folder:
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class Saved:
    folder: Path
    checksum: str


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, sockets: Path) -> Saved:
    """A Linux guest that this command booted, with a device that a resume has to repeat; it had counted to 1."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "ram").touch()
    os.truncate(folder / "ram", RAM_BYTES)
    guest = build(folder, random_mib=2, text_mib=2)
    boot = ("-kernel", str(guest.kernel), "-append", guest.append)
    more = ("--", "-initrd", str(guest.initrd), "-device", "virtio-rng-pci", "-no-reboot", "-accel", "tcg")
    with vm(folder / "log", str(folder / "ram"), *boot, *more, sockets=sockets) as source:
        checksum = source.serial.expect("lazymem ready", 100)
        assert source.serial.ask("tick", "tick") == "1"
        open_monitor(source.monitor, source.process, source.log).close()
        assert snapshot.main([str(source.monitor), str(folder / "snap")]) == 0
        assert source.process.wait(60) == 0
    return Saved(folder / "snap", checksum)


@pytest.fixture
def local(saved: Saved, tmp_path: Path) -> Path:
    """RAM and state alone, without the manifest that would say what belongs to what."""
    subprocess.run(["cp", "--sparse=always", saved.folder / "pc.ram", saved.folder / "vmstate", tmp_path], check=True)
    return tmp_path


DEVICE = ("--", "-device", "virtio-rng-pci")


def test_resumes_from_a_mount_and_only_once(
    saved: Saved, tmp_path: Path, sockets: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The main job; then rule 6: the state is of RAM as it was, so what the first run wrote is nothing to resume."""
    (tmp_path / "mnt").mkdir()
    # Without guesses: on a busy machine they bring all of it before the guest's first touch.
    options = ("--cache", str(tmp_path / "cache"), "--prefetch", "none")
    with (
        served([saved.folder], tmp_path / "serve.log") as address,
        mounted(address, tmp_path / "mnt", tmp_path / "mount.log", *options) as here,
    ):
        incoming = ("-incoming", f"file:{here.vmstate}")
        with vm(tmp_path / "log", str(here.ram), *incoming, *DEVICE, sockets=sockets) as guest:
            guest.wait_running()
            assert guest.serial.ask("tick", "tick") == "2"
            assert guest.serial.ask("sum", "sum") == saved.checksum
            assert guest.serial.ask("write here", "written") != saved.checksum
            said = tail(guest.log)
            assert "machine pc-i440fx-" in said
            assert "tcg as the snapshot was made" in said
            guest.process.send_signal(signal.SIGTERM)
            assert guest.process.wait(60) == 0
        assert here.status()["demand_faults"] > 0
        words = ["--engine", "qemu", "-m", "256", "--pcram-file", str(here.ram), "-qmp", f"unix:{tmp_path}/q"]
        assert main([*words, "-incoming", "defer"]) == IdentityError.exit_code
        assert "mount the snapshot anew" in capfd.readouterr().err


def test_many_from_one_image_which_stays_as_it_was(saved: Saved, tmp_path: Path, sockets: Path) -> None:
    ram = saved.folder / "pc.ram"
    before = ram.stat().st_mtime_ns
    words = (f"{ram},share=off", "-incoming", f"file:{saved.folder}/vmstate", *DEVICE)
    with vm(tmp_path / "1", *words, sockets=sockets) as one, vm(tmp_path / "2", *words, sockets=sockets) as two:
        one.wait_running()
        two.wait_running()
        assert one.serial.ask("write one", "written") != saved.checksum
        assert two.serial.ask("sum", "sum") == saved.checksum
        assert two.serial.ask("tick", "tick") == "2"
    assert ram.stat().st_mtime_ns == before


def test_a_state_that_comes_over_a_socket_to_a_guest_that_shall_stand(
    saved: Saved, local: Path, tmp_path: Path, sockets: Path
) -> None:
    stream = sockets / "stream"
    words = ("-incoming", f"unix:{stream}", "-S", *DEVICE)
    with vm(tmp_path / "log", str(local / "pc.ram"), *words, sockets=sockets) as guest:
        wait_until(lambda: stream.exists() or guest.process.poll() is not None, "somebody to take the state")
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(str(stream))
            sender.sendall((local / "vmstate").read_bytes())
        with open_monitor(guest.monitor, guest.process, guest.log) as qmp:
            assert qmp.wait_status(lambda status: status != "inmigrate") == "paused"
            on = [entry["capability"] for entry in qmp.command("query-migrate-capabilities") if entry["state"]]
            assert "x-ignore-shared" in on
            qmp.command("cont")
        assert guest.serial.ask("sum", "sum") == saved.checksum
    assert not stream.exists()


def test_a_missing_device_is_named_and_qemu_says_no(saved: Saved, tmp_path: Path, sockets: Path) -> None:
    words = (f"{saved.folder}/pc.ram,share=off", "-incoming", f"file:{saved.folder}/vmstate")
    with vm(tmp_path / "log", *words, sockets=sockets) as guest:
        assert guest.process.wait(60) == 1
    said = tail(tmp_path / "log")
    assert "'-device virtio-rng-pci'" in said
    assert "qemu-system-x86_64: " in said
    assert "virtio-rng" in said.partition("qemu-system-x86_64: ")[2]
    assert "QEMU ended with status 1 before its guest could run" in said


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("-machine", "q35"), "Machine type received is 'pc-i440fx-"),
        (("-object", "nonsense"), "nonsense"),
        (("-m", "128"), "backend"),
    ],
)
def test_what_qemu_refuses_it_says_itself(local: Path, sockets: Path, more: tuple[str, ...], reason: str) -> None:
    """No manifest, so nobody but QEMU can know."""
    before = (local / "pc.ram").stat().st_mtime_ns
    words = ("-incoming", f"file:{local}/vmstate", *DEVICE, *more)
    with vm(local / "log", str(local / "pc.ram"), *words, sockets=sockets) as guest:
        assert guest.process.wait(60) == 1
    assert reason in tail(local / "log")
    assert (local / "pc.ram").stat().st_mtime_ns == before


def test_a_cut_state(local: Path, sockets: Path) -> None:
    """In the middle. (QEMU 7.2 runs a guest whose state lacks only the description at its end.)"""
    data = (local / "vmstate").read_bytes()
    (local / "cut").write_bytes(data[: len(data) // 2])
    words = ("-incoming", f"file:{local}/cut", *DEVICE)
    with vm(local / "log", str(local / "pc.ram"), *words, sockets=sockets) as guest:
        assert guest.process.wait(60) == 1
    assert "load of migration failed" in tail(local / "log")


def test_its_end_when_we_are_killed(saved: Saved, tmp_path: Path, sockets: Path) -> None:
    words = (f"{saved.folder}/pc.ram,share=off", "-incoming", f"file:{saved.folder}/vmstate", *DEVICE)
    with vm(tmp_path / "log", *words, sockets=sockets) as guest:
        guest.wait_running()
        assert guest.serial.ask("tick", "tick") == "2"
        with open_monitor(guest.monitor, guest.process, guest.log) as qmp:
            qemu = os.pidfd_open(qmp.peer_pid or 0)
        try:
            guest.process.kill()
            guest.process.wait()
            assert select.select([qemu], [], [], 60)[0], "QEMU outlived lazymem-vm"
        finally:
            os.close(qemu)


def test_the_manifest_says_what_was_said(saved: Saved) -> None:
    made_by = json.loads((saved.folder / "manifest.json").read_text())["emulator"]
    assert made_by["machine"].startswith("pc-i440fx-")
    assert "-nodefaults" in made_by["options"]
