"""A guest's memory is read by an emulator that has our descriptor, and one that does not answer is not waited for.

(What a real QEMU reads: `tests/system/test_qemu_screen.py`.)
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazymem.errors import MonitorError
from lazymem.vm.guestmemory import GuestMemory
from lazymem.vm.qmpclient import QmpClient
from tests.support.vmprocess import WAIT_SECONDS

PAGE = b"a page" * 100

ANSWER_SECONDS = 3600.0
"""For whatever is no reading: more than a test may take."""


class Emulator:
    """A monitor in this process, which therefore has each memfd of ours. `writes`: by pmemsave; None: it does not
    answer that, nor closefd, until the next command comes."""

    def __init__(self, connection: socket.socket, writes: bytes | None) -> None:
        self._connection = connection
        self._writes = writes
        self.commands: list[str] = []
        self.paths: list[str] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        late: list[bytes] = []
        with self._connection, self._connection.makefile("rb") as lines:
            self._connection.sendall(b'{"QMP": {}}\n')
            for line in lines:
                command: dict[str, Any] = json.loads(line)
                self.commands.append(command["execute"])
                answer = json.dumps({"return": {}, "id": command["id"]}).encode() + b"\n"
                if self._writes is None and command["execute"] in ("pmemsave", "closefd"):
                    late.append(answer)
                    continue
                if command["execute"] == "pmemsave":
                    assert self._writes is not None
                    self.paths.append(command["arguments"]["filename"])
                    Path(self.paths[-1]).write_bytes(self._writes)
                self._connection.sendall(b"".join(late) + answer)
                late.clear()


@contextmanager
def emulating(writes: bytes | None) -> Iterator[tuple[QmpClient, Emulator]]:
    ours, theirs = socket.socketpair()
    emulator = Emulator(theirs, writes)
    with QmpClient(Path("nowhere"), ANSWER_SECONDS, connection=ours) as qmp:
        yield qmp, emulator
    emulator.thread.join(60)


def test_what_the_emulator_writes_is_read() -> None:
    with emulating(PAGE) as (qmp, emulator):
        before = set(os.listdir("/proc/self/fd"))
        memory = GuestMemory(qmp, WAIT_SECONDS)
        assert [memory.read(4096, len(PAGE)) for _ in range(2)] == [PAGE] * 2
        memory.close()
        assert set(os.listdir("/proc/self/fd")) == before
    assert emulator.commands == ["qmp_capabilities", "getfd", "pmemsave", "pmemsave", "closefd"]
    assert all(path.startswith("/proc/self/fd/") for path in emulator.paths)


@pytest.mark.parametrize("writes", [PAGE[:-1], b""])
def test_less_than_that_is_refused(writes: bytes) -> None:
    with emulating(writes) as (qmp, _):
        memory = GuestMemory(qmp, WAIT_SECONDS)
        with pytest.raises(MonitorError, match="has written"):
            memory.read(0, len(PAGE))
        memory.close()


def test_an_answer_that_does_not_come_is_not_waited_for() -> None:
    """It comes later, and is nobody else's; who asks then waits as long as before."""
    with emulating(None) as (qmp, emulator):
        memory = GuestMemory(qmp)
        with pytest.raises(MonitorError, match="pmemsave"):
            memory.read(0, len(PAGE))
        assert qmp.command("query-status") == {}
        assert qmp.patience(ANSWER_SECONDS) == ANSWER_SECONDS
        memory.close()
    assert emulator.commands[-2:] == ["query-status", "closefd"]


def test_an_emulator_that_stands_for_its_migration_is_not_waited_for_at_the_end() -> None:
    """It closes what it was given when it goes on, before anything else."""
    with emulating(None) as (qmp, emulator):
        GuestMemory(qmp).close()
        assert qmp.patience(ANSWER_SECONDS) == ANSWER_SECONDS
        assert qmp.command("query-status") == {}
    assert emulator.commands[-2:] == ["closefd", "query-status"]
