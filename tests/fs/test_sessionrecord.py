"""The record that outlives a daemon: whatever happens, the next one finds the last whole one."""

import os

import pytest

from lazymem.errors import EnvironmentRefusedError
from lazymem.fs.mountinfo import Mount
from lazymem.fs.sessionrecord import SessionRecord

MOUNT = Mount(7, "0:42", "/mnt/ram", "fuse.lazymem", "host:1", None)


def _again(record: SessionRecord) -> SessionRecord:
    return SessionRecord.read(os.dup(record.descriptor))


def test_what_was_noted_is_read() -> None:
    record = SessionRecord.create()
    assert (_again(record).init, _again(record).contents.maybe_mounted) == (b"", None)
    record.change(maybe_mounted=MOUNT, mounted_ns=5)
    record.note_init(b"request")
    record.note("welcome", b"w" * 1000)
    assert _again(record).init_answer == b""
    record.note_init_answer(b"answer")
    assert _again(record).contents == record.contents
    assert _again(record).contents.notes == {"welcome": b"w" * 1000}


def test_it_does_not_grow_with_each_change() -> None:
    record = SessionRecord.create()
    record.note("set", bytes(1 << 16))
    for number in range(50):
        record = _again(record)
        record.change(restarts=number)
        assert _again(record).contents == record.contents
    assert os.fstat(record.descriptor).st_size < 3 << 16


def test_a_daemon_that_dies_while_it_writes_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    record = SessionRecord.create()
    record.change(restarts=1)
    pwrite = os.pwrite

    class Killed(BaseException):
        pass

    def dies(fd: int, data: bytes, offset: int) -> int:
        if offset:
            pwrite(fd, data[: len(data) // 2], offset)
        raise Killed

    for _ in range(3):
        monkeypatch.setattr(os, "pwrite", dies)
        with pytest.raises(Killed):
            record.change(restarts=2)
        monkeypatch.setattr(os, "pwrite", pwrite)
        record = _again(record)
        assert record.contents.restarts == 1


@pytest.mark.parametrize("data", [b"", b"lazymem\0" + bytes(24), b"something else" * 9])
def test_what_is_none_is_refused(data: bytes) -> None:
    descriptor = os.memfd_create("none")
    os.write(descriptor, data)
    with pytest.raises(EnvironmentRefusedError):
        SessionRecord.read(descriptor)
    os.close(descriptor)
