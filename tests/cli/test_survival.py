"""What a next daemon does with what it inherits; real ones are in `tests/system/test_mount_survival.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import trio
import trio.testing

from lazymem.cli.survival import SUPERVISOR, KeptBy, Survival
from lazymem.fs import descriptorstore
from lazymem.fs.descriptorstore import FUSE, RECORD
from lazymem.fs.sessionrecord import SessionRecord


class Ram:
    """Notes writes."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []

    def read_soon(self, *arguments: object) -> bytes | bool:
        return b"at hand"

    async def read(self, offset: int, length: int) -> bytes:
        return b"at hand"

    def is_unseen(self, offset: int, length: int) -> bool:
        return True

    async def write(self, offset: int, data: bytes, storing: Callable[[], None]) -> None:
        self.writes.append((offset, data))


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


async def test_writes_wait_for_all_before_us_and_so_do_those_of_the_next(nursery: trio.Nursery) -> None:
    before = [_sleeper(), _sleeper()]
    pidfds = {f"predecessor-{process.pid}": os.pidfd_open(process.pid) for process in before}
    connection, other = os.pipe()
    inherited = {RECORD: SessionRecord.create().descriptor, FUSE: connection, **pidfds}
    survival = Survival(None, dict(inherited))
    ram = Ram()
    patient = survival.writes_after_predecessor(ram, nursery)  # type: ignore[arg-type]  # a RAM, for what it does
    nursery.start_soon(patient.write, 0, b"ours", lambda: None)
    with trio.fail_after(60):
        await trio.testing.wait_all_tasks_blocked()
        assert await patient.read(0, 7) == b"at hand"
        _end(before[1])
        await trio.testing.wait_all_tasks_blocked()
        assert not ram.writes, "one has not ended"
        # Our supervisor dies, and another one is told of both.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            survival.kept_by(KeptBy(SUPERVISOR, ours, os.getpid()))
            messages = [descriptorstore.receive(theirs) for _ in inherited]
        assert {message.fields["FDNAME"] for message in messages if message is not None} == set(inherited)
        _end(before[0])
        while not ram.writes:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)
    assert ram.writes == [(0, b"ours")]
    for message in messages:
        assert message is not None
        assert message.maybe_descriptor is not None
        os.close(message.maybe_descriptor)
    for descriptor in (other, *inherited.values()):
        os.close(descriptor)
