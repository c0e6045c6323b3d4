"""The Linux guest's parts: archives that Linux and cpio can read, kernels and busybox that are fit, QEMU's options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazymem.demo import cpio, linuxguest
from lazymem.demo.linuxguest import LinuxGuest
from lazymem.demo.qemu import QemuOptions
from lazymem.errors import EnvironmentRefusedError


def read_newc(data: bytes) -> list[tuple[str, int, bytes]]:
    """A reader of its own: (name, mode, data) up to the trailer."""
    found: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_bytes = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_bytes - 1].decode()
        at = (at + 110 + name_bytes + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found.append((name, mode, data[at : at + size]))
        at = (at + size + 3) // 4 * 4


def test_archive_reads_back_whatever_the_lengths() -> None:
    entries = [cpio.folder("bin")] + [cpio.program(f"p{'x' * n}", b"d" * n) for n in range(9)]
    assert read_newc(cpio.archive(entries)) == [(e.name, e.mode, e.data) for e in entries]


def test_initrd_holds_busybox_and_an_init_that_it_can_parse(tmp_path: Path) -> None:
    busybox = linuxguest.find_busybox()
    found = {name: (mode, data) for name, mode, data in read_newc(linuxguest.initrd_archive(busybox))}
    assert found["bin/busybox"] == (0o100755, busybox.read_bytes())
    (tmp_path / "init").write_bytes(found["init"][1])
    assert os.spawnv(os.P_WAIT, str(busybox), ["busybox", "sh", "-n", str(tmp_path / "init")]) == 0


def test_newest_cloud_kernel_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linuxguest, "PARTS_FOLDER", tmp_path / "parts")
    with pytest.raises(EnvironmentRefusedError, match="no readable kernel"):
        linuxguest.find_kernel(tmp_path)
    for age, name in enumerate(("vmlinuz-9-generic", "vmlinuz-6-cloud-amd64", "vmlinuz-5-cloud-amd64")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
        assert linuxguest.find_kernel(tmp_path).name == ("vmlinuz-6-cloud-amd64" if age else "vmlinuz-9-generic")


def test_qemu_gets_paths_with_commas_whole() -> None:
    guest = LinuxGuest(Path("/k"), Path("/i"))
    command = QemuOptions(Path("/a,b"), 64 << 20, Path("/q,1"), Path("/s"), guest, share=False, paused=True).command()
    assert "memory-backend-file,id=pc.ram,size=67108864,mem-path=/a,,b,share=off" in command
    assert "unix:/q,,1,server=on,wait=off" in command
    assert command[-1] == "-S"
    assert "-incoming" not in command


def test_parts_are_looked_for_where_the_set_up_unpacks_them() -> None:
    """Whatever folder the command runs in. The set-up is no module that can be imported."""
    checkout = Path(__file__).resolve().parents[2]
    assert 'GUEST_PARTS = ROOT / ".cache" / "linux-guest"' in (checkout / "scripts" / "prepare.py").read_text()
    assert checkout / ".cache" / "linux-guest" == linuxguest.PARTS_FOLDER
