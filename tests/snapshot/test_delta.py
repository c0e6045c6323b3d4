"""A delta over its parent is the whole snapshot, bytes and digests; and nothing else passes for a parent."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES, TreeShape, leaf_digest, page_digest, root_digest
from lazymem.errors import SnapshotError, VerificationError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, PageRange, runs
from lazymem.snapshot import chain, deltaindex
from lazymem.snapshot.deltaindex import INDEX_NAME, DeltaIndex, decode, encode
from lazymem.snapshot.manifest import DELTA_NAME, DIGESTS_NAME, MANIFEST_NAME, Manifest, parse
from lazymem.snapshot.reader import SnapshotReader, open_snapshot
from tests.support.deltas import make_delta
from tests.support.descriptors import open_descriptors
from tests.support.snapshots import make_snapshot

PAGES = 600  # Three leaves of digests, the last one not full.


def page(seed: int) -> bytes:
    return ZERO_PAGE if not seed else random.Random(seed).randbytes(PAGE_SIZE)


def content(reader: SnapshotReader, pages: PageRange) -> bytes:
    return b"".join(bytes(run.data or bytes(run.pages.length_bytes)) for run in reader.read(pages))


def check_is(reader: SnapshotReader, ram: bytes) -> None:
    """Bytes, digests and root are those of `ram`, by an own calculation."""
    assert content(reader, PageRange(0, PAGES)) == ram
    digests = b"".join(page_digest(ram[at : at + PAGE_SIZE]) for at in range(0, len(ram), PAGE_SIZE))
    leaves = [digests[at : at + 256 * DIGEST_BYTES] for at in range(0, len(digests), 256 * DIGEST_BYTES)]
    upper = b"".join(leaf_digest(leaf) for leaf in leaves)
    assert [reader.leaf(leaf) for leaf in range(len(leaves))] == leaves
    assert reader.upper(0, len(leaves)) == upper
    assert reader.manifest is not None
    assert bytes.fromhex(reader.manifest.ram_root) == root_digest(len(ram), upper)


written_pages = st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 5), max_size=40)


@settings(max_examples=40)
@given(st.lists(written_pages, min_size=1, max_size=3), st.data())
def test_any_chain_of_deltas_is_the_whole(deltas: list[dict[int, int]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        below = make_snapshot(folder / "0", pages=PAGES)
        ram = bytearray(below.ram)
        for number, written in enumerate(deltas, 1):
            # Some pages are written with what is there already.
            pages = {
                at: page(seed) if seed < 5 else bytes(ram[at << 12 : at + 1 << 12]) for at, seed in written.items()
            }
            changed = {at for at in pages if pages[at] != ram[at << 12 : at + 1 << 12]}
            index = make_delta(folder / str(number), folder / str(number - 1), pages)
            assert {at for run in index.runs for at in range(run.start, run.end)} == changed
            for at in changed:
                ram[at << 12 : at + 1 << 12] = pages[at]
        with open_snapshot(folder / str(len(deltas))) as reader:
            check_is(reader, bytes(ram))
            start = data.draw(st.integers(0, PAGES - 1))
            asked = PageRange(start, data.draw(st.integers(1, PAGES - start)))
            expected = ram[asked.offset_bytes : asked.offset_bytes + asked.length_bytes]
            assert content(reader, asked) == expected
            maybe_runs = reader.read_nowait(asked)
            if maybe_runs is not None:
                found = b"".join(bytes(run.data or bytes(run.pages.length_bytes)) for run in maybe_runs)
                assert found == expected
            buffer = bytearray(PAGE_SIZE)
            held = reader.read_into_nowait(start, 1, memoryview(buffer))
            if held is not None:
                assert (bytes(buffer) if held else ZERO_PAGE) == expected[:PAGE_SIZE]


@settings(max_examples=60)
@given(st.sets(st.integers(0, 9999)), st.integers(0, 9999), st.integers(1, 300))
def test_index_knows_each_pages_place(pages: set[int], start: int, count: int) -> None:
    made = DeltaIndex(10_000, runs(pages))
    index = decode(encode(made, b"i" * 32), b"i" * 32, 10_000)
    places = {number: place * PAGE_SIZE for place, number in enumerate(sorted(pages))}
    asked = PageRange(start, min(count, 10_000 - start))
    found: dict[int, int] = {}
    at = asked.start
    for run, maybe_place in index.segments(asked):
        assert run.start == at
        at = run.end
        if maybe_place is not None:
            found |= {number: maybe_place + (number - run.start) * PAGE_SIZE for number in range(run.start, run.end)}
    assert at == asked.end
    assert found == {number: places[number] for number in pages if number in asked}
    assert index.leaves() == sorted({number // 256 for number in pages})


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return make_snapshot(tmp_path / "parent", pages=PAGES).folder


@pytest.fixture
def delta(tmp_path: Path, parent: Path) -> Path:
    make_delta(tmp_path / "delta", parent, {5: page(1), 300: page(2), 599: page(3)})
    return tmp_path / "delta"


def test_what_is_served_names_no_parent(delta: Path) -> None:
    with open_snapshot(delta) as reader:
        served = parse(reader.manifest_bytes)
    own = parse((delta / MANIFEST_NAME).read_bytes())
    assert own.parent is not None
    assert served.parent is None
    assert (served.identity, served.ram.file) == (own.identity, "pc.ram")
    assert b'"version": 1' in served.to_json()


def test_a_delta_is_small(delta: Path) -> None:
    assert (delta / DELTA_NAME).stat().st_size == 3 * PAGE_SIZE
    assert (delta / DIGESTS_NAME).stat().st_size == TreeShape(PAGES * PAGE_SIZE).file_bytes
    index = make_delta(delta.with_name("second"), delta, {7: page(4)})
    assert (delta.with_name("second") / DIGESTS_NAME).stat().st_size == (256 + 3) * DIGEST_BYTES
    assert index.pages == 1


def test_a_delta_of_nothing(tmp_path: Path, parent: Path) -> None:
    make_delta(tmp_path / "same", parent, {})
    with open_snapshot(tmp_path / "same") as reader, open_snapshot(parent) as original:
        assert reader.identity != original.identity
        assert content(reader, PageRange(0, PAGES)) == content(original, PageRange(0, PAGES))


def test_the_parent_may_be_elsewhere(tmp_path: Path, parent: Path, delta: Path) -> None:
    (tmp_path / "far").mkdir()
    shutil.move(parent, tmp_path / "far" / "away")
    with pytest.raises(
        SnapshotError, match=r"parent of .*delta \(identity [0-9a-f]{16}\.\.\.\) is not beside it: name"
    ):
        open_snapshot(delta)
    with open_snapshot(delta, [tmp_path / "far" / "away"]) as reader:
        assert content(reader, PageRange(5, 1)) == page(1)


def test_a_wrong_parent_is_refused(tmp_path: Path, parent: Path, delta: Path) -> None:
    other = make_snapshot(tmp_path / "x" / "other", pages=PAGES, seed=1).folder
    bare = make_snapshot(tmp_path / "x" / "bare", pages=PAGES, hashed=False).folder
    shutil.move(parent, tmp_path / "x" / "parent")
    with pytest.raises(SnapshotError, match=r"is not beside it, and not among .*other: name its folder"):
        open_snapshot(delta, [other])
    with pytest.raises(SnapshotError, match=r"bare cannot be a parent: it has no manifest\.json"):
        open_snapshot(delta, [bare])
    with pytest.raises(SnapshotError, match="does not exist"):
        open_snapshot(delta, [tmp_path / "none"])


def test_a_changed_parent_is_refused(parent: Path, delta: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open(parent / "pc.ram", "r+b") as file:
        file.seek(100 * PAGE_SIZE)
        file.write(b"changed")
    later = (parent / MANIFEST_NAME).stat().st_mtime_ns + 10**9
    os.utime(parent / "pc.ram", ns=(later, later))
    with pytest.raises(SnapshotError, match=r"parent was changed since it was made: page 100 is not what its digest"):
        open_snapshot(delta)
    assert "reading all of it against its digests" in caplog.text


def test_a_parent_that_was_copied_is_as_good(parent: Path, delta: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its RAM file is newer than its manifest, and its bytes are the same: a look at them says so."""
    later = (parent / MANIFEST_NAME).stat().st_mtime_ns + 10**9
    os.utime(parent / "pc.ram", ns=(later, later))
    open_snapshot(delta).close()
    assert "is newer than its manifest" in caplog.text


def test_a_page_of_the_parent_that_changes_while_it_is_served(parent: Path, delta: Path) -> None:
    with open_snapshot(delta) as reader:
        with open(parent / "pc.ram", "r+b") as file:
            file.seek(100 * PAGE_SIZE)
            file.write(b"changed")
        with pytest.raises(VerificationError, match="page 100 "):
            reader.read(PageRange(99, 4))
        assert content(reader, PageRange(5, 1)) == page(1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [(INDEX_NAME, "pc.ram.pages"), (DELTA_NAME, "pc.ram.delta"), (DIGESTS_NAME, "pc.ram.digests")],
)
@pytest.mark.parametrize("how", ["missing", "cut", "longer"])
def test_a_broken_delta_is_refused(delta: Path, name: str, reason: str, how: str) -> None:
    if how == "missing":
        (delta / name).unlink()
    else:
        size = (delta / name).stat().st_size
        os.truncate(delta / name, size - 16 if how == "cut" else size + 16)
    with pytest.raises(SnapshotError, match=reason):
        open_snapshot(delta)


def test_a_damaged_index_is_refused(delta: Path, parent: Path) -> None:
    with open(delta / INDEX_NAME, "r+b") as file:
        file.seek(70)
        file.write(b"\1")
    with pytest.raises(SnapshotError, match="its checksum is another"):
        open_snapshot(delta)


def test_anothers_index_is_refused(tmp_path: Path, delta: Path, parent: Path) -> None:
    make_delta(tmp_path / "second", parent, {5: page(9), 300: page(2), 599: page(3)})
    shutil.copy(tmp_path / "second" / INDEX_NAME, delta / INDEX_NAME)
    with pytest.raises(SnapshotError, match="of another snapshot than its manifest"):
        open_snapshot(delta)


def test_a_manifest_that_names_the_wrong_parent(tmp_path: Path, parent: Path) -> None:
    """Somebody else's snapshot of the same size, named by hand: its digests do not fit."""
    delta = tmp_path / "delta"
    make_delta(delta, parent, {5: page(1)})
    other = make_snapshot(tmp_path / "other", pages=PAGES, seed=1)
    text = (delta / MANIFEST_NAME).read_text()
    named = parse(text.encode()).parent
    assert named is not None
    (delta / MANIFEST_NAME).write_text(text.replace(named.identity, other.identity.hex()))
    with pytest.raises(SnapshotError, match="was not made from the parent that it names"):
        open_snapshot(delta)


def test_a_delta_that_is_its_own_parent(tmp_path: Path, delta: Path) -> None:
    manifest = parse((delta / MANIFEST_NAME).read_bytes())
    text = (delta / MANIFEST_NAME).read_text()
    assert manifest.parent is not None
    (delta / MANIFEST_NAME).write_text(text.replace(manifest.parent.identity, manifest.identity.hex()))
    with pytest.raises(SnapshotError, match="is not beside it"):
        open_snapshot(delta)
    shutil.copytree(delta, tmp_path / "copy")
    before = open_descriptors(collect=True)
    with pytest.raises(SnapshotError, match="deltas that lie over each other"):
        open_snapshot(delta)
    assert open_descriptors() == before


def test_index_refuses_nonsense() -> None:
    good = encode(DeltaIndex(100, [PageRange(3, 2)]), b"i" * 32)
    for data, reason in (
        (b"", "is cut"),
        (b"x" + good[1:], "first bytes"),
        (good[:8] + b"\2" + good[9:], "version 2"),
        (good + b"x", "cut or damaged"),
    ):
        with pytest.raises(SnapshotError, match=reason):
            decode(data, b"i" * 32, 100)
    with pytest.raises(SnapshotError, match="another snapshot"):
        decode(good, b"j" * 32, 100)
    with pytest.raises(SnapshotError, match="another snapshot"):
        decode(good, b"i" * 32, 101)
    with pytest.raises(SnapshotError, match="out of order"):
        DeltaIndex(100, [PageRange(3, 2), PageRange(4, 1)])
    assert len(good) <= deltaindex.max_file_bytes(100)


def test_manifest_of_a_delta_is_of_another_version(delta: Path) -> None:
    """So that a lazymem that knows nothing of deltas refuses it."""
    text = (delta / MANIFEST_NAME).read_text()
    assert '"version": 2' in text
    manifest = parse(text.encode())
    assert isinstance(manifest, Manifest)
    with pytest.raises(SnapshotError, match="lacks or misuses"):
        parse(text.replace('"parent"', '"mother"').encode())
    assert chain.MAX_DELTAS == 64
