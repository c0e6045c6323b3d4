"""Opening and reading snapshot folders: what is right comes out, what is wrong is one clear error or a refused page."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES, ZERO_PAGE_DIGEST
from lazymem.errors import SnapshotError, VerificationError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot import publishedfile, vouching
from lazymem.snapshot import reader as reader_module
from lazymem.snapshot.reader import VouchedRun, open_snapshot
from tests.support.descriptors import open_descriptors
from tests.support.snapshots import BuiltSnapshot, make_snapshot

HASHED = pytest.mark.parametrize("hashed", [True, False], ids=["hashed", "unhashed"])


def data_of(runs: list[VouchedRun]) -> bytes:
    return b"".join(bytes(run.pages.length_bytes) if run.data is None else bytes(run.data) for run in runs)


def spoil(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        before = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([before[0] ^ 1]), offset)


@pytest.fixture(scope="module", params=[True, False], ids=["hashed", "unhashed"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("reader") / "web", pages=600, hashed=request.param)


@settings(max_examples=60)
@given(start=st.integers(0, 599), count=st.integers(1, 300))
def test_any_range_by_any_way(built: BuiltSnapshot, start: int, count: int) -> None:
    pages = PageRange(start, min(count, 600 - start))
    expected = built.ram[pages.offset_bytes : pages.offset_bytes + pages.length_bytes]
    with open_snapshot(built.folder) as reader:
        for runs in (reader.read(pages), reader.read_nowait(pages)):
            if runs is None:  # not in the host's memory just now
                continue
            assert data_of(list(runs)) == expected
            assert [page for run in runs for page in range(run.pages.start, run.pages.end)] == list(
                range(pages.start, pages.end)
            )
            digests = built.digests[pages.start * DIGEST_BYTES : pages.end * DIGEST_BYTES]
            assert b"".join(run.digests for run in runs) == digests
            for run in runs:
                zero = [run.digests[at : at + 16] == ZERO_PAGE_DIGEST for at in range(0, len(run.digests), 16)]
                assert zero == [run.data is None] * run.pages.count
        assert b"".join(bytes(r.data or bytes(r.pages.length_bytes)) for r in reader.read_pages(pages)) == expected


def test_read_some_goes_on_to_the_end(built: BuiltSnapshot) -> None:
    with open_snapshot(built.folder) as reader:
        at, parts = 0, []
        while at < 600:
            runs = reader.read_some(PageRange(at, 600 - at), 7)
            assert runs[0].pages.start == at
            assert sum(run.pages.count for run in runs if run.data is not None) <= 7
            parts.append(data_of(runs))
            at = runs[-1].pages.end
        assert b"".join(parts) == built.ram


def test_properties(built: BuiltSnapshot) -> None:
    with open_snapshot(built.folder) as reader:
        assert reader.ram_bytes == len(built.ram)
        assert reader.total_pages == 600
        assert reader.hashed is (built.manifest is not None)
        assert reader.manifest == built.manifest
        assert reader.vmstate.size_bytes == len(built.vmstate)
        assert reader.vmstate.read(0, 9999) == built.vmstate
        assert reader.working_set.size_bytes == 0
        assert reader.working_set.read(0, 10) == b""
        if built.manifest is None:
            with pytest.raises(SnapshotError, match="no digest tree"):
                reader.leaf(0)
        else:
            assert reader.identity == built.identity
            assert [reader.leaf(leaf) for leaf in range(3)] == [built.leaf(leaf) for leaf in range(3)]
            assert reader.upper(1, 2) == built.upper[16:48]


def test_holes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pc.ram").touch()
    os.truncate(tmp_path / "pc.ram", 1 << 40)
    with open(tmp_path / "pc.ram", "r+b") as file:
        os.pwrite(file.fileno(), b"x", 5 << 30)
    read: list[int] = []
    original = publishedfile.PublishedFile.read

    def counted(self: publishedfile.PublishedFile, offset: int, length: int) -> bytearray:
        read.append(length)
        return original(self, offset, length)

    monkeypatch.setattr(publishedfile.PublishedFile, "read", counted)
    with open_snapshot(tmp_path) as reader:
        runs = reader.read(PageRange((5 << 30) // PAGE_SIZE - 1000, 2000))
    assert [run.data is None for run in runs].count(False) == 1
    assert sum(read) <= 16 * PAGE_SIZE  # what the file system calls one block of data


def test_cached_pages_need_no_thread(built: BuiltSnapshot) -> None:
    """Else each fault would pay for one although both the page and its leaf are in the host's memory."""
    with open_snapshot(built.folder) as reader:
        reader.read(PageRange(0, 600))
    with open_snapshot(built.folder) as reader:
        assert reader.read_nowait(PageRange(3, 2)) is not None


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been written long before it is opened."""
    monkeypatch.setattr(reader_module, "lies_in_memory", lambda device: False)
    monkeypatch.setattr(reader_module, "SETTLED_NS", -1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(start=st.integers(0, 599), count=st.integers(1, 300))
def test_what_nobody_touched_is_read_without_a_look_at_its_bytes(
    built: BuiltSnapshot, settled: None, start: int, count: int
) -> None:
    """By the digests alone; twice, since an unhashed file's are known from its first read on."""
    pages = PageRange(start, min(count, 600 - start))
    expected = built.ram[pages.offset_bytes : pages.offset_bytes + pages.length_bytes]
    with open_snapshot(built.folder) as reader:
        for _ in range(2):
            runs = reader.read_nowait(pages)
            if runs is None:
                continue
            assert data_of(list(runs)) == expected
            assert b"".join(run.digests for run in runs) == built.digests[16 * pages.start : 16 * pages.end]
            for run in runs:
                assert (run.data is None) == (run.digests == ZERO_PAGE_DIGEST * run.pages.count)


@pytest.mark.parametrize("count", [1, 3])
def test_a_few_pages_by_the_shortest_way(built: BuiltSnapshot, settled: None, count: int) -> None:
    buffer = memoryview(bytearray(count * PAGE_SIZE))
    seen = set()
    with open_snapshot(built.folder) as reader:
        reader.read(PageRange(0, 600))  # the host has it in memory
        for start in range(256 - count):
            held = reader.read_into_nowait(start, count, buffer)
            expected = built.ram[start * PAGE_SIZE : (start + count) * PAGE_SIZE]
            zeros = sum(not any(built.page(page)) for page in range(start, start + count))
            seen.add(held)
            if held is not None:
                assert held is (zeros == 0)
                assert zeros in (0, count)
                assert not held or bytes(buffer) == expected
    assert seen == ({None} if built.manifest is None else {True, False} if count == 1 else {True, False, None})


@pytest.mark.parametrize("way", ["a young file", "written to", "cut"])
def test_by_the_shortest_way_nothing_of_a_file_that_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """It looks at no bytes, so it gives up."""
    monkeypatch.setattr(reader_module, "SETTLED_NS", 10**18 if way == "a young file" else -1)
    built = make_snapshot(tmp_path / "web", pages=64)
    with open_snapshot(built.folder) as reader:
        reader.read(PageRange(0, 64))
        if way == "written to":
            spoil(built.folder / "pc.ram", 63 * PAGE_SIZE)
            os.utime(built.folder / "pc.ram", ns=(1, 1))  # two writes in one tick of the clock have the same times
        elif way == "cut":
            os.truncate(built.folder / "pc.ram", 32 * PAGE_SIZE)
        buffer = memoryview(bytearray(PAGE_SIZE))
        assert {reader.read_into_nowait(page, 1, buffer) for page in range(64)} == {None}


@HASHED
def test_a_suspect_page_is_looked_at(tmp_path: Path, settled: None, hashed: bool) -> None:
    """The file's times say nothing, as after a write through a shared map."""
    built = make_snapshot(tmp_path / "web", pages=64, hashed=hashed)
    with open_snapshot(built.folder) as reader:
        reader.read(PageRange(0, 64))
        spoil(built.folder / "pc.ram", 9 * PAGE_SIZE + 1)
        reader._signature = reader._ram.signature()
        runs = reader.read_nowait(PageRange(9, 1))
        assert runs is None or data_of(list(runs)) != built.page(9)
        with pytest.raises(VerificationError, match="page 9 "):
            reader.read_nowait(PageRange(9, 1), suspect=True)


@HASHED
def test_a_changed_page_is_refused_by_name(tmp_path: Path, hashed: bool) -> None:
    built = make_snapshot(tmp_path / "web", pages=300, hashed=hashed)
    with open_snapshot(built.folder) as reader:
        reader.read(PageRange(0, 300))
        spoil(built.folder / "pc.ram", 280 * PAGE_SIZE + 9)
        for read in (reader.read, reader.read_nowait):
            with pytest.raises(VerificationError, match=r"page 280 "):
                read(PageRange(250, 50))
        assert data_of(reader.read(PageRange(0, 280))) == built.ram[: 280 * PAGE_SIZE]


@HASHED
def test_a_page_that_became_a_hole_is_refused(tmp_path: Path, hashed: bool) -> None:
    built = make_snapshot(tmp_path / "web", pages=64, hashed=hashed)
    last = max(page for page in range(64) if any(built.page(page)))
    with open_snapshot(built.folder) as reader:
        reader.read(PageRange(0, 64))
        os.truncate(built.folder / "pc.ram", last * PAGE_SIZE)
        os.truncate(built.folder / "pc.ram", 64 * PAGE_SIZE)
        with pytest.raises(VerificationError, match=f"page {last} "):
            reader.read(PageRange(0, 64))


def test_a_changed_digests_file_is_refused(tmp_path: Path) -> None:
    built = make_snapshot(tmp_path / "web", pages=600)
    with open_snapshot(built.folder) as reader:
        spoil(built.folder / "pc.ram.digests", 256 * DIGEST_BYTES + 5)
        with pytest.raises(VerificationError, match="leaf 1 "):
            reader.read(PageRange(256, 1))
        assert data_of(reader.read(PageRange(0, 256))) == built.ram[: 256 * PAGE_SIZE]
        os.truncate(built.folder / "pc.ram.digests", 100)
        with pytest.raises(VerificationError):
            reader.leaf(2)


def test_the_leaf_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vouching, "MAX_CACHED_LEAVES", 2)
    built = make_snapshot(tmp_path / "web", pages=1024)
    with open_snapshot(built.folder) as reader:
        for leaf in (0, 1, 2, 3, 0):
            assert reader.leaf(leaf) == built.leaf(leaf)
        assert data_of(reader.read(PageRange(0, 1024))) == built.ram


def test_a_cut_vmstate_is_noticed_while_served(tmp_path: Path) -> None:
    built = make_snapshot(tmp_path / "web", vmstate=b"0123456789")
    with open_snapshot(built.folder) as reader:
        os.truncate(built.folder / "vmstate", 5)
        with pytest.raises(VerificationError, match="vmstate"):
            reader.vmstate.read(0, 5)
        with pytest.raises(VerificationError, match="vmstate"):
            reader.vmstate.read(4, 4)


def test_pieces_of_two_vmstates_never_come_together(tmp_path: Path) -> None:
    """A client reads it by the MiB, and of an unhashed snapshot nothing else tells that it changed in between."""
    built = make_snapshot(tmp_path / "web", vmstate=b"0123456789", hashed=False)
    with open_snapshot(built.folder) as reader:
        assert reader.vmstate.read(0, 5) == b"01234"
        with open(built.folder / "vmstate", "r+b") as file:
            file.write(b"ABCDEFGHIJ")
        os.utime(built.folder / "vmstate", ns=(0, time.time_ns()))  # whatever the grain of this file system's clock
        with pytest.raises(VerificationError, match="vmstate was changed"):
            reader.vmstate.read(5, 5)


# ---- folders that are none


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="does not exist"):
        open_snapshot(tmp_path / "nothing")


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(SnapshotError, match="not a folder"):
        open_snapshot(tmp_path / "x")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"not a snapshot: it has no pc\.ram"):
        open_snapshot(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_a_ram_file_of_no_whole_pages(tmp_path: Path, size: int) -> None:
    (tmp_path / "pc.ram").write_bytes(bytes(size))
    with pytest.raises(SnapshotError, match=f"{size} bytes"):
        open_snapshot(tmp_path)


def test_a_ram_file_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pc.ram")
    with pytest.raises(SnapshotError, match="not a regular file"):
        open_snapshot(tmp_path)


def _grow_ram(folder: Path) -> None:
    os.truncate(folder / "pc.ram", 65 * PAGE_SIZE)


def _cut_digests(folder: Path) -> None:
    os.truncate(folder / "pc.ram.digests", 1000)


def _spoil_upper(folder: Path) -> None:
    spoil(folder / "pc.ram.digests", 64 * DIGEST_BYTES)


def _cut_vmstate(folder: Path) -> None:
    os.truncate(folder / "vmstate", 3)


def _drop_vmstate(folder: Path) -> None:
    (folder / "vmstate").unlink()


def _drop_digests(folder: Path) -> None:
    (folder / "pc.ram.digests").unlink()


def _drop_ram(folder: Path) -> None:
    (folder / "pc.ram").unlink()


def _path_outside(folder: Path) -> None:
    text = (folder / "manifest.json").read_text().replace('"file": "pc.ram"', '"file": "../pc.ram"')
    (folder / "manifest.json").write_text(text)


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"")


def _huge_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 1 << 40)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_grow_ram, "its manifest says"),
        (_cut_digests, "1000 bytes"),
        (_spoil_upper, "not the digest tree"),
        (_cut_vmstate, "its manifest says"),
        (_drop_vmstate, "0 bytes, its manifest says"),
        (_drop_digests, "cannot open"),
        (_drop_ram, "not a snapshot"),
        (_path_outside, "outside the snapshot's folder"),
        (_empty_manifest, "is empty"),
        (_huge_manifest, "more than"),
    ],
)
def test_damaged_snapshots(tmp_path: Path, damage: object, match: str) -> None:
    built = make_snapshot(tmp_path / "web", pages=64)
    before = open_descriptors(collect=True)
    assert callable(damage)
    damage(built.folder)
    with pytest.raises(SnapshotError, match=match):
        open_snapshot(built.folder)
    assert open_descriptors() == before


@HASHED
def test_a_mapped_write_to_a_file_in_memory_is_seen(hashed: bool) -> None:
    """It moves no time, so what is read there is never believed unseen."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        built = make_snapshot(Path(folder), pages=300, hashed=hashed)
        page = next(number for number in range(300) if any(built.page(number)))
        with open_snapshot(built.folder) as reader:
            assert data_of(reader.read(PageRange(page, 1))) == built.page(page)
            assert not reader.untouched()
            with (built.folder / "pc.ram").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                mapped[page * PAGE_SIZE] ^= 1
            assert reader.unchanged(), "as far as its times tell"
            with pytest.raises(VerificationError, match=f"page {page} "):
                reader.read_nowait(PageRange(page, 1))
            assert reader.read_into_nowait(page, 1, memoryview(bytearray(PAGE_SIZE))) is None


@pytest.mark.parametrize("size", [0, 16, 48])
def test_sums_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    built = make_snapshot(tmp_path / "web", pages=300)
    assert len(built.sums) == 32
    os.truncate(built.folder / "pc.ram.sums", size)
    with pytest.raises(SnapshotError, match=rf"pc\.ram\.sums has {size} bytes"):
        open_snapshot(built.folder)


def test_sums_that_the_manifest_does_not_name_are_not_offered(tmp_path: Path) -> None:
    built = make_snapshot(tmp_path / "web", hashed=False)
    (built.folder / "pc.ram.sums").write_bytes(bytes(16))
    with open_snapshot(built.folder) as reader:
        assert not reader.sums.size_bytes
