"""A daemon's copies, with the test as their supervisor; of real mounts: `tests/system/test_mount_survival.py`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.cli.nextdaemon import NAME
from lazymem.fs import descriptorstore
from lazymem.fs.descriptorstore import LOCK, Message
from tests.support.mounts import wait_until
from tests.support.processtree import is_gone, maybe_process

DAEMON = """
import os, socket, sys
from lazymem.cli.nextdaemon import begin_and_leave_copy, wait_copied, wait_start
from lazymem.cli.survival import SUPERVISOR, KeptBy
from lazymem.fs import descriptorstore

number, first = int(sys.argv[1]), sys.argv[2] == "first"
held = os.pipe()  # as the first daemon has a pipe to the command that it came of
if first:
    survival = begin_and_leave_copy(KeptBy(SUPERVISOR, socket.socket(fileno=number), os.getppid()))
else:
    survival = wait_start(number)
wait_copied(survival)
keeper = survival.maybe_keeper
names = ",".join(sorted(survival._inherited))
said = {"BEGUN": names, "BY": keeper.pid, "SERVICE": "NOTIFY_SOCKET" in os.environ, "PID": os.getpid()}
descriptorstore.send(keeper.to, said)
keeper.to.recv(1)
"""
"""Begins as a mount's does, and then says what it has got, to whom."""


class Started:
    """A daemon, and what this supervisor hears of it."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control

    def hear(self, what: str) -> Message:
        message = descriptorstore.receive(self.control)
        assert message is not None
        assert what in message.fields, message
        return message

    def hear_of_copy(self) -> Started:
        message = self.hear("NEXT")
        assert message.maybe_descriptor is not None
        return Started(int(message.fields["NEXT"]), socket.socket(fileno=message.maybe_descriptor))

    def begin(self, **fields: object) -> None:
        """With a descriptor, and its word."""
        read_end, write_end = os.pipe()
        descriptorstore.put(self.control, LOCK, read_end)
        os.close(read_end)
        os.close(write_end)
        descriptorstore.send(self.control, {"START": 1, **fields})

    def descriptors(self) -> set[str]:
        """What it has open, but for what cannot be anything of somebody's."""
        found = set()
        for path in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                found.add(os.readlink(path))
        return found - {os.devnull}

    def name(self) -> str:
        return Path(f"/proc/{self.pid}/comm").read_text().removesuffix("\n")

    def descriptor_count(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextlib.contextmanager
def started(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """`kind`: "first", as a mount begins, or "loaded", as a supervisor starts one."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DAEMON), str(theirs.fileno()), kind],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    with process, ours:
        try:
            yield Started(process.pid, ours)
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["first", "loaded"])
def test_each_daemon_leaves_a_copy_before_it_begins(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the mount's descriptors, is nobody's child that is looked for, and begins with its own."""
    with started(kind, monkeypatch) as daemon:
        if kind == "loaded":
            daemon.hear("WARM")
            daemon.begin()
        name = daemon.name()
        counts = []
        for generation in range(3):
            copy = daemon.hear_of_copy()
            said = daemon.hear("BEGUN").fields
            expected = "" if kind == "first" and not generation else LOCK
            assert (said["BEGUN"], said["PID"]) == (expected, str(daemon.pid))
            wait_until(lambda copy=copy: copy.name() == NAME, "it is told apart")  # type: ignore[misc]
            # Behind its name, for which it has a file open.
            wait_until(lambda copy=copy: len(copy.descriptors()) == 1, "it has but its socket")  # type: ignore[misc]
            assert daemon.name() == name
            found = maybe_process(copy.pid)
            assert found is not None
            assert found.parent != daemon.pid
            counts.append(copy.descriptor_count())
            daemon.control.close()
            copy.begin(SUPERVISOR=4711 + generation)
            daemon = copy
            daemon.control.settimeout(60)
        assert len(set(counts)) == 1, "descriptors add up"
        last = daemon.hear_of_copy()
        said = daemon.hear("BEGUN").fields
        assert (said["BY"], said["SERVICE"]) == ("4713", "False")
        daemon.control.close()
        last.control.close()
        wait_until(lambda: is_gone(daemon.pid) and is_gone(last.pid), "both end")


def test_a_copy_ends_with_its_supervisor_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with started("first", monkeypatch) as daemon:
        copy = daemon.hear_of_copy()
        wait_until(lambda: _session(copy.pid) == copy.pid, "it has a session of its own")
        copy.control.close()
        wait_until(lambda: is_gone(copy.pid), "it ends")
        assert not [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(pid) == copy.pid]
        assert not is_gone(daemon.pid)


def _session(pid: int) -> int:
    """-1: it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[3])


def test_a_daemon_that_can_leave_no_copy_begins_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there may be no more processes: its supervisor loads the next one."""
    limited = "import os\ndef fork():\n    raise BlockingIOError('no process')\nos.fork = fork\n"
    monkeypatch.setitem(globals(), "DAEMON", limited + DAEMON)
    with started("loaded", monkeypatch) as daemon:
        daemon.hear("WARM")
        daemon.begin()
        assert daemon.hear("BEGUN").fields["BEGUN"] == LOCK
