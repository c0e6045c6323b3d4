"""The snapshot writer: copies are exact, digests are those of the bytes, a folder is whole or absent."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymem.digests import TreeShape, leaf_matches, page_digest, sums_digest
from lazymem.errors import SnapshotError
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.manifest import Block, Emulator, Manifest, parse, vmstate_digest
from lazymem.snapshot.ramcopy import Copied, copy_ram, data_extents
from lazymem.snapshot.writer import PendingSnapshot, create_like, new_ram_id, vmstate_record, write_digests
from tests.support.snapshots import make_snapshot

MIB = 1 << 20


def sparse_file(path: Path, size: int, parts: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path


def copy(source: Path, target: Path, size: int) -> tuple[Copied, int]:
    """The copy's report, and how much `advance` was told."""
    told: list[int] = []
    reading = os.open(source, os.O_RDONLY)
    writing = create_like(target, os.fstat(reading))
    try:
        return copy_ram(reading, writing, size, told.append), sum(told)
    finally:
        os.close(reading)
        os.close(writing)


PARTS = {0: b"start", 3 * MIB + 17: b"x" * 100_000, 30 * MIB - 4: b"end!"}


def refuse_range_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)


@pytest.mark.parametrize("by_hand", [False, True])
def test_copy_is_exact_and_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool) -> None:
    source = sparse_file(tmp_path / "source", 30 * MIB, PARTS)
    if by_hand:
        refuse_range_copy(monkeypatch)
    report, told = copy(source, tmp_path / "target", 30 * MIB)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert told == 30 * MIB
    if report.way == "copy":
        assert 0 < report.moved_bytes < MIB
        assert (tmp_path / "target").stat().st_blocks * 512 < MIB


def test_copy_by_hand_leaves_written_zeros_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_range_copy(monkeypatch)
    source = sparse_file(tmp_path / "source", 9 * MIB, {0: bytes(9 * MIB - 1) + b"1"})
    copy(source, tmp_path / "target", 9 * MIB)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert (tmp_path / "target").stat().st_blocks * 512 <= 64 * 1024


def test_copy_takes_only_the_guests_part_of_a_longer_file(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "source", 8 * MIB, {MIB: b"inside", 5 * MIB: b"behind"})
    copy(source, tmp_path / "target", 4 * MIB)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()[: 4 * MIB]


def test_copy_of_a_file_that_ends_early_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sparse_file(tmp_path / "source", 2 * MIB, {0: b"x" * MIB})
    monkeypatch.setattr("lazymem.snapshot.ramcopy.data_extents", lambda *_: iter([(0, 4 * MIB)]))
    with pytest.raises(OSError, match="ended"):
        copy(source, tmp_path / "target", 4 * MIB)


def test_reflink_is_used_where_there_is_one_and_cut_to_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sparse_file(tmp_path / "source", 8 * MIB, {0: b"a", 4 * MIB: b"behind"})

    def clone(target: int, request: int, origin: int) -> int:
        assert request == 0x40049409
        os.pwrite(target, os.pread(origin, 8 * MIB, 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    report, told = copy(source, tmp_path / "target", 4 * MIB)
    assert report == Copied("reflink", 0)
    assert told == 4 * MIB
    assert (tmp_path / "target").read_bytes() == source.read_bytes()[: 4 * MIB]


def test_a_broken_disk_is_not_taken_for_a_missing_reflink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(OSError, match="broken"):
        copy(sparse_file(tmp_path / "source", MIB, {}), tmp_path / "target", MIB)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(parts=st.dictionaries(st.integers(0, 63), st.sampled_from([b"\1", bytes(PAGE_SIZE), b"z" * PAGE_SIZE])))
def test_extents_hold_all_data(tmp_path: Path, parts: dict[int, bytes]) -> None:
    size = 64 * PAGE_SIZE
    path = sparse_file(tmp_path / "file", size, {page * PAGE_SIZE: data for page, data in parts.items()})
    content = bytearray(path.read_bytes()[:size])
    file = os.open(path, os.O_RDONLY)
    try:
        extents = list(data_extents(file, size))
    finally:
        os.close(file)
    assert extents == sorted(extents)
    for start, end in extents:
        content[start:end] = bytes(end - start)
    assert not any(content)


@pytest.mark.parametrize("pages", [1, 255, 256, 257, 700])
def test_digests_are_those_of_the_bytes(tmp_path: Path, pages: int) -> None:
    built = make_snapshot(tmp_path / "built", pages, seed=pages)
    told: list[int] = []
    sums = tmp_path / "sums"
    roots = write_digests(built.folder / "pc.ram", len(built.ram), tmp_path / "digests", told.append, sums)
    assert built.root is not None
    assert roots.tree == built.root.hex()
    assert sums.read_bytes() == built.sums
    assert roots.sums == sums_digest(built.sums).hex()
    assert (tmp_path / "digests").read_bytes() == built.digests + built.upper
    assert sum(told) == len(built.ram)


def test_digests_of_a_file_of_holes(tmp_path: Path) -> None:
    size = 3 * MIB + PAGE_SIZE
    sparse_file(tmp_path / "ram", size, {})
    write_digests(tmp_path / "ram", size, tmp_path / "digests")
    shape = TreeShape(size)
    data = (tmp_path / "digests").read_bytes()
    assert data[: shape.upper_offset] == page_digest(bytes(PAGE_SIZE)) * shape.pages
    assert leaf_matches(data[shape.upper_offset :], 3, data[3 * 4096 : shape.upper_offset])


def manifest(ram_bytes: int, vmstate: Path) -> Manifest:
    return Manifest(
        Emulator("fake", "1"), (Block("pc.ram", "pc.ram", ram_bytes),), new_ram_id(), "00" * 32, vmstate_record(vmstate)
    )


def fill(pending: PendingSnapshot) -> Manifest:
    pending.vmstate.write_bytes(b"state")
    sparse_file(pending.ram, PAGE_SIZE, {0: b"ram"})
    return manifest(PAGE_SIZE, pending.vmstate)


def test_published_whole(tmp_path: Path) -> None:
    with PendingSnapshot(tmp_path / "snap") as pending:
        made = fill(pending)
        pending.seal(made)
        assert not (tmp_path / "snap").exists()
        pending.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snap"]
    assert sorted(path.name for path in (tmp_path / "snap").iterdir()) == ["manifest.json", "pc.ram", "vmstate"]
    read = parse((tmp_path / "snap" / "manifest.json").read_bytes())
    assert read == made
    assert read.vmstate is not None
    assert read.vmstate.digest == vmstate_digest(b"state")


@pytest.mark.parametrize("call", ["fsync", "rename", "open", "mkdir"])
def test_every_failing_call_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The Nth call fails, then the N+1st, until none does."""
    real = getattr(os, call)
    failures = 0
    for number in range(1, 50):
        calls = 0

        def failing(*arguments: object, _number: int = number, **more: object) -> object:
            nonlocal calls
            calls += 1
            if calls == _number:
                raise OSError(errno.ENOSPC, "no space")
            return real(*arguments, **more)

        target = tmp_path / f"snap{number}"
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                with PendingSnapshot(target) as pending:
                    pending.seal(fill(pending))
                    pending.publish()
            except (OSError, SnapshotError):
                failures += 1
        if calls < number:
            assert target.is_dir()
            break
        # Only a failing sync of the parent comes after the name is given: the snapshot is whole then.
        if target.exists():
            assert (target / "manifest.json").exists()
        else:
            assert not list(tmp_path.glob(f".{target.name}.*"))
    else:
        pytest.fail("it never succeeded")
    assert failures == number - 1 > 0


def test_existing_and_impossible_targets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, reason in (("there", "exists"), ("dangling", "exists"), ("no/such", "not a folder")):
        with pytest.raises(SnapshotError, match=reason):
            PendingSnapshot(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "there"]


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with PendingSnapshot(tmp_path / "snap") as pending:
        pending.seal(fill(pending))
        (tmp_path / "snap").mkdir()
        with pytest.raises(SnapshotError, match="exists"):
            pending.publish()
    assert not any((tmp_path / "snap").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["snap"]


def test_a_kept_folder_survives_a_failure(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), PendingSnapshot(tmp_path / "snap") as pending:
        pending.seal(fill(pending))
        pending.keep()
        raise KeyboardInterrupt
    assert (pending.folder / "pc.ram").exists()


def test_a_second_name_of_the_ram_file_forbids_the_move(tmp_path: Path) -> None:
    ram = sparse_file(tmp_path / "ram", PAGE_SIZE, {})
    with PendingSnapshot(tmp_path / "snap") as pending:
        assert pending.can_move(ram)
        os.link(ram, tmp_path / "second")
        assert not pending.can_move(ram)


def test_a_copy_is_readable_by_nobody_who_could_not_read_the_ram(tmp_path: Path) -> None:
    ram = sparse_file(tmp_path / "ram", PAGE_SIZE, {})
    for mode, expected in ((0o600, 0o600), (0o640, 0o640), (0o444, 0o644), (0o755, 0o644)):
        ram.chmod(mode)
        target = tmp_path / f"copy{mode}"
        os.close(create_like(target, ram.stat()))
        assert target.stat().st_mode & 0o777 == expected


def test_what_a_killed_one_left_goes_with_the_next_of_that_name(tmp_path: Path) -> None:
    """Not what somebody still writes, and not what may be a guest's only copy, nor anything of another name."""
    killed, others = tmp_path / ".s[1].partial-0a1b2c3d", tmp_path / ".s[1]2.partial-0a1b2c3d"
    for folder in (killed, others):
        folder.mkdir()
        (folder / "pc.ram").write_bytes(b"half")
    with PendingSnapshot(tmp_path / "s[1]") as first, PendingSnapshot(tmp_path / "s[1]") as second:
        assert not killed.exists()
        assert others.exists()
        assert first.folder.exists()
        assert second.folder.exists()
        second.keep()
        kept = second.folder
        assert (second.folder.name, first.folder.name) != (first.folder.name, second.folder.name)
    assert kept.exists()
    with PendingSnapshot(tmp_path / "s[1]") as third:
        third.seal(fill(third))
        third.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kept.name, others.name, "s[1]"])
