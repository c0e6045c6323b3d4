"""Takes a snapshot of a running guest over its monitor: the steps and their order.

The guest stands only while its device state ends and its RAM file is copied; digests are made from the copy afterwards.
Until the folder is complete the guest can always go on, and does, whatever fails. Known limit: this process killed by
SIGKILL in the middle leaves the guest stopped (`cont` at its monitor lets it go on) and a hidden *.partial-* folder.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from lazymem.errors import LazymemError, MonitorError, RamFileError, SnapshotError
from lazymem.snapshot.manifest import MANIFEST_NAME, RAM_BLOCK, RAM_NAME, Block, Emulator, Manifest
from lazymem.snapshot.ramcopy import Copied, copy_ram, reflink
from lazymem.snapshot.writer import PendingSnapshot, create_like, new_ram_id, vmstate_record, write_digests
from lazymem.vm import emulator
from lazymem.vm.emulator import RamBacking
from lazymem.vm.identity import RUN_ATTRIBUTE
from lazymem.vm.qmpclient import CommandError, QmpClient
from lazymem.vm.savestate import SaveRefusedError, abandon, let_go_on, ram_left_out, save_device_state

_EXIT_SECONDS = 60.0
_PREREAD_BYTES = 4 << 20


class Reporter(Protocol):
    """Whoever wants to know how far it is: one phase after the other, each with a number of bytes or without."""

    def phase(self, text: str, total_bytes: int | None = None) -> None:
        """A new phase begins; the one before is over."""
        ...

    def advance(self, count_bytes: int) -> None:
        """So many bytes of the phase are done."""
        ...


class Options(Struct, frozen=True):
    """What the user asked for."""

    monitor: Path
    target: Path
    resume: bool = False
    disks_handled: bool = False


class Result(Struct, frozen=True):
    """What was made. `ram_way`: reflink, copy or move.

    `pause_seconds`: how long the guest stood; None unless it ran before and runs on.
    """

    directory: str
    ram_bytes: int
    ram_stored_bytes: int
    vmstate_bytes: int
    ram_way: str
    pause_seconds: float | None
    total_seconds: float
    resumed: bool
    uncovered_disks: tuple[str, ...]


class _Guest(Struct, frozen=True):
    """The guest before it is touched."""

    ram: RamBacking
    was_running: bool
    made_by: Emulator
    disks: tuple[str, ...]


def take_snapshot(options: Options, reporter: Reporter) -> Result:
    """Makes the snapshot.

    Raises:
        LazymemError: with the reason; then there is no folder of that name and the guest is as it was before.
    """
    started = time.monotonic()
    with PendingSnapshot(options.target) as pending, QmpClient(options.monitor) as qmp:
        guest = _look(qmp, options)
        way, pause = _Taking(options, reporter, qmp, guest, pending).run()
    folder = Path(os.path.abspath(options.target))
    return Result(
        directory=str(folder),
        ram_bytes=guest.ram.size_bytes,
        ram_stored_bytes=(folder / RAM_NAME).stat().st_blocks * 512,
        vmstate_bytes=(folder / "vmstate").stat().st_size,
        ram_way=way,
        pause_seconds=pause,
        total_seconds=time.monotonic() - started,
        resumed=options.resume,
        uncovered_disks=guest.disks,
    )


def _look(qmp: QmpClient, options: Options) -> _Guest:
    """Everything that can be refused is refused here, before the guest notices anything."""
    state = emulator.run_state(qmp)
    emulator.refuse_other_migration(qmp)
    ram = emulator.ram_backing(qmp)
    if not ram.share:
        raise RamFileError(f"the guest maps {ram.path} with share=off, so its RAM is not in that file: use share=on")
    if not on_lazymem_mount(ram.path) and (ram.path.parent / MANIFEST_NAME).exists():
        raise RamFileError(
            f"the guest runs directly on the RAM of the snapshot {ram.path.parent} and has changed it: that snapshot "
            "is no more what its manifest says. Run guests from a lazymem-mount of it, or from a copy of its pc.ram"
        )
    disks = tuple(emulator.writable_disks(qmp))
    if disks and not options.disks_handled:
        raise SnapshotError(
            f"the guest has writable disks that a snapshot does not cover: {', '.join(disks)}. Save them yourself at "
            "the same moment and say --disks-handled"
        )
    return _Guest(ram, state == "running", emulator.describe(qmp), disks)


def on_lazymem_mount(path: Path) -> bool:
    """Whether a file lies on a lazymem mount: its own run's pages then, not a snapshot's."""
    try:
        os.getxattr(path, RUN_ATTRIBUTE)
    except OSError:
        return False
    return True


class _Taking:
    """One snapshot on its way: the steps, in order, over what they share."""

    def __init__(
        self, options: Options, reporter: Reporter, qmp: QmpClient, guest: _Guest, pending: PendingSnapshot
    ) -> None:
        self._options = options
        self._reporter = reporter
        self._qmp = qmp
        self._guest = guest
        self._pending = pending
        self._ram_id = new_ram_id()
        self._begun = False
        self._times: dict[str, float] = {}

    def run(self) -> tuple[str, float | None]:
        """As `_run`; a guest that ran runs again after any failure or interrupt within."""
        try:
            return self._run()
        except BaseException:
            # Not only errors of ours: an interrupt, too, must not leave a guest standing. It may also have ended
            # already. A guest that stands because of somebody else (another snapshot) is left alone.
            if self._begun:
                with suppress(MonitorError):
                    abandon(self._qmp)
                    if self._guest.was_running:
                        let_go_on(self._qmp)
            raise

    def _run(self) -> tuple[str, float | None]:
        """Returns how the RAM file was taken, and the guest's pause in seconds when it runs on."""
        ram = self._guest.ram
        moving = self._may_move()
        source = _open_ram(ram.path)
        try:
            self._warm_up(source, moving)
            with ram_left_out(self._qmp):
                self._reporter.phase("saving device state")
                self._save()
                if moving:
                    os.fsync(source)
                    return self._end_moving(), None
                copied = self._copy(source)
                self._check_it_stood()
                pause = self._resume() if self._options.resume else None
        finally:
            os.close(source)
        self._seal(self._pending.ram, pause)
        self._pending.publish()
        if not self._options.resume:
            self._quit()
        return copied.way, pause

    def _save(self) -> None:
        self._qmp.take_events()
        self._begun = True
        try:
            save_device_state(self._qmp, self._options.monitor, self._pending.vmstate)
        except SaveRefusedError:
            self._begun = False
            raise

    def _check_it_stood(self) -> None:
        """RAM that changed behind the device state would be a snapshot of no guest, and no digest would tell.

        Raises:
            MonitorError: somebody else let the guest run since the save (another monitor, another snapshot command).
        """
        status = self._qmp.command("query-status")["status"]
        self._times |= {event.name: event.seconds for event in self._qmp.take_events()}
        if status == "running" or "RESUME" in self._times:
            raise MonitorError("somebody let the guest go on while its RAM was being saved; try again")

    def _may_move(self) -> bool:
        """A move needs to see the emulator end, since nothing may map a snapshot's file."""
        ram = self._guest.ram
        exact = ram.path.stat().st_size == ram.size_bytes
        return (
            not self._options.resume and exact and self._qmp.peer_pid is not None and self._pending.can_move(ram.path)
        )

    def _warm_up(self, source: int, moving: bool) -> None:
        """While the guest still runs: what would otherwise have to wait for a disk or a network in its pause."""
        ram = self._guest.ram
        if on_lazymem_mount(ram.path):
            self._reporter.phase("reading the RAM through its mount", ram.size_bytes)
            for offset in range(0, ram.size_bytes, _PREREAD_BYTES):
                self._reporter.advance(len(os.pread(source, _PREREAD_BYTES, offset)))
        elif not moving:
            # A reflink has to write out what is dirty first; this one does that for nearly all of it.
            trial = self._pending.folder / "trial"
            file = create_like(trial, os.fstat(source))
            try:
                reflink(source, file)
            finally:
                os.close(file)
                trial.unlink()

    def _copy(self, source: int) -> Copied:
        size = self._guest.ram.size_bytes
        self._reporter.phase("copying the RAM (the guest stands)", size)
        target = create_like(self._pending.ram, os.fstat(source))
        try:
            return copy_ram(source, target, size, self._reporter.advance)
        finally:
            os.close(target)

    def _resume(self) -> float | None:
        """Lets the guest run on; how long it stood, by the emulator's own events."""
        if not self._guest.was_running:
            return None
        let_go_on(self._qmp)
        self._qmp.command("query-status")
        times = self._times | {event.name: event.seconds for event in self._qmp.take_events()}
        return times["RESUME"] - times["STOP"] if {"RESUME", "STOP"} <= set(times) else None

    def _seal(self, ram: Path, pause: float | None) -> None:
        size = self._guest.ram.size_bytes
        self._reporter.phase("digests", size)
        root = write_digests(ram, size, self._pending.digests, self._reporter.advance)
        vmstate = self._pending.vmstate
        os.chmod(vmstate, self._guest.ram.path.stat().st_mode & 0o666 | 0o600)
        self._reporter.phase("writing out")
        self._pending.seal(
            Manifest(
                emulator=self._guest.made_by,
                blocks=(Block(RAM_BLOCK, RAM_NAME, size),),
                ram_id=self._ram_id,
                ram_root=root,
                vmstate=vmstate_record(vmstate),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                disks_handled=bool(self._guest.disks),
                pause_seconds=pause,
            )
        )

    def _end_moving(self) -> str:
        """The guest ends here, so its RAM file becomes the snapshot's. All that can fail comes before it ends."""
        ram = self._guest.ram.path
        self._seal(ram, None)
        self._check_it_stood()
        pid = self._qmp.peer_pid
        process = os.pidfd_open(pid) if pid else None
        self._pending.keep()
        try:
            self._reporter.phase("ending the emulator")
            self._quit()
            return self._take_over(ram, process)
        except (OSError, LazymemError, KeyboardInterrupt) as error:
            raise SnapshotError(
                f"the guest has ended, and its snapshot is in {self._pending.folder} but could not be completed there "
                f"(RAM file: {ram}): {error}"
            ) from error
        finally:
            if process is not None:
                os.close(process)

    def _quit(self) -> None:
        """Ends the emulator; its monitor may end before it has answered."""
        try:
            self._qmp.command("quit")
        except CommandError:
            raise
        except MonitorError:
            return

    def _take_over(self, ram: Path, process: int | None) -> str:
        way = "move"
        if process is not None and select.select([process], [], [], _EXIT_SECONDS)[0]:
            self._pending.move_ram(ram)
        else:
            # It does not end (a debugger, a stuck disk); its vCPUs stand, so a copy is right where a move is not.
            source = _open_ram(ram)
            try:
                way = self._copy(source).way
            finally:
                os.close(source)
        self._pending.publish()
        return way


def _open_ram(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise RamFileError(f"cannot read the RAM file {path}: {error.strerror}") from error
