"""The supervisor of one mount: keeps the FUSE connection and what else must outlive the daemon, and starts the next.

The first one of a mount is a fork of its daemon (`supervisorstart`); one that takes its place is started by the daemon
(`supervised`) and by nobody else:

    python -m lazymem.cli.supervisor DESCRIPTOR

It holds descriptors, and a next daemon that has loaded all it needs, and waits; whatever could fail is a daemon's.
Whether to start again is read from the connection (unmounted, or aborted: over), never from an exit code. Daemons that
do not start are tried again for as long as the mount stands, since what keeps them from it may pass (no room, no
descriptors, no memory): the guest waits meanwhile, and the log says so. `lazymem umount --force` ends that.

It ends with the mount, so SIGTERM is the daemon's to obey and not its own. As a systemd unit's main process it does a
little more: `unit`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

from lazymem.cli import logs
from lazymem.cli.daemonprocess import Daemon, Program, Starter, has_hung_up, is_readable, program_of
from lazymem.cli.patience import Patience
from lazymem.cli.supervisorstart import IGNORED_SIGNALS
from lazymem.errors import LazymemError
from lazymem.fs import descriptorstore, session
from lazymem.fs.descriptorstore import FUSE, PREDECESSOR, RECORD, Message

log = logging.getLogger("lazymem.supervisor")

NO_SPARE_SECONDS = 60.0
"""Until the next try, when one did not load, or was the second that died in so long."""

COPIES_FAIL = 2
"""So many daemons in a row that ended before they were ready, and the next one is no copy of the last: it is loaded
from files, which may be of another version by now than what had been loaded once."""

LOAD_SECONDS = 60.0
"""For a next daemon to load what it needs; the present one serves meanwhile."""


class Supervisor:
    """From the first daemon's start or first message to the end of the mount. `run` does it all. `held`: by name."""

    def __init__(self, starter: Starter, held: dict[str, int], maybe_daemon: Daemon | None) -> None:
        self._starter = starter
        self._held = held
        self._maybe_daemon = maybe_daemon  # None: to be started
        self._maybe_next: Daemon | None = None
        self._upgrading = False  # to that one
        self._program = program_of(sys.executable)
        self._spare_at = math.inf  # the present one is not ready
        self._spare_died_at = -math.inf
        self._patience = Patience()

    def run(self) -> int:
        """Returns when the mount is over: 0."""
        while True:
            self._wait()
            self._look_after_next()
            maybe_daemon = self._maybe_daemon
            if maybe_daemon is not None and not maybe_daemon.is_dead():
                continue
            if maybe_daemon is not None:
                self._hear(maybe_daemon)  # what it said at last
                self._starter.leave(maybe_daemon)
            maybe_code = self._maybe_end(maybe_daemon)
            if maybe_code is not None:
                self._discard_next()
                return maybe_code
            self._go_on(maybe_daemon)

    def _maybe_end(self, maybe_dead: Daemon | None) -> int | None:
        """What to end with; None: a next daemon goes on."""
        if FUSE in self._held and not session.is_over(self._held[FUSE]):
            return None
        self._tidy()
        return 0

    def _tidy(self) -> None:
        """A daemon that was killed at the very end, or just behind mount(2), had no time to; one that had has taken its
        record back."""
        if FUSE not in self._held:
            self._starter.clear_dead_mount()
        if FUSE in self._held and RECORD in self._held:
            from lazymem.cli.survival import Survival  # trio comes with it

            try:
                Survival(None, self._held).clear_away()
            except LazymemError as error:
                log.error("what the mount leaves behind is not cleared away: %s", error)

    # ---- waiting and hearing

    def _wait(self) -> None:
        """For whoever says something, or ends."""
        waiting = select.poll()
        for daemon in filter(None, (self._maybe_daemon, self._maybe_next)):
            daemon.wait_for(waiting)
        if self._maybe_daemon is not None:
            waiting.poll(self._maybe_daemon.look_seconds() * 1000)
        for daemon in filter(None, (self._maybe_daemon, self._maybe_next)):
            self._hear(daemon)
        self._starter.reap()

    def _hear(self, daemon: Daemon) -> None:
        while daemon.control.fileno() >= 0 and is_readable(daemon.control.fileno()):
            try:
                maybe_message = descriptorstore.receive(daemon.control)
            except ConnectionResetError:  # told once, ahead of its last words: it was killed and had not read ours
                continue
            except OSError:
                maybe_message = None
            if maybe_message is None:
                daemon.control.close()
                return
            self._obey(daemon, maybe_message)

    def _obey(self, daemon: Daemon, message: Message) -> None:
        fields = message.fields
        if "FDSTORE" in fields and message.maybe_descriptor is not None:
            self._keep(fields["FDNAME"], message.maybe_descriptor)
        elif "FDSTOREREMOVE" in fields:
            self._let_go(fields["FDNAME"])
        elif "READY" in fields:
            if not daemon.is_ready:  # it says so to each supervisor, and this one may have read that already
                self._note_ready(daemon)
        elif "NEXT" in fields and message.maybe_descriptor is not None:
            self._take_next(daemon, int(fields["NEXT"]), socket.socket(fileno=message.maybe_descriptor))
        elif "LIFE" in fields and message.maybe_descriptor is not None:
            daemon.take_life_sign(message.maybe_descriptor)
        elif "WARM" in fields and daemon is self._maybe_next:
            self._note_warm(daemon)
        elif "UPGRADE" in fields:
            self._begin_upgrade(fields["UPGRADE"])
        elif message.maybe_descriptor is not None:  # of a daemon of a later version, which says more than we know
            os.close(message.maybe_descriptor)

    def _note_ready(self, daemon: Daemon) -> None:
        daemon.is_ready = True
        self._patience.failures = 0
        self._program = daemon.program
        self._spare_at = time.monotonic()  # at once: what killed one may kill more

    def _keep(self, name: str, descriptor: int) -> None:
        self._let_go(name)
        self._held[name] = descriptor

    def _let_go(self, name: str) -> None:
        descriptor = self._held.pop(name, -1)
        if descriptor >= 0:
            os.close(descriptor)

    # ---- the next daemon, loaded beforehand

    def _take_next(self, daemon: Daemon, pid: int, control: socket.socket) -> None:
        """A copy of `daemon` (`nextdaemon`), of no use where there is a next one already: it ends with its socket."""
        with contextlib.ExitStack() as given_up:
            given_up.callback(control.close)
            if self._maybe_next is not None or daemon is not self._maybe_daemon:
                return
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                return
            if has_hung_up(control):  # then it is dead, and `pid` may be anybody's
                os.close(pidfd)
                return
            given_up.pop_all()
        self._maybe_next = Daemon(pid, pidfd, control, daemon.program)
        self._note_warm(self._maybe_next)

    def _note_warm(self, daemon: Daemon) -> None:
        daemon.is_warm = True
        self._say(**({"HANDOVER": 1} if self._upgrading else {"LOADED": 1, "NEXT": daemon.pid}))

    def _look_after_next(self) -> None:
        daemon, now = self._maybe_next, time.monotonic()
        if daemon is not None and (daemon.is_dead() or (not daemon.is_warm and daemon.age_seconds() > LOAD_SECONDS)):
            at_once = self._upgrading or (daemon.is_warm and now > self._spare_died_at + NO_SPARE_SECONDS)
            if self._spare_at < math.inf:
                self._spare_at = now if at_once else now + NO_SPARE_SECONDS
            self._spare_died_at = now
            self._discard_next()
        if self._maybe_next is None and now >= self._spare_at:
            self._spare_at = now + NO_SPARE_SECONDS
            with contextlib.suppress(OSError):
                self._maybe_next = self._starter.start(self._program)

    def _begin_upgrade(self, python: str) -> None:
        """Load one of another version. The present daemon ends once that is loaded."""
        if self._upgrading:
            self._say(REFUSED="another upgrade is under way")
            return
        self._discard_next()
        program = self._program_for(python)
        try:
            self._maybe_next, self._upgrading = self._starter.start(program), True
        except OSError as error:
            self._say(REFUSED=f"{program[0]} cannot be started: {error.strerror}")

    def _program_for(self, python: str) -> Program:
        return program_of(python)

    def _discard_next(self) -> None:
        if self._maybe_next is not None:
            self._starter.discard(self._maybe_next)
            if self._maybe_next.is_warm:
                self._say(LOADED=0)
        if self._upgrading:
            self._say(REFUSED="the new version's daemon does not start")
        self._maybe_next, self._upgrading = None, False

    def _say(self, **fields: object) -> None:
        if self._maybe_daemon is not None:
            with contextlib.suppress(OSError):  # it has died
                descriptorstore.send(self._maybe_daemon.control, fields)

    # ---- the hand-over

    def _go_on(self, maybe_dead: Daemon | None) -> None:
        """`maybe_dead` is, and the mount is not."""
        self._maybe_daemon = None
        if maybe_dead is not None:
            was_ready = maybe_dead.is_ready or maybe_dead.is_adopted
            self._patience.note_death(maybe_dead.pid, was_ready, self._held[FUSE])
            if self._patience.failures >= COPIES_FAIL and not self._upgrading:
                self._discard_next()
        for name in [name for name in self._held if name.startswith(PREDECESSOR)]:
            if is_readable(self._held[name]):
                self._let_go(name)
        daemon, upgraded = self._maybe_next, self._upgrading
        self._maybe_next, self._upgrading, self._spare_at = None, False, math.inf
        try:
            self._hand_over(daemon or self._starter.start(self._program), upgraded=upgraded)
        except OSError as error:
            self._note_failure(f"no next daemon can be started: {error}")

    def _note_failure(self, what: str) -> None:
        self._patience.note_failure(what, self._held[FUSE])

    def _hand_over(self, daemon: Daemon, *, upgraded: bool) -> None:
        """Everything that is held, then the word to begin. A daemon that dies over it is found dead like any other.

        Among it are pidfds of all daemons before it that have not wholly ended: a thread of one that died long ago may
        still stand in a write. `upgraded`: it is of another version than the one before.
        """
        self._maybe_daemon, daemon.since = daemon, time.monotonic()
        with contextlib.suppress(OSError):
            for name, descriptor in self._held.items():
                descriptorstore.put(daemon.control, name, descriptor)
        self._keep(f"{PREDECESSOR}-{daemon.pid}", daemon.pidfd)
        if FUSE in self._held:
            log.warning("a next daemon (pid %d) goes on with the mount", daemon.pid)
        self._begin(daemon)

    def _begin(self, daemon: Daemon) -> None:
        self._say(START=1, SUPERVISOR=os.getpid())


def main() -> int:
    """Run the program; returns its exit code."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    return supervise(control)


def supervise(control: socket.socket) -> int:
    """Of the daemon at the other end of `control`, to the end of its mount; returns the exit code."""
    maybe_hello = descriptorstore.receive(control)
    if maybe_hello is None or maybe_hello.maybe_descriptor is None:
        return 0  # whoever started this went away again
    fields = maybe_hello.fields
    with contextlib.suppress(LazymemError):
        logs.set_up("lazymem-mount", in_front=False, verbose=False, file=Path(fields["LOG"]) if fields["LOG"] else None)
    daemon = Daemon(int(fields["DAEMON"]), maybe_hello.maybe_descriptor, control, program_of(sys.executable))
    held = {f"{PREDECESSOR}-{daemon.pid}": daemon.pidfd}
    return Supervisor(Starter(json.loads(fields["COMMAND"])), held, daemon).run()


if __name__ == "__main__":
    sys.exit(main())
