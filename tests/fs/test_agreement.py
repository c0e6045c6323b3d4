"""INIT from daemon to daemon: whoever dies when, kernel and library agree on the same."""

import struct

import pytest

from lazymem.errors import EnvironmentRefusedError
from lazymem.fs import fuseabi
from lazymem.fs.agreement import Agreement
from lazymem.fs.sessionrecord import SessionRecord

RESENT = 1 << 63


def _request(unique: int) -> bytes:
    return fuseabi.IN_HEADER.pack(104, fuseabi.INIT, unique, 0, 0, 0, 0, 0, 0) + struct.pack("=16I", 7, 45, *[0] * 14)


def _answer(unique: int, flags: int = 1) -> bytes:
    return fuseabi.OUT_HEADER.pack(80, 0, unique) + struct.pack("=16I", 7, 38, 0, flags, *[0] * 12)


def test_the_first_daemon_and_the_second() -> None:
    record = SessionRecord.create()
    first = Agreement(record)
    assert not first.begun
    assert first.maybe_answer(_request(2)) is None, "the library's"
    assert not first.takes(memoryview(_answer(4))), "of another request"
    assert not first.takes(memoryview(_answer(2))), "the kernel's"
    second = Agreement(record)
    assert second.begun
    assert second.maybe_repeat() == _request(2)
    assert second.takes(memoryview(_answer(2))), "the kernel has had it"
    assert not second.takes(memoryview(_answer(2))), "once"


def test_a_death_before_init_is_noted() -> None:
    second = Agreement(SessionRecord.create(), continues=True)
    assert second.begun, "the kernel must send it again"
    assert second.maybe_repeat() is None
    assert second.maybe_answer(_request(2 | RESENT)) is None


def test_a_death_before_the_library_answers() -> None:
    record = SessionRecord.create()
    Agreement(record).maybe_answer(_request(2))
    second = Agreement(record)
    assert second.begun, "the kernel must send it again"
    assert second.maybe_repeat() is None
    assert second.maybe_answer(_request(2 | RESENT)) is None
    assert not second.takes(memoryview(_answer(2 | RESENT)))
    assert record.init_answer == _answer(2 | RESENT)


def test_a_death_before_the_kernel_has_the_answer() -> None:
    record = SessionRecord.create()
    first = Agreement(record)
    first.maybe_answer(_request(2))
    first.takes(memoryview(_answer(2)))
    second = Agreement(record)
    assert second.maybe_repeat() == _request(2)
    assert second.takes(memoryview(_answer(2)))
    assert second.maybe_answer(_request(2 | RESENT)) == _answer(2 | RESENT)


def test_another_library_is_refused() -> None:
    record = SessionRecord.create()
    first = Agreement(record)
    first.maybe_answer(_request(2))
    first.takes(memoryview(_answer(2)))
    second = Agreement(record)
    second.maybe_repeat()
    with pytest.raises(EnvironmentRefusedError, match="libfuse"):
        second.takes(memoryview(_answer(2, flags=3)))
