"""A mount's supervisor as a unit's main process, with a stand-in for systemd; a real one is in
`tests/system/test_units_started.py`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazymem.cli import unit
from lazymem.cli.daemonprocess import Daemon, Starter, is_readable
from lazymem.cli.servicemanager import AGAIN_EXIT_CODE, MISTAKE_EXIT_CODE, maybe_notify_socket
from lazymem.cli.supervisor import Supervisor
from lazymem.cli.unit import UnitSupervisor
from lazymem.errors import MountError, ServerUnreachableError
from lazymem.fs import descriptorstore
from lazymem.fs.descriptorstore import FUSE
from tests.support.mounts import WAIT_SECONDS, wait_until
from tests.support.standinsystemd import StandInSystemd

SERVES = """
import os, socket, sys
control = socket.socket(fileno=int(os.environ["LAZYMEM_SUPERVISOR_FD"]))
assert not {"NOTIFY_SOCKET", "LISTEN_FDS"} & set(os.environ)
supervisors = 0
while True:
    word, _, _, _ = control.recvmsg(1000, socket.CMSG_LEN(4))
    if not word:
        sys.exit(0)
    keeper = word.partition(b"KEEPER=")[2]
    supervisors += bool(keeper)
    if keeper and supervisors >= float(sys.argv[1]):
        control.send(b"READY=1\\nKEEPER=" + keeper)
"""
"""In the place of a daemon. Its argument: to its how manieth supervisor it says that it is ready."""

NEVER = "inf"

Made = Callable[..., "Unit"]


class Unit(UnitSupervisor):
    """One start of the unit."""

    def look_until(self, reached: Callable[[], bool]) -> None:
        """A part of `run`, which a signal could end."""
        while not reached():
            self._wait()
            self._look_after_next()

    @property
    def daemon(self) -> Daemon:
        assert self._maybe_daemon is not None
        return self._maybe_daemon

    def begin(self) -> None:
        """Have the first daemon, or the next one, of this start begin."""
        self._go_on(None)

    def rest_of_run(self) -> int:
        """Of what `begin` has begun."""
        return Supervisor.run(self)

    def leave(self) -> None:
        """As if it were killed."""
        for daemon in filter(None, (self._maybe_daemon, self._maybe_next)):
            daemon.control.close()
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
        self._unit.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInSystemd]:
    made = StandInSystemd(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def start(systemd: StandInSystemd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """A start of the unit whose daemons are `program`, with what systemd keeps, or with a mount (`mounted`)."""
    monkeypatch.setattr(unit, "BEGIN_SECONDS", WAIT_SECONDS)  # a busy machine may need longer to start a daemon
    started: list[Unit] = []

    def make(*program: str, mounted: bool = False) -> Unit:
        monkeypatch.setattr(UnitSupervisor, "_program_for", lambda self, python: program)
        connection = maybe_notify_socket()
        assert connection is not None
        made = Unit(Starter(["ignored"], in_front=True), systemd.take_kept(), connection)
        if mounted:
            read_end, write_end = os.pipe()
            made._keep(FUSE, write_end)
            ends.callback(os.close, read_end)
        started.append(made)
        return made

    with contextlib.ExitStack() as ends:
        yield make
        for each in started:
            if each._maybe_daemon is not None and FUSE in each._held:
                each.daemon.send_signal(signal.SIGKILL)
            each.leave()


def serving(start: Made, *, mounted: bool = True, ready: bool = True) -> Unit:
    made = start(sys.executable, "-c", SERVES, "1" if ready else NEVER, mounted=mounted)
    made.begin()
    if ready:
        made.look_until(lambda: made.daemon.is_ready)
    return made


def exits_with(code: int) -> tuple[str, ...]:
    return ("/bin/sh", "-c", f"exit {code}")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (MountError.exit_code, MISTAKE_EXIT_CODE),
        (2, MISTAKE_EXIT_CODE),
        (ServerUnreachableError.exit_code, ServerUnreachableError.exit_code),
    ],
)
def test_a_first_daemon_that_does_not_start(systemd: StandInSystemd, start: Made, code: int, expected: int) -> None:
    """Nothing is kept then, so that the next start is a first one, too."""
    assert start(*exits_with(code)).run() == expected
    systemd.look()
    assert (systemd.kept, systemd.said) == ({}, [])


ENDS_BIT_BY_BIT = """
import ctypes, os, socket, sys, threading
control = socket.socket(fileno=int(os.environ["LAZYMEM_SUPERVISOR_FD"]))
def end():
    while b"DEAD" not in control.recv(1000):
        pass
    os._exit(int(sys.argv[1]))
threading.Thread(target=end).start()
ctypes.CDLL(None).pthread_exit(None)
"""
"""Its first thread does at once; the other one when it is told that it has been taken for dead."""


def test_what_a_first_daemon_ended_with_is_known_when_its_last_thread_has_ended(
    start: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = Starter.leave

    def leave_and_tell(starter: Starter, daemon: Daemon) -> None:
        descriptorstore.send(daemon.control, {"DEAD": 1})
        leave(starter, daemon)

    monkeypatch.setattr(Starter, "leave", leave_and_tell)
    assert start(sys.executable, "-c", ENDS_BIT_BY_BIT, "2").run() == MISTAKE_EXIT_CODE


@pytest.mark.parametrize(("script", "expected"), [("exit 2", 2), ("exit 0", 70), ("kill -KILL $$", AGAIN_EXIT_CODE)])
def test_a_next_daemon_that_does_not_start_is_left_to_systemd(
    systemd: StandInSystemd, start: Made, script: str, expected: int
) -> None:
    """No such code is the mount's end: what is kept stays so."""
    made = start("/bin/sh", "-c", script, mounted=True)
    made.begin()
    assert made.rest_of_run() == expected
    systemd.look()
    assert FUSE in systemd.kept
    assert not [name for name in systemd.kept if name.startswith(unit.CONTROL)]


def test_a_program_that_is_not_there_is_too(start: Made) -> None:
    with pytest.raises(SystemExit) as end:
        start("/nowhere/lazymem-mount", mounted=True).begin()
    assert end.value.code == AGAIN_EXIT_CODE


def test_a_next_daemon_that_is_never_ready_is_too(start: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made = serving(start)
    monkeypatch.setattr(unit, "BEGIN_SECONDS", 0.01)
    made._program = (sys.executable, "-c", SERVES, NEVER)
    made._discard_next()  # which was loaded as the present one was
    made.daemon.send_signal(signal.SIGKILL)
    assert made.rest_of_run() == AGAIN_EXIT_CODE


def test_while_systemd_starts_the_unit_its_own_patience_counts(start: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its TimeoutStartSec=, or a mount whose daemon needs longer would be started again and again."""
    made = serving(start, ready=False)
    monkeypatch.setattr(unit, "BEGIN_SECONDS", 0.0)
    for _ in range(3):
        made._wait()
    assert not made.daemon.is_dead()


def test_another_supervisor_takes_the_daemon_up(systemd: StandInSystemd, start: Made) -> None:
    """With all that was kept; and that one too, with the daemon after it."""
    first = serving(start)
    pid = first.daemon.pid
    first.leave()
    systemd.look()
    assert set(systemd.kept) == {FUSE, f"predecessor-{pid}", f"control-{pid}"}
    assert systemd.said == ["READY=1"]
    second = start(sys.executable, "-c", SERVES, "1")
    assert (second.daemon.pid, second.daemon.is_dead()) == (pid, False)
    second.daemon.send_signal(signal.SIGKILL)
    second.look_until(second.daemon.is_dead)
    dead = second.daemon
    second._starter.leave(dead)
    assert second._maybe_end(dead) is None, "it had been ready: so it is not systemd that goes on"
    second._go_on(dead)
    second.look_until(lambda: second.daemon.is_ready)
    systemd.look()
    names = {f"predecessor-{second.daemon.pid}", f"control-{second.daemon.pid}"}
    assert set(systemd.kept) >= {FUSE, *names}
    assert f"control-{pid}" not in systemd.kept


def test_whether_it_is_ready_only_the_daemon_knows(systemd: StandInSystemd, start: Made) -> None:
    """Not that there is a mount, with which it may just have begun to go on. Before, systemd is not told, and the
    daemon is not told to end."""
    first = start(sys.executable, "-c", SERVES, "3", mounted=True)
    first.begin()
    first.leave()
    second = start()
    second._take_up()
    second.end()
    second._wait()
    assert (second.daemon.is_ready, second.daemon.is_dead()) == (False, False)
    second.leave()
    assert systemd.look() == []
    third = start()
    third.end()
    third._take_up()
    third.look_until(third.daemon.is_dead)
    third.daemon.reap()
    assert third.daemon.maybe_code == -signal.SIGTERM
    assert systemd.look() == ["READY=1"]


def test_what_it_said_to_the_one_before_does_not_count(systemd: StandInSystemd, start: Made) -> None:
    """Ready to systemd is a mount of which systemd has all: what was said before that, and was lost, comes again."""
    first = start(sys.executable, "-c", SERVES, "1", mounted=True)
    first.begin()
    wait_until(lambda: is_readable(first.daemon.control.fileno()), "it has said it, and nobody reads that")
    first.leave()
    second = start()
    second._wait()
    assert not second.daemon.is_ready
    assert systemd.look() == []
    second._take_up()
    second.look_until(lambda: second.daemon.is_ready)
    assert systemd.look() == ["READY=1"]


def test_one_that_died_while_nobody_looked_was_no_failure_to_start(systemd: StandInSystemd, start: Made) -> None:
    """It may have been ready: another one goes on at once. Does that one not start, it is left to systemd."""
    first = serving(start, ready=False)
    dead = first.daemon
    dead.send_signal(signal.SIGKILL)
    first.leave()
    second = start(*exits_with(2))
    second.look_until(second.daemon.is_dead)
    assert (second.daemon.pid, second.run()) == (dead.pid, 2)
    assert second._patience.failures == 0
    systemd.look()
    assert FUSE in systemd.kept
    assert not [name for name in systemd.kept if name.startswith(unit.CONTROL)]


def test_what_is_said_again_is_never_out_of_systemds_hands(systemd: StandInSystemd, start: Made) -> None:
    made = start(mounted=True)
    made._keep("state", os.open("/", os.O_RDONLY))
    for name in (FUSE, "state"):
        made._keep(name, os.dup(made._held[name]))
    systemd.look()
    assert set(systemd.kept) == {FUSE, "state"}
    assert not systemd.dropped
    made._keep("state", os.open("/dev", os.O_RDONLY))
    systemd.look()
    assert os.path.sameopenfile(systemd.kept["state"], made._held["state"]), "another one is another one"


@pytest.mark.parametrize("newest_first", [False, True])
def test_of_two_that_are_kept_the_living_one_serves(systemd: StandInSystemd, start: Made, newest_first: bool) -> None:
    """As when systemd did not hear of the first one's end."""
    first = serving(start)
    before = first.daemon
    before.send_signal(signal.SIGKILL)
    first.look_until(before.is_dead)
    first._starter.leave(before)
    first._go_on(before)
    after = first.daemon.pid
    first.leave()
    systemd.look()
    assert {f"control-{before.pid}", f"control-{after}"} < set(systemd.kept)
    if newest_first:
        systemd.kept = dict(reversed(systemd.kept.items()))
    second = start(sys.executable, "-c", SERVES, "1")
    assert (second.daemon.pid, second.daemon.is_dead()) == (after, False)
    second._take_up()
    second.look_until(lambda: second.daemon.is_ready)
    systemd.look()
    assert f"control-{before.pid}" not in systemd.kept
    assert f"control-{after}" in systemd.kept


@pytest.mark.parametrize("living", [2, 0])
def test_of_two_of_which_nobody_knows_neither_goes_on(systemd: StandInSystemd, start: Made, living: int) -> None:
    """Two that live cannot be; if they seem to, each may have taken requests that only a next one can ask for again."""
    first = serving(start)
    daemons = [first.daemon]
    first._go_on(None)
    daemons.append(first.daemon)
    first.look_until(lambda: first.daemon.is_ready)
    for daemon in daemons[living:]:
        daemon.send_signal(signal.SIGKILL)
        first.look_until(daemon.is_dead)
    first.leave()
    daemons[0].control.close()
    second = start(sys.executable, "-c", SERVES, "1")
    assert all(daemon.is_dead() for daemon in daemons)
    dead = second.daemon
    second._take_up()
    assert second._maybe_end(dead) is None
    second._go_on(dead)
    dead.control.close()
    second.look_until(lambda: second.daemon.is_ready)
    systemd.look()
    assert [name for name in systemd.kept if name.startswith(unit.CONTROL)] == [f"control-{second.daemon.pid}"]


def test_one_with_other_arguments_is_not_taken_up_but_followed(systemd: StandInSystemd, start: Made) -> None:
    """As of `lazymem template FOLDER`, whose server has gone with the supervisor."""
    first = serving(start)
    before = first.daemon
    first.leave()
    second = start(*exits_with(3))
    second._takes_up = False
    assert second.run() == 3, "the one after it"
    assert before.is_dead()


def test_what_systemd_has_no_room_for_is_said_a_little_later(systemd: StandInSystemd, start: Made) -> None:
    made = start(mounted=True)
    with contextlib.suppress(BlockingIOError):
        while True:
            descriptorstore.send(made._unit, {"STATUS": "much"})
    telling = threading.Thread(target=made._keep, args=("late", os.dup(2)))
    telling.start()
    while telling.is_alive():
        systemd.look()
    systemd.look()
    assert {FUSE, "late"} <= set(systemd.kept)


def test_a_daemon_of_which_only_half_was_kept_has_not_begun(systemd: StandInSystemd, start: Made) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = maybe_notify_socket()
    assert connection is not None
    with ours, theirs, connection:
        descriptorstore.put(connection, "control-1", theirs.fileno())
        made = start()
        assert made._maybe_daemon is None
        systemd.look()
        assert not systemd.kept
        theirs.close()
        assert ours.recv(10) == b"", "it ends, since nobody has its socket"


def test_a_wish_to_end_waits_for_a_next_daemon_to_be_ready(start: Made) -> None:
    """Its handler comes late, and without it it would die."""
    made = serving(start, ready=False)
    made.end()
    assert not made.daemon.is_dead()
    made._note_ready(made.daemon)
    made.look_until(made.daemon.is_dead)
    made.daemon.reap()
    assert made.daemon.maybe_code == -signal.SIGTERM


def test_a_wish_to_end_at_the_first_start_is_no_failure(systemd: StandInSystemd, start: Made) -> None:
    made = serving(start, mounted=False, ready=False)
    made.end()
    assert made.rest_of_run() == 0
    systemd.look()
    assert not systemd.kept


def test_an_upgrade_is_the_supervisors_too(systemd: StandInSystemd, start: Made) -> None:
    """systemd starts the new version's, and the new daemon serves meanwhile."""
    made = serving(start)
    dead = made.daemon
    made._begin_upgrade("/anything")
    made.daemon.send_signal(signal.SIGKILL)
    made.look_until(dead.is_dead)
    made._starter.leave(dead)
    made._go_on(dead)
    with pytest.raises(SystemExit) as end:
        made.look_until(lambda: False)
    assert end.value.code == AGAIN_EXIT_CODE
    assert not made.daemon.is_dead()
    systemd.look()
    assert f"control-{made.daemon.pid}" in systemd.kept


def test_a_mount_that_ended_without_anybody_is_an_end(systemd: StandInSystemd, start: Made) -> None:
    """Not a failure, after which systemd would mount again."""
    first = serving(start)
    first.daemon.send_signal(signal.SIGKILL)
    first.leave()
    systemd.look()
    os.close(systemd.kept.pop(FUSE))
    read_end, over = os.pipe()
    os.close(read_end)  # as an unmount ends the connection
    systemd.kept[FUSE] = over
    second = start()
    second.look_until(second.daemon.is_dead)
    assert second.run() == 0
    systemd.look()
    assert systemd.kept == {}
    assert systemd.said.count("READY=1") == 2
