"""RAM images to measure with: made from a seed, kept between runs, hashed like every snapshot that lazymem writes.

What is in guests' RAM decides what compression and deduplication are worth, so the image has it all: half of it is zero
(holes of the file); of the rest a quarter is incompressible, a quarter slabs of records with pointers, a quarter text,
and a quarter repeats pages that stand elsewhere (as page caches of equal files do). Runs of 1 to 512 pages of a kind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import zstandard

from lazymem.digests import page_digest
from lazymem.pages import PAGE_SIZE, ZERO_PAGE
from lazymem.snapshot.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    RAM_BLOCK,
    RAM_NAME,
    SUMS_NAME,
    VMSTATE_NAME,
    Block,
    Emulator,
    Manifest,
)
from lazymem.snapshot.writer import new_ram_id, vmstate_record, write_digests

FORMAT = 2
"""Part of the kept image's name: raise it when what is made changes."""

CONTENT_SEED = "lazymem-bench 1"
"""What is around the RAM may change without its bytes."""

FACTS_NAME = "bench-facts.json"
TOUCH_SEED = 20260
_MAX_RUN = 512


@dataclass(frozen=True, slots=True)
class Facts:
    """What is in an image. `nonzero_pages`: pages with a byte that is not zero; `zstd_bytes`: `zstd -3` of the distinct
    ones of them in one stream, in order of their first place: what no sender of that RAM can do much without."""

    pages: int
    nonzero_pages: int
    distinct_pages: int
    zstd_bytes: int


@dataclass(frozen=True, slots=True)
class Image:
    """A snapshot folder to measure with."""

    folder: Path
    facts: Facts

    @property
    def ram(self) -> Path:
        return self.folder / RAM_NAME

    @property
    def vmstate(self) -> Path:
        return self.folder / VMSTATE_NAME

    @property
    def ram_bytes(self) -> int:
        return self.facts.pages * PAGE_SIZE

    def nonzero_numbers(self) -> array[int]:
        """Page numbers with data."""
        found = array("L")
        with self.ram.open("rb") as file:
            for start, end in _data_extents(file.fileno(), self.ram_bytes):
                file.seek(start)
                for page in range(start // PAGE_SIZE, end // PAGE_SIZE):
                    if file.read(PAGE_SIZE) != ZERO_PAGE:
                        found.append(page)
        return found

    def warm(self) -> None:
        """Have the host's page cache hold all of it, so that no way is measured with somebody's disk."""
        with self.ram.open("rb") as file:
            for start, end in _data_extents(file.fileno(), self.ram_bytes):
                for at in range(start, end, 1 << 20):
                    os.pread(file.fileno(), min(1 << 20, end - at), at)


def synthetic(work: Path, size_mib: int) -> Image:
    """The image of that size; made the first time, some seconds."""
    folder = work / f"image-{size_mib}-v{FORMAT}"
    return _kept(folder) or _made(folder, lambda ram: _write_synthetic(ram, size_mib << 20))


def sparse(work: Path, size_gib: float) -> Image:
    """The image of one hole but for its last page, hashed as all are. Its digests are 4 MiB a GiB."""
    folder = work / f"sparse-{size_gib:g}g-hashed-v{FORMAT}"
    return _kept(folder) or _made(folder, lambda ram: _write_sparse(ram, int(size_gib * (1 << 30))))


def adopt(folder: Path) -> Image:
    """A snapshot folder that somebody else made, looked through once."""
    return _kept(folder) or _sealed(folder, look_through(folder / RAM_NAME))


def image_of_guest(folder: Path, save: Callable[[Path, Path], Path]) -> Image:
    """The snapshot `folder`, made once. `save`: runs a guest and returns where its snapshot is. It gets a folder whose
    path is short, as sockets need it, and one beside `folder`, so that what is made there can be moved."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="lazymem-bench-") as sockets,
            tempfile.TemporaryDirectory(prefix=".guest-", dir=folder.parent) as near,
        ):
            shutil.move(save(Path(sockets), Path(near)), folder)
    return adopt(folder)


def _kept(folder: Path) -> Image | None:
    try:
        facts = Facts(**json.loads((folder / FACTS_NAME).read_text()))
    except OSError:
        return None
    return Image(folder, facts)


def _made(folder: Path, write: Callable[[Path], None]) -> Image:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ram = partial / RAM_NAME
    write(ram)
    _hash(partial)
    _sealed(partial, look_through(ram))
    partial.rename(folder)
    found = _kept(folder)
    assert found is not None
    return found


def _sealed(folder: Path, facts: Facts) -> Image:
    (folder / FACTS_NAME).write_text(json.dumps(asdict(facts)))
    return Image(folder, facts)


def _hash(folder: Path) -> None:
    size = (folder / RAM_NAME).stat().st_size
    (folder / VMSTATE_NAME).write_bytes(b"no emulator made this")
    roots = write_digests(folder / RAM_NAME, size, folder / DIGESTS_NAME, maybe_sums=folder / SUMS_NAME)
    manifest = Manifest(
        emulator=Emulator("lazymem-bench", str(FORMAT)),
        blocks=(Block(RAM_BLOCK, RAM_NAME, size),),
        ram_id=new_ram_id(),
        ram_root=roots.tree,
        ram_sums=roots.sums,
        vmstate=vmstate_record(folder / VMSTATE_NAME),
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())


def look_through(ram: Path) -> Facts:
    """The facts of a RAM file, by reading its data once."""
    size = ram.stat().st_size
    nonzero = 0
    distinct: set[bytes] = set()
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    compressed = 0
    with ram.open("rb") as file:
        for start, end in _data_extents(file.fileno(), size):
            file.seek(start)
            for _ in range(start, end, PAGE_SIZE):
                page = file.read(PAGE_SIZE)
                if page == ZERO_PAGE:
                    continue
                nonzero += 1
                short = page_digest(page)
                if short not in distinct:
                    distinct.add(short)
                    compressed += len(compressor.compress(page))
    compressed += len(compressor.flush())
    return Facts(size // PAGE_SIZE, nonzero, len(distinct), compressed)


def _data_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        start -= start % PAGE_SIZE
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        at = min(size, -(-at // PAGE_SIZE) * PAGE_SIZE)
        yield start, at


# --- what is in the pages


def _write_sparse(ram: Path, size: int) -> None:
    with ram.open("wb") as file:
        file.truncate(size - PAGE_SIZE)
        file.seek(0, os.SEEK_END)
        file.write(b"\1" * PAGE_SIZE)


def _write_synthetic(ram: Path, size: int) -> None:
    content = _Content(random.Random(CONTENT_SEED))
    with ram.open("wb") as file:
        file.truncate(size)
        for first, kind, count in _runs(content.choose, size // PAGE_SIZE):
            if kind != "zero":
                file.seek(first * PAGE_SIZE)
                file.write(b"".join(content.page(kind) for _ in range(count)))


def _runs(choose: random.Random, pages: int) -> Iterator[tuple[int, str, int]]:
    """(first page, kind, count) that cover all; each kind has its share of the whole to within a run."""
    shares = {"zero": 0.5, "random": 0.125, "slab": 0.125, "text": 0.125, "repeat": 0.125}
    left = {kind: int(share * pages) for kind, share in shares.items()}
    left["zero"] += pages - sum(left.values())
    first = 0
    while first < pages:
        kinds = [kind for kind, count in left.items() if count]
        kind = choose.choices(kinds, [left[kind] for kind in kinds])[0]
        count = min(left[kind], 1 + int(_MAX_RUN ** choose.random()))
        left[kind] -= count
        yield first, kind, count
        first += count


class _Content:
    """Pages of each kind, none of them zero."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self._words = [choose.randbytes(choose.randint(1, 5)).hex().encode() + b" " for _ in range(3000)]
        self._weights = [1 / (rank + 1) for rank in range(len(self._words))]
        self._repeats = [self._text() for _ in range(512)] + [choose.randbytes(PAGE_SIZE) for _ in range(512)]

    def page(self, kind: str) -> bytes:
        if kind == "random":
            return self.choose.randbytes(PAGE_SIZE)
        if kind == "repeat":
            return self.choose.choice(self._repeats)
        return self._slab() if kind == "slab" else self._text()

    def _text(self) -> bytes:
        return b"".join(self.choose.choices(self._words, self._weights, k=1500))[:PAGE_SIZE]

    def _slab(self) -> bytes:
        """32 records of 128 bytes: two kernel pointers, a counter, flags, a name, and room."""
        choose = self.choose
        base = 0xFFFF888000000000 + choose.randrange(1 << 30) * 64
        pack = struct.Struct("<QQIIQ16s80x").pack
        records = [
            pack(
                base + choose.randrange(1 << 14) * 64,
                base + choose.randrange(1 << 14) * 64,
                choose.randrange(1, 1 << 16),
                choose.choice((1, 3, 0x80)),
                choose.randrange(1 << 40),
                choose.choice(self._words),
            )
            for _ in range(PAGE_SIZE // 128)
        ]
        return b"".join(records)
