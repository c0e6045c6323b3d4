"""The mount daemon put together: client, scheduler, store (`mountstore`), FUSE operations, and their order at start and
end.

Start: connect, open cache and state, mount, serve, tune, ready. So a server that is not there leaves no mount behind.
End: the mount is gone first (its unmount stores what the guest wrote), then the files are closed.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import trio

from lazymem.cli.fillprocess import FillOrder, FillProcess
from lazymem.cli.fillwatch import tell_link, watch_fill
from lazymem.cli.mountfiles import SmallFiles, maybe_manifest, vmstate_bytes
from lazymem.cli.mountrecording import ServersSet, maybe_recording
from lazymem.cli.mountstatus import MAP_XATTR, MountStatus
from lazymem.cli.mountstore import open_store
from lazymem.cli.mountwatch import Watch
from lazymem.cli.nextdaemon import wait_copied
from lazymem.cli.restart import Restart
from lazymem.cli.supervised import Supervised
from lazymem.cli.survival import Survival
from lazymem.errors import MountError
from lazymem.fetch.adopting import Adopting, ToldToBoth
from lazymem.fetch.client import Client, connect, resume
from lazymem.fetch.headstart import HeadStart
from lazymem.fetch.prefetch import Prepager, prepager
from lazymem.fetch.scheduler import Scheduler
from lazymem.fs import mountinfo, readahead, session, tuning
from lazymem.fs.agreement import Agreement
from lazymem.fs.channel import Channel
from lazymem.fs.faultaddresses import FaultAddresses
from lazymem.fs.lifetime import Lifetime
from lazymem.fs.operations import RUN_XATTR, STATUS_XATTR, Operations
from lazymem.fs.pagecache import PageCache
from lazymem.fs.readahead import ReadAheads
from lazymem.fs.readorder import ReadOrder
from lazymem.fs.refused import Refused
from lazymem.fs.session import MountOptions
from lazymem.fs.tree import DIGESTS_INODE, WRITTEN_INODE, Tree
from lazymem.fs.writeback import WritebackPace
from lazymem.pages import PageRange
from lazymem.settings import MountSettings, Prefetch, servers_text
from lazymem.snapshot.manifest import Manifest
from lazymem.store.adoption import Adoption
from lazymem.store.coarsemap import coarse_map
from lazymem.store.guestram import GuestRam
from lazymem.store.origin import RamOrigin
from lazymem.store.pristine import PristinePages
from lazymem.store.touches import Touches
from lazymem.wire.messages import Welcome

log = logging.getLogger(__name__)

WELCOME_NOTE = "welcome"
"""The server's first word, in the mount's record: what a next daemon knows of the snapshot while the server is away."""

MIN_ORDERED_SECONDS = 0.0005
"""Of faster answers the kernel's read-ahead of a touch takes no time that an order would save. (Over slow links it is
refused, and while a recorded set comes, so that counting faults would only cost.)"""

Ready = Callable[[tuple[str, ...]], None]
"""Called once, when the mount answers, with lines that the user should read."""

Progress = Callable[[Callable[[], bytes]], Awaitable[None]]
"""A task that gets what makes a status record (JSON), until it is cancelled."""


async def run(
    settings: MountSettings,
    options: MountOptions,
    ready: Ready,
    progress: Progress | None,
    survival: Survival,
    again: Restart,
    maybe_filler: FillProcess | None = None,
    maybe_head_start: HeadStart | None = None,
) -> None:
    """Serve the mount from start to end; `ready` is called once it answers. `progress` runs beside it.

    `survival` says whether the mount is there already; `again` how a next daemon is started. `maybe_filler`: brings the
    rest of a hashed snapshot; without it, the daemon does that itself. `maybe_head_start`: a connection that was begun.

    Raises:
        LazymemError: it could not be started; nothing is left mounted that was not there.
    """
    if survival.mount_is_over:
        await trio.to_thread.run_sync(survival.clear_away)
        return
    # The store is around the nursery: closed once no task is left that could use it.
    async with AsyncExitStack() as opened, trio.open_nursery() as nursery:
        client = await _client(nursery, settings, survival, maybe_head_start)
        await _serve(client, settings, options, ready, progress, maybe_filler, nursery, opened, survival, again)
        nursery.cancel_scope.cancel()


async def _serve(
    client: Client,
    settings: MountSettings,
    options: MountOptions,
    ready: Ready,
    progress: Progress | None,
    maybe_filler: FillProcess | None,
    nursery: trio.Nursery,
    opened: AsyncExitStack,
    survival: Survival,
    again: Restart,
) -> None:
    manifest = maybe_manifest(client.welcome)
    vmstate_bytes(client.welcome, manifest)  # refuses a wrong one before anything is made or fetched
    origin = RamOrigin(
        client.identity, client.welcome.ram_bytes, bytes.fromhex(manifest.ram_root) if manifest else None
    )
    maybe_order = _maybe_order(client, settings, origin, manifest)
    if maybe_filler is not None and maybe_order is not None:
        maybe_filler.last_demand.can_be_sent = client.statistics().connected
        maybe_filler.prepare(maybe_order)
    servers_set = ServersSet(survival.record, asks=not survival.continues)
    nursery.start_soon(servers_set.load, client, settings)
    pristine, state = await open_store(client, settings, origin, survival)
    maybe_set = await servers_set.maybe_set()
    recorded = maybe_set.runs if maybe_set is not None else ()
    everything = settings.prefetch is Prefetch.ALL
    if maybe_filler is not None and (maybe_order is None or not (everything or recorded)):
        nursery.start_soon(maybe_filler.end)
        maybe_filler = None
    maybe_prepager = None
    if settings.prefetch is not Prefetch.NONE:
        maybe_prepager = prepager(
            pristine.next_to_guess,
            origin.pages,
            recorded=recorded if maybe_filler is None else (),
            sweep=everything and maybe_filler is None,
            maybe_leaf_missing=pristine.missing_leaves,
            others_bring_set=lambda: maybe_filler is not None and maybe_filler.latest.set_is_coming,
        )
    maybe_adopting = _maybe_adopting(client, pristine, maybe_prepager, lambda: scheduler)
    scheduler = Scheduler(
        client,
        pristine,
        nursery,
        deadline_seconds=settings.deadline_seconds,
        prefetcher=ToldToBoth(maybe_prepager, maybe_adopting) if maybe_prepager and maybe_adopting else maybe_prepager,
        last_demand=maybe_filler.last_demand if maybe_filler is not None else None,
        maybe_coming=maybe_filler.share(origin.pages) if maybe_filler is not None else None,
    )
    if maybe_filler is not None and maybe_order is not None and maybe_prepager is not None:
        maybe_written_fd = state.written.fileno() if state is not None else None
        held_fd = pristine.cache.held.fileno()
        maybe_filler.begin(origin.pages, recorded, maybe_written_fd, client.best_round_trip_seconds, held_fd)
        if readahead.SLOW_SECONDS <= client.best_round_trip_seconds < math.inf:
            client.connect_for_guesses()
        nursery.start_soon(tell_link, client, maybe_filler.last_demand)
        nursery.start_soon(watch_fill, maybe_filler, maybe_order, recorded, pristine, scheduler, maybe_prepager)
    pristine.wire_bytes_per_second = lambda: scheduler.background_bytes_per_second
    if maybe_adopting is not None:
        nursery.start_soon(maybe_adopting.run)
    ram = GuestRam(pristine, state, scheduler, settings.deadline_seconds)
    opened.push_async_callback(_close, ram)
    page_cache = None
    if settings.prefetch is not Prefetch.NONE:
        page_cache = PageCache(
            pristine,
            everything=everything,
            demands_wait=lambda: scheduler.demands_wait,
            fetching=lambda: scheduler.fetching or (maybe_filler is not None and maybe_filler.is_filling),
        )
        if settings.prefetch is Prefetch.WORKING_SET:  # else all is filled, and what is held first is the set
            page_cache.prefer(sorted(recorded))

    def set_is_coming() -> bool:
        return (maybe_prepager is not None and maybe_prepager.set_is_coming) or (
            maybe_filler is not None and maybe_filler.latest.set_is_coming
        )

    def order_pays() -> bool:
        near = MIN_ORDERED_SECONDS <= scheduler.answer_seconds() < readahead.SLOW_SECONDS
        return near and not set_is_coming()

    touches = Touches(origin.pages, pristine.states, recorded)
    recording = maybe_recording(settings, client, touches, ram.written_pages, survival)
    watch = Watch(page_cache, None, None, None, None)
    if recorded or recording is not None or (maybe_filler is not None and everything):
        refused = Refused(origin.pages, ram.is_at_hand)
        read_aheads = ReadAheads(
            origin.pages,
            ram.is_at_hand,
            lambda pages: (
                set_is_coming()
                or (
                    maybe_filler is not None
                    and maybe_filler.is_filling
                    and readahead.SLOW_SECONDS <= scheduler.answer_seconds() < math.inf
                    and not (maybe_prepager is not None and maybe_prepager.are_of_a_stream(pages))
                )
            ),
            refused.refuse,
        )
        watch = Watch(page_cache, read_aheads, refused, touches, recording)
    try:
        status = MountStatus(
            settings,
            client,
            scheduler,
            ram,
            lambda: coarse_map(
                origin.pages,
                pristine.held_at,
                pristine.given_at,
                ram.written_at,
                page_cache.brought_at if page_cache is not None else None,
            ),
            page_cache,
            touches if recorded else None,
            maybe_filler,
            survival,
        )
        if progress is not None:
            nursery.start_soon(progress, status.to_json)
        await _mount_and_serve(
            client, manifest, ram, scheduler, settings, options, status, ready, watch, order_pays, survival, again
        )
    finally:
        with trio.CancelScope(shield=True):
            await scheduler.wait_kept()


def _maybe_order(
    client: Client, settings: MountSettings, origin: RamOrigin, manifest: Manifest | None
) -> FillOrder | None:
    """None: what an unhashed snapshot is to be verified against, only this process knows."""
    if origin.root is None or manifest is None:
        return None
    return FillOrder(
        origin.identity,
        origin.size_bytes,
        origin.root,
        everything=settings.prefetch is Prefetch.ALL,
        template=settings.template,
        sums=bytes.fromhex(manifest.ram_sums or ""),
        welcome=msgspec.msgpack.encode(client.welcome),
    )


def _maybe_adopting(
    client: Client, pristine: PristinePages, maybe_prepager: Prepager | None, scheduler: Callable[[], Scheduler]
) -> Adopting | None:
    """`scheduler`: of what is not made yet."""
    if pristine.maybe_candidates is None:
        return None
    if maybe_prepager is None or not client.tells_leaves:
        pristine.maybe_candidates.finish()
        return None

    def look_again() -> None:
        maybe_prepager.brought(PageRange(0, 1))  # of what does not matter: a sweep is worth it
        scheduler().look_for_guesses()

    adoption = Adoption(pristine, pristine.maybe_candidates)
    return Adopting(client, adoption, lambda ranges: scheduler().prefetch(ranges), look_again)


async def _client(
    nursery: trio.Nursery, settings: MountSettings, survival: Survival, maybe_head_start: HeadStart | None
) -> Client:
    """A mount that goes on does so without its server, if need be."""
    if survival.continues:
        welcome = msgspec.msgpack.decode(survival.record.contents.notes[WELCOME_NOTE], type=Welcome)
        return resume(nursery, settings.servers, welcome, settings.link)
    client = await connect(nursery, settings.servers, settings.link, maybe_head_start=maybe_head_start)
    survival.record.note(WELCOME_NOTE, msgspec.msgpack.encode(client.welcome))
    return client


async def _close(ram: GuestRam) -> None:
    with trio.CancelScope(shield=True):
        await ram.close()


async def _mount_and_serve(
    client: Client,
    manifest: Manifest | None,
    ram: GuestRam,
    scheduler: Scheduler,
    settings: MountSettings,
    options: MountOptions,
    status: MountStatus,
    ready: Ready,
    watch: Watch,
    order_pays: Callable[[], bool],
    survival: Survival,
    again: Restart,
) -> None:
    path = str(settings.mountpoint)
    vmstate_size = vmstate_bytes(client.welcome, manifest)
    tree = Tree(
        ram_bytes=client.welcome.ram_bytes,
        manifest_bytes=len(client.welcome.manifest) if manifest else 0,
        vmstate_bytes=vmstate_size,
        has_writes=lambda: ram.written_pages > 0,
        others=options.allow_other,
        digests_bytes=ram.run_files.tree_bytes,
        written_bytes=ram.run_files.written_bytes,
    )
    files = SmallFiles(client, manifest)
    xattrs: dict[bytes, Callable[[], bytes]] = {
        STATUS_XATTR: status.to_json,
        RUN_XATTR: status.run_to_json,
        MAP_XATTR: status.map_to_json,
    }
    async with trio.open_nursery() as nursery:
        wish = await nursery.start(_wish_to_end)
        nursery.start_soon(survival.note_wish, wish)
        async with _mounted(path, servers_text(settings.servers), options, survival) as (descriptor, mounted):
            faults = FaultAddresses(mounted.device, order_pays)
            nursery.start_soon(faults.run, lambda: ram.is_whole)
            channel = Channel(
                descriptor,
                tree,
                survival.writes_after_predecessor(ram, nursery),
                scheduler,
                watch.maybe_on_read,
                watch.maybe_on_write,
                Agreement(survival.record, continues=survival.continues),
                maybe_order=ReadOrder(faults, ram.is_at_hand, order_pays),
                takes_back=not survival.continues,
            )
            lifetime = Lifetime(path, mounted.device, descriptor, channel, wish)
            supervised = Supervised(survival, again, channel.drain)
            operations = Operations(
                tree,
                ram,
                files.read,
                xattrs,
                mounted_ns=survival.record.contents.mounted_ns,
                on_open=faults.watch,
                on_release=lifetime.released,
                on_upgrade=supervised.upgrade,
                template=ram.template,
                parts={DIGESTS_INODE: ram.run_files.read_tree, WRITTEN_INODE: ram.run_files.read_written},
            )
            session.attach(operations, channel.take_library_end())
            notices = (*(manifest.resume_notices if manifest else ()), *survival.notices, *ram.notices)
            pace = WritebackPace(mounted)
            nursery.start_soon(_announce, path, mounted, ready, notices, pace)
            if settings.prefetch is not Prefetch.NONE and not survival.continues and not ram.written_pages:
                nursery.start_soon(files.fetch_ahead, vmstate_size)
            nursery.start_soon(watch.run, mounted, wish)
            nursery.start_soon(supervised.run)
            await lifetime.serve()
            survival.forget_all()
            pace.stop()
            session.detach()
            channel.close()
        await watch.finish()
        nursery.cancel_scope.cancel()
    log.info("%s is unmounted", path)


@asynccontextmanager
async def _mounted(
    path: str, source: str, options: MountOptions, survival: Survival
) -> AsyncIterator[tuple[int, mountinfo.Mount]]:
    """Mounted; and in the end unmounted, unless somebody has a next daemon go on: a dead mount would hang whoever looks
    at it."""
    wait_copied(survival)  # whoever is killed with a mount has left a copy; it was made long ago
    maybe_found = survival.maybe_mount()
    if maybe_found is not None:
        descriptor, mounted = maybe_found
    else:
        descriptor = await trio.to_thread.run_sync(session.mount, path, source, options)
        maybe_mounted = mountinfo.maybe_mount_at(path)
        assert maybe_mounted is not None, "mounted a moment ago"
        mounted = maybe_mounted
        survival.mounted(descriptor, mounted)
    try:
        yield descriptor, mounted
    finally:
        left = None if survival.outlives_us else mountinfo.maybe_mount_at(path)
        if left is not None and (left.mount_id, left.device) == (mounted.mount_id, mounted.device):
            session.unmount(path, lazy=True)  # an error ended us; lazily, since nobody serves its flush any more
        os.close(descriptor)


async def _announce(
    path: str, mounted: mountinfo.Mount, ready: Ready, notices: tuple[str, ...], pace: WritebackPace
) -> None:
    """Turn the kernel's knobs, see the mount answer, say so."""

    def tune_and_look() -> None:
        tuning.ensure_fusectl()
        tuning.apply(tuning.knobs(0, mounted.minor))
        try:
            os.stat(path)
        except OSError as error:
            raise MountError(f"the mount on {path} does not answer: {error.strerror}") from error

    await trio.to_thread.run_sync(tune_and_look, abandon_on_cancel=True)
    gc.freeze()  # or the collector looks at all that start-up made, 20 ms at a time, while a fault waits
    # Logged first: whoever is told looks for it there at once.
    log.info("%s is ready (pid %d)", path, os.getpid())
    for notice in notices:
        log.warning("%s: %s", path, notice)
    ready(notices)
    pace.start()


async def _wish_to_end(*, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED) -> None:
    """SIGTERM, ctrl-C and a closed terminal are a wish to unmount, also while the mount is still being made."""
    wish = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started(wish)
        async for _ in signals:
            wish.set()
