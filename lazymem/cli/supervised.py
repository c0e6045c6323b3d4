"""The daemon's end of its supervisor: starts it, and another one if that dies; listens to it; hands over to a next
daemon.

Until there is a mount all of this happens before the event loop; then it is one task, `Supervised.run`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import trio

from lazymem.cli.nextdaemon import begin_and_leave_copy, wait_start
from lazymem.cli.restart import Restart
from lazymem.cli.servicemanager import AGAIN_EXIT_CODE
from lazymem.cli.supervisorstart import Forked, say_hello
from lazymem.cli.survival import SUPERVISOR, KeptBy, Survival
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


def begin(
    again: Restart, *, in_front: bool, wanted: bool, maybe_forked: Forked | None = None, keep: Sequence[int] = ()
) -> Survival:
    """Who keeps what for this daemon, and what was kept by the one before it. Blocking; returns once more in each copy
    of this process that goes on after it.

    `in_front`: whoever started us looks after us (a systemd unit has a supervisor of its own: `unit`). `wanted`: the
    user did not say no. `maybe_forked`: a supervisor that is there already. `keep`: descriptors that those copies
    have as well.

    Raises:
        EnvironmentRefusedError: what was kept cannot be understood.
    """
    if SUCCESSOR_VARIABLE in os.environ:
        return wait_start(int(os.environ.pop(SUCCESSOR_VARIABLE)))
    maybe_hindered_by = checks.maybe_no_resend()
    if maybe_hindered_by is not None or not wanted or in_front:
        return Survival(None, descriptorstore.take_listened(), maybe_hindered_by)
    if maybe_forked is not None:
        return begin_and_leave_copy(KeptBy(SUPERVISOR, maybe_forked.to, maybe_forked.pid), keep)
    try:
        supervisor = start_supervisor(again)
    except OSError as error:
        return Survival(None, None, f"no supervisor can be started: {error.strerror}")
    return begin_and_leave_copy(supervisor, keep)


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
    say_hello(ours, again)
    return KeptBy(SUPERVISOR, ours, process.pid)


class Supervised:
    """For a mount that serves. `drain` returns once every request that was taken is answered."""

    def __init__(self, survival: Survival, again: Restart, drain: Drain) -> None:
        self._survival = survival
        self._again = again
        self._drain = drain
        self._handed_over = trio.Event()

    def upgrade(self, value: bytes) -> bool:
        """Somebody wants a next daemon to go on, of the Python that `value` names; False: there is nobody to start it.

        It loads all it needs before we end.
        """
        self._survival.maybe_refusal = None
        self._survival.say(UPGRADE=os.fsdecode(value))
        return self._survival.maybe_keeper is not None

    async def run(self) -> None:
        """Until cancelled, or this process ends for a next one."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_when_handed_over)
            while (maybe_keeper := self._survival.maybe_keeper) is not None:
                await self._listen(maybe_keeper)
                if maybe_keeper.name == SUPERVISOR:
                    await self._replace(maybe_keeper)
                else:
                    self._let_go_of_unit(maybe_keeper)

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
                self._survival.next_is_loaded = maybe_message.fields["LOADED"] == "1"  # 0: it is there no more
                self._survival.maybe_next_pid = int(maybe_message.fields.get("NEXT", 0)) or None
            elif "KEEPER" in maybe_message.fields:  # another process of the unit's
                self._survival.kept_by(KeptBy(keeper.name, keeper.to, int(maybe_message.fields["KEEPER"])))
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
        self._survival.kept_by(new)
        await trio.sleep(RESPAWN_SECONDS)

    def _let_go_of_unit(self, keeper: KeptBy) -> None:
        """systemd keeps our supervisor's end of the socket for as long as the unit is not stopped. (It need not ask us:
        it is stopped between a supervisor's death and the next one's start.)"""
        log.warning("the unit was stopped: the mount ends once nobody uses it")
        keeper.to.close()
        self._survival.maybe_keeper = None
        os.kill(os.getpid(), signal.SIGTERM)

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
