"""A mount's working sets: the one that the server has, and the one that is recorded of this run.

A recording ends after so many seconds from the first touch, when it is full, or at unmount; then it is written to a
file (`--record`), sent to the server if that learns, or both. Until it ends nothing is put into the kernel's page cache
ahead of the guest: what is there already is touched without our knowledge.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import trio

from lazymem.cli.survival import Survival
from lazymem.errors import LazymemError
from lazymem.fetch.client import Client
from lazymem.fs.sessionrecord import SessionRecord
from lazymem.pages import PAGE_SHIFT
from lazymem.settings import MountSettings, Prefetch
from lazymem.snapshot import workingset
from lazymem.snapshot.wholefile import write_whole
from lazymem.snapshot.workingset import WorkingSet
from lazymem.store.touches import Recording, Touches
from lazymem.wire.messages import Capability, PublishedFile

log = logging.getLogger(__name__)

WORKING_SET_NOTE = "working-set"

RECORDING_NOTE = "recording"
"""Of a recording that goes on: seconds, and the runs so far. Empty: it is over."""

SAVE_SECONDS = 1.0

LOAD_SECONDS = 10.0
SEND_SECONDS = 10.0
"""For a hint of a MiB at most; a server that is lost is not waited for, at mount or unmount."""


class ServersSet:
    """Reads the server's working set beside what else there is to do at the start. `record` keeps it for a next daemon,
    which is one that does not ask (`asks`): the server may be away."""

    def __init__(self, record: SessionRecord, *, asks: bool) -> None:
        self._record = record
        self._asks = asks
        self._loaded = trio.Event()
        self._maybe_set: WorkingSet | None = None

    async def load(self, client: Client, settings: MountSettings) -> None:
        """Every way in which it is of no use is one line in the log."""
        try:
            if settings.prefetch is not Prefetch.NONE and client.welcome.working_set_bytes:
                maybe_data = await self._maybe_data(client)
                if maybe_data is not None:
                    self._maybe_set = await trio.to_thread.run_sync(
                        workingset.decode, maybe_data, client.identity, client.total_pages
                    )
                    self._record.note(WORKING_SET_NOTE, maybe_data)
        except LazymemError as error:
            log.warning("the server's working set is not used: %s", error)
        except trio.TooSlowError:
            log.warning("the server's working set is not used: it did not come within %g s", LOAD_SECONDS)
        except RuntimeError as error:  # threading's word for a host that has no thread for us
            log.warning("the server's working set is not used: %s", error)
        finally:
            self._loaded.set()

    async def _maybe_data(self, client: Client) -> bytes | None:
        if not self._asks:
            return self._record.contents.notes.get(WORKING_SET_NOTE)
        with trio.fail_after(LOAD_SECONDS):
            return await client.read_file(PublishedFile.WORKING_SET, workingset.MAX_BYTES)

    async def maybe_set(self) -> WorkingSet | None:
        await self._loaded.wait()
        return self._maybe_set


class MountRecording:
    """Made by `maybe_recording`. `over` is set once touches are no longer recorded."""

    def __init__(
        self,
        touches: Touches,
        client: Client,
        seconds: float,
        maybe_file: Path | None,
        learn: bool,
        record: SessionRecord,
    ) -> None:
        self.over = trio.Event()
        self._touches = touches
        self._client = client
        self._seconds = seconds
        self._maybe_file = maybe_file
        self._learn = learn
        self._touched = trio.Event()
        self._enough = trio.Event()
        self._ended = trio.Event()
        self._log = Recording(workingset.MAX_RUNS, self._touched.set, self._enough.set)
        touches.record(self._log)
        self._record = record
        self._elapsed_seconds = 0.0  # of daemons before us
        self._take_over()

    def _take_over(self) -> None:
        """What a daemon before us had recorded, for a next one too. Its touches go into the log in their order."""
        saved = self._record.contents.notes.get(RECORDING_NOTE)
        if saved:
            self._elapsed_seconds, runs = msgspec.msgpack.decode(saved, type=tuple[float, list[tuple[int, int]]])
            for start, count in runs:
                self._touches.read(start << PAGE_SHIFT, count << PAGE_SHIFT)

    async def _save_often(self) -> None:
        """A killed daemon's last second of touches is missing, and no more."""
        begun, saved_runs = trio.current_time(), -1
        while True:
            await trio.sleep(SAVE_SECONDS)
            runs = self._log.runs()
            if len(runs) != saved_runs:
                elapsed = self._elapsed_seconds + trio.current_time() - begun
                pairs = [(run.start, run.count) for run in runs]
                self._record.note(RECORDING_NOTE, msgspec.msgpack.encode((elapsed, pairs)))
                saved_runs = len(runs)

    async def run(self) -> None:
        """Record to the end; to be started once."""
        try:
            await self._run()
        except RuntimeError as error:  # threading's word for a host that has no thread for us
            log.error("the recording is lost: %s", error)
        finally:
            self.over.set()
            self._ended.set()

    async def _run(self) -> None:
        await self._touched.wait()
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._save_often)
            with trio.move_on_after(max(self._seconds - self._elapsed_seconds, 0)):
                await self._enough.wait()
            nursery.cancel_scope.cancel()
        self._touches.record(None)
        self._record.note(RECORDING_NOTE, b"")
        self.over.set()
        runs = self._log.runs()
        if runs:
            identity, pages = self._client.identity, self._client.total_pages
            recorded = WorkingSet(identity, pages, runs, self._elapsed_seconds + trio.current_time() - begun)
            await self._keep(await trio.to_thread.run_sync(workingset.encode, recorded), recorded)
        elif self._maybe_file is not None:
            log.warning("nothing was recorded, since no page was touched; there is no %s", self._maybe_file)

    async def finish(self) -> None:
        """The mount is gone: no more touches will come. Returns when what was recorded is kept, while `run` runs."""
        self._touched.set()
        self._enough.set()
        await self._ended.wait()

    async def _keep(self, data: bytes, recorded: WorkingSet) -> None:
        log.info("recorded %d pages in %d runs, in %.1f s", recorded.pages, len(recorded.runs), recorded.seconds)
        if self._maybe_file is not None:
            try:
                await trio.to_thread.run_sync(write_whole, self._maybe_file, data)
            except OSError as error:
                log.error("cannot write the recording to %s: %s", self._maybe_file, error.strerror)
        if self._learn:
            try:
                with trio.fail_after(SEND_SECONDS):
                    await self._client.store_file(PublishedFile.WORKING_SET, data)
            except LazymemError as error:
                log.info("the server did not take the recording: %s", error)
            except trio.TooSlowError:
                log.info("the server did not take the recording within %g s", SEND_SECONDS)


def maybe_recording(
    settings: MountSettings, client: Client, touches: Touches, written_pages: int, survival: Survival
) -> MountRecording | None:
    """What was asked for on the command line, or by a server that learns.

    A run that goes on with written pages (`written_pages` of them) does not start where the snapshot does: such a one
    is recorded only if the user says so. Nor does one that goes on with a mount: it goes on with what was recorded.
    """
    if survival.continues:
        if not survival.record.contents.notes.get(RECORDING_NOTE):  # there is none, or it has ended
            return None
        written_pages = 0
    learn = bool(client.welcome.capabilities & Capability.LEARN) and not written_pages
    if settings.record_file is None and not learn:
        return None
    return MountRecording(touches, client, settings.record_seconds, settings.record_file, learn, survival.record)
