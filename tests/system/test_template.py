"""Templates: one mount, many guests that map it privately, and bytes that never change, whoever tries."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazymem.cli import snapshot, template
from lazymem.cli.main import main as lazymem
from lazymem.demo.vmrun import VmGuest, started
from lazymem.errors import RamFileError, SnapshotError, UsageError
from lazymem.vm.guests import build_guest
from lazymem.vm.qemuchild import PRIVATE_ATTRIBUTE, preparation
from tests.support.deltas import make_delta
from tests.support.mounts import Mounted, Stage, command, page_of, wait_until
from tests.support.snapshots import BuiltSnapshot
from tests.support.vmprocess import Start

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

RAM_MIB = 16
QUIET = ("--prefetch", "none")


class Template(Mounted):
    """A mount made by `lazymem template`, of a folder here or of a server."""

    MODULE = "lazymem.cli.template"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Template]]:
    with contextlib.ExitStack() as undo:

        def begin(source: object, *options: object, name: str = "mnt") -> Template:
            made = Template(str(source), tmp_path / name, *options, cache=tmp_path / f"cache-{name}")
            undo.callback(made.clean_up)
            return made

        yield begin


def server_of(mounted: Template) -> Path:
    """The socket that the mount's own server listens on."""
    return Path(mounted.status()["server"].removeprefix("unix:"))


def processes_with(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if any(text in word.decode(errors="replace") for word in words):
                found.append(int(path.parent.name))
    return found


def test_a_local_folder_is_served_until_the_mount_ends(make: Callable[..., Template], snapshot: BuiltSnapshot) -> None:
    mounted = make(snapshot.folder, *QUIET)
    socket = server_of(mounted)
    assert mounted.status()["template"] is True
    with mounted.open_map(private=True) as mapped:
        assert page_of(mapped, 5) == snapshot.page(5)
        # A server that dies is started again; what is missing meanwhile is waited for.
        serving = [pid for pid in processes_with(str(socket)) if "--listen" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(serving) == 1
        os.kill(serving[0], signal.SIGKILL)
        assert page_of(mapped, 900) == snapshot.page(900)
    assert lazymem(["umount", str(mounted.path)]) == 0
    wait_until(lambda: not processes_with(str(socket)), "the server's end")
    assert not socket.parent.exists()


def test_in_front_until_ctrl_c(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Its own group gets the signal, as at a terminal."""
    (tmp_path / "mnt").mkdir()
    words = (snapshot.folder, tmp_path / "mnt", "-f", "--cache", tmp_path / "cache")
    with subprocess.Popen(
        command("lazymem.cli.template", *words), stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            wait_until(lambda: (tmp_path / "mnt" / "pc.ram").exists() or process.poll() is not None, "the mount")
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
        finally:
            process.kill()
    assert not os.path.ismount(tmp_path / "mnt")


def test_what_cannot_be_served_is_refused_and_nothing_is_left(
    snapshot: BuiltSnapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnt").mkdir()
    assert template.main([str(tmp_path / "mnt"), str(tmp_path / "mnt")]) == SnapshotError.exit_code
    assert "has no pc.ram" in capsys.readouterr().err
    assert template.main([str(tmp_path / "no"), str(tmp_path / "mnt")]) == UsageError.exit_code
    assert "is no folder, and no server's address" in capsys.readouterr().err
    assert template.main([str(snapshot.folder), str(tmp_path / "no")]) == 13
    wait_until(lambda: not processes_with(str(tmp_path)), "the server's end")


def test_a_delta_with_its_parent(make: Callable[..., Template], snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    make_delta(tmp_path / "far" / "delta", snapshot.folder, {5: b"new!" * 1024}, (snapshot.folder,))
    mounted = make(tmp_path / "far" / "delta", "--parent", snapshot.folder)
    with mounted.open_map(private=True) as mapped:
        assert page_of(mapped, 5) == b"new!" * 1024
        assert page_of(mapped, 6) == snapshot.page(6)


def test_clean_pages_are_in_memory_once(make: Callable[..., Template], snapshot: BuiltSnapshot) -> None:
    """Two who map it privately: the second finds all of it in the kernel's page cache, and each accounts for half."""
    mounted = make(snapshot.folder, *QUIET)
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(mounted.ram_path.open("rb"))
        maps = [mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) for _ in range(2)]
        for mapped in maps:
            undo.callback(mapped.close)
        assert maps[0][:] == snapshot.ram
        reads = mounted.requests()
        assert maps[1][:] == snapshot.ram
        assert mounted.requests() == reads
        parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        ours = [part for part in parts if str(mounted.ram_path) in part]
        figures = [re.findall(r"^(Rss|Pss): +(\d+) kB", part, re.MULTILINE) for part in ours]
        assert [dict(found) for found in figures] == [{"Rss": "4096", "Pss": "2048"}] * 2


def test_nobody_changes_a_byte(make: Callable[..., Template], snapshot: BuiltSnapshot) -> None:
    mounted = make(snapshot.folder)
    descriptor = os.open(mounted.ram_path, os.O_RDWR)  # as QEMU 7.2 opens it, also for share=off
    try:
        with pytest.raises(OSError, match="Read-only") as refused:
            os.pwrite(descriptor, b"changed", 100)
        assert refused.value.errno == errno.EROFS
        with pytest.raises(OSError, match="No such device"):
            mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED)
        assert os.pread(descriptor, 9000, 5001) == snapshot.ram[5001:14001]
        with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE) as own:
            own[100:107] = b"changed"
            assert mounted.ram_path.read_bytes() == snapshot.ram
            assert own[100:107] == b"changed"
    finally:
        os.close(descriptor)
    with pytest.raises(OSError, match="not permitted"):
        os.setxattr(mounted.ram_path, "user.other", b"1")
    assert mounted.status()["pages_written"] == 0


def qemu_on(ram: Path, share: str) -> list[str]:
    program = shutil.which("qemu-system-x86_64")
    assert program is not None
    memory = f"memory-backend-file,id=pc.ram,size=4M,mem-path={ram},share={share}"
    return [program, "-machine", "pc,memory-backend=pc.ram", "-m", "4M", "-object", memory, "-display", "none"]


@contextlib.contextmanager
def running(words: list[str], prepare: Callable[[], None] | None = None) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=prepare) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_stock_qemu_with_share_on_does_not_start(make: Callable[..., Template], snapshot: BuiltSnapshot) -> None:
    """Nobody told it: the kernel refuses the map. With share=off it runs, and its firmware writes to its own pages."""
    mounted = make(snapshot.folder)
    done = subprocess.run(qemu_on(mounted.ram_path, "on"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "unable to map backing store for guest RAM: No such device" in done.stderr
    with running(qemu_on(mounted.ram_path, "off")) as qemu:
        wait_until(lambda: private_dirty_kib(qemu.pid, mounted.ram_path) > 0, "its firmware to write")
        assert mounted.ram_path.read_bytes() == snapshot.ram


def private_dirty_kib(pid: int, ram: Path) -> int:
    """Of the maps of `ram` in that process."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE)
    found = [re.findall(r"^Private_Dirty: +(\d+) kB", part, re.MULTILINE) for part in parts if str(ram) in part]
    return sum(int(number) for numbers in found for number in numbers)


def test_a_qemu_that_lies_shows_its_writes_to_this_mount_only(
    make: Callable[..., Template], snapshot: BuiltSnapshot
) -> None:
    """It promises to map privately, as lazymem-vm does for it, and shares. What it writes is in the kernel's page
    cache, where others read it; the mount takes none of it, and the next one has the snapshot's bytes."""
    mounted = make(snapshot.folder)
    descriptor = os.open(mounted.ram_path, os.O_RDONLY)
    try:
        with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as clone:
            assert clone[:] == snapshot.ram
            with running(qemu_on(mounted.ram_path, "on"), preparation(None, mounted.ram_path)):
                wait_until(lambda: clone[:] != snapshot.ram, "its firmware to write")
            with contextlib.suppress(OSError):  # that of the write-back; who hears of it first is the kernel's choice
                os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(descriptor, len(snapshot.ram), 0) == snapshot.ram
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    assert "this mount is a template" in mounted.log.read_text()
    assert mounted.status()["pages_written"] == 0
    again = make(snapshot.folder, name="again")
    assert again.ram_path.read_bytes() == snapshot.ram


def test_the_promise_is_for_one_open_of_a_template(make: Callable[..., Template], snapshot: BuiltSnapshot) -> None:
    mounted = make(snapshot.folder)
    os.setxattr(mounted.ram_path, PRIVATE_ATTRIBUTE, b"1")
    with mounted.ram_path.open("r+b") as first, mounted.ram_path.open("r+b") as second:
        mmap.mmap(first.fileno(), 0, flags=mmap.MAP_SHARED).close()
        with pytest.raises(OSError, match="No such device"):
            mmap.mmap(second.fileno(), 0, flags=mmap.MAP_SHARED)


# ---- guests


@pytest.fixture
def saved(tmp_path: Path, sockets: Path) -> Path:
    """A snapshot of a `pages` guest that has filled its RAM."""
    ram = tmp_path / "source.ram"
    with ram.open("xb") as file:
        file.truncate(RAM_MIB << 20)
    guest = VmGuest(ram, RAM_MIB << 20, sockets / "q", sockets / "s", build_guest("pages", tmp_path))
    with started(guest, tmp_path / "log") as vm:
        with vm.open_monitor() as qmp:
            qmp.command("cont")
        vm.serial.expect("ready")
        vm.serial.ask("fill 7", "filled")
        assert snapshot.main([str(vm.monitor), str(tmp_path / "saved")]) == 0
        assert vm.process.wait(60) == 0
    return tmp_path / "saved"


def test_guests_come_and_go_and_do_not_see_each_other(
    make: Callable[..., Template], mounts: Stage, saved: Path, sockets: Path, tmp_path: Path
) -> None:
    """Of a server elsewhere. What one has fetched the others need not; what one writes no other sees."""
    mounted = make(mounts.serve(saved).address, *QUIET)
    received = 0
    with contextlib.ExitStack() as running_guests:
        for number in range(3):
            ram = Path(f"{mounted.ram_path},share=off")
            guest = VmGuest(ram, RAM_MIB << 20, sockets / f"q{number}", sockets / f"s{number}")
            vm = running_guests.enter_context(started(guest, tmp_path / f"log{number}"))
            with vm.open_monitor() as qmp:
                qmp.command("migrate-incoming", uri=f"file:{mounted.path}/vmstate")
                assert qmp.wait_status(lambda status: status != "inmigrate") == "running"
            assert "generation 0" in vm.serial.ask("status", "status")
            assert " bad 0 " in vm.serial.ask("verify", "verified")
            now = mounted.status()["wire_received_bytes"]
            assert now > received + (1 << 20) if not number else now - received < 1 << 16
            received = now
            assert vm.serial.ask(f"rewrite 50 {number}", "rewrote") == "50"
            assert " bad 0 " in vm.serial.ask("verify", "verified")
        assert snapshot.main([str(vm.monitor), str(tmp_path / "second"), "--resume"]) == RamFileError.exit_code
    assert mounted.status()["pages_written"] == 0
    assert mounted.ram_path.read_bytes() == (saved / "pc.ram").read_bytes()
    assert lazymem(["umount", str(mounted.path)]) == 0


@pytest.mark.parametrize("engine", ["unicorn", "qemu"])
def test_share_on_is_refused(make: Callable[..., Template], saved: Path, start: Start, engine: str) -> None:
    mounted = make(saved)
    words = ("--engine", engine, "--pcram-file", mounted.ram_path, "-incoming", f"file:{mounted.path}/vmstate")
    code, said = start(*words).end()
    assert (code, "is a template for many guests: use share=off" in said) == (RamFileError.exit_code, True), said
