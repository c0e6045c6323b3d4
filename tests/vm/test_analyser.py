"""QEMU's own analyser reads what lazymem-vm saves: every section, field and page; and refuses what is broken."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from lazymem.vm.guests import build_guest
from lazymem.vm.machine import MachineConfig, block_sizes
from lazymem.vm.migration import shape_of
from lazymem.vm.ram import MemFile, RamBlocks
from lazymem.vm.savestream.format import Mark, StreamShape
from lazymem.vm.savestream.loader import load
from tests.support.analyser import analyse, field_values, found_sections
from tests.support.machines import MIB, Rig
from tests.support.streamreader import read_stream
from tests.support.vmprocess import starting

RAM_MIB = 16


def empty_file(path: Path) -> Path:
    path.touch()
    os.truncate(path, RAM_MIB * MIB)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a lazymem-vm process saved whose guest had counted for a while."""
    folder = tmp_path_factory.mktemp("saved")
    with starting(folder, RAM_MIB) as start:
        vm = start("--pcram-file", empty_file(folder / "ram"), "-kernel", build_guest("heartbeat", folder))
        vm.wait_ticks(3)
        vm.save(f"file:{folder}/vmstate")
        vm.quit()
    return (folder / "vmstate").read_bytes()


@pytest.fixture
def shape(tmp_path: Path) -> StreamShape:
    """What the devices themselves say of their fields: neither the stream nor its description is asked."""
    config = MachineConfig(RAM_MIB * MIB, build_guest("heartbeat", tmp_path))
    with Rig(config, RamBlocks(block_sizes(config), [MemFile("pc.ram", empty_file(tmp_path / "ram"))])) as rig:
        return shape_of(rig.machine)


def test_every_section_with_all_its_fields(saved: bytes, shape: StreamShape, tmp_path: Path) -> None:
    devices = load(saved, shape).devices
    found = found_sections(saved, tmp_path)
    ram = found.pop("ram (2)")
    assert {name: int(size, 16) for name, size in ram["section sizes"].items()} == {
        block.name: block.size for block in shape.blocks
    }
    names = [f"{layout.name} ({number})" for number, layout in enumerate(shape.layouts, 3)]
    assert list(found) == names
    assert len(names) > 8, "a CPU, a run state, and the PC's chips"
    for name, layout in zip(names, shape.layouts, strict=True):
        assert list(found[name]) == [field.name for field in layout.fields]
        assert field_values(found[name]) == devices[layout.name, layout.instance], name


def test_the_guests_ordinary_memory_and_no_page_of_the_ram_file(saved: bytes, tmp_path: Path) -> None:
    done = analyse(saved, tmp_path, "-x")
    assert done.returncode == 0, done.stderr
    stream = read_stream(saved)
    for block in ("pc.bios", "vga.vram"):
        assert (tmp_path / block).read_bytes() == stream.memory(block)
    assert (tmp_path / "pc.ram").stat().st_size == RAM_MIB * MIB
    assert (tmp_path / "pc.ram").stat().st_blocks == 0, "it lists the block and has no page of it"
    assert {"desc.json", "state.json"} <= set(os.listdir(tmp_path))


def test_a_changed_value_is_seen(saved: bytes, tmp_path: Path) -> None:
    """So the comparison of the values could fail."""
    at = saved.index(b"running".ljust(100, b"\0"))
    before = found_sections(saved, tmp_path)
    after = found_sections(saved[:at] + b"R" + saved[at + 1 :], tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"globalstate (3)"}


@pytest.mark.parametrize("other", [b"running" + bytes(92), b"running" + bytes(94)], ids=["less", "more"])
def test_a_byte_less_or_more_is_seen(saved: bytes, other: bytes, tmp_path: Path) -> None:
    """It takes a zero where a section should begin for the end, and says nothing: the sections behind are missing."""
    before = found_sections(saved, tmp_path)
    after = found_sections(replaced(b"running" + bytes(93), other)(saved), tmp_path)
    assert list(after) == list(before)[:2]


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(stream: bytes) -> bytes:
        assert stream.count(old) == 1
        return stream.replace(old, new)

    return change


def device_head(number: int, name: bytes) -> bytes:
    return struct.pack(">BIB", Mark.SECTION_FULL, number, len(name)) + name


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda stream: b"QEVN" + stream[4:], "Invalid file magic"),
    "file version": (lambda stream: stream[:7] + b"\4" + stream[8:], "Invalid version number 4"),
    "ram's version": (
        replaced(b"\3ram" + struct.pack(">II", 0, 4), b"\3ram" + struct.pack(">II", 0, 5)),
        "Unknown RAM version 5",
    ),
    "a device that nobody described": (
        replaced(device_head(3, b"globalstate"), device_head(3, b"globalstatE")),
        "KeyError: ('globalstatE', 0)",
    ),
    "a footer": (
        replaced(struct.pack(">BIBI", Mark.FOOTER, 3, Mark.SECTION_FULL, 4), struct.pack(">BIBI", 0x7E, 9, 4, 4)),
        "Mismatched section footer: 9 vs 3",
    ),
    "a field that the description lacks": (replaced(b'"name":"runstate"', b'"nome":"runstate"'), "KeyError: 'name'"),
    "the end": (lambda stream: stream[:-1], "JSONDecodeError"),
    "all behind the ram section": (
        lambda stream: stream[: stream.index(b"\x0bglobalstate")],
        "read_migration_debug_json",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_stream_is_refused(saved: bytes, what: str, tmp_path: Path) -> None:
    """So the tests above could fail."""
    change, reason = BROKEN[what]
    done = analyse(change(saved), tmp_path, "-d", "state")
    assert done.returncode != 0
    assert reason in done.stderr
