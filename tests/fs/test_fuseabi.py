"""The kernel's messages: sizes and places as in linux/fuse.h, and answers that say their own length."""

import struct

from lazymem.fs import fuseabi


def test_sizes_are_the_kernels() -> None:
    assert fuseabi.IN_HEADER.size == 40
    assert fuseabi.READ_IN.size == fuseabi.WRITE_IN.size == 40
    assert fuseabi.OUT_HEADER.size == 16
    assert fuseabi.WRITE_OUT.size == 24
    assert fuseabi.WRITE_DATA_AT == 80


def test_answers_say_their_length() -> None:
    assert struct.unpack("=IiQ", fuseabi.answer_head(7, 4096)) == (4112, 0, 7)
    assert struct.unpack("=IiQ", fuseabi.error_answer(1 << 63, 5)) == (16, -5, 1 << 63)
    assert struct.unpack("=IiQII", fuseabi.write_answer(9, 4096)) == (24, 0, 9, 4096, 0)


def test_an_init_without_splice_is_otherwise_the_same() -> None:
    head = fuseabi.IN_HEADER.pack(104, fuseabi.INIT, 2, 0, 0, 0, 0, 0, 0)
    body = struct.pack("=IIII", 7, 45, 131072, 0xFFFFFFFF) + bytes(range(48))
    assert len(head + body) == 104, "what the kernel sends"
    changed = fuseabi.without_splice(head + body)
    assert len(changed) == 104
    assert struct.unpack_from("=I", changed, 52) == (0xFFFFFFFF & ~(1 << 7 | 1 << 8 | 1 << 9),)
    assert changed[:52] == (head + body)[:52]
    assert changed[56:] == (head + body)[56:]
