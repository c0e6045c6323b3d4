"""`manifest.json`: what a snapshot is and how it was made. Pure: text in, a checked record out.

Comes from outside (a folder, the wire), so every field is checked, and a file name may not leave the folder.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3
from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from lazymem.digests import ROOT_BYTES
from lazymem.errors import SnapshotError
from lazymem.pages import PAGE_SIZE

FORMAT = "lazymem-snapshot"
VERSION = 1
DELTA_VERSION = 2
"""Of a manifest that names a parent, so that a lazymem that knows nothing of such ones refuses it."""
SUMS_VERSION = 3
"""Of one that names leaf sums: its identity has them in it, and who knows nothing of them would make another one."""
MANIFEST_NAME = "manifest.json"
RAM_BLOCK = "pc.ram"
RAM_NAME = "pc.ram"
DIGESTS_NAME = "pc.ram.digests"
SUMS_NAME = "pc.ram.sums"
DELTA_NAME = "pc.ram.delta"
VMSTATE_NAME = "vmstate"

MAX_MANIFEST_BYTES = 256 * 1024
"""Ours are under 4 KiB; a larger one is not a manifest but an attack on the reader's memory."""

MAX_RAM_BYTES = 1 << 46
"""64 TiB: beyond any x86 guest, and small enough that page counts fit their fields."""

IDENTITY_BYTES = 32

_MAX_PAUSE_SECONDS = 1e9
"""30 years; a number beyond it is nonsense, and may not even fit a float."""


class Emulator(Struct, frozen=True):
    """How the snapshot was made. `options` are the emulator's, in order; None where unknown."""

    name: str
    version: str
    machine: str | None = None
    cpu: str | None = None
    options: tuple[str, ...] = ()


class Block(Struct, frozen=True):
    """One RAM block that is a file of the snapshot. Sizes in bytes."""

    name: str
    file: str
    size: int
    page_size: int = PAGE_SIZE


class VmState(Struct, frozen=True):
    """The save stream: size in bytes and BLAKE3 (32 bytes, hex) over it."""

    file: str
    size: int
    digest: str


class Parent(Struct, frozen=True):
    """The snapshot that a delta is to be laid over. `identity`: `Manifest.identity` of it (32 bytes, hex)."""

    identity: str


class Manifest(Struct, frozen=True):
    """A whole manifest. `ram_id` is random (16 bytes, hex); `ram_root` the digest tree's root (32 bytes, hex).

    `parent`: only some of the pages are here, the others are that snapshot's. `ram_root` is over all of them.
    `ram_sums`: the digest of the leaf sums (32 bytes, hex), where there are some; never with a parent.
    """

    emulator: Emulator
    blocks: tuple[Block, ...]
    ram_id: str
    ram_root: str
    vmstate: VmState | None
    created: str = ""
    disks_handled: bool = False
    """True: the guest had writable disks that the snapshot does not cover, and its maker said that he sees to them."""
    pause_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    parent: Parent | None = None
    ram_sums: str | None = None

    @property
    def ram(self) -> Block:
        return next(block for block in self.blocks if block.name == RAM_BLOCK)

    @property
    def resume_notices(self) -> tuple[str, ...]:
        """Lines that a person should read each time a guest is resumed from this snapshot."""
        if not self.disks_handled:
            return ()
        return (
            "this snapshot does not cover the guest's writable disks; who made it said that he sees to them: "
            "make sure that they are as they were then",
        )

    def to_json(self) -> bytes:
        """The text of manifest.json."""
        version = DELTA_VERSION if self.parent else SUMS_VERSION if self.ram_sums else VERSION
        document = {"format": FORMAT, "version": version, **to_builtins(self)}
        if self.parent is None:
            del document["parent"]
        if version != SUMS_VERSION:
            del document["ram_sums"]
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

    def without_parent(self) -> Manifest:
        """Of the same snapshot with all of its pages in one file: what a delta looks like once it is served."""
        blocks = tuple(replace(block, file=RAM_NAME) if block.name == RAM_BLOCK else block for block in self.blocks)
        return replace(self, blocks=blocks, parent=None)

    @property
    def identity(self) -> bytes:
        """32 bytes that name this RAM: root, id and size. Two snapshots with it have the same bytes in pc.ram.

        And the sums, if there are any: pages that were verified by other ones would be in the same cache.
        """
        sums = f":{self.ram_sums}" if self.ram_sums and self.parent is None else ""
        return blake3(f"{self.ram_id}:{self.ram_root}:{self.ram.size}{sums}".encode()).digest(32)


def vmstate_digest(data: bytes | memoryview) -> str:
    """BLAKE3 over a save stream, as hex: the manifest's `vmstate.digest`."""
    return blake3(data).hexdigest()


def parse(text: bytes) -> Manifest:
    """Check and read manifest.json.

    Raises:
        SnapshotError: with what is wrong; nothing of a bad manifest is believed.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise SnapshotError(
            f"manifest.json has {len(text)} bytes, more than the {MAX_MANIFEST_BYTES} any manifest needs"
        )
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"manifest.json is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SnapshotError(f'manifest.json is not a snapshot\'s: its "format" is not "{FORMAT}"')
    if document.get("version") not in (VERSION, DELTA_VERSION, SUMS_VERSION):
        raise SnapshotError(
            f"manifest.json has version {document.get('version')!r}, this lazymem reads {VERSION} to {SUMS_VERSION}: "
            "use a newer one"
        )
    try:
        return _build(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"manifest.json lacks or misuses a field: {error}") from error


def parse_made_by(text: bytes) -> Emulator:
    """The emulator that a manifest names; everything else in it is left alone.

    Raises:
        SnapshotError: it names none.
    """
    try:
        return emulator_of(json.loads(text)["emulator"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"it does not say which emulator a state comes from: {error}") from error


def emulator_of(entry: dict[str, Any]) -> Emulator:
    """Checks the record; SnapshotError, KeyError, TypeError or AttributeError where it is none."""
    return Emulator(
        name=_text(entry["name"]),
        version=_text(entry["version"]),
        machine=_maybe_text(entry.get("machine")),
        cpu=_maybe_text(entry.get("cpu")),
        options=tuple(_text(option) for option in entry.get("options", ())),
    )


def _build(document: dict[str, Any]) -> Manifest:
    blocks = tuple(_block(entry) for entry in document["blocks"])
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise SnapshotError("manifest.json names a block twice")
    if RAM_BLOCK not in names:
        raise SnapshotError(f"manifest.json has no block {RAM_BLOCK}")
    vmstate = document["vmstate"]
    pause = document.get("pause_seconds")
    return Manifest(
        emulator=emulator_of(document["emulator"]),
        blocks=blocks,
        ram_id=_hex(document["ram_id"], 16, "ram_id"),
        ram_root=_hex(document["ram_root"], ROOT_BYTES, "ram_root"),
        vmstate=None
        if vmstate is None
        else VmState(
            _file_name(vmstate["file"]),
            _number(vmstate["size"], "vmstate size"),
            _hex(vmstate["digest"], 32, "vmstate digest"),
        ),
        created=_text(document.get("created", "")),
        disks_handled=document.get("disks_handled", False) is True,
        pause_seconds=float(pause) if isinstance(pause, int | float) and 0 <= pause < _MAX_PAUSE_SECONDS else None,
        extra=_mapping(document.get("extra", {})),
        parent=_maybe_parent(document),
        ram_sums=_hex(document["ram_sums"], ROOT_BYTES, "ram_sums") if document["version"] == SUMS_VERSION else None,
    )


def _maybe_parent(document: dict[str, Any]) -> Parent | None:
    if document["version"] != DELTA_VERSION:
        return None
    return Parent(_hex(document["parent"]["identity"], IDENTITY_BYTES, "the parent's identity"))


def _block(entry: dict[str, Any]) -> Block:
    size = _number(entry["size"], "block size")
    page_size = _number(entry["page_size"], "page size")
    if page_size != PAGE_SIZE:
        raise SnapshotError(f"manifest.json has pages of {page_size} bytes; lazymem knows {PAGE_SIZE}")
    if not 0 < size <= MAX_RAM_BYTES or size % PAGE_SIZE:
        raise SnapshotError(f"manifest.json has a block of {size} bytes, not a sane multiple of {PAGE_SIZE}")
    return Block(_text(entry["name"]), _file_name(entry["file"]), size, page_size)


def _file_name(value: object) -> str:
    name = _text(value)
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise SnapshotError(f"manifest.json names the file {name!r}, which is outside the snapshot's folder")
    return name


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise SnapshotError(f"manifest.json has {value!r} where a text belongs")
    if not value.isascii() and any("\ud800" <= mark <= "\udfff" for mark in value):
        raise SnapshotError(f"manifest.json has {value!r}, which is no text: half of a surrogate pair")
    return value


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SnapshotError(f"manifest.json has {value!r} where an object belongs")
    return value


def _refuse_constant(name: str) -> None:
    """Python's reader takes NaN and Infinity, which no JSON has."""
    raise ValueError(f"{name} is no number")


def _maybe_text(value: object) -> str | None:
    return None if value is None else _text(value)


def _number(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SnapshotError(f"manifest.json has {value!r} as {what}")
    return value


def _hex(value: object, length_bytes: int, what: str) -> str:
    text = _text(value)
    try:
        good = len(bytes.fromhex(text)) == length_bytes and text == text.lower() and len(text) == 2 * length_bytes
    except ValueError:
        good = False
    if not good:
        raise SnapshotError(f"manifest.json has {text!r} as {what}, not {length_bytes} bytes in hex")
    return text
