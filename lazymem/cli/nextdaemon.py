"""The next daemon: one that has loaded all that it needs, and waits for its supervisor's word to begin.

Loading takes a second on a busy host, and a daemon may be killed in the first second of its life as in any other. So
each daemon leaves a copy of itself, by fork, before it has begun: a process that has loaded what this one has, shares
its memory, has none of its descriptors, and has done nothing yet. Only the first daemon of a version is loaded from
files, and one whose copy came to nothing (then the supervisor starts the next one while the present one serves).

A copy is nobody's child: the daemon, which may outlive it, has others to wait for.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path

from lazymem.cli import logs
from lazymem.cli.background import let_go_of_inherited
from lazymem.cli.servicemanager import without_systemds
from lazymem.cli.survival import SUPERVISOR, KeptBy, Survival
from lazymem.fs import descriptorstore

NAME = "lazymem-next"
"""Of a copy that waits, for ps(1) and killall(1): whoever kills the daemon by its name is not to kill this with it."""

_COMM = Path("/proc/self/comm")


def wait_start(descriptor: int) -> Survival:
    """For a daemon that a supervisor started: say that all is loaded, and wait for the word to begin; returns in the
    daemon's copies too, when it is their turn. Blocking.

    Ends the process if the word does not come: the supervisor is gone, and so has no use for us.
    """
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    with contextlib.suppress(OSError):  # it went away: what is received next says so
        descriptorstore.send(control, {"WARM": 1})
    return _wait_start(control, _own_name())


def begin_and_leave_copy(keeper: KeptBy, keep: Sequence[int] = ()) -> Survival:
    """For the first daemon, which has just got `keeper`; returns in its copies too, when it is their turn. `keep`:
    descriptors that a copy has as well."""
    name = _own_name()
    control, copier = _leave_copy(keeper.to, keep)
    return Survival(keeper, copier_pid=copier) if copier else _wait_start(control, name, keep)


def wait_copied(survival: Survival) -> None:
    """Blocking: until the supervisor has been told of the copy, if there is one. Before it hears that we are ready, or
    it would load a next daemon."""
    if survival.copier_pid > 0:
        with contextlib.suppress(ChildProcessError):  # of a process that was started so, the kernel waits for them
            os.waitpid(survival.copier_pid, 0)


def _wait_start(control: socket.socket, name: str, keep: Sequence[int] = ()) -> Survival:
    """`name`: to have again, when it is our turn."""
    copier = 0
    while not copier and _wait_word(control):
        control, copier = _leave_copy(control, keep)
    _be_called(name)
    return _take_over(control, copier)


def _own_name() -> str:
    """Empty: this host does not say."""
    with contextlib.suppress(OSError):
        return _COMM.read_text().removesuffix("\n")
    return ""


def _be_called(name: str) -> None:
    with contextlib.suppress(OSError):
        if name:
            _COMM.write_text(name)


def _wait_word(control: socket.socket) -> bool:
    """Until the supervisor says something, or is gone (False). It says nothing before we are to begin; and what it says
    is not to be read yet: a copy must not hold the mount's connection and its locks."""
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    return not waiting.poll()[0][1] & select.POLLHUP


def _leave_copy(control: socket.socket, keep: Sequence[int]) -> tuple[socket.socket, int]:
    """In the caller `control` and the process id of its child that makes the copy, of which it tells the supervisor at
    the other end, and ends (-1: there is none). In the copy its own socket to the supervisor, and 0."""
    try:
        copier = os.fork()
    except OSError:  # no memory, or too many processes: the supervisor loads a next daemon
        return control, -1
    if copier:
        return control, copier
    maybe_ours = None
    try:
        maybe_ours = _copy(control, keep)
    finally:  # an error is a copy that there is not, too; and this is no daemon
        if maybe_ours is None:
            os._exit(0)
    return maybe_ours, 0


def _copy(control: socket.socket, keep: Sequence[int]) -> socket.socket | None:
    """None: the supervisor has been told of the copy, which is a child of this process. As `_leave_copy` else."""
    ours, supervisors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    copy = os.fork()
    if copy:
        descriptorstore.send(control, {"NEXT": copy}, supervisors.fileno())
        return None
    for one in (control, supervisors):  # or there would be more of them from copy to copy
        one.close()
    let_go_of_inherited(ours.fileno(), *logs.descriptors(), *keep)
    os.setsid()
    _be_called(NAME)
    for name in set(os.environ) - set(without_systemds(os.environ)):
        del os.environ[name]
    return ours


def _take_over(control: socket.socket, copier_pid: int) -> Survival:
    inherited: dict[str, int] = {}
    while True:
        try:
            maybe_message = descriptorstore.receive(control)
        except ConnectionResetError:  # it went away without having read our word
            maybe_message = None
        if maybe_message is None:
            os._exit(0)
        fields = maybe_message.fields
        if maybe_message.maybe_descriptor is not None:
            inherited[fields["FDNAME"]] = maybe_message.maybe_descriptor
        if "START" in fields:
            supervisor = int(fields.get("SUPERVISOR", os.getppid()))
            keeper = KeptBy(fields.get("KEEPER", SUPERVISOR), control, supervisor)
            return Survival(keeper, inherited, copier_pid=copier_pid)
        if "KEEPER" in fields:  # another supervisor, which thinks that we serve
            os._exit(0)
