"""The daemon's end of its supervisor: starts it, and another one if that dies; listens to it; hands over to a next
daemon.

Until there is a mount all of this happens before the event loop; then it is one task, `Supervised.run`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio

from lazymem.cli.restart import Restart
from lazymem.cli.servicemanager import maybe_notify_socket
from lazymem.cli.survival import AGAIN_EXIT_CODE, SUPERVISOR, SYSTEMD, KeptBy, Survival
from lazymem.cli.trial import maybe_objection, own_command
from lazymem.fs import checks, descriptorstore
from lazymem.fs.descriptorstore import SUCCESSOR_VARIABLE

log = logging.getLogger(__name__)

RESPAWN_SECONDS = 1.0
"""Between a supervisor's death and the next one: whoever kills them should not have us do little else."""

REAP_LOOK_SECONDS = 0.005

DRAIN_SECONDS = 0.5
"""For what was taken from the kernel to be answered, before a next daemon goes on. What is not by then (a page whose
server is away) the kernel sends again."""

Drain = Callable[[], Awaitable[None]]


def begin(again: Restart, *, in_front: bool, wanted: bool) -> Survival:
    """Who keeps what for this daemon, and what was kept by the one before it. Blocking.

    `in_front`: whoever started us looks after us; that is systemd, or nobody. `wanted`: the user did not say no.

    Raises:
        EnvironmentRefusedError: what was kept cannot be understood.
    """
    if SUCCESSOR_VARIABLE in os.environ:
        return wait_start(int(os.environ.pop(SUCCESSOR_VARIABLE)))
    maybe_hindered_by = checks.maybe_no_resend()
    listened = descriptorstore.take_listened()
    if maybe_hindered_by is not None or not wanted:
        return Survival(None, listened, maybe_hindered_by)
    if in_front:
        maybe_socket = maybe_notify_socket()
        return Survival(KeptBy(SYSTEMD, maybe_socket) if maybe_socket is not None else None, listened)
    try:
        return Survival(start_supervisor(again))
    except OSError as error:
        return Survival(None, None, f"no supervisor can be started: {error.strerror}")


def start_supervisor(again: Restart) -> KeptBy:
    """Raises OSError: no process can be made."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lazymem.cli.supervisor", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    process.returncode = 0  # nobody waits for it here
    pidfd = os.pidfd_open(os.getpid())
    try:
        hello = {
            "DAEMON": os.getpid(),
            "COMMAND": json.dumps(again.arguments),
            "LOG": again.maybe_log or "",
        }
        descriptorstore.send(ours, hello, pidfd)
    finally:
        os.close(pidfd)
    return KeptBy(SUPERVISOR, ours, process.pid)


def wait_start(descriptor: int) -> Survival:
    """For a daemon that a supervisor started: say that all is loaded, and wait for the word to begin. Blocking.

    Ends the process if the word does not come: the supervisor is gone, and so has no use for us.
    """
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    inherited: dict[str, int] = {}
    with contextlib.suppress(OSError):  # it went away: what is received next says so
        descriptorstore.send(control, {"WARM": 1})
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
            return Survival(KeptBy(SUPERVISOR, control, os.getppid()), inherited)


class Supervised:
    """For a mount that serves. `drain` returns once every request that was taken is answered."""

    def __init__(self, survival: Survival, again: Restart, drain: Drain) -> None:
        self._survival = survival
        self._again = again
        self._drain = drain
        self._asked = trio.Event()
        self._handed_over = trio.Event()

    def upgrade(self, value: bytes) -> bool:
        """Somebody wants a next daemon to go on, of the Python that `value` names; False: there is nobody to start it.

        A supervisor has it load all it needs before we end; systemd starts what the unit says, so that is tried first.
        """
        self._survival.maybe_refusal = None
        maybe_keeper = self._survival.maybe_keeper
        if maybe_keeper is None:
            return False
        if maybe_keeper.name == SUPERVISOR:
            self._survival.say(UPGRADE=os.fsdecode(value))
        else:
            self._asked.set()
        return True

    async def run(self) -> None:
        """Until cancelled, or this process ends for a next one."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_when_handed_over)
            nursery.start_soon(self._upgrade_under_systemd)
            while True:
                maybe_keeper = self._survival.maybe_keeper
                if maybe_keeper is None or maybe_keeper.name != SUPERVISOR:
                    return
                await self._listen(maybe_keeper)
                await self._replace(maybe_keeper)

    async def _listen(self, keeper: KeptBy) -> None:
        """Until it is gone."""
        while True:
            await trio.lowlevel.wait_readable(keeper.to)
            try:
                maybe_message = descriptorstore.receive(keeper.to)
            except OSError:
                return
            if maybe_message is None:
                return
            if "HANDOVER" in maybe_message.fields:
                self._handed_over.set()
            elif "LOADED" in maybe_message.fields:
                self._survival.next_is_loaded = True
            elif "REFUSED" in maybe_message.fields:
                self._survival.maybe_refusal = maybe_message.fields["REFUSED"]
                log.error("no upgrade: %s", self._survival.maybe_refusal)

    async def _replace(self, keeper: KeptBy) -> None:
        log.warning("the supervisor (pid %d) died: starting another one", keeper.pid)
        keeper.to.close()
        await end_child(keeper.pid)
        while True:
            try:
                new = await trio.to_thread.run_sync(start_supervisor, self._again)
                break
            except (OSError, RuntimeError) as error:  # RuntimeError: no thread, says trio
                log.error("no supervisor can be started: %s", error)
            await trio.sleep(RESPAWN_SECONDS)
        self._survival.next_is_loaded = False
        self._survival.kept_by(new)
        self._survival.ready()
        await trio.sleep(RESPAWN_SECONDS)

    async def _upgrade_under_systemd(self) -> None:
        """Who asks while one is tried gets the same answer."""
        while True:
            await self._asked.wait()
            maybe_refusal = await maybe_objection(own_command())
            if maybe_refusal is None:
                self._handed_over.set()
                return
            self._survival.maybe_refusal = maybe_refusal
            log.error("no upgrade: %s", maybe_refusal)
            self._asked = trio.Event()

    async def _end_when_handed_over(self) -> None:
        await self._handed_over.wait()
        log.info("a next daemon goes on")
        with trio.move_on_after(DRAIN_SECONDS):
            await self._drain()
        _leave_the_mount()


async def end_child(pid: int) -> None:
    """A supervisor that closed its socket: it can be waited for only a little after that. Two of them that live would
    both start a next daemon."""
    with contextlib.suppress(ChildProcessError):  # we came after it
        while not os.waitpid(pid, os.WNOHANG)[0]:  # noqa: ASYNC222  # which does not block
            os.kill(pid, signal.SIGKILL)  # ours until it is waited for
            await trio.sleep(REAP_LOOK_SECONDS)


def _leave_the_mount() -> NoReturn:
    """All that a next daemon needs is in its place already, as it is when we are killed; nothing is to be tidied up."""
    logging.shutdown()
    os._exit(AGAIN_EXIT_CODE)
