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

from lazymem.cli import logs
from lazymem.cli.background import let_go_of_inherited
from lazymem.cli.servicemanager import without_systemds
from lazymem.cli.survival import SUPERVISOR, KeptBy, Survival
from lazymem.fs import descriptorstore


def wait_start(descriptor: int) -> Survival:
    """For a daemon that a supervisor started: say that all is loaded, and wait for the word to begin; returns in the
    daemon's copies too, when it is their turn. Blocking.

    Ends the process if the word does not come: the supervisor is gone, and so has no use for us.
    """
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    with contextlib.suppress(OSError):  # it went away: what is received next says so
        descriptorstore.send(control, {"WARM": 1})
    return _wait_start(control)


def begin_and_leave_copy(keeper: KeptBy) -> Survival:
    """For the first daemon, which has just got `keeper`; returns in its copies too, when it is their turn."""
    maybe_copys = _leave_copy(keeper.to)
    return Survival(keeper) if maybe_copys is None else _wait_start(maybe_copys)


def _wait_start(control: socket.socket) -> Survival:
    while _wait_word(control) and (maybe_copys := _leave_copy(control)) is not None:
        control = maybe_copys
    return _take_over(control)


def _wait_word(control: socket.socket) -> bool:
    """Until the supervisor says something, or is gone (False). It says nothing before we are to begin; and what it says
    is not to be read yet: a copy must not hold the mount's connection and its locks."""
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    return not waiting.poll()[0][1] & select.POLLHUP


def _leave_copy(control: socket.socket) -> socket.socket | None:
    """None: this is the caller, and the supervisor at the other end of `control` has been told of the copy, unless
    there could not be one. Else this is the copy, and that is its own socket to the supervisor."""
    try:
        between = os.fork()
    except OSError:  # no memory, or too many processes: the supervisor starts one when it likes
        return None
    if between:
        with contextlib.suppress(ChildProcessError):  # of a process that was started so, the kernel waits for them
            os.waitpid(between, 0)
        return None
    maybe_ours = None
    try:
        maybe_ours = _copy(control)
    finally:  # an error is a copy that there is not, too; and this is no daemon
        if maybe_ours is None:
            os._exit(0)
    return maybe_ours


def _copy(control: socket.socket) -> socket.socket | None:
    """None: the supervisor has been told of the copy, which is a child of this process. As `_leave_copy` else."""
    ours, supervisors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    copy = os.fork()
    if copy:
        descriptorstore.send(control, {"NEXT": copy}, supervisors.fileno())
        return None
    for one in (control, supervisors):  # or there would be more of them from copy to copy
        one.close()
    let_go_of_inherited(ours.fileno(), *logs.descriptors())
    os.setsid()
    for name in set(os.environ) - set(without_systemds(os.environ)):
        del os.environ[name]
    return ours


def _take_over(control: socket.socket) -> Survival:
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
            return Survival(KeptBy(fields.get("KEEPER", SUPERVISOR), control, supervisor), inherited)
        if "KEEPER" in fields:  # another supervisor, which thinks that we serve
            os._exit(0)
