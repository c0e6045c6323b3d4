"""Saving a guest and taking a saved one over: what goes into the stream, in which order, and when the guest stands.

Saving: the blocks of ordinary memory go while the guest still runs; then it stops, and what changed since, the devices
and the end go. A file-backed block is listed, never sent and not counted as remaining; its file is synced before the
save counts as completed, but not in a hand-over (`savestate.LEAVE_UNSYNCED`). There is no dirty log: a page's digest at
sending time is compared once the guest stands, which costs a pass over the ordinary memory (a few ms for the
framebuffer and firmware; a second a GiB for a guest without a RAM file).

Taking over: the whole stream is read and checked, then its binding to the RAM file, then devices and memory are loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trio
from msgspec import Struct, field

from lazymem.digests import page_digest
from lazymem.errors import LazymemError, MonitorError, SaveStreamError
from lazymem.pages import PAGE_SIZE, is_zero
from lazymem.vm.devicestate import Field, Layout, State
from lazymem.vm.identity import check_state_belongs
from lazymem.vm.ram import RamBlock
from lazymem.vm.runstate import ENDED, MachineLike, RunState
from lazymem.vm.savestream.format import BlockShape, Page, StreamShape
from lazymem.vm.savestream.loader import SavedState, load, max_stream_bytes
from lazymem.vm.savestream.writer import StreamWriter
from lazymem.vm.transport import Address, Output, open_output, receive
from lazymem.vm.uri import Uri

MACHINE_TYPE = "lazymem-pc-0.1"
"""Versioned: a stream is loaded by the machine type that wrote it and no other."""

_RUNSTATE_BYTES = 100
_PART_PAGES = 256
"""Pages a ram part: 1 MiB, so that the monitor gets its turn every few ms."""

GLOBAL_STATE = Layout("globalstate", 1, (Field("size", 4), Field("runstate", _RUNSTATE_BYTES, buffer=True)))
"""QEMU's section for the run state at the time of the save."""


def shape_of(machine: MachineLike) -> StreamShape:
    """What this machine's stream consists of."""
    blocks = tuple(BlockShape(b.name, b.size, b.backed, b.do_not_save) for b in machine.blocks.values())
    return StreamShape(MACHINE_TYPE, blocks, (GLOBAL_STATE, *(device.layout for device in machine.stateful())))


def global_state(run_state: str) -> State:
    """The run state as `GLOBAL_STATE` holds it: its length with a final NUL, and the text padded with NULs."""
    text = run_state.encode() + b"\0"
    return {"size": len(text), "runstate": text.ljust(_RUNSTATE_BYTES, b"\0")}


class Progress(Struct):
    """One migration's figures, for query-migrate. Sizes in bytes; file-backed blocks count nowhere."""

    incoming: bool
    status: str = "setup"
    total: int = 0
    remaining: int = 0
    transferred: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    passes: int = 0
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    stopped: float | None = None
    error: LazymemError | None = None
    address: Address | None = None

    @property
    def over(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")


class Migrations:
    """At most one at a time, out or in. `progress` is the last one's."""

    def __init__(self, runstate: RunState, *, start_paused: bool = False, notice: Callable[[str], None]) -> None:
        """`start_paused`: the -S option. `notice`: one line that a person should read."""
        self._runstate = runstate
        self._start_paused = start_paused
        self._notice = notice
        self._cancel: trio.CancelScope | None = None
        self.progress: Progress | None = None
        self.leave_unsynced = False
        """The next save only, as `savestate.LEAVE_UNSYNCED`: whoever asked for it may be dead when it has ended."""

    def begin_save(self) -> None:
        """From here on `progress` is the save's that `save` then makes.

        Raises:
            MonitorError: not now, with the reason.
        """
        self._check_idle()
        status = self._runstate.status
        if status == "inmigrate":
            raise MonitorError("Guest is waiting for an incoming migration")
        if status in ENDED:
            raise MonitorError(f"the guest has ended ({status}): there is nothing to save")
        self._begin(Progress(incoming=False))

    def begin_take_over(self) -> None:
        """As `begin_save`, for a state that comes in."""
        self._check_idle()
        if self._runstate.status != "inmigrate":
            raise MonitorError("'-incoming' was not specified on the command line, or the state is here already")
        self._begin(Progress(incoming=True))

    def _begin(self, progress: Progress) -> None:
        self.progress = progress
        self._set("setup")

    def _check_idle(self) -> None:
        if self.progress is not None and not self.progress.over:
            raise MonitorError("There's a migration process in progress")

    def cancel(self) -> None:
        """Break a save off; the guest goes on. Nothing happens where none is under way."""
        if self._cancel is not None and self.progress is not None and not self.progress.incoming:
            self._set("cancelling")
            self._cancel.cancel()

    async def save(self, uri: Uri) -> None:
        """Save to `uri`, begun by `begin_save`.

        Ends with the guest stopped (postmigrate), or going on as before with progress "failed" or "cancelled".
        """
        saver = _Saver(self._runstate, self._progress, sync=not self.leave_unsynced)
        with trio.CancelScope() as self._cancel:
            try:
                await self._save(uri, saver)
            except Exception as error:  # noqa: BLE001 (also a bug of ours: it must not end the guest with the save)
                self._fail(error)
                self._notice(f"the save to {uri} failed: {self._progress.error}")
            else:
                self._runstate.set_overlay("postmigrate")
                self._set("completed")
                return
            finally:
                self._cancel = None
                self.leave_unsynced = False
        if not self._progress.over:
            self._set("cancelled")
        await saver.undo()

    async def _save(self, uri: Uri, saver: _Saver) -> None:
        output = await open_output(uri)
        try:
            await saver.run(output, on_active=lambda: self._set("active"))
            # The other side has all of it now and may run: nothing from here on may let this side run too (rule 14).
            with trio.CancelScope(shield=True):
                await output.commit()
        except BaseException:
            with trio.CancelScope(shield=True):
                await output.abort()
            raise

    async def take_over(self, uri: Uri) -> None:
        """Take the state at `uri` over, begun by `begin_take_over`, and let the guest run as the stream says.

        Raises:
            LazymemError: refused; nothing was changed and the guest stands. The next one may come.
        """
        try:
            saved = await self._receive(uri)
        except Exception as error:
            raise self._fail(error) from error
        except BaseException:
            self._fail(MonitorError("incoming broken off"))
            raise
        self._set("completed")
        ran = saved.devices[GLOBAL_STATE.name, 0]["runstate"] == global_state("running")["runstate"]
        self._runstate.arrived(run=ran and not self._start_paused)

    async def _receive(self, uri: Uri) -> SavedState:
        machine = self._runstate.machine
        shape = shape_of(machine)
        data = await receive(uri, max_stream_bytes(shape), self._listening)
        self._set("active")
        # In threads: both may wait for pages of a mount, and hashing a GiB takes a second.
        saved = await trio.to_thread.run_sync(load, data, shape)
        await trio.to_thread.run_sync(check_blocks, machine, data, self._notice)
        await trio.to_thread.run_sync(take, machine, saved)
        return saved

    def _listening(self, address: Address) -> None:
        self._progress.address = address

    @property
    def _progress(self) -> Progress:
        assert self.progress is not None
        return self.progress

    def _set(self, status: str) -> None:
        self._progress.status = status
        if self._progress.over:
            self._progress.ended = time.monotonic()
        self._runstate.emit("MIGRATION", {"status": status})

    def _fail(self, error: Exception) -> LazymemError:
        """Set "failed"; returns the error as it is told."""
        told = error if isinstance(error, LazymemError) else _translated(error)
        self._progress.error = told
        self._set("failed")
        return told


def _translated(error: Exception) -> LazymemError:
    if isinstance(error, OSError):
        found = MonitorError(f"the save stream cannot be written: {error.strerror or error}")
    else:
        found = MonitorError(f"a bug in lazymem-vm broke it off: {error!r}")
    found.__cause__ = error
    return found


class _Saver:
    """One save's passes, and the way back from them."""

    def __init__(self, runstate: RunState, progress: Progress, *, sync: bool) -> None:
        self._runstate = runstate
        self._syncs = sync
        self._machine = runstate.machine
        self._progress = progress
        self._writer = StreamWriter(shape_of(runstate.machine))
        self._blocks = [block for block in self._machine.blocks.values() if not block.do_not_save]
        self._sent: dict[tuple[str, int], bytes] = {}
        self._before: str | None = None
        progress.total = progress.remaining = sum(block.size for block in self._blocks)

    async def run(self, output: Output, on_active: Callable[[], None]) -> None:
        self._output = output
        await self._send(self._writer.begin())
        on_active()
        await self._pass()
        # While the guest still runs: the sync in its pause then has only what it wrote since.
        await self._sync()
        self._progress.stopped = time.monotonic()
        # Asked now and not at the start: somebody may have stopped the guest, or let it go on, during the pass.
        self._before = await self._runstate.stop("finish-migrate")
        if self._machine.run_state in ENDED:
            raise MonitorError(f"the guest ended while it was saved ({self._machine.run_state})")
        await self._pass()
        await self._send(self._writer.ram_end())
        await self._send(self._writer.device(global_state("running" if self._before == "running" else "paused")))
        for device in self._machine.stateful():
            await self._send(self._writer.device(device.state()))
        # The files are part of the saved state. Before the end is sent, since a failure here lets this side run on,
        # and a stream without its end runs nowhere.
        await self._sync()
        await self._send(self._writer.end())

    async def undo(self) -> None:
        """The guest is as it was when the save stopped it, or as it is when the save had not come so far."""
        if self._before == "running":
            await self._runstate.resume_after_save()
        elif self._before is not None:
            self._runstate.set_overlay(self._before)

    async def _sync(self) -> None:
        if self._syncs:
            await trio.to_thread.run_sync(self._machine.blocks.sync)

    async def _pass(self) -> None:
        """Send every page that is not yet, or no longer, as it was sent."""
        self._progress.passes += 1
        for block in self._blocks:
            for offset in range(0, block.size, _PART_PAGES * PAGE_SIZE):
                # In a thread: a privately mapped file's pages may have to come from a mount.
                pages = await trio.to_thread.run_sync(self._changed, block, offset)
                if pages:
                    await self._send(self._writer.ram_pages(pages))

    def _changed(self, block: RamBlock, start: int) -> list[Page]:
        data = memoryview(block.read(start, min(_PART_PAGES * PAGE_SIZE, block.size - start)))
        return list(self._compare(block.name, start, data))

    def _compare(self, name: str, start: int, data: memoryview) -> Iterator[Page]:
        for at in range(0, len(data), PAGE_SIZE):
            page = data[at : at + PAGE_SIZE]
            digest = page_digest(page)
            key = (name, start + at)
            before = self._sent.get(key)
            if digest == before:
                continue
            self._sent[key] = digest
            if before is None:
                self._progress.remaining -= PAGE_SIZE
            zero = is_zero(page)
            self._progress.zero_pages += zero
            self._progress.normal_pages += not zero
            yield Page(name, start + at, None if zero else page)

    async def _send(self, data: bytes) -> None:
        await self._output.send(data)
        self._progress.transferred += len(data)


def check_blocks(machine: MachineLike, stream: bytes, notice: Callable[[str], None]) -> None:
    """Rule 6 for every file-backed block: the state and that RAM belong together."""
    for block in machine.blocks.values():
        path: Path | None = block.path
        if path is not None:
            check_state_belongs(path, block.name, stream, notice)


def take(machine: MachineLike, saved: SavedState) -> None:
    """Load a checked stream. Devices first: a value that one refuses leaves the memory as it was.

    Raises:
        SaveStreamError: a device cannot be in that state; the machine must not run.
    """
    for device in machine.stateful():
        layout = device.layout
        try:
            device.load_state(saved.devices[layout.name, layout.instance])
        except SaveStreamError as error:
            raise SaveStreamError(f"save stream refused, section {layout.name}: {error}") from error
    zeros = bytes(PAGE_SIZE)
    for name, pages in saved.pages.items():
        block = machine.blocks[name]
        for offset, data in pages.items():
            # Fresh memory is zero: writing zeros there would only make it resident.
            if data is not None:
                block.write(offset, data)
            elif block.read(offset, PAGE_SIZE) != zeros:
                block.write(offset, zeros)
