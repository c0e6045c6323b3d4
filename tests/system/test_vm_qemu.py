"""lazymem-vm --engine qemu with real guests: booted, saved, resumed off a mount; and what QEMU refuses by itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
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
from uuid import UUID

import pytest
from qemu.qmp import QMPClient

from lazymem.cli import snapshot
from lazymem.cli.vm import main
from lazymem.demo.linuxguest import build
from lazymem.demo.processes import child, open_monitor, tail
from lazymem.demo.serialline import SerialLine
from lazymem.demo.serving import mounted, served, unmount
from lazymem.demo.streamscan import scan
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


NUMBERS = itertools.count()


@contextmanager
def vm(log: Path, ram: str, *words: str, sockets: Path) -> Iterator[Vm]:
    """`sockets`: a folder with a short name. Its serial line leads to us from the guest's first byte on."""
    serial = sockets / f"serial{next(NUMBERS)}"
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
    """`generation`: the guest's id when it was saved."""

    folder: Path
    checksum: str
    generation: UUID


GENERATION = ("-device", "vmgenid,guid=auto")
EVENTS = "/sys/firmware/acpi/interrupts/gpe05"
"""How often the guest's kernel was told of a new generation id: that event is this device's in QEMU's ACPI tables."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, sockets: Path) -> Saved:
    """A Linux guest that this command booted, with a device that a resume has to repeat; it had counted to 1."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "ram").touch()
    os.truncate(folder / "ram", RAM_BYTES)
    guest = build(folder, random_mib=2, text_mib=2)
    boot = ("-kernel", str(guest.kernel), "-append", guest.append)
    more: tuple[str, ...] = (
        "--",
        "-initrd",
        str(guest.initrd),
        "-device",
        "virtio-rng-pci",
        "-no-reboot",
        "-accel",
        "tcg",
    )
    more = (*more, *GENERATION)
    with vm(folder / "log", str(folder / "ram"), *boot, *more, sockets=sockets) as source:
        checksum = source.serial.expect("lazymem ready", 100)
        assert source.serial.ask("tick", "tick") == "1"
        generation = generation_of(source)
        assert int(source.serial.ask(f"show {EVENTS}", "show").split()[0]) == 0
        assert snapshot.main([str(source.monitor), str(folder / "snap")]) == 0
        assert source.process.wait(60) == 0
    return Saved(folder / "snap", checksum, generation)


def generation_of(guest: Vm) -> UUID:
    with open_monitor(guest.monitor, guest.process, guest.log) as qmp:
        return UUID(qmp.command("query-vm-generation-id")["guid"])


@pytest.fixture
def local(saved: Saved, tmp_path: Path) -> Path:
    """RAM and state alone, without the manifest that would say what belongs to what."""
    subprocess.run(["cp", "--sparse=always", saved.folder / "pc.ram", saved.folder / "vmstate", tmp_path], check=True)
    return tmp_path


DEVICE = ("--", "-device", "virtio-rng-pci")
"""What the user has to repeat; the generation id's device is repeated by itself where there is a manifest."""

BOTH = (*DEVICE, *GENERATION)


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
            no_huge_pages_asked_for(guest, here.ram)
            assert asyncio.run(stopped_by_qemus_own_client(guest.monitor)) == ["STOP", "RESUME"]
            sent_by_hand_without_its_ram(guest, sockets / "sent")
            guest.process.send_signal(signal.SIGTERM)
            assert guest.process.wait(60) == 0
        assert here.status()["demand_faults"] > 0
        words = ["--engine", "qemu", "-m", "256", "--pcram-file", str(here.ram), "-qmp", f"unix:{tmp_path}/q"]
        assert main([*words, "-incoming", "defer"]) == IdentityError.exit_code
        assert "mount the snapshot anew" in capfd.readouterr().err


def no_huge_pages_asked_for(guest: Vm, ram: Path) -> None:
    """QEMU's own call is answered by a filter: the kernel would read 2 MiB ahead of each touch."""
    with open_monitor(guest.monitor, guest.process, guest.log) as qmp:
        qemu = Path(f"/proc/{qmp.peer_pid}")
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", (qemu / "smaps").read_text(), flags=re.MULTILINE)
    found = [part for part in maps if part.splitlines()[:1] and part.splitlines()[0].endswith(f" {ram}")]
    assert found
    flags = [line.split()[1:] for part in found for line in part.splitlines() if line.startswith("VmFlags:")]
    assert not [one for one in flags if "hg" in one], flags
    assert re.search(r"^Seccomp:\s+2$", (qemu / "status").read_text(), re.MULTILINE)


async def stopped_by_qemus_own_client(monitor: Path) -> list[str]:
    """And let go on; the names of what QEMU told of that."""
    client = QMPClient("test")
    await client.connect(str(monitor))
    try:
        status = await client.execute("query-status")
        assert isinstance(status, dict)
        assert status["status"] == "running"
        with client.listener(["STOP", "RESUME"]) as events:
            await client.execute("stop")
            await client.execute("cont")
            return [str((await events.get())["event"]) for _ in range(2)]
    finally:
        await client.disconnect()


def sent_by_hand_without_its_ram(guest: Vm, stream: Path) -> None:
    """By a user's own `migrate`, without a word of capabilities; the guest stands after it."""
    with open_monitor(guest.monitor, guest.process, guest.log) as qmp:
        qmp.command("migrate", uri=f"exec:cat > {stream}")
        wait_until(lambda: qmp.command("query-migrate")["status"] in ("completed", "failed"), "the state to be sent")
        assert qmp.command("query-migrate")["status"] == "completed"
    sent = scan(stream.read_bytes())
    assert sent.of_block("pc.ram") == 0
    assert sum(sent.page_bytes.values()) > 0


def test_a_delta_of_what_it_wrote_is_resumed_elsewhere(saved: Saved, tmp_path: Path, sockets: Path) -> None:
    """Its pages lie over those of the snapshot that it ran from, most of which were never here."""
    (tmp_path / "delta").mkdir()
    delta = tmp_path / "delta" / "second"
    checksum = saved.checksum
    for folder, parent in ((saved.folder, saved.folder), (delta, saved.folder)):
        place = tmp_path / folder.name
        place.mkdir()
        (place / "mnt").mkdir()
        options = ("--cache", str(place / "cache"), "--prefetch", "none")
        with (
            served([folder], place / "serve.log", "--parent", str(parent)) as address,
            mounted(address, place / "mnt", place / "mount.log", *options) as here,
            vm(place / "log", str(here.ram), "-incoming", f"file:{here.vmstate}", *DEVICE, sockets=sockets) as guest,
        ):
            guest.wait_running()
            if folder == delta:
                assert guest.serial.ask("sum", "sum") == checksum
                break
            checksum = guest.serial.ask("write here", "written")
            assert checksum != saved.checksum
            assert here.status()["pages_held"] < here.status()["pages_total"]
            assert snapshot.main([str(guest.monitor), str(delta), "--delta"]) == 0
            assert guest.process.wait(60) == 0


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


def test_clones_of_a_template_have_generations_of_their_own(saved: Saved, tmp_path: Path, sockets: Path) -> None:
    """QEMU writes each one's new id into its memory while it loads the state, and tells the guest's kernel."""
    ram_bytes = (saved.folder / "pc.ram").read_bytes()
    places = [at.start() for at in re.finditer(re.escape(saved.generation.bytes_le), ram_bytes)]
    places = [at for at in places if at % 4096 == 40]  # where the ACPI tables point into the page that is its
    assert places
    found = {saved.generation}
    (tmp_path / "mnt").mkdir()
    with templated(saved.folder, tmp_path / "mnt", "--cache", str(tmp_path / "cache")) as mount:
        words = (f"{mount}/pc.ram,share=off", "-incoming", f"file:{mount}/vmstate", *DEVICE)
        for number in range(2):
            with vm(tmp_path / f"log{number}", *words, sockets=sockets) as guest:
                guest.wait_running()
                assert guest.serial.ask("sum", "sum") == saved.checksum
                assert int(guest.serial.ask(f"show {EVENTS}", "show").split()[0]) == 1
                own = generation_of(guest)
                assert own.bytes_le in [memory_at(guest, place) for place in places]
                found.add(own)
        assert len(found) == 3
        assert (mount / "pc.ram").read_bytes() == ram_bytes


@contextmanager
def templated(folder: Path, mount: Path, *options: str) -> Iterator[Path]:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "lazymem.cli.template",
        folder,
        mount,
        "--log",
        mount.with_name("mount.log"),
    ]
    subprocess.run([*command, *options], check=True, timeout=60)
    try:
        yield mount
    finally:
        unmount(mount)


def memory_at(guest: Vm, address: int) -> bytes:
    """16 bytes of the guest's memory."""
    with open_monitor(guest.monitor, guest.process, guest.log) as qmp:
        said = qmp.command("human-monitor-command", **{"command-line": f"xp /16xb {address:#x}"})
    return bytes(int(word, 16) for word in re.findall(r"0x([0-9a-f]{2})\b", str(said)))


def test_a_state_that_comes_over_a_socket_to_a_guest_that_shall_stand(
    saved: Saved, local: Path, tmp_path: Path, sockets: Path
) -> None:
    stream = sockets / "stream"
    words = ("-incoming", f"unix:{stream}", "-S", *BOTH)
    with vm(tmp_path / "log", str(local / "pc.ram"), *words, sockets=sockets) as guest:
        with socket.socket(socket.AF_UNIX) as sender:
            # QEMU listens a moment after its socket has its name.
            wait_until(lambda: sender.connect_ex(str(stream)) == 0, "somebody to take the state")
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
    words = ("-incoming", f"file:{local}/vmstate", *BOTH, *more)
    with vm(local / "log", str(local / "pc.ram"), *words, sockets=sockets) as guest:
        assert guest.process.wait(60) == 1
    assert reason in tail(local / "log")
    assert (local / "pc.ram").stat().st_mtime_ns == before


def test_a_cut_state(local: Path, sockets: Path) -> None:
    """In the middle. (QEMU 7.2 runs a guest whose state lacks only the description at its end.)"""
    data = (local / "vmstate").read_bytes()
    (local / "cut").write_bytes(data[: len(data) // 2])
    words = ("-incoming", f"file:{local}/cut", *BOTH)
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
