"""The supervisor of one mount: keeps the FUSE connection and what else must outlive the daemon, and starts the next.

    python -m lazymem.cli.supervisor DESCRIPTOR     started by the daemon itself (`supervised`), for nobody else

It holds descriptors, and a next daemon that has loaded all it needs, and waits; whatever could fail is a daemon's.
Whether to start again is read from the connection (unmounted, or aborted: over), never from an exit code. Daemons that
do not start are tried again for as long as the mount stands, since what keeps them from it may pass (no room, no
descriptors, no memory): the guest waits meanwhile, and the log says so. `lazymem umount --force` ends that.

It ends with the mount, so SIGTERM is the daemon's to obey and not its own.
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
from lazymem.cli.daemonprocess import Daemon, Starter, is_readable
from lazymem.cli.nextdaemon import NextDaemon
from lazymem.cli.patience import CROWDED_PAUSE_SECONDS, Patience
from lazymem.errors import LazymemError
from lazymem.fs import descriptorstore, session
from lazymem.fs.descriptorstore import FUSE, PREDECESSOR, RECORD, STATE, Message
from lazymem.fs.sessionrecord import SessionRecord

log = logging.getLogger("lazymem.supervisor")

SPARE_SECONDS = 5.0
"""After the mount is ready, which is when the guest resumes and needs the processor, a next daemon is loaded: to load
one when it is needed would be most of the guest's wait. At once after a restart: what killed one may kill more."""

NO_SPARE_SECONDS = 60.0
"""Until the next try, when one died."""

LOOK_SECONDS = 1.0
"""A killed daemon one of whose threads waits for the daemon itself does not end, and no descriptor tells of it."""


class Supervisor:
    """From the daemon's first message to the end of the mount. `run` does it all."""

    def __init__(self, control: socket.socket) -> None:
        self._held: dict[str, int] = {}
        self._python = sys.executable
        self._next_python = sys.executable
        self._failures = 0
        self._patience = Patience()
        self._spare_at = math.inf
        maybe_hello = descriptorstore.receive(control)
        if maybe_hello is None or maybe_hello.maybe_descriptor is None:
            raise SystemExit("whoever started this went away again")
        fields = maybe_hello.fields
        self._starter = Starter(json.loads(fields["COMMAND"]))
        self._next = NextDaemon(self._starter, self._refuse)
        self.maybe_log = Path(fields["LOG"]) if fields["LOG"] else None
        self._daemon = Daemon(int(fields["DAEMON"]), maybe_hello.maybe_descriptor, control, None)

    def run(self) -> int:
        """Returns when the mount is over: 0."""
        while True:
            self._wait()
            self._starter.reap()
            if self._next.maybe_daemon is None and time.monotonic() > self._spare_at:
                self._spare_at = time.monotonic() + NO_SPARE_SECONDS
                self._next.load(self._python)
            if self._daemon.is_dead():
                self._hear(self._daemon)  # what it said at last
                if FUSE not in self._held or session.is_over(self._held[FUSE]):
                    self._tidy()
                    return 0
                self._go_on()

    def close(self) -> None:
        """Let go of everything, after `run`."""
        self._daemon.control.close()
        if self._daemon.pidfd not in self._held.values():
            os.close(self._daemon.pidfd)
        for name in list(self._held):
            self._let_go(name)

    # ---- waiting and hearing

    def _wait(self) -> None:
        waiting = select.poll()
        waiting.register(self._daemon.pidfd, select.POLLIN)
        for daemon in filter(None, (self._daemon, self._next.maybe_daemon)):
            if daemon.control.fileno() >= 0:
                waiting.register(daemon.control, select.POLLIN)
        waiting.poll(LOOK_SECONDS * 1000)
        self._hear(self._daemon)
        if self._next.maybe_daemon is not None:
            self._hear_next(self._next.maybe_daemon)

    def _hear(self, daemon: Daemon) -> None:
        while daemon.control.fileno() >= 0 and is_readable(daemon.control.fileno()):
            try:
                maybe_message = descriptorstore.receive(daemon.control)
            except OSError:
                maybe_message = None
            if maybe_message is None:
                daemon.control.close()
                return
            self._obey(daemon, maybe_message)

    def _obey(self, daemon: Daemon, message: Message) -> None:
        fields = message.fields
        if "FDSTORE" in fields and message.maybe_descriptor is not None:
            self._let_go(fields["FDNAME"])
            self._held[fields["FDNAME"]] = message.maybe_descriptor
        elif "FDSTOREREMOVE" in fields:
            self._let_go(fields["FDNAME"])
        elif "READY" in fields:
            daemon.is_ready = True
            self._failures = 0
            self._python = self._next_python
            self._spare_at = time.monotonic() + (SPARE_SECONDS if daemon.process is None else 0.0)
        elif "WARM" in fields:
            daemon.is_warm = True
        elif "UPGRADE" in fields:
            self._begin_upgrade(fields["UPGRADE"])

    def _let_go(self, name: str) -> None:
        descriptor = self._held.pop(name, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def _let_go_of_ended(self) -> None:
        """A thread of one that died long ago may still stand in a write: a next daemon waits for all that have not
        ended, however many came in between."""
        for name in [name for name in self._held if name.startswith(PREDECESSOR)]:
            if is_readable(self._held[name]):
                self._let_go(name)

    # ---- the next daemon

    def _go_on(self) -> None:
        """The daemon is dead and the mount is not."""
        dead = self._daemon
        self._pause(dead)
        self._let_go_of_ended()
        # Itself: a copy would need a descriptor, of which there may be none.
        self._held[f"{PREDECESSOR}-{dead.pid}"] = dead.pidfd
        self._starter.leave(dead)
        maybe_next = self._next.take()
        while maybe_next is None or maybe_next.is_dead():
            if maybe_next is not None:
                self._starter.discard(maybe_next)
                maybe_next = None
            if session.is_over(self._held[FUSE]):
                break  # while nothing went on
            try:
                maybe_next = self._starter.start(self._python)
            except OSError as error:
                self._note_failure(f"no next daemon can be started: {error}")
        if maybe_next is None:
            return
        dead.control.close()
        self._daemon = maybe_next
        self._spare_at = math.inf
        self._hand_over(maybe_next)

    def _pause(self, dead: Daemon) -> None:
        crowded = self._patience.note_death()
        if not dead.is_ready:
            self._next_python = self._python  # not what an upgrade wanted
            self._note_failure(f"the daemon (pid {dead.pid}) ended before it was ready")
        elif crowded:
            time.sleep(CROWDED_PAUSE_SECONDS)

    def _note_failure(self, what: str) -> None:
        self._failures += 1
        self._patience.note_failure(what, self._failures, self._held[FUSE])

    def _hand_over(self, to: Daemon) -> None:
        """Everything that is held, then the word to begin. A daemon that dies over it is found dead like any other."""
        with contextlib.suppress(OSError):
            for name, descriptor in self._held.items():
                descriptorstore.put(to.control, name, descriptor)
            descriptorstore.send(to.control, {"START": 1})
        log.warning("a next daemon (pid %d) goes on with the mount", to.pid)

    def _begin_upgrade(self, python: str) -> None:
        if self._next.begin_upgrade(python):
            self._next_python = python

    def _hear_next(self, daemon: Daemon) -> None:
        was_warm = daemon.is_warm
        self._hear(daemon)
        if daemon.is_warm and not was_warm:
            self._say(**{self._next.word_when_loaded: 1})
        elif self._next.give_up_lost():
            self._next_python, self._spare_at = self._python, time.monotonic() + NO_SPARE_SECONDS

    def _refuse(self, reason: str) -> None:
        self._say(REFUSED=reason)

    def _say(self, **fields: object) -> None:
        with contextlib.suppress(OSError):
            descriptorstore.send(self._daemon.control, fields)

    # ---- the end

    def _tidy(self) -> None:
        """A daemon that was killed at the very end had no time to."""
        if RECORD not in self._held:
            return
        try:
            contents = SessionRecord.read(self._held[RECORD]).contents
            if not contents.state_path or not os.path.exists(contents.state_path):
                return
            from lazymem.store.statefolder import end_run, remove_private  # trio comes with it

            if contents.state_is_private:
                remove_private(Path(contents.state_path))
            elif STATE in self._held:
                end_run(Path(contents.state_path), self._held[STATE])
        except LazymemError as error:
            log.error("what was written is not synced: %s", error)


def main() -> int:
    """Run the program; returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    supervisor = Supervisor(control)
    with contextlib.suppress(LazymemError):
        logs.set_up("lazymem-mount", in_front=False, verbose=False, file=supervisor.maybe_log)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
