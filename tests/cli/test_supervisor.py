"""The supervisor by itself, with daemons that do not start; real ones are in `tests/system/test_mount_survival.py`."""

from __future__ import annotations

import errno
import os
import signal
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


def _supervised(
    command: list[str], daemons: str = "import time; time.sleep(60)"
) -> tuple[Looked, socket.socket, subprocess.Popen[bytes]]:
    """A supervisor in this process, and the daemon that it looks after."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen([sys.executable, "-c", daemons])
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


HALF_DEAD = """
import ctypes, os, threading
threading.Thread(target=threading.Event().wait).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""
"""Its first thread ends; the process does not, as one that is killed while another of its threads cannot end."""


def test_a_daemon_that_is_dead_and_cannot_end_is_followed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sign of life tells; what else there is to wait for does not."""
    monkeypatch.setattr(daemonprocess, "LOOK_SECONDS", 3600.0)
    looked_after, control, process = _supervised([], HALF_DEAD)
    read_end, write_end = os.pipe()
    daemon = looked_after._maybe_daemon
    assert daemon is not None
    with control:
        descriptorstore.send(control, {"LIFE": 1}, read_end)
        os.close(read_end)
        os.close(write_end)  # nobody holds it any more
        while not daemon.is_dead():
            looked_after._wait()
        assert not daemonprocess.is_readable(daemon.pidfd)
    process.kill()
    process.wait()
    daemon.close()
    looked_after.close()


def _copy_of(control: socket.socket, pid: int) -> socket.socket:
    """What a daemon at `control` says of a copy of itself; the copy's socket."""
    ours, supervisors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with supervisors:
        descriptorstore.send(control, {"NEXT": pid}, supervisors.fileno())
    return ours


def test_a_daemons_copy_is_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there before the daemon is ready, and nobody is started in its place; a second one is of no use."""
    looked_after, control, process = _supervised([])
    monkeypatch.setattr(Starter, "start", lambda *_: pytest.fail("a daemon is started"))
    read_end, looked_after._held[FUSE] = os.pipe()
    copy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with control, _copy_of(control, copy.pid) as to_copy, _copy_of(control, process.pid) as to_other:
        descriptorstore.send(control, {"READY": 1})
        looked_after._wait()
        looked_after._look_after_next()
        assert to_other.recv(1) == b"", "it ends with its socket"
        told = descriptorstore.receive(control)
        assert told is not None
        assert told.fields == {"LOADED": "1", "NEXT": str(copy.pid)}
        looked_after.go_on()
        got = _received(to_copy)
        assert FUSE in got
        assert looked_after._maybe_daemon is not None
        assert looked_after._maybe_daemon.pid == copy.pid
    for descriptor in [read_end, *got.values()]:
        os.close(descriptor)
    looked_after.close()
    for one in (process, copy):
        one.kill()
        one.wait()


def test_what_a_daemon_said_at_last_is_heard_though_it_had_not_read_our_word() -> None:
    """The kernel tells of that first. Its mount's connection may be in what follows, which nobody else has by then."""
    looked_after, control, process = _supervised([])
    read_end, write_end = os.pipe()
    with control:
        looked_after._say(LOADED=1, NEXT=process.pid)
        descriptorstore.put(control, FUSE, read_end)
    os.close(read_end)
    daemon = looked_after._maybe_daemon
    assert daemon is not None
    looked_after._hear(daemon)
    assert os.write(write_end, b"it is held") == len(b"it is held")
    assert os.read(looked_after._held[FUSE], 16) == b"it is held"
    assert daemon.control.fileno() < 0, "and that it is gone"
    os.close(write_end)
    looked_after.close()
    process.kill()
    process.wait()


def test_a_next_daemon_that_is_killed_is_loaded_again_but_not_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once the first time, or a daemon killed after it would be followed only when one has loaded."""
    looked_after, control, process = _supervised([])
    loaded: list[Program] = []

    def start(self: Starter, program: Program) -> Daemon:
        loaded.append(program)
        raise OSError(errno.EMFILE, "it is tried")

    monkeypatch.setattr(Starter, "start", start)
    looked_after._note_ready(looked_after._maybe_daemon)  # type: ignore[arg-type]
    with control:
        for _ in range(2):
            copy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            with _copy_of(control, copy.pid):
                while looked_after._maybe_next is None:
                    looked_after._wait()
                copy.kill()
                copy.wait()
                looked_after._look_after_next()
            assert len(loaded) == 1
    process.kill()
    process.wait()
    looked_after.close()


def test_a_copy_that_has_ended_is_none() -> None:
    """Its process id may be anybody's by then."""
    looked_after, control, process = _supervised([])
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with control:
        _copy_of(control, stranger.pid).close()
        looked_after._wait()
        assert looked_after._maybe_next is None
    looked_after.close()
    for one in (process, stranger):
        one.kill()
        one.wait()


def test_what_a_later_versions_daemon_says_beyond_that_leaves_nothing_open() -> None:
    """A supervisor lives as long as the mount, through all upgrades of the daemon."""
    looked_after, control, process = _supervised([])
    read_end, write_end = os.pipe()
    with control:
        descriptorstore.send(control, {"NEWS": 1}, write_end)
        os.close(write_end)
        looked_after._wait()
        assert daemonprocess.has_hung_up(read_end)
    os.close(read_end)
    looked_after.close()
    process.kill()
    process.wait()


def test_copies_that_do_not_start_are_followed_by_one_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have in memory is what fails: of a version, say, whose other files are gone."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)
    looked_after, control, process = _supervised([])
    assert looked_after._maybe_daemon is not None
    looked_after._maybe_daemon.is_ready = True
    programs: list[Program] = []

    def start(self: Starter, program: Program) -> Daemon:
        programs.append(program)
        raise OSError(errno.ENOSPC, "it is tried")

    monkeypatch.setattr(Starter, "start", start)
    read_end, looked_after._held[FUSE] = os.pipe()
    copies, ends = [], []
    with control:
        speaker = control
        for _ in range(3):
            copies.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            ends.append(_copy_of(speaker, copies[-1].pid))
            looked_after._wait()
            assert looked_after._maybe_next is not None
            assert not programs
            looked_after.go_on()
            speaker = ends[-1]
    assert len(programs) == 1
    assert copies[2].wait() == -signal.SIGKILL, "it was never told to begin"
    for one in (process, *copies):
        one.kill()
        one.wait()
    for end in ends:
        end.close()
    os.close(read_end)
    looked_after.close()


def test_a_daemon_without_a_copy_has_a_next_one_loaded_once_it_is_ready() -> None:
    looked_after, control, process = _supervised([])
    with control:
        first = looked_after._maybe_daemon
        assert first is not None
        looked_after._look_after_next()
        assert looked_after._maybe_next is None
        looked_after._obey(first, descriptorstore.Message({"READY": "1"}))
        assert looked_after._spare_at <= time.monotonic()
    process.kill()
    process.wait()
    looked_after.close()
