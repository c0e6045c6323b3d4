"""One MiB of a fill, step by step, each by itself: what server and client cannot do without, beside what a fill takes.

Of the image's leaves without a zero page: at the server read, compress, hand to a socket; at the client take from it,
decompress, verify, write to the cache. Wall time of one thread, everything in memory; the middle one of the leaves.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from time import perf_counter
from typing import TypeVar

from bench.context import Context, Measure, pairs
from bench.record import Sample
from lazymem.digests import LEAF_PAGES, leaf_sum, page_digests, zero_marks
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot.reader import SnapshotReader, open_snapshot
from lazymem.store.pagefile import BLOCK_BYTES
from lazymem.wire.codec import encode_parts
from lazymem.wire.messages import Encoding, Packed
from lazymem.wire.pagedata import FAST_LEVEL, THOROUGH_LEVEL, compress_pages, decode_data

MOST_LEAVES = 64
LEAF_BYTES = LEAF_PAGES * PAGE_SIZE
_PIECE_BYTES = 64 * 1024
"""Sent and taken in turn: any socket has room for it."""

_LEVELS = {"fast": FAST_LEVEL, "thorough": THOROUGH_LEVEL}

R = TypeVar("R")


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def begin(self, name: str) -> None:
        """What is added from now on is of the next leaf."""
        self.seconds[f"{name}_seconds"].append(0.0)

    def add(self, name: str, work: Callable[[], R]) -> R:
        """Do the work, and note how long it took."""
        began = perf_counter()
        done = work()
        self.seconds[f"{name}_seconds"][-1] += perf_counter() - began
        return done

    def of(self, name: str, work: Callable[[], R]) -> R:
        self.begin(name)
        return self.add(name, work)


@contextmanager
def _connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            yield server, client


def _full_leaves(reader: SnapshotReader) -> Iterator[int]:
    for leaf in range(reader.total_pages // LEAF_PAGES):
        if not zero_marks(reader.leaf(leaf)).strip(b"\0"):
            yield leaf


def _compressed(clock: _Clock, data: bytes, name: str, level: int) -> None:
    encoding, encoded = clock.of(f"server_zstd_{name}", lambda: compress_pages(data, level))
    clock.of(f"client_zstd_{name}", lambda: decode_data(encoding, encoded, LEAF_PAGES))


def _sent(clock: _Clock, frame: Sequence[bytes | memoryview], server: socket.socket, client: socket.socket) -> None:
    clock.begin("server_send")
    clock.begin("client_receive")
    room = memoryview(bytearray(sum(map(len, frame))))
    at = 0
    for part in frame:
        view = memoryview(part)
        for begin in range(0, len(view), _PIECE_BYTES):
            sent = clock.add("server_send", partial(server.send, view[begin : begin + _PIECE_BYTES]))
            taken = clock.add("client_receive", partial(client.recv_into, room[at:], sent, socket.MSG_WAITALL))
            at += taken
    assert at == len(room), "a piece is taken whole"


def _written(file: int, data: memoryview, offset: int) -> None:
    """As `PageFile` does: a block at a time."""
    for at in range(0, LEAF_BYTES, BLOCK_BYTES):
        os.pwritev(file, (data[at : at + BLOCK_BYTES],), offset + at)


def _one(
    clock: _Clock, reader: SnapshotReader, leaf: int, ends: tuple[socket.socket, socket.socket], file: int
) -> None:
    pages = PageRange(leaf * LEAF_PAGES, LEAF_PAGES)
    runs = clock.of("server_read", lambda: reader.read_nowait(pages))
    assert runs is not None, "the image was read a moment ago"
    data = b"".join(run.data for run in runs if run.data is not None)
    assert len(data) == LEAF_BYTES, "a leaf without zeros"
    for name, level in _LEVELS.items():
        _compressed(clock, data, name, level)
    _sent(clock, encode_parts(Packed(1, pages.start, LEAF_PAGES, Encoding.RAW, data, final=True)), *ends)
    clock.of("client_verify_leaf", lambda: leaf_sum([data]))
    clock.of("client_verify_pages", lambda: page_digests(data))
    clock.of("client_write", lambda: _written(file, memoryview(data), pages.offset_bytes))


def _run(context: Context) -> Sample:
    context.image.warm()
    clock = _Clock()
    with (
        tempfile.TemporaryFile(dir=context.work) as file,
        open_snapshot(context.image.folder) as reader,
        _connected() as ends,
    ):
        os.ftruncate(file.fileno(), context.image.ram_bytes)
        leaves = list(islice(_full_leaves(reader), MOST_LEAVES))
        for leaf in leaves:
            reader.read_nowait(PageRange(leaf * LEAF_PAGES, LEAF_PAGES))
            _one(clock, reader, leaf, ends, file.fileno())
    figures = {name: statistics.median(seconds) for name, seconds in clock.seconds.items()}
    return context.sample({"leaves": float(len(leaves)), **figures})


MEASURE = Measure("stages", "one MiB of a fill, step by step, each by itself", pairs(("loopback",), ("local",)), _run)
