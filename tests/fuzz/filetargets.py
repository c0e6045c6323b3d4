"""Fuzz targets of files, save streams, and what a hand-over says: see `targets`."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import zstandard
from blake3 import blake3

from lazymem.demo import streamscan
from lazymem.digests import DIGEST_BYTES, TreeShape, leaf_matches, root_digest
from lazymem.handover import journal, messages
from lazymem.handover.statepieces import MAX_PIECE_BYTES, Packer, Unpacker
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.settings import parse_server
from lazymem.snapshot import deltaindex, manifest, workingset
from lazymem.snapshot.layers import WholeDigests
from lazymem.snapshot.publishedfile import PublishedFile as FileOnDisk
from lazymem.snapshot.vouching import TreeVouching
from lazymem.store.digestfile import DigestFile
from lazymem.store.folders import maybe_record
from lazymem.store.pagemap import UNSET, PageMap
from lazymem.vm.devicestate import Field, Layout
from lazymem.vm.savestream.format import BlockShape, StreamShape
from lazymem.vm.savestream.loader import load
from tests.fuzz.registry import IDENTITY, TOTAL_PAGES, maybe, target

# ---- a snapshot's files


@target
def manifest_json(data: bytes) -> None:
    maybe(lambda: manifest.parse_made_by(data))
    found = manifest.parse(data)
    assert manifest.parse(found.to_json()) == found
    assert len(found.identity) == 32
    _ = found.ram, found.resume_notices


def _sealed(data: bytes) -> bytes:
    """Without its first byte; where that is odd, with a checksum as working set and delta index have it."""
    body = data[1:]
    return body + blake3(body).digest(32) if data[:1] and data[0] & 1 else body


@target
def working_set(data: bytes) -> None:
    data = _sealed(data)
    found = workingset.decode(data, IDENTITY, TOTAL_PAGES)
    assert workingset.encode(found) == data
    assert found.pages <= TOTAL_PAGES


@target
def delta_index(data: bytes) -> None:
    data = _sealed(data)
    found = deltaindex.decode(data, IDENTITY, TOTAL_PAGES)
    again = deltaindex.encode(found, IDENTITY)
    assert again[:10] == data[:10]
    assert again[16:-32] == data[16:-32]  # what is reserved may be anything
    pages = [page for run in found.runs for page in range(run.start, run.end)]
    assert len(pages) == found.pages
    assert [found.position(page) for page in pages] == list(range(len(pages)))
    assert [run.count for run, _ in found.segments(PageRange(0, TOTAL_PAGES))]


def _memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("lazymem-fuzz", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@target
def page_map(data: bytes) -> None:
    """The map file of a cache or state folder: any byte may stand for any page."""
    if not data:
        return
    found = PageMap(_memory_file(data), len(data))
    try:
        everything = PageRange(0, len(data))
        unset = {page for page, state in enumerate(data) if state == UNSET}
        assert found.states(everything) == data
        assert found.count == len(data) - len(unset)
        assert {page for run in found.unset_runs(everything) for page in range(run.start, run.end)} == unset
        assert found.all_unset(everything) == (not found.count)
        found.set(PageRange(0, 1), 1)
        assert found.count == found.recount() == len(data) - len(unset - {0})
    finally:
        found.close()


def _shape(data: bytes) -> TreeShape | None:
    """The shape of the tree whose digests file has as many bytes, if there is such a one."""
    for pages in range(max(1, len(data) // DIGEST_BYTES - 1 - len(data) // 4096), len(data) // DIGEST_BYTES):
        shape = TreeShape(pages * PAGE_SIZE)
        if shape.file_bytes == len(data):
            return shape
    return None


@target
def digests_file(data: bytes) -> None:
    """A cache's and a snapshot's: with the root that its upper level has, every leaf is right or refused."""
    shape = _shape(data)
    if shape is None:
        return
    upper = data[shape.upper_offset :]
    root = root_digest(shape.size_bytes, upper)
    cached = DigestFile(_memory_file(data), shape)
    try:
        assert cached.maybe_upper(root) == upper
        assert cached.maybe_upper(bytes(32)) is None
        assert cached.page_digests(PageRange(0, shape.pages)) == data[: shape.upper_offset]
    finally:
        cached.close()
    vouching = TreeVouching(WholeDigests(FileOnDisk(_memory_file(data)), shape), Path("digests"), shape, root)
    try:
        for leaf in range(shape.leaves):
            found = maybe(lambda leaf=leaf: vouching.leaf(leaf))  # type: ignore[misc]
            assert found is None or leaf_matches(upper, leaf, found)
            first = leaf * 256 * DIGEST_BYTES
            assert (found is None) != leaf_matches(upper, leaf, data[first : first + shape.leaf_pages(leaf) * 16])
    finally:
        vouching.close()


# ---- save streams

RAM = BlockShape("pc.ram", 4 * PAGE_SIZE, backed=True, do_not_save=True)
BIOS = BlockShape("pc.bios", PAGE_SIZE)
CPU = Layout("cpu", 2, (Field("rip", 8), Field("halted", 1), Field("fpu", 16, buffer=True)))
UART = Layout("serial", 3, (Field("lcr", 1), Field("divider", 2)))
SHAPE = StreamShape("lazymem-test-1", (RAM, BIOS), (CPU, UART))


@target
def save_stream(data: bytes) -> None:
    """lazymem-vm's loader: what it lets through is whole."""
    saved = load(data, SHAPE)
    assert set(saved.devices) == {(layout.name, layout.instance) for layout in SHAPE.layouts}
    assert len(saved.pages[BIOS.name]) == 1
    assert not saved.pages[RAM.name]


@target
def qemu_stream(data: bytes) -> None:
    found = streamscan.scan(data)
    assert sum(found.page_bytes.values()) <= len(data) * PAGE_SIZE


# ---- a hand-over


@target
def handover_journal(data: bytes) -> None:
    """Sealed where the first byte is odd: a slot's digest, then its text."""
    if data[:1] and data[0] & 1:
        text = data[1:].rstrip(b"\0")
        data = b"\0" + blake3(text).digest(32) + text
    with tempfile.TemporaryDirectory(prefix="lazymem-fuzz-") as folder:
        Path(folder, journal.NAME).write_bytes(data[1:])
        found = journal.read(Path(folder))
    if found is None:
        return
    assert all(isinstance(text, str) for text in (found.role, found.handover, found.state))
    assert isinstance(found.details, dict)


@target
def handover_messages(data: bytes) -> None:
    """What a stranger says to `lazymem send`; where the first byte is odd, one message of the right length."""
    if data[:1] and data[0] & 1:
        data = b"\0" + (len(data) - 1).to_bytes(4, "little") + data[1:]
    receiver = messages.Receiver()
    for at in range(1, len(data), 997):
        for message in receiver.feed(data[at : at + 997]):
            assert messages.Receiver().feed(messages.encode(message)) == [message]


_PACKER = Packer()


@target
def state_pieces(data: bytes) -> None:
    """A device state from a source; where the first byte is odd, one piece in the form that the second says, of the
    right lengths."""
    if len(data) >= 2 and data[0] & 1:
        packed = zstandard.compress(data[2:], 1)
        data = b"\0" + data[1:2] + struct.pack("<II", len(data) - 2, len(packed)) + packed
    unpacker = Unpacker()
    for at in range(1, len(data), 997):
        for piece in unpacker.feed(data[at : at + 997]):
            assert 0 < len(piece) <= MAX_PIECE_BYTES
            assert list(Unpacker().feed(_PACKER.pack(piece))) == [piece]


# ---- small things


@target
def meta_record(data: bytes) -> None:
    """meta.json and state.json of the store's folders."""
    with tempfile.NamedTemporaryFile(prefix="lazymem-fuzz-") as file:
        file.write(data)
        file.flush()
        found = maybe_record(Path(file.name))
    assert found is None or isinstance(found, dict)


@target
def server_address(data: bytes) -> None:
    parse_server(data.decode(errors="surrogateescape"))
