"""Rule 6 at the emulator: a device state is taken with the RAM that it was saved with, and with no other.

A mount's attribute is set here as an ordinary one of the file, which reads the same.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import tempfile
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.errors import IdentityError, LazymemError, RamFileError, SnapshotError
from lazymem.pages import PAGE_SIZE
from lazymem.vm import identity
from lazymem.vm.identity import RUN_ATTRIBUTE, check_may_share, check_state_belongs
from tests.support.deltas import make_delta
from tests.support.snapshots import BuiltSnapshot, make_snapshot

STATE = b"the state that belongs to it"
PAGES = 600  # Three leaves of digests, the last one not full.


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    built = make_snapshot(tmp_path / "snapshot", PAGES, vmstate=STATE)
    set_ram_time(built, -1)
    return built


@pytest.fixture
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests' folders lie."""
    monkeypatch.setattr(identity, "lies_in_memory", lambda device: False)


def set_ram_time(snapshot: BuiltSnapshot, seconds: int) -> None:
    """pc.ram's mtime, counted from the manifest's."""
    at = (snapshot.folder / "manifest.json").stat().st_mtime_ns + seconds * 10**9
    os.utime(snapshot.folder / "pc.ram", ns=(at, at))


def ram_of(snapshot: BuiltSnapshot) -> Path:
    return snapshot.folder / "pc.ram"


def as_mounted(monkeypatch: pytest.MonkeyPatch, snapshot: BuiltSnapshot, **told: object) -> None:
    """As if `snapshot`'s folder were a lazymem mount of it."""
    document = {"identity": snapshot.identity.hex(), "written_pages": 0, "template": False, "hashed": True, **told}

    def getxattr(path: Path, name: str) -> bytes:
        if Path(path) != ram_of(snapshot) or name != RUN_ATTRIBUTE:
            raise OSError(errno.ENODATA, "No data available")
        return json.dumps(document).encode()

    monkeypatch.setattr(os, "getxattr", getxattr)


def notices(snapshot: BuiltSnapshot, stream: bytes = STATE) -> list[str]:
    """Check; what a person was told."""
    said: list[str] = []
    check_state_belongs(ram_of(snapshot), "pc.ram", stream, said.append)
    return said


class TestSnapshotsOwnFolder:
    @pytest.mark.usefixtures("on_a_disk")
    def test_its_own_state_belongs(self, snapshot: BuiltSnapshot) -> None:
        assert notices(snapshot) == []

    def test_ram_in_memory_is_read_whole_and_said(self) -> None:
        """There a raw QEMU that maps the file shared writes it without a trace, but for its bytes."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            snapshot = make_snapshot(Path(folder), PAGES, vmstate=STATE)
            (said,) = notices(snapshot)
            assert "lies in memory" in said
            before = ram_of(snapshot).stat()
            with ram_of(snapshot).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                mapped[5 * PAGE_SIZE] ^= 1
            assert ram_of(snapshot).stat().st_mtime_ns == before.st_mtime_ns
            with pytest.raises(IdentityError, match="was written since the snapshot was made"):
                notices(snapshot)

    @pytest.mark.parametrize("stream", [b"", STATE[:-1], STATE + b"x", STATE.replace(b"t", b"T")])
    def test_another_state_does_not(self, snapshot: BuiltSnapshot, stream: bytes) -> None:
        with pytest.raises(IdentityError, match="device state is not that of the snapshot"):
            notices(snapshot, stream)

    def test_a_snapshot_without_state_has_none(self, tmp_path: Path) -> None:
        bare = make_snapshot(tmp_path, PAGES, vmstate=b"")
        with pytest.raises(IdentityError, match="has no device state"):
            notices(bare)

    def test_newer_ram_is_read_whole_and_said(self, snapshot: BuiltSnapshot) -> None:
        set_ram_time(snapshot, 1)
        (said,) = notices(snapshot)
        assert "reading all of it" in said

    @pytest.mark.parametrize("page", [0, 255, 256, PAGES - 1])
    def test_written_ram_is_refused(self, snapshot: BuiltSnapshot, page: int) -> None:
        with ram_of(snapshot).open("r+b") as file:
            file.seek(page * PAGE_SIZE + 17)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        set_ram_time(snapshot, 1)
        with pytest.raises(IdentityError, match=r"was written since the snapshot was made \(in the MiB at"):
            notices(snapshot)

    @pytest.mark.parametrize("damage", [b"", b"short"])
    def test_digests_that_are_not_the_manifests_are_refused(self, snapshot: BuiltSnapshot, damage: bytes) -> None:
        set_ram_time(snapshot, 1)
        digests = snapshot.folder / "pc.ram.digests"
        digests.write_bytes(damage or bytes(digests.stat().st_size))
        with pytest.raises(IdentityError, match="not the digest tree"):
            notices(snapshot)

    def test_missing_digests_are_refused(self, snapshot: BuiltSnapshot) -> None:
        set_ram_time(snapshot, 1)
        (snapshot.folder / "pc.ram.digests").unlink()
        with pytest.raises(SnapshotError, match="No such file"):
            notices(snapshot)

    def test_a_writing_guest_is_refused(self, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
        with pytest.raises(RamFileError, match="would destroy the snapshot"):
            check_may_share(ram_of(snapshot), "pc.ram")
        (tmp_path / "link").symlink_to(ram_of(snapshot))
        with pytest.raises(RamFileError, match="would destroy the snapshot"):
            check_may_share(tmp_path / "link", "pc.ram")

    def test_a_broken_manifest_protects_too(self, snapshot: BuiltSnapshot) -> None:
        (snapshot.folder / "manifest.json").write_bytes(b"{")
        with pytest.raises(RamFileError, match="would destroy the snapshot"):
            check_may_share(ram_of(snapshot), "pc.ram")
        with pytest.raises(SnapshotError, match="not JSON"):
            notices(snapshot)

    def test_a_manifest_that_cannot_be_read_is_said_to_be_that(self, snapshot: BuiltSnapshot) -> None:
        """Not that the file is a snapshot's, which nobody could see."""
        (snapshot.folder / "manifest.json").unlink()
        (snapshot.folder / "manifest.json").symlink_to("manifest.json")
        with pytest.raises(RamFileError, match=r"cannot be found out: cannot read .*manifest\.json"):
            check_may_share(ram_of(snapshot), "pc.ram")

    @pytest.mark.usefixtures("on_a_disk")
    def test_uncovered_disks_are_said_on_each_resume(self, snapshot: BuiltSnapshot) -> None:
        assert snapshot.manifest is not None
        manifest = replace(snapshot.manifest, disks_handled=True)
        (snapshot.folder / "manifest.json").write_bytes(manifest.to_json())
        set_ram_time(snapshot, -1)
        for _ in range(2):
            (said,) = notices(snapshot)
            assert "does not cover the guest's writable disks" in said


class TestOnAMount:
    def test_untouched_ram_belongs(self, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
        as_mounted(monkeypatch, snapshot)
        set_ram_time(snapshot, 1)  # A mount's times mean nothing.
        check_may_share(ram_of(snapshot), "pc.ram")
        assert notices(snapshot) == []

    def test_written_ram_is_refused(self, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
        as_mounted(monkeypatch, snapshot, written_pages=3)
        with pytest.raises(IdentityError, match="has written 3 pages"):
            notices(snapshot)
        check_may_share(ram_of(snapshot), "pc.ram")  # A guest that boots afresh may use it.

    def test_another_snapshots_ram_is_refused(self, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
        as_mounted(monkeypatch, snapshot, identity="00" * 32)
        with pytest.raises(IdentityError, match="another snapshot"):
            notices(snapshot)

    def test_another_state_is_refused(self, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
        as_mounted(monkeypatch, snapshot)
        with pytest.raises(IdentityError, match="device state is not that"):
            notices(snapshot, b"other")

    def test_written_ram_without_a_manifest_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bare = make_snapshot(tmp_path, 8, hashed=False)
        as_mounted(monkeypatch, bare, written_pages=1)
        with pytest.raises(IdentityError, match="has written 1 pages"):
            notices(bare)

    def test_a_template_has_no_writer(self, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
        as_mounted(monkeypatch, snapshot, template=True)
        with pytest.raises(RamFileError, match="use share=off"):
            check_may_share(ram_of(snapshot), "pc.ram")
        assert notices(snapshot) == []

    @pytest.mark.parametrize(
        "answer", [b"", b"[]", b"{", b'{"identity": "x"}', b'{"identity": "x", "written_pages": "y"}']
    )
    def test_nonsense_from_the_mount_is_refused(
        self, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, answer: bytes
    ) -> None:
        monkeypatch.setattr(os, "getxattr", lambda *_: answer)
        with pytest.raises(IdentityError, match="cannot be read"):
            notices(snapshot)
        with pytest.raises(LazymemError):
            check_may_share(ram_of(snapshot), "pc.ram")

    @pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO])
    def test_a_dead_mount_is_not_taken_for_none(
        self, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def dead(*_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "getxattr", dead)
        with pytest.raises(IdentityError, match="cannot ask which RAM it is"):
            notices(snapshot)


class TestAlone:
    def test_nothing_is_known_and_nothing_refused(self, tmp_path: Path) -> None:
        bare = make_snapshot(tmp_path, 8, hashed=False)
        check_may_share(ram_of(bare), "pc.ram")
        assert notices(bare) == []

    def test_a_manifest_about_another_file_says_nothing(self, snapshot: BuiltSnapshot) -> None:
        other = snapshot.folder / "work.ram"
        other.write_bytes(snapshot.ram)
        check_may_share(other, "pc.ram")
        check_state_belongs(other, "pc.ram", b"any", lambda line: pytest.fail(line))


def test_nothing_runs_on_a_deltas_own_file(tmp_path: Path) -> None:
    """It is not all of the RAM. Shared it is a snapshot's own file, as any; privately, too, it is refused."""
    parent = make_snapshot(tmp_path / "parent", pages=PAGES)
    make_delta(tmp_path / "delta", parent.folder, {5: b"new!" * 1024}, vmstate=b"device state")
    ram = tmp_path / "delta" / "pc.ram.delta"
    with pytest.raises(RamFileError, match="is a snapshot's own"):
        check_may_share(ram, "pc.ram")
    with pytest.raises(IdentityError, match="is a delta's, which is not all of the RAM"):
        check_state_belongs(ram, "pc.ram", b"device state", pytest.fail)
