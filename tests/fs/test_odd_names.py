"""Names that no tidy person gives, but that anybody on the host may give, and that must not end a daemon.

One mount whose name holds a carriage return once kept every lazymem on the host from starting; one process whose name
is no UTF-8 (the kernel cuts names at 15 bytes, also within a character) ended a daemon that SIGTERM had asked to end,
and with it the guest.
"""

import os
from pathlib import Path

import pytest

from lazymem.fs import mountinfo
from lazymem.fs.holders import find_holders

DEVICE = "0:77"


def make_process(proc: Path, pid: int, comm: bytes) -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "maps").write_text(f"7f0000000000-7f0000001000 rw-s 00000000 00:{77:02x} 2  /mnt/pc.ram\n")
    (folder / "comm").write_bytes(comm)


def test_a_holder_with_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    make_process(tmp_path, 4242, b"gu\xe9st\xff\n")
    (holder,) = find_holders(DEVICE, "/mnt", proc=tmp_path)
    assert holder.pid == 4242
    str(holder).encode()  # and it can be logged


def test_a_carriage_return_in_a_mount_is_no_end_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = b"36 35 0:41 / /mnt/a\rb\xff rw shared:1 - fuse.lazymem host:7411 rw\n"
    monkeypatch.setattr(Path, "read_bytes", lambda self: line)
    (mount,) = mountinfo.current()
    assert os.fsencode(mount.path) == b"/mnt/a\rb\xff"
