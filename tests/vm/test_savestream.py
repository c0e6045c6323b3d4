"""The save stream: writer and loader against each other and against a reader that was written apart from both."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lazymem.errors import SaveStreamError
from lazymem.pages import PAGE_SIZE
from lazymem.vm.devicestate import Field, Layout, State
from lazymem.vm.savestream.format import BlockShape, Page, RamFlag, StreamShape
from lazymem.vm.savestream.loader import load, max_stream_bytes
from lazymem.vm.savestream.writer import StreamWriter
from tests.support.analyser import analyse
from tests.support.streamreader import StreamFormatError, read_stream

CPU = Layout("cpu", 2, (Field("rip", 8), Field("halted", 1), Field("fpu", 16, buffer=True)))
UART = Layout("serial", 3, (Field("lcr", 1), Field("divider", 2), Field("status", 4)))
UART_2 = replace(UART, instance=1)
STATES: dict[Layout, State] = {
    CPU: {"rip": 0xFFFF_8000_0000_1234, "halted": 1, "fpu": bytes(range(16))},
    UART: {"lcr": 3, "divider": 12, "status": 0xDEAD_BEEF},
    UART_2: {"lcr": 0, "divider": 0, "status": 1},
}
RAM = BlockShape("pc.ram", 64 * PAGE_SIZE, backed=True, do_not_save=True)
BIOS = BlockShape("pc.bios", 4 * PAGE_SIZE)
VRAM = BlockShape("vga.vram", 3 * PAGE_SIZE)
SHAPE = StreamShape("lazymem-test-1", (RAM, BIOS, VRAM), tuple(STATES))


def page_bytes(block: str, number: int) -> bytes:
    """All pages differ; page 1 of each block is zero."""
    return bytes(PAGE_SIZE) if number == 1 else f"{block}:{number:04}.".encode().ljust(64, b"#") * (PAGE_SIZE // 64)


def saved_pages(shape: StreamShape) -> list[Page]:
    return [
        Page(block.name, number * PAGE_SIZE, page_bytes(block.name, number))
        for block in shape.blocks
        if not block.do_not_save
        for number in range(block.size // PAGE_SIZE)
    ]


def write_stream(shape: StreamShape = SHAPE, again: tuple[Page, ...] = ()) -> bytes:
    """A whole stream; `again`: pages that come once more in a second part."""
    writer = StreamWriter(shape)
    pages = saved_pages(shape)
    parts = [writer.begin(), writer.ram_pages(pages[:3]), writer.ram_pages(pages[3:])]
    if again:
        parts.append(writer.ram_pages(again))
    parts.append(writer.ram_end())
    parts += [writer.device(STATES[layout]) for layout in shape.layouts]
    return b"".join([*parts, writer.end()])


@functools.cache
def good_stream() -> bytes:
    return write_stream()


def test_what_was_written_is_loaded() -> None:
    saved = load(good_stream(), SHAPE)
    assert saved.devices == {(layout.name, layout.instance): state for layout, state in STATES.items()}
    assert saved.pages["pc.ram"] == {}
    for block in (BIOS, VRAM):
        assert len(saved.pages[block.name]) == block.size // PAGE_SIZE
        for offset, data in saved.pages[block.name].items():
            number = offset // PAGE_SIZE
            assert (data is None) == (number == 1)
            assert bytes(data or bytes(PAGE_SIZE)) == page_bytes(block.name, number)


def test_an_independent_reader_finds_the_same() -> None:
    stream = read_stream(good_stream())
    assert (stream.machine, stream.capabilities) == ("lazymem-test-1", ["x-ignore-shared"])
    assert stream.blocks == {"pc.ram": RAM.size, "pc.bios": BIOS.size, "vga.vram": VRAM.size}
    assert stream.addresses == dict.fromkeys(stream.blocks, 0)
    assert stream.pages_of("pc.ram") == 0
    assert stream.memory("pc.bios") == b"".join(page_bytes("pc.bios", number) for number in range(4))
    assert [data for block, offset, data in stream.page_records if offset == PAGE_SIZE] == [None, None]
    assert [(s.name, s.instance, s.version) for s in stream.devices] == [
        ("cpu", 0, 2),
        ("serial", 0, 3),
        ("serial", 1, 3),
    ]
    assert [section.fields for section in stream.devices] == list(STATES.values())
    assert stream.description["configuration"]["subsections"][0]["vmsd_name"] == "configuration/capabilities"
    assert stream.description["page_size"] == PAGE_SIZE


def test_a_page_that_comes_again_replaces_the_one_before() -> None:
    newer = Page("vga.vram", 0, b"n" * PAGE_SIZE)
    emptied = Page("pc.bios", 2 * PAGE_SIZE, bytes(PAGE_SIZE))
    data = write_stream(again=(newer, emptied))
    saved = load(data, SHAPE)
    assert bytes(saved.pages["vga.vram"][0] or b"") == newer.data
    assert saved.pages["pc.bios"][2 * PAGE_SIZE] is None
    assert read_stream(data).memory("vga.vram")[:PAGE_SIZE] == newer.data


def test_runs_of_one_block_name_it_once() -> None:
    assert good_stream().count(b"\x07pc.bios") == 2 + 1  # Block list, and the two parts that hold pages of it.


def test_a_stream_without_shared_blocks_has_no_addresses() -> None:
    shape = replace(SHAPE, blocks=(BIOS, VRAM), ignore_shared=False)
    data = write_stream(shape)
    stream = read_stream(data)
    assert (stream.capabilities, stream.addresses) == ([], {})
    assert load(data, replace(shape, ignore_shared=True)).shape.ignore_shared is False


def test_cut_at_every_byte_but_inside_pages_it_is_refused() -> None:
    data = good_stream()
    inside_pages = PAGE_SIZE // 8
    previous = 0
    for length in range(len(data)):
        # Inside a page's bytes one cut is like the next: take every eighth of them.
        if data[previous:length].count(b"#") == length - previous and (length - previous) % inside_pages:
            continue
        previous = length
        with pytest.raises(SaveStreamError, match="save stream refused, section "):
            load(data[:length], SHAPE)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_altered_byte_is_refused(data: st.DataObject) -> None:
    stream = bytearray(good_stream())
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SaveStreamError, match=r"section "):
        load(bytes(stream), SHAPE)


def test_every_byte_outside_of_pages_is_guarded() -> None:
    stream = bytearray(good_stream())
    for at in range(len(stream)):
        if stream[at] == ord("#"):
            continue
        stream[at] ^= 0x01
        with pytest.raises(SaveStreamError):
            load(bytes(stream), SHAPE)
        stream[at] ^= 0x01


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_refused(noise: bytes, behind_header: bool) -> None:
    with pytest.raises(SaveStreamError):
        load((good_stream()[:8] if behind_header else b"") + noise, SHAPE)


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(SaveStreamError, match=r"section description.*more bytes follow"):
        load(good_stream() + b"\0", SHAPE)


def test_an_altered_field_is_named_by_its_section() -> None:
    stream = bytearray(good_stream())
    at = stream.index(struct.pack(">Q", 0xFFFF_8000_0000_1234))
    stream[at] ^= 0x80
    with pytest.raises(SaveStreamError, match=r"section cpu.*not those that were written"):
        load(bytes(stream), SHAPE)


def test_an_altered_page_is_named_by_its_section() -> None:
    stream = good_stream().replace(page_bytes("pc.bios", 3), page_bytes("pc.bios", 4))
    with pytest.raises(SaveStreamError, match=r"section ram.*not those that were written"):
        load(stream, SHAPE)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (replace(SHAPE, machine="lazymem-test-2"), "section configuration.*'lazymem-test-1', this is lazymem-test-2"),
        (
            replace(SHAPE, blocks=(RAM, BIOS)),
            "section ram.*has a RAM block 'vga.vram', this machine has pc.ram, pc.bios",
        ),
        (replace(SHAPE, blocks=(*SHAPE.blocks, BlockShape("pc.rom", PAGE_SIZE))), "section ram.*lacks pc.rom"),
        (
            replace(SHAPE, blocks=(replace(RAM, size=PAGE_SIZE), BIOS, VRAM)),
            "section ram.*pc.ram has 262144 .* 4096 here",
        ),
        (replace(SHAPE, blocks=(replace(RAM, do_not_save=False, backed=False), BIOS, VRAM)), "pc.ram has 0 of its 64"),
        (
            replace(SHAPE, blocks=(RAM, replace(BIOS, do_not_save=True), VRAM)),
            "pages of RAM block pc.bios, whose state",
        ),
        (replace(SHAPE, layouts=(CPU, UART)), r"section serial.*no device serial \(instance 1\)"),
        (replace(SHAPE, layouts=(*SHAPE.layouts, replace(CPU, name="rtc"))), "ends without the section rtc"),
        (replace(SHAPE, layouts=(replace(CPU, version=3), UART, UART_2)), "section cpu.*version is 0x2, not 0x3"),
        (replace(SHAPE, layouts=(replace(CPU, fields=CPU.fields[:2]), UART, UART_2)), "section cpu.*footer"),
    ],
)
def test_a_stream_of_another_machine_is_refused(shape: StreamShape, reason: str) -> None:
    with pytest.raises(SaveStreamError, match=reason):
        load(good_stream(), shape)


def test_a_privately_mapped_file_stands_in_for_pages_that_the_stream_lacks() -> None:
    private = replace(SHAPE, blocks=(replace(RAM, do_not_save=False), BIOS, VRAM))
    assert load(good_stream(), private).pages["pc.ram"] == {}
    whole = load(write_stream(private), private).pages["pc.ram"]
    assert len(whole) == RAM.size // PAGE_SIZE
    with pytest.raises(SaveStreamError, match=r"pages of RAM block pc.ram, whose state is the file"):
        load(write_stream(private), SHAPE)


def test_a_device_twice_is_refused() -> None:
    twice = write_stream(replace(SHAPE, layouts=(CPU, UART, UART)))
    with pytest.raises(SaveStreamError, match=r"section serial.*twice"):
        load(twice, SHAPE)


@pytest.mark.parametrize("name", [b"\x1b[2J\x1b[1m", b"serial\n", b"\xe2\x80\xae", b"a\0b", b"\xff", b""])
def test_an_error_cannot_move_the_terminals_cursor(name: bytes) -> None:
    stream = good_stream()
    at = stream.index(b"\x06serial") + 1
    with pytest.raises(SaveStreamError, match=r"section of a device .* a name ") as refused:
        load(stream[: at - 1] + bytes([len(name)]) + name + stream[at + 6 :], SHAPE)
    assert str(refused.value).isprintable()


def test_an_error_is_short_however_long_a_name_is() -> None:
    stream = good_stream()
    long = stream[:9] + struct.pack(">I", 10 << 20) + b"x" * (10 << 20)
    with pytest.raises(SaveStreamError, match=r"section configuration.*a name of 10485760 bytes"):
        load(long, SHAPE)


def test_a_page_record_with_unknown_flags_is_refused() -> None:
    word = struct.pack(">Q", RamFlag.PAGE | RamFlag.CONTINUE | PAGE_SIZE * 2)
    stream = good_stream()
    assert word in stream
    with pytest.raises(SaveStreamError, match=r"section ram.*unknown flags 0x6[08]"):
        load(stream.replace(word, struct.pack(">Q", 0x40 | RamFlag.PAGE | RamFlag.CONTINUE | PAGE_SIZE * 2), 1), SHAPE)


def test_the_bound_on_a_stream_lets_two_passes_through() -> None:
    pages = tuple(saved_pages(SHAPE))
    assert len(write_stream(again=pages)) < max_stream_bytes(SHAPE)


def test_the_writer_refuses_its_callers_mistakes() -> None:
    writer = StreamWriter(SHAPE)
    writer.begin()
    with pytest.raises(ValueError, match=r"pc\.ram"):
        writer.ram_pages([Page("pc.ram", 0, b"x" * PAGE_SIZE)])
    with pytest.raises(ValueError, match=r"vga\.vram"):
        writer.ram_pages([Page("vga.vram", VRAM.size, None)])
    with pytest.raises(ValueError, match="after the ram"):
        writer.device(STATES[CPU])
    writer.ram_end()
    with pytest.raises(ValueError, match="missing"):
        writer.end()
    with pytest.raises(ValueError, match="exactly its layout"):
        writer.device({"rip": 1})
    with pytest.raises(ValueError, match="not open"):
        writer.ram_pages([])


@pytest.mark.parametrize("bad", [{"rip": -1}, {"rip": 1 << 64}, {"rip": b"x"}, {"fpu": b"short"}, {"fpu": 5}])
def test_the_writer_refuses_values_that_do_not_fit(bad: State) -> None:
    writer = StreamWriter(SHAPE)
    writer.begin()
    writer.ram_end()
    with pytest.raises(ValueError, match="cpu"):
        writer.device({**STATES[CPU], **bad})


def test_the_independent_reader_refuses_a_cut_stream() -> None:
    with pytest.raises((StreamFormatError, ValueError)):
        read_stream(good_stream()[:-1])


def test_qemus_own_analyser_finds_every_page(tmp_path: Path) -> None:
    done = analyse(good_stream(), tmp_path, "-x")
    assert done.returncode == 0, done.stderr
    for block in ("pc.bios", "vga.vram"):
        assert (tmp_path / block).read_bytes() == read_stream(good_stream()).memory(block)
    done = analyse(good_stream(), tmp_path, "-d", "desc")
    assert json.loads(done.stdout) == read_stream(good_stream()).description
