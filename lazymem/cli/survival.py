"""The daemon's side of its own survival: what it got from the daemon before it, and who keeps what for the next one.

Kept are descriptors: the FUSE connection, the session's record, the lock of the mount and that of the state folder (so
nobody takes either in between). By our supervisor (`supervisor`), which as a systemd unit's main process (`unit`) has
systemd keep them, too. All else that a next daemon needs is in files.

A daemon that nobody keeps anything for works as one that is kept; only its death is the end of the mount.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trio
from msgspec import Struct

from lazymem.errors import LazymemError
from lazymem.fs import descriptorstore, session
from lazymem.fs.channelends import RamFile
from lazymem.fs.descriptorstore import FUSE, LOCK, PREDECESSOR, RECORD, STATE, UPPER
from lazymem.fs.mountinfo import Mount
from lazymem.fs.sessionrecord import SessionRecord
from lazymem.store.guestram import GuestRam
from lazymem.store.origin import RamOrigin
from lazymem.store.statefiles import StateFolder
from lazymem.store.statefolder import adopt_state, end_run, remove_private

log = logging.getLogger(__name__)

SUPERVISOR = "supervisor"
"""Who keeps descriptors for us; or `SYSTEMD`, as well as a supervisor that is its unit's."""

UNUSUAL_SECONDS = 2.0
"""A killed process is gone in milliseconds, unless the kernel cannot end what it was at."""


class KeptBy(Struct, frozen=True):
    """Who keeps descriptors for us. `to`, `pid`: our supervisor's."""

    name: str
    to: socket.socket
    pid: int


class SurvivalStatistics(Struct, frozen=True):
    """`kept_by`: "supervisor", "systemd", or None, where a killed daemon is the mount's end; `hindered_by`: why so,
    unless it was asked for. `next_is_loaded`: a next daemon only waits for this one's end; `next_pid`: that one's.
    `upgrade_refused`: why the last one did not come about."""

    kept_by: str | None
    supervisor_pid: int | None
    restarts: int
    next_is_loaded: bool
    next_pid: int | None
    hindered_by: str | None
    upgrade_refused: str | None


class _PatientRam:
    """See `Survival.writes_after_predecessor`. READs do not pay for it."""

    def __init__(self, ram: GuestRam) -> None:
        self.read_soon = ram.read_soon
        self.read = ram.read
        self.is_unseen = ram.is_unseen
        self._write = ram.write
        self._ended = trio.Event()

    async def wait_ended(self, pidfds: list[int]) -> None:
        with trio.move_on_after(UNUSUAL_SECONDS):
            await self._wait_each(pidfds)
            return
        log.warning("what the guest writes waits: the killed daemon before has not wholly ended (a slow disk?)")
        await self._wait_each(pidfds)
        log.warning("it has ended: what the guest writes is stored")

    async def _wait_each(self, pidfds: list[int]) -> None:
        for pidfd in pidfds:
            await trio.lowlevel.wait_readable(pidfd)
        self._ended.set()

    async def write(self, offset: int, data: bytes, storing: Callable[[], None]) -> None:
        await self._ended.wait()
        await self._write(offset, data, storing)


class Survival:
    """One daemon's. `inherited`: descriptors by name."""

    def __init__(
        self,
        maybe_keeper: KeptBy | None = None,
        inherited: dict[str, int] | None = None,
        maybe_hindered_by: str | None = None,
        *,
        copier_pid: int = -1,
    ) -> None:
        self.copier_pid = copier_pid
        """The child that makes our copy, see `nextdaemon`; -1: there is none."""
        self.maybe_keeper = maybe_keeper
        self.maybe_hindered_by = maybe_hindered_by
        self.maybe_refusal: str | None = None  # why the last upgrade did not come about
        self.is_ready = self.next_is_loaded = False
        self.maybe_next_pid: int | None = None
        self._maybe_life_sign: int | None = None
        self._is_over = False
        self._maybe_state: StateFolder | None = None
        self._kept: dict[str, int] = {}
        self._inherited = inherited or {}
        self.continues = FUSE in self._inherited
        """Whether we go on with a mount that is there."""
        if self.continues:
            self.record = SessionRecord.read(self._inherited[RECORD])
            self.record.change(restarts=self.restarts + 1)
            self._kept = dict(self._inherited)  # predecessors, too: another supervisor's next daemon waits for them
        else:
            self._forget_a_start()
            self.record = SessionRecord.create()
            self.keep(RECORD, self.record.descriptor)

    @property
    def outlives_us(self) -> bool:
        """Whether the mount is to be left as it is when something ends us."""
        return (self.is_ready or self.continues) and not self._is_over and self.maybe_keeper is not None

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should read at the start."""
        if self.maybe_hindered_by is None or self.maybe_keeper is not None:
            return ()
        return (f"{self.maybe_hindered_by}; so the end of the daemon, should it be killed, is the guest's",)

    @property
    def restarts(self) -> int:
        """How many daemons this mount had before."""
        return self.record.contents.restarts

    @property
    def mount_is_over(self) -> bool:
        """It was unmounted while it had no daemon."""
        return self.continues and session.is_over(self._inherited[FUSE])

    def inherited(self, name: str) -> int:
        """A descriptor that was kept for us; -1: there is none."""
        return self._inherited.get(name, -1)

    def maybe_mount(self) -> tuple[int, Mount] | None:
        """The mount that we go on with, and its connection."""
        maybe_mounted = self.record.contents.maybe_mounted
        if not self.continues or maybe_mounted is None:
            return None
        return self._inherited[FUSE], maybe_mounted

    def mounted(self, descriptor: int, mounted: Mount) -> None:
        """A mount of our own making. The record is whole before the connection is kept."""
        self.record.change(maybe_mounted=mounted, mounted_ns=time.time_ns())
        self.keep(FUSE, descriptor)

    def statistics(self) -> SurvivalStatistics:
        maybe_keeper = self.maybe_keeper
        return SurvivalStatistics(
            kept_by=maybe_keeper.name if maybe_keeper is not None else None,
            supervisor_pid=maybe_keeper.pid if maybe_keeper is not None and maybe_keeper.pid else None,
            restarts=self.restarts,
            next_is_loaded=self.next_is_loaded,
            next_pid=self.maybe_next_pid,
            hindered_by=self.maybe_hindered_by,
            upgrade_refused=self.maybe_refusal,
        )

    def writes_after_predecessor(self, ram: GuestRam, nursery: trio.Nursery) -> RamFile:
        """`ram`, whose writes wait until the daemons before us have ended wholly. One of their threads may stand in a
        write to the state file that the kernel cannot end, and that would come behind a later one of ours."""
        pidfds = [fd for name, fd in self._inherited.items() if name.startswith(PREDECESSOR)]
        if not pidfds:
            return ram
        patient = _PatientRam(ram)
        nursery.start_soon(patient.wait_ended, pidfds)
        return patient

    async def note_wish(self, wish_to_end: trio.Event) -> None:
        """It holds for a next daemon too: whoever sent SIGTERM sends it once."""
        if self.record.contents.wish_to_end:
            wish_to_end.set()
            return
        await wish_to_end.wait()
        self.record.change(wish_to_end=True)

    # ---- the snapshot's digests

    def maybe_upper(self) -> bytes | None:
        """The upper level of the digest tree, kept by the first daemon; whoever uses it verifies it."""
        descriptor = self._inherited.get(UPPER, -1)
        if descriptor < 0:
            return None
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def keep_upper(self, upper: bytes) -> None:
        """16 bytes a MiB of RAM: a next daemon needs no server to begin."""
        if self.continues or self.maybe_keeper is None or not upper:
            return
        with contextlib.suppress(OSError):  # no room: then a next daemon asks the cache, or the server
            descriptor = os.memfd_create("lazymem-upper")
            with open(descriptor, "wb", closefd=False) as file:
                file.write(upper)
            self.keep(UPPER, descriptor)

    # ---- the state folder

    def adopt_state(self, origin: RamOrigin) -> StateFolder | None:
        """The run's written pages, of the mount that we go on with; a template has none. Blocking.

        Raises:
            IdentityError, StoreError: it is not what it was.
        """
        contents = self.record.contents
        if not contents.state_path:
            return None
        path, private = Path(contents.state_path), contents.state_is_private
        state = adopt_state(path, origin, self._inherited[STATE], private=private)
        self._maybe_state = state
        state.kept = True
        return state

    def keep_state(self, state: StateFolder | None) -> None:
        """A folder that was opened for this mount."""
        if state is None:
            return
        self.record.change(state_path=str(state.path), state_is_private=state.private)
        self._maybe_state = state
        self.keep(STATE, state.lock_fd)

    def clear_away(self) -> None:
        """The mount ended while it had no daemon, or one that was killed over it. Blocking."""
        contents = self.record.contents
        log.warning("the mount ended without its daemon")
        if contents.state_is_private:
            remove_private(Path(contents.state_path))
        elif contents.state_path and os.path.exists(contents.state_path):
            try:
                end_run(Path(contents.state_path), self.inherited(STATE))
            except LazymemError as error:
                log.error("what was written is not synced: %s", error)
        self.forget_all()

    # ---- descriptors

    def _forget_a_start(self) -> None:
        """Of a daemon that was killed before it had mounted; of use is its lock, which is never free so."""
        self._kept = {LOCK: self._inherited[LOCK]} if LOCK in self._inherited else {}
        for name in [name for name in self._inherited if name != LOCK]:
            os.close(self._inherited.pop(name))
            self._drop(name)

    def keep(self, name: str, descriptor: int) -> None:
        """Have it outlive us, once there is a mount to go on with. It stays ours to close."""
        self._kept[name] = descriptor
        if FUSE in self._kept:
            for each in self._kept if name == FUSE else (name,):
                self._put(each)

    def _put(self, name: str) -> None:
        if self.maybe_keeper is not None:
            with self._told(f"keeps no {name} for a next daemon"):
                descriptorstore.put(self.maybe_keeper.to, name, self._kept[name])

    def forget_all(self) -> None:
        """The mount has ended: there will be no next daemon. (Our supervisor sees it on the connection.)"""
        self._kept.clear()
        self._is_over = True
        if self._maybe_state is not None:
            self._maybe_state.kept = False

    def nothing_is_left(self) -> None:
        """The mount has ended, and all of it is stored and closed: a supervisor has nothing to clear away."""
        self._drop(RECORD)

    def _drop(self, name: str) -> None:
        if self.maybe_keeper is not None:
            with self._told(f"does not let go of {name}"):
                descriptorstore.drop(self.maybe_keeper.to, name)

    def kept_by(self, keeper: KeptBy) -> None:
        """Another one: it gets everything, and hears whether we are ready. Whoever was killed may have had all of it,
        and given nothing on."""
        self.maybe_keeper = keeper
        self.next_is_loaded, self.maybe_next_pid = False, None
        self._show_life()
        for name in self._kept:
            self._put(name)
        if self.is_ready:
            self._say_ready()

    def show_life(self, maybe_sign: int | None) -> None:
        """Have the keeper hear of our death by this descriptor (`lifesign`)."""
        self._maybe_life_sign = maybe_sign
        self._show_life()

    def _show_life(self) -> None:
        if self.maybe_keeper is not None and self._maybe_life_sign is not None:
            with self._told("does not hear of our death"):
                descriptorstore.send(self.maybe_keeper.to, {"LIFE": 1}, self._maybe_life_sign)

    def say(self, **fields: object) -> None:
        """Tell the keeper."""
        if self.maybe_keeper is not None:
            with self._told("does not listen"):
                descriptorstore.send(self.maybe_keeper.to, fields)

    def ready(self) -> None:
        self.is_ready = True
        if self._maybe_state is not None:
            self._maybe_state.kept = self.outlives_us
        self._say_ready()

    def _say_ready(self) -> None:
        """To whom, as well: what was said to one that was killed, the next one reads, but first it is to have all that
        we keep."""
        if self.maybe_keeper is not None:
            self.say(READY=1, KEEPER=self.maybe_keeper.pid)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            assert self.maybe_keeper is not None
            log.warning("%s %s (%s)", self.maybe_keeper.name, what, error.strerror)
