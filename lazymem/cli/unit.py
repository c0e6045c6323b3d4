"""A mount's supervisor as the main process of a systemd unit: it starts the first daemon too, and may itself be killed.

What it holds, a pidfd of each daemon that has not ended, and its end of the socket to the present one are in systemd's
descriptor store as well. So whoever kills the daemon has a next one, which is loaded, go on at once, without systemd;
and whoever kills the supervisor has systemd start another one, which takes all of that up while the daemon serves, and
to which the daemon says again what it said before: the one that was killed may have heard it and told nobody.

Left to systemd is what it has patience for, and a way to be told to give up (`systemctl stop`): daemons that do not
start. Then this ends, but not with 0, and is started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable

from lazymem.cli import logs
from lazymem.cli.background import BUG_EXIT_CODE
from lazymem.cli.daemonprocess import Daemon, Program, Starter, program_of
from lazymem.cli.restart import Restart
from lazymem.cli.servicemanager import AGAIN_EXIT_CODE, SYSTEMD, exit_code_of_first_start, maybe_notify_socket
from lazymem.cli.supervisor import Supervisor
from lazymem.fs import descriptorstore, session
from lazymem.fs.descriptorstore import FUSE, PREDECESSOR, Message

log = logging.getLogger("lazymem.supervisor")

CONTROL = "control"
"""As "control-PID", what a socket to the daemon with that process id is kept as; its pidfd is "predecessor-PID"."""

LISTEN_SECONDS = 5.0
"""For systemd to have room for another message."""

CODE_SECONDS = 5.0
"""For the last threads of a daemon that did not start to end: milliseconds, unless the kernel holds one. What it ended
with is not known before, and a mistake in the unit would be tried again and again."""

BEGIN_SECONDS = 10.0
"""For a next daemon to be ready. One that systemd starts instead has longer (TimeoutStartSec=), and can be given up."""


class UnitSupervisor(Supervisor):
    """`held`: what systemd kept; `unit`: where it takes messages."""

    def __init__(self, starter: Starter, held: dict[str, int], unit: socket.socket, *, takes_up: bool = True) -> None:
        """`takes_up`: not False, where a daemon with other arguments than `starter`'s has to go."""
        self._unit = unit
        self._takes_up = takes_up
        super().__init__(starter, held, self._maybe_adopted(held))
        self._program = self._program_for("")
        self._continues = FUSE in held  # the present daemon, with a mount that was there
        self._is_told = self._upgraded = self._wish_to_end = False

    def _maybe_adopted(self, held: dict[str, int]) -> Daemon | None:
        """The daemon that a supervisor before us started, also when it is dead: what it said at last is to be heard.

        Several are kept where systemd did not hear of an end. A daemon begins only once no other runs code, so at most
        one lives, and that one serves. If two seem to, nobody knows which of them has what the guest asked for: neither
        goes on, and a next daemon has the kernel ask it for all of that.
        """
        found: list[Daemon] = []
        for name in [name for name in held if name.startswith(CONTROL)]:
            control, pid = socket.socket(fileno=held.pop(name)), int(name.partition("-")[2])
            if f"{PREDECESSOR}-{pid}" in held:
                found.append(Daemon(pid, held[f"{PREDECESSOR}-{pid}"], control, self._program_for("")))
            else:  # between the keeping of the one and of the other it has not begun
                self._forget(pid, control)
        living = [daemon for daemon in found if not daemon.is_dead()]
        if len(living) > 1:
            log.error("two daemons (pids %s): neither goes on", ", ".join(str(daemon.pid) for daemon in living))
            for daemon in living:
                daemon.send_signal(signal.SIGKILL)
            for daemon in living:
                daemon.wait_dead()
        maybe_one = next(iter(living or found), None)
        for daemon in found:
            daemon.is_adopted = True
            if daemon is not maybe_one:
                self._forget(daemon.pid, daemon.control)
        return maybe_one

    def _forget(self, pid: int, control: socket.socket) -> None:
        control.close()
        self._tell(descriptorstore.drop, f"{CONTROL}-{pid}")

    def run(self) -> int:
        """Returns what to end with: 0 when the mount is over, else systemd is to start another one."""
        self._take_up()
        return super().run()

    def _take_up(self) -> None:
        """Ask the daemon that was there for all that it has said to the supervisor before us, READY=1 among it."""
        maybe_daemon = self._maybe_daemon
        if maybe_daemon is not None and not self._takes_up:
            maybe_daemon.send_signal(signal.SIGKILL)
        elif maybe_daemon is not None and not maybe_daemon.is_dead():
            log.warning("another supervisor: the daemon (pid %d) goes on", maybe_daemon.pid)
            self._say(KEEPER=os.getpid())
            if self._continues and session.is_over(self._held[FUSE]):
                self._note_ready(maybe_daemon)  # it stores what was written, and may hear nobody any more

    def end(self) -> None:
        """Somebody stops the unit. A daemon that goes on with the mount would die of a signal before it has said that
        it is ready, and what the guest wrote not be stored."""
        self._wish_to_end = True
        if self._maybe_daemon is not None and (self._maybe_daemon.is_ready or not self._continues):
            self._maybe_daemon.send_signal(signal.SIGTERM)

    def _wait(self) -> None:
        super()._wait()
        daemon = self._maybe_daemon
        if daemon is None or daemon.is_ready or not self._continues or daemon.age_seconds() < BEGIN_SECONDS:
            return
        if not self._is_told:  # we are being started ourselves, and systemd has its own patience
            return
        log.error("the next daemon (pid %d) is not ready after %g s", daemon.pid, BEGIN_SECONDS)
        daemon.send_signal(signal.SIGKILL)

    def _obey(self, daemon: Daemon, message: Message) -> None:
        if daemon.is_adopted and "READY" in message.fields and message.fields.get("KEEPER") != str(os.getpid()):
            return  # said to the supervisor before us, who may not have given on what came before that
        super()._obey(daemon, message)

    def _note_ready(self, daemon: Daemon) -> None:
        super()._note_ready(daemon)
        self._tell_ready()
        if self._wish_to_end:
            self.end()
        elif self._upgraded:
            raise SystemExit(AGAIN_EXIT_CODE)  # systemd starts the new version's supervisor, and the daemon serves on

    # ---- the end of a daemon

    def _maybe_end(self, maybe_dead: Daemon | None) -> int | None:
        is_over = FUSE not in self._held or session.is_over(self._held[FUSE])
        if maybe_dead is not None:
            self._tell(descriptorstore.drop, f"{CONTROL}-{maybe_dead.pid}")
            if maybe_dead.is_adopted and not is_over:
                return None  # whether it had been ready, only a supervisor before us may know
            if not maybe_dead.is_ready and not (is_over and self._continues):
                return self._code_of_start(maybe_dead, first=is_over)
        elif FUSE not in self._held:
            return None  # the very first one is to be started
        if not is_over:
            return None
        self._tidy()
        self._let_go_of_all()
        self._tell_ready()
        return 0

    def _code_of_start(self, dead: Daemon, *, first: bool) -> int:
        """For one that has not become ready. `first`: there is no mount yet, nor any more."""
        dead.wait_code(CODE_SECONDS)
        code = dead.maybe_code if dead.maybe_code is not None else -signal.SIGKILL
        if not first:
            log.error("the daemon (pid %d) ended before it was ready", dead.pid)
            return code if code > 0 else BUG_EXIT_CODE if code == 0 else AGAIN_EXIT_CODE
        self._let_go_of_all()
        if code == 0 or self._wish_to_end:
            self._tell_ready()
            return 0
        return exit_code_of_first_start(code) if code > 0 else AGAIN_EXIT_CODE

    def _tell_ready(self) -> None:
        """Once. An end with 0 before that would be a failure to systemd."""
        if not self._is_told:
            self._tell(descriptorstore.send, {"READY": 1})
        self._is_told = True

    def _note_failure(self, what: str) -> None:
        log.error("%s", what)
        raise SystemExit(AGAIN_EXIT_CODE)

    # ---- the next daemon

    def _program_for(self, python: str) -> Program:
        """Whatever Python asks: the unit's own program."""
        if os.path.isabs(sys.argv[0]) and os.path.basename(sys.argv[0]) == "lazymem-mount":
            return (sys.argv[0],)
        return program_of(sys.executable)

    def _hand_over(self, daemon: Daemon, *, upgraded: bool) -> None:
        self._continues, self._upgraded = FUSE in self._held, upgraded
        super()._hand_over(daemon, upgraded=upgraded)

    def _begin(self, daemon: Daemon) -> None:
        """Whoever comes after us must know of it before it does anything."""
        self._tell(descriptorstore.put, f"{CONTROL}-{daemon.pid}", daemon.control.fileno())
        self._say(START=1, KEEPER=SYSTEMD, SUPERVISOR=os.getpid())

    # ---- what systemd has too

    def _keep(self, name: str, descriptor: int) -> None:
        """A daemon says all to another supervisor again. What systemd has it must not lose, be it for a moment."""
        if name in self._held and os.path.sameopenfile(self._held[name], descriptor):
            os.close(descriptor)
            return
        super()._keep(name, descriptor)
        self._tell(descriptorstore.put, name, descriptor)

    def _let_go(self, name: str) -> None:
        if name in self._held:
            self._tell(descriptorstore.drop, name)
        super()._let_go(name)

    def _let_go_of_all(self) -> None:
        """The next start of the unit is a first one."""
        for name in list(self._held):
            self._let_go(name)

    def _tell(self, what: Callable[..., None], *words: object) -> None:
        try:
            try:
                what(self._unit, *words)
            except BlockingIOError:  # it has much to do
                select.select([], [self._unit], [], LISTEN_SECONDS)
                what(self._unit, *words)
        except OSError as error:
            log.warning("systemd does not listen (%s)", error.strerror)


def supervise(again: Restart, *, verbose: bool, check_host: Callable[[], None], takes_up: bool) -> int:
    """Run as the unit's main process; returns its exit code. `again`: how daemons are started; `takes_up`: those of a
    process before us were started so, too.

    Raises:
        LazymemError: of `check_host`, at a first start.
    """
    held = descriptorstore.take_listened()
    if not held:
        check_host()
    logs.set_up("lazymem-mount", in_front=True, verbose=verbose, file=again.maybe_log)
    unit = maybe_notify_socket()
    assert unit is not None, "see `servicemanager.is_service`"
    supervisor = UnitSupervisor(Starter(again.arguments, in_front=True), held, unit, takes_up=takes_up)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.end())
    with contextlib.closing(unit):
        return supervisor.run()
