"""Takes a snapshot of a running guest over its monitor: the steps and their order.

The guest stands only while its device state ends and its RAM file is copied; digests are made from the copy afterwards.
Until the folder is complete the guest can always go on, and does, whatever fails. What a process that is killed in the
middle leaves behind it has noted with somebody else (`undoing`), but for a hidden *.partial-* folder and a socket.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from lazymem.errors import LazymemError, MonitorError, RamFileError, SnapshotError
from lazymem.snapshot.deltaindex import INDEX_NAME, encode
from lazymem.snapshot.manifest import MANIFEST_NAME, Emulator, Manifest
from lazymem.snapshot.writer import PendingSnapshot, new_ram_id, vmstate_record
from lazymem.vm import emulator, migrationsettings
from lazymem.vm.emulator import RamBacking
from lazymem.vm.identity import MountRun, maybe_mount_run
from lazymem.vm.mountram import MountRam
from lazymem.vm.qmpclient import CommandError, QmpClient
from lazymem.vm.ramways import FileCopy, Made, MountCopy, MountDelta, RamWay, Reporter, hashed
from lazymem.vm.savestate import CAPABILITY, SaveRefusedError, abandon, let_go_on, ram_left_out, save_device_state
from lazymem.vm.undoing import Change

_EXIT_SECONDS = 60.0

Note = Callable[[Change | None], None]
"""Gets what would have to be taken back from now on, if this process were killed; None: nothing."""


class Options(Struct, frozen=True):
    """What the user asked for."""

    monitor: Path
    target: Path
    resume: bool = False
    disks_handled: bool = False
    delta: bool = False


class Result(Struct, frozen=True):
    """What was made. `ram_way`: reflink, copy, move or delta. `parent`: a delta's, its identity (hex).

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
    parent: str | None = None


class _Guest(Struct, frozen=True):
    """The guest before it is touched."""

    ram: RamBacking
    mount: MountRun | None
    was_running: bool
    made_by: Emulator
    disks: tuple[str, ...]


def take_snapshot(options: Options, reporter: Reporter, note: Note = lambda _: None) -> Result:
    """Makes the snapshot.

    Raises:
        LazymemError: with the reason; then there is no folder of that name and the guest is as it was before.
    """
    started = time.monotonic()
    with PendingSnapshot(options.target) as pending, QmpClient(options.monitor) as qmp:
        guest = _look(qmp, options)
        way, pause, manifest = _Taking(options, reporter, qmp, guest, pending, note).run()
    folder = Path(os.path.abspath(options.target))
    return Result(
        directory=str(folder),
        ram_bytes=guest.ram.size_bytes,
        ram_stored_bytes=(folder / manifest.ram.file).stat().st_blocks * 512,
        vmstate_bytes=(folder / "vmstate").stat().st_size,
        ram_way=way,
        pause_seconds=pause,
        total_seconds=time.monotonic() - started,
        resumed=options.resume,
        uncovered_disks=guest.disks,
        parent=manifest.parent.identity if manifest.parent else None,
    )


def _look(qmp: QmpClient, options: Options) -> _Guest:
    """Everything that can be refused is refused here, before the guest notices anything."""
    state = emulator.run_state(qmp)
    emulator.refuse_other_migration(qmp)
    emulator.refuse_incapable(qmp)
    ram = emulator.ram_backing(qmp)
    mount = maybe_mount_run(ram.path)
    template = mount is not None and mount.template
    if not ram.share:
        instead = "a guest that shall be saved needs a lazymem-mount of its own" if template else "use share=on"
        raise RamFileError(f"the guest maps {ram.path} with share=off, so its RAM is not in that file: {instead}")
    if template:
        raise RamFileError(
            f"the guest maps the template {ram.path} with share=on, and what it wrote is kept nowhere: "
            "it needs a lazymem-mount of its own"
        )
    if mount is None and options.delta:
        raise RamFileError(f"{ram.path} is on no lazymem mount, so nobody knows what was written: leave --delta out")
    if mount is None and (ram.path.parent / MANIFEST_NAME).exists():
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
    return _Guest(ram, mount, state == "running", emulator.describe(qmp), disks)


class _Taking:
    """One snapshot on its way: the steps, in order, over what they share."""

    def __init__(
        self,
        options: Options,
        reporter: Reporter,
        qmp: QmpClient,
        guest: _Guest,
        pending: PendingSnapshot,
        note: Note,
    ) -> None:
        self._options = options
        self._reporter = reporter
        self._qmp = qmp
        self._guest = guest
        self._pending = pending
        self._note = note
        self._change = Change(migrationsettings.read(qmp, [CAPABILITY]), guest.was_running)
        self._ram_id = new_ram_id()
        self._begun = False
        self._times: dict[str, float] = {}

    def run(self) -> tuple[str, float | None, Manifest]:
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

    def _run(self) -> tuple[str, float | None, Manifest]:
        """Returns how the RAM file was taken, the guest's pause in seconds when it runs on, and the manifest."""
        with ExitStack() as undo:
            source = _open_ram(self._guest.ram.path)
            undo.callback(os.close, source)
            moving = self._may_move()
            way = self._way(source, moving, undo)
            way.warm_up()
            self._note(self._change)
            with ram_left_out(self._qmp):
                self._reporter.phase("saving device state")
                self._save_or_abandon()
                if moving:
                    os.fsync(source)
                    return self._end_moving()
                copied = way.copy()
                self._check_it_stood()
                pause = self._resume() if self._options.resume else None
            if self._options.resume:
                self._note(None)
            manifest = self._seal(way.finish(), pause)
        self._pending.publish()
        self._note(None)
        if not self._options.resume:
            self._quit()
        return copied.way, pause, manifest

    def _way(self, source: int, moving: bool, undo: ExitStack) -> RamWay:
        ram = self._guest.ram
        if self._guest.mount is None:
            return FileCopy(ram, source, self._pending, self._reporter, moving=moving)
        mounted = MountRam(ram.path, ram.size_bytes, self._guest.mount, source)
        if not self._options.delta:
            return MountCopy(mounted, source, self._pending, self._reporter)
        if not mounted.tells_what_was_written:
            raise RamFileError(f"the mount of {ram.path} does not tell what was written: leave --delta out")
        return MountDelta(mounted, source, self._pending, self._reporter, undo)

    def _save(self) -> None:
        self._qmp.take_events()
        self._begun = True
        self._note(replace(self._change, saves=True))
        try:
            save_device_state(self._qmp, self._options.monitor, self._pending.vmstate)
        except SaveRefusedError:
            self._begun = False
            self._note(self._change)
            raise

    def _save_or_abandon(self) -> None:
        """Here and not in `run` alone: while a save is under way the emulator's settings cannot be set back."""
        try:
            self._save()
        except BaseException:
            if self._begun:
                with suppress(MonitorError):
                    abandon(self._qmp)
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

    def _resume(self) -> float | None:
        """Lets the guest run on; how long it stood, by the emulator's own events."""
        if not self._guest.was_running:
            return None
        let_go_on(self._qmp)
        self._qmp.command("query-status")
        times = self._times | {event.name: event.seconds for event in self._qmp.take_events()}
        return times["RESUME"] - times["STOP"] if {"RESUME", "STOP"} <= set(times) else None

    def _seal(self, made: Made, pause: float | None) -> Manifest:
        vmstate = self._pending.vmstate
        os.chmod(vmstate, self._guest.ram.path.stat().st_mode & 0o666 | 0o600)
        self._reporter.phase("writing out")
        manifest = Manifest(
            emulator=self._guest.made_by,
            blocks=(made.block,),
            ram_id=self._ram_id,
            ram_root=made.root,
            vmstate=vmstate_record(vmstate),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            disks_handled=bool(self._guest.disks),
            pause_seconds=pause,
            parent=made.parent,
            ram_sums=made.sums,
        )
        if made.index is not None:
            (self._pending.folder / INDEX_NAME).write_bytes(encode(made.index, manifest.identity))
        self._pending.seal(manifest)
        return manifest

    def _end_moving(self) -> tuple[str, None, Manifest]:
        """The guest ends here, so its RAM file becomes the snapshot's. All that can fail comes before it ends."""
        ram = self._guest.ram
        manifest = self._seal(hashed(ram.path, ram.size_bytes, self._pending, self._reporter), None)
        self._check_it_stood()
        pid = self._qmp.peer_pid
        process = os.pidfd_open(pid) if pid else None
        self._pending.keep()
        self._note(None)  # the guest ends, and what it would write from here on is in no snapshot
        try:
            self._reporter.phase("ending the emulator")
            self._quit()
            return self._take_over(process), None, manifest
        except (OSError, LazymemError, KeyboardInterrupt) as error:
            raise SnapshotError(
                f"the guest has ended, and its snapshot is in {self._pending.folder} but could not be completed there "
                f"(RAM file: {ram.path}): {error}"
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

    def _take_over(self, process: int | None) -> str:
        ram = self._guest.ram
        way = "move"
        if process is not None and select.select([process], [], [], _EXIT_SECONDS)[0]:
            self._pending.move_ram(ram.path)
        else:
            # It does not end (a debugger, a stuck disk); its vCPUs stand, so a copy is right where a move is not.
            source = _open_ram(ram.path)
            try:
                way = FileCopy(ram, source, self._pending, self._reporter, moving=True).copy().way
            finally:
                os.close(source)
        self._pending.publish()
        return way


def _open_ram(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise RamFileError(f"cannot read the RAM file {path}: {error.strerror}") from error
