"""The supervisor by itself, with daemons that do not start; real ones are in `tests/system/test_mount_survival.py`."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import trio

from lazymem.cli import daemonprocess, patience, supervisor
from lazymem.cli.daemonprocess import Daemon, Program, Starter, program_of
from lazymem.cli.supervised import end_child
from lazymem.fs import descriptorstore
from lazymem.fs.descriptorstore import FUSE, RECORD
from lazymem.fs.sessionrecord import SessionRecord


class Looked(supervisor.Supervisor):
    """With what a test looks at."""

    def go_on(self) -> None:
        """As if the present daemon had died."""
        assert self._maybe_daemon is not None
        self._starter.leave(self._maybe_daemon)
        self._go_on(self._maybe_daemon)

    def close(self) -> None:
        """Let go of everything."""
        if self._maybe_daemon is not None:
            self._maybe_daemon.control.close()
        for name in list(self._held):
            self._let_go(name)


def _supervised(command: list[str]) -> tuple[Looked, socket.socket, subprocess.Popen[bytes]]:
    """A supervisor in this process, and the daemon that it looks after."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    daemon = Daemon(process.pid, os.pidfd_open(process.pid), theirs, program_of(sys.executable))
    held = {f"predecessor-{daemon.pid}": daemon.pidfd}
    return Looked(Starter(command), held, daemon), ours, process


def test_daemons_that_do_not_start_are_tried_until_the_mount_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some cannot even be started, and some end; the log is not filled with it, and says what one can do."""
    monkeypatch.setattr(patience, "MAX_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(patience, "LOUD_FAILURES", 4)
    looked_after, control, daemon = _supervised([])
    looked_after._program = ("/bin/false",)
    real_start, tries = Starter.start, 0
    tried_enough = threading.Event()

    def start(self: Starter, program: Program) -> Daemon:
        nonlocal tries
        tries += 1
        if tries == 20:
            tried_enough.set()
        if tries % 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return real_start(self, program)

    monkeypatch.setattr(Starter, "start", start)
    read_end, connection = os.pipe()
    with control:
        descriptorstore.put(control, RECORD, SessionRecord.create().descriptor)
        descriptorstore.put(control, FUSE, connection)
        os.close(connection)
        results: list[int] = []
        running = threading.Thread(target=lambda: results.append(looked_after.run()))
        running.start()
        daemon.kill()
        daemon.wait()
        assert tried_enough.wait(60)
        os.close(read_end)  # as an unmount ends the connection
        running.join(60)
        assert results == [0]
    looked_after.close()
    messages = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(messages) == 4, messages
    assert "umount --force" in messages[-1]


def test_what_kept_daemons_from_starting_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After more failures than one would believe in, the next one gets everything and goes on."""
    monkeypatch.setattr(patience, "MAX_PAUSE_SECONDS", 0.001)
    looked_after, control, daemon = _supervised([])
    good: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
    tries = 0

    def start(self: Starter, program: Program) -> Daemon:
        nonlocal tries
        tries += 1
        if tries < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        good.append((process, theirs))
        return Daemon(process.pid, os.pidfd_open(process.pid), ours, program)

    monkeypatch.setattr(Starter, "start", start)
    read_end, connection = os.pipe()
    with control:
        descriptorstore.put(control, FUSE, connection)
        os.close(connection)
        daemon.kill()
        daemon.wait()
        looked_after._wait()
        looked_after.go_on()
        while not good:
            looked_after._go_on(None)
        (process, theirs) = good[0]
        got = _received(theirs)
        assert {FUSE} == set(got), "whoever has wholly ended is not waited for"
        assert looked_after._maybe_daemon is not None
        assert looked_after._maybe_daemon.pid == process.pid
    for descriptor in got.values():
        os.close(descriptor)
    looked_after.close()
    os.close(read_end)
    theirs.close()
    process.kill()
    process.wait()


def test_a_daemon_without_a_mount_has_no_next_one() -> None:
    looked_after, control, daemon = _supervised(["--nonsense"])
    with control:
        daemon.kill()
        daemon.wait()
        assert looked_after.run() == 0
    looked_after.close()


def _received(source: socket.socket) -> dict[str, int]:
    """What a daemon gets before the word to begin."""
    found: dict[str, int] = {}
    while (message := descriptorstore.receive(source)) is not None and "START" not in message.fields:
        assert message.maybe_descriptor is not None
        found[message.fields["FDNAME"]] = message.maybe_descriptor
    return found


def test_a_daemon_is_told_of_all_before_it_that_have_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the first may stand in a write for longer than the second lives."""
    looked_after, control, first = _supervised([])
    started: list[tuple[subprocess.Popen[bytes], socket.socket]] = []

    def start(self: Starter, program: Program) -> Daemon:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        started.append((process, theirs))
        daemon = Daemon(process.pid, os.pidfd_open(process.pid), ours, program)
        daemon.is_ready = True
        return daemon

    monkeypatch.setattr(Starter, "start", start)
    assert looked_after._maybe_daemon is not None
    looked_after._maybe_daemon.is_ready = True
    read_end, looked_after._held[FUSE] = os.pipe()
    with control:
        looked_after.go_on()  # nobody has ended, for all that a pidfd tells
        looked_after.go_on()
        (second, to_second), (_, to_third) = started
        names = {f"predecessor-{first.pid}", f"predecessor-{second.pid}"}
        gots = [_received(to_second), _received(to_third)]
        assert [set(got) for got in gots] == [{FUSE, f"predecessor-{first.pid}"}, {FUSE, *names}]
        first.kill()
        first.wait()
        looked_after.go_on()
        gots.append(_received(started[2][1]))
        assert set(gots[2]) == {FUSE, f"predecessor-{second.pid}", f"predecessor-{started[1][0].pid}"}
    for descriptor in [read_end, *(descriptor for got in gots for descriptor in got.values())]:
        os.close(descriptor)
    looked_after.close()
    for process, theirs in started:
        theirs.close()
        process.kill()
        process.wait()


def test_a_supervisor_that_closed_its_socket_is_ended_and_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    trio.run(end_child, child.pid)
    assert not os.path.exists(f"/proc/{child.pid}")
    child.returncode = 0  # it was waited for
    trio.run(end_child, os.getppid())  # none of ours


def test_a_daemon_of_which_nothing_can_be_read_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without free descriptors must not get two daemons for one mount."""

    def no_descriptor(*_: object) -> None:
        raise OSError(errno.ENFILE, "no descriptor")

    looked_after, control, daemon = _supervised([])
    monkeypatch.setattr(daemonprocess, "open", no_descriptor, raising=False)
    assert looked_after._maybe_daemon is not None
    assert not looked_after._maybe_daemon.is_dead()
    daemon.kill()
    daemon.wait()
    assert looked_after._maybe_daemon.is_dead(), "its pidfd tells"
    control.close()
    looked_after.close()


def test_a_next_daemon_is_loaded_at_once_after_a_restart() -> None:
    """At the mount's start the guest needs the processor more."""
    looked_after, control, process = _supervised([])
    with control:
        first = looked_after._maybe_daemon
        assert first is not None
        began = time.monotonic()
        looked_after._obey(first, descriptorstore.Message({"READY": "1"}))
        assert looked_after._spare_at >= began + supervisor.SPARE_SECONDS
        first.is_ready = False  # as the next one is not
        looked_after._obey(first, descriptorstore.Message({"READY": "1"}))
        assert looked_after._spare_at <= time.monotonic()
    process.kill()
    process.wait()
    looked_after.close()
