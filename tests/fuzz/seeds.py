"""What the fuzzers start from: good input of each format, and whatever was worth keeping of earlier runs.

The good input is made here, so that a change of a format does not leave a corpus of refused bytes behind. What
coverage-guided runs (`make fuzz`) found on top of it is in `corpus/`, one file an input, named by its digest; what once
broke something has a name that says what.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from lazymem.digests import leaf_digest, page_digest
from lazymem.handover import journal, messages
from lazymem.handover.statepieces import Packer
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot import deltaindex, workingset
from lazymem.vm.devicestate import State
from lazymem.vm.savestream.format import Page
from lazymem.vm.savestream.writer import StreamWriter
from lazymem.wire import limits
from lazymem.wire.codec import encode
from lazymem.wire.frame import HEADER, FrameType, Role
from lazymem.wire.messages import Capability, Hello
from lazymem.wire.pagedata import encode_pages
from tests.fuzz.filetargets import BIOS, SHAPE
from tests.fuzz.registry import IDENTITY, TOTAL_PAGES
from tests.fuzz.wiretargets import REQUESTS, UNHASHED_REQUESTS
from tests.support.snapshots import make_snapshot
from tests.support.wiremessages import SAMPLES

CORPUS = Path(__file__).with_name("corpus")

MOST_BYTES = 4096
"""Of a seed: longer ones only make a fuzzer slow."""


def seeds(name: str, folder: Path) -> list[bytes]:
    """All of a target's, the good ones first. `folder`: an empty one for what has to be made on a disk."""
    made = list(_MADE[name](folder))
    return made + [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


def _frames(role: Role) -> list[bytes]:
    return [data for sender, sample in SAMPLES if sender is role and len(data := encode(sample)) <= MOST_BYTES]


def _from_client(_: Path) -> Iterator[bytes]:
    for data in _frames(Role.CLIENT):
        yield b"\0" + data
        yield b"\x03" + data
    hello = encode(Hello("web", capabilities=Capability.ZSTD | Capability.PACKED))
    yield b"\x80" + hello + b"".join(map(encode, REQUESTS))
    yield b"\x83" + b"".join(map(encode, REQUESTS))
    yield b"\x81" + b"".join(map(encode, UNHASHED_REQUESTS))


def _from_server(_: Path) -> Iterator[bytes]:
    for data in _frames(Role.SERVER):
        yield b"\0" + data
        yield b"\x03" + data
        yield b"\x81" + data


def _frame(_: Path) -> Iterator[bytes]:
    for _role, sample in SAMPLES:
        data = encode(sample)
        _, number, flags, _, _ = HEADER.unpack_from(data)
        if len(data) <= MOST_BYTES:
            yield bytes([list(FrameType).index(FrameType(number)), flags]) + data[HEADER.size :]


def _page_data(_: Path) -> Iterator[bytes]:
    for count in (1, 2, 256):
        yield bytes([count - 1]) + bytes(encode_pages(b"abcdefgh" * (count * PAGE_SIZE // 8), Capability.ZSTD)[1])


def _manifest(folder: Path) -> Iterator[bytes]:
    whole = make_snapshot(folder, pages=4).manifest
    assert whole is not None
    text = whole.to_json()
    yield text
    document = json.loads(text)
    yield json.dumps(document | {"version": 2, "parent": {"identity": "ab" * 32}, "extra": {"a": [1, {}]}}).encode()
    yield json.dumps(document | {"vmstate": None, "disks_handled": True, "pause_seconds": 0.5}).encode()


_RUNS = (PageRange(7, 2), PageRange(0, 1), PageRange(900, 100))


def _working_set(_: Path) -> Iterator[bytes]:
    for runs in (_RUNS, ()):
        data = workingset.encode(workingset.WorkingSet(IDENTITY, TOTAL_PAGES, runs, 1.5))
        yield b"\0" + data
        yield b"\1" + data[:-32]


def _delta_index(_: Path) -> Iterator[bytes]:
    for runs in (sorted(_RUNS), []):
        data = deltaindex.encode(deltaindex.DeltaIndex(TOTAL_PAGES, runs), IDENTITY)
        yield b"\0" + data
        yield b"\1" + data[:-32]


def _page_map(_: Path) -> Iterator[bytes]:
    yield from (bytes(300), b"\1" * 30, b"\0\1\2\3\xff" * 20)


def _digests_file(_: Path) -> Iterator[bytes]:
    for count in (1, 3, 250):
        digests = b"".join(page_digest(bytes([at]) * PAGE_SIZE) for at in range(count))
        yield digests + leaf_digest(digests)


def _stream(_: Path) -> Iterator[bytes]:
    writer = StreamWriter(SHAPE)
    states: tuple[State, ...] = ({"rip": 1, "halted": 1, "fpu": bytes(16)}, {"lcr": 3, "divider": 12})
    parts = [writer.begin(), writer.ram_pages([Page(BIOS.name, 0, None)]), writer.ram_end()]
    parts += [writer.device(state) for state in states]
    yield b"".join([*parts, writer.end()])


def _qemu_stream(folder: Path) -> Iterator[bytes]:
    """One more without capabilities, with a command and an address-less block list, as older ones are."""
    yield from _stream(folder)
    start = struct.pack(">BI", 1, 2) + b"\3ram" + struct.pack(">II", 0, 4)
    blocks = struct.pack(">Q", PAGE_SIZE | 4) + b"\6pc.ram" + struct.pack(">Q", PAGE_SIZE)
    zero = struct.pack(">Q", 0x02) + b"\6pc.ram\0" + struct.pack(">Q", 0x10)
    yield struct.pack(">II", 0x5145564D, 3) + b"\x08\0\1\0\2ab" + start + blocks + zero + b"\x7e\0\0\0\2\0"


def _journal(_: Path) -> Iterator[bytes]:
    record = journal.Record("source", "ab" * 16, "given", {"ram_path": "/ram", "emulator_pid": 7})
    text = journal._encode(5, record)
    yield b"\0" + text
    yield b"\0" + text.ljust(16 * 1024, b"\0") + journal._encode(6, record)
    yield b"\1" + text[32:]


def _handover_messages(_: Path) -> Iterator[bytes]:
    emulator = {"name": "qemu", "version": "7.2", "options": ["-m", "1"]}
    said: list[messages.Message] = [
        messages.Hello(1, "boot", "ab" * 16),
        messages.Offer(1, "ab" * 16, 1 << 20, emulator, "boot", "/ram", True),
        messages.No("busy", True),
        messages.Clock(1.5),
        messages.Arrived(1 << 40),
        messages.Given(2.5),
        messages.Mine(None),
        messages.Whole({"pages": 7}),
        messages.Done(),
    ]
    yield b"\0" + b"".join(map(messages.encode, said))
    for message in said:
        yield b"\1" + messages.encode(message)[4:]


def _state_pieces(_: Path) -> Iterator[bytes]:
    packer = Packer()
    slope = bytes(value for at in range(2500) for value in (at & 0xFF, at >> 1 & 0xFF, at >> 2 & 0xFF, 0))
    pieces = [packer.pack(piece) for piece in (b"QEVM\0\0\0\3", b"cell" * 500, slope)]
    assert [piece[0] for piece in pieces] == [0, 1, 2]
    yield b"\0" + b"".join(pieces) + packer.end()
    for piece in pieces:
        yield b"\0" + piece
    yield b"\1\1" + b"cell" * 500
    yield b"\1\2" + b"cell" * 500 + b"abc"


def _meta_record(_: Path) -> Iterator[bytes]:
    yield b'{"format": "lazymem-state", "identity": "ab", "size_bytes": 4096, "version": 1}\n'


def _server_address(_: Path) -> Iterator[bytes]:
    yield from (b"host:7411", b"[::1]:7411/web", b"unix:/run/x/web", b"host", b"host:0/")


_MADE: dict[str, Callable[[Path], Iterator[bytes]]] = {
    "wire_from_client": _from_client,
    "wire_from_server": _from_server,
    "frame": _frame,
    "page_data": _page_data,
    "manifest_json": _manifest,
    "working_set": _working_set,
    "delta_index": _delta_index,
    "page_map": _page_map,
    "digests_file": _digests_file,
    "save_stream": _stream,
    "qemu_stream": _qemu_stream,
    "handover_journal": _journal,
    "handover_messages": _handover_messages,
    "state_pieces": _state_pieces,
    "meta_record": _meta_record,
    "server_address": _server_address,
}


def file_name(data: bytes) -> str:
    return blake3(data).hexdigest(8)


assert limits.MAX_FRAME_PAGES == 256, "the page data's seeds say so"
