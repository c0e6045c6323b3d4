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
import subprocess
import sys
import time
from pathlib import Path

from lazymem.cli import logs
from lazymem.errors import LazymemError
from lazymem.fs import descriptorstore, session
from lazymem.fs.descriptorstore import FUSE, PREDECESSOR, RECORD, STATE, SUCCESSOR_VARIABLE, Message
from lazymem.fs.sessionrecord import SessionRecord

log = logging.getLogger("lazymem.supervisor")

FIRST_PAUSE_SECONDS = 0.05
MAX_PAUSE_SECONDS = 5.0
"""Between daemons that ended before they were ready, one after the other."""

LOUD_FAILURES = 8
"""So many in a row, within some 12 s, and it is said that nothing goes on, and again each `LOUD_SECONDS`."""

LOUD_SECONDS = 60.0

CROWD = 16
CROWD_SECONDS = 30.0
CROWDED_PAUSE_SECONDS = 1.0
"""So many deaths within so long, of daemons that were ready: something kills each. Others want the processor too."""

WARM_SECONDS = 60.0
"""For a next daemon to load what it needs; the present one serves meanwhile."""

SPARE_SECONDS = 5.0
"""After the mount is ready, which is when the guest resumes and needs the processor, a next daemon is loaded: to load
one when it is needed would be most of the guest's wait. At once after a restart: what killed one may kill more."""

NO_SPARE_SECONDS = 60.0
"""Until the next try, when one died."""

LOOK_SECONDS = 1.0
"""A killed daemon one of whose threads waits for the daemon itself does not end, and no descriptor tells of it."""


class Daemon:
    """One that serves, or is to. `control`: our end of its socket."""

    def __init__(self, pid: int, pidfd: int, control: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.control = control
        self.process = process  # None: not our child
        self.is_ready = self.is_warm = False
        self.started_at = time.monotonic()

    def is_dead(self) -> bool:
        """It runs no more code. A thread that the kernel cannot end yet may be left, and with it the process."""
        if self.process is not None and self.process.poll() is not None:
            return True
        if _is_readable(self.pidfd):
            return True
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:  # this host cannot say (no descriptor, no memory), and two that serve would be worse than none
            return False

    def close(self) -> None:
        self.control.close()
        os.close(self.pidfd)


class Supervisor:
    """From the daemon's first message to the end of the mount. `run` does it all."""

    def __init__(self, control: socket.socket) -> None:
        self._held: dict[str, int] = {}
        self._command: list[str] = []
        self._python = sys.executable
        self._next_python = sys.executable
        self._failures = 0
        self._loud_at = 0.0
        self._deaths: list[float] = []
        self._maybe_next: Daemon | None = None  # it loads, and waits for the present one's end
        self._upgrading = False  # to that
        self._spare_at = math.inf
        self._left: list[subprocess.Popen[bytes]] = []  # not reaped yet
        maybe_hello = descriptorstore.receive(control)
        if maybe_hello is None or maybe_hello.maybe_descriptor is None:
            raise SystemExit("whoever started this went away again")
        fields = maybe_hello.fields
        self._command = json.loads(fields["COMMAND"])
        self.maybe_log = Path(fields["LOG"]) if fields["LOG"] else None
        self._daemon = Daemon(int(fields["DAEMON"]), maybe_hello.maybe_descriptor, control, None)

    def run(self) -> int:
        """Returns when the mount is over: 0."""
        while True:
            self._wait()
            self._left = [process for process in self._left if process.poll() is None]
            if self._maybe_next is None and time.monotonic() > self._spare_at:
                self._load_next()
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
        for daemon in filter(None, (self._daemon, self._maybe_next)):
            if daemon.control.fileno() >= 0:
                waiting.register(daemon.control, select.POLLIN)
        waiting.poll(LOOK_SECONDS * 1000)
        self._hear(self._daemon)
        if self._maybe_next is not None:
            self._hear_next(self._maybe_next)

    def _hear(self, daemon: Daemon) -> None:
        while daemon.control.fileno() >= 0 and _is_readable(daemon.control.fileno()):
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
            if _is_readable(self._held[name]):
                self._let_go(name)

    # ---- the next daemon

    def _go_on(self) -> None:
        """The daemon is dead and the mount is not."""
        dead = self._daemon
        self._pause(dead)
        self._let_go_of_ended()
        # Itself: a copy would need a descriptor, of which there may be none.
        self._held[f"{PREDECESSOR}-{dead.pid}"] = dead.pidfd
        if dead.process is not None:
            self._left.append(dead.process)
        maybe_next, self._maybe_next = self._maybe_next, None
        while maybe_next is None or maybe_next.is_dead():
            if maybe_next is not None:
                self._discard(maybe_next)
                maybe_next = None
            if session.is_over(self._held[FUSE]):
                break  # while nothing went on
            try:
                maybe_next = self._start(self._python)
            except OSError as error:
                self._note_failure(f"no next daemon can be started: {error}")
        if maybe_next is None:
            return
        dead.control.close()
        self._daemon = maybe_next
        self._upgrading, self._spare_at = False, math.inf
        self._hand_over(maybe_next)

    def _pause(self, dead: Daemon) -> None:
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if at > now - CROWD_SECONDS] + [now]
        if not dead.is_ready:
            self._next_python = self._python  # not what an upgrade wanted
            self._note_failure(f"the daemon (pid {dead.pid}) ended before it was ready")
        elif len(self._deaths) > CROWD:
            time.sleep(CROWDED_PAUSE_SECONDS)

    def _note_failure(self, what: str) -> None:
        """Say it, not for ever each time; then the pause before the next try, or until the mount is over."""
        self._failures += 1
        now = time.monotonic()
        if self._failures < LOUD_FAILURES:
            log.error("%s", what)
        elif now > self._loud_at:
            self._loud_at = now + LOUD_SECONDS
            log.error(
                "%s: failure %d in a row. The guest waits, and it is tried again for as long as it is mounted; what "
                "the daemons log says why (no room? no memory?). 'lazymem umount --force' gives up",
                what,
                self._failures,
            )
        over = select.poll()
        over.register(self._held[FUSE], 0)
        over.poll(_pause_seconds(self._failures) * 1000)

    def _start(self, python: str) -> Daemon:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [python, "-P", "-m", "lazymem.cli.mount", *self._command],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, SUCCESSOR_VARIABLE: str(theirs.fileno())},
                start_new_session=True,
            )
        try:
            return Daemon(process.pid, os.pidfd_open(process.pid), ours, process)
        except OSError:  # no descriptor left, for one
            ours.close()
            process.kill()
            self._left.append(process)
            raise

    def _hand_over(self, to: Daemon) -> None:
        """Everything that is held, then the word to begin. A daemon that dies over it is found dead like any other."""
        with contextlib.suppress(OSError):
            for name, descriptor in self._held.items():
                descriptorstore.put(to.control, name, descriptor)
            descriptorstore.send(to.control, {"START": 1})
        log.warning("a next daemon (pid %d) goes on with the mount", to.pid)

    def _discard(self, daemon: Daemon) -> None:
        if daemon.process is not None:
            with contextlib.suppress(OSError):
                daemon.process.kill()
            self._left.append(daemon.process)
        daemon.close()

    # ---- a next daemon while the present one serves

    def _load_next(self) -> None:
        self._spare_at = time.monotonic() + NO_SPARE_SECONDS
        with contextlib.suppress(OSError):
            self._maybe_next = self._start(self._python)

    def _begin_upgrade(self, python: str) -> None:
        if self._upgrading:
            return self._refuse("another upgrade is under way")
        if self._maybe_next is not None:  # of the version that we have
            self._discard(self._maybe_next)
        self._maybe_next = None
        try:
            self._maybe_next = self._start(python)
        except OSError as error:
            return self._refuse(f"{python} cannot be started: {error.strerror}")
        self._next_python, self._upgrading = python, True
        return None

    def _hear_next(self, daemon: Daemon) -> None:
        was_warm = daemon.is_warm
        self._hear(daemon)
        if daemon.is_warm and not was_warm:
            self._say(**({"HANDOVER": 1} if self._upgrading else {"LOADED": 1}))
        elif daemon.is_dead() or (not daemon.is_warm and time.monotonic() > daemon.started_at + WARM_SECONDS):
            self._maybe_next, self._next_python = None, self._python
            self._discard(daemon)
            if self._upgrading:
                self._refuse("the new version's daemon does not start")
            self._upgrading, self._spare_at = False, time.monotonic() + NO_SPARE_SECONDS

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


def _is_readable(descriptor: int) -> bool:
    looking = select.poll()
    looking.register(descriptor, select.POLLIN)
    return bool(looking.poll(0))


def _pause_seconds(failures: int) -> float:
    return float(min(FIRST_PAUSE_SECONDS * 2 ** min(failures - 1, 16), MAX_PAUSE_SECONDS))


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
