"""What the filling process does: brings a hashed snapshot's working set, then the rest, into its daemon's cache."""

from __future__ import annotations

import logging
import os

import msgspec
import trio
from msgspec import structs

from lazymem.cli.confinement import confine_filler
from lazymem.cli.fillprocess import FillOrder, FillPipe, FillReport, FillStart, give_way
from lazymem.cli.groups import cause_of
from lazymem.errors import LazymemError, StoreError
from lazymem.fetch.client import Client, resume
from lazymem.fetch.coming import Coming
from lazymem.fetch.fill import Fill
from lazymem.fetch.headstart import HeadStart, maybe_head_start
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.prefetch import Prepager, prepager
from lazymem.pages import PageRange
from lazymem.settings import MountSettings
from lazymem.store.cachefolder import CacheFolder, open_cache
from lazymem.store.origin import RamOrigin
from lazymem.store.pagemap import PageMap
from lazymem.store.pristine import PristinePages
from lazymem.wire.messages import Welcome

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.1
LOOK_SECONDS = 0.01
TURN_LOOK_SECONDS = 0.05
"""How long after the demands' connection ours may come back, and nobody waits for it."""

WHOLE_BLOCKS_SECONDS = 0.01
"""Over a link with shorter round trips than this, what surrounds recorded pages comes along: half as much again for the
wire, and a tenth of the READs. Not less, since a first answer beside an emulator that starts takes 7 ms over a link of
one."""

NEAR_SECONDS = 0.001
"""A round trip to a server on this host is shorter; behind a tunnel whose near end is here, it is longer as a rule."""

NEAR_BYTES_PER_SECOND = 200e6
"""What a server on this host is taken for until answers tell, so that whole leaves are asked for from the beginning: a
rate for which no equal pages are copied. (Should it be slower, 1.6 MB are out at first.)"""

STUCK_SECONDS = 2.0
"""Nothing asked for, nothing held: a sweep ended and left pages that the server refuses, or that fail verification."""


def fill(settings: MountSettings, order: FillOrder, pipe: FillPipe, last_demand: LastDemand) -> None:
    """Blocking: until everything is held, or the daemon is gone.

    Raises:
        LazymemError: it cannot go on; the daemon then does it itself.
    """
    try:
        trio.run(_fill, settings, order, pipe, last_demand)
    except BaseExceptionGroup as group:
        raise cause_of(group) from group


async def _fill(settings: MountSettings, order: FillOrder, pipe: FillPipe, last_demand: LastDemand) -> None:
    """Opens what it needs and connects while the daemon opens its own; then begins."""
    origin = RamOrigin(order.identity, order.size_bytes, order.root)
    welcome = msgspec.msgpack.decode(order.welcome, type=Welcome)
    maybe_early = _maybe_head_start(settings, welcome) if last_demand.can_be_sent else None
    cache = open_cache(settings.cache_dir, origin)
    confine_filler(settings)
    if maybe_early is not None:
        maybe_early.say_hello()

    async def wait_turn() -> None:
        while not last_demand.can_be_sent:  # noqa: ASYNC110  # another process says so
            await trio.sleep(TURN_LOOK_SECONDS)

    async with trio.open_nursery() as nursery:
        # Waits for a server that is away; demands, which somebody waits for, come back before.
        client = resume(
            nursery,
            settings.servers,
            welcome,
            settings.link,
            wait_turn=wait_turn,
            guesses_only=True,
            maybe_head_start=maybe_early,
        )
        sums = _Sums(client, order.sums)
        nursery.start_soon(sums.fetch)
        maybe_start = await pipe.maybe_start()
        if maybe_start is not None:
            nursery.start_soon(_end_with_daemon, pipe, nursery.cancel_scope)
            await _bring(origin, cache, order, maybe_start, client, sums, pipe, last_demand, nursery)
        nursery.cancel_scope.cancel()


async def _bring(
    origin: RamOrigin,
    cache: CacheFolder,
    order: FillOrder,
    start: FillStart,
    client: Client,
    sums: _Sums,
    pipe: FillPipe,
    last_demand: LastDemand,
    nursery: trio.Nursery,
) -> None:
    """
    Raises:
        StoreError: the disk refused; or this cache is not the daemon's.
    """
    if start.maybe_held_fd is not None:
        _check_same(start.maybe_held_fd, cache)
    maybe_written = None
    if order.template:
        os.close(start.written_fd)
    else:
        maybe_written = PageMap(start.written_fd, origin.pages)
    upper = cache.digests.maybe_upper(order.root) or await client.fetch_upper()
    pristine = PristinePages(origin, cache, upper, maybe_written)
    sums.tell(pristine)
    guesses = prepager(
        pristine.next_missing,
        origin.pages,
        recorded=start.recorded,
        whole_blocks=lambda: order.everything and work.round_trip_seconds < WHOLE_BLOCKS_SECONDS,
        sweep=order.everything,
        # A page of its own for each leaf, ahead of the rest, costs more than it saves where the link is fast.
        maybe_leaf_missing=lambda pages: pristine.copies_pay and pristine.missing_leaves(pages),
    )
    coming = Coming(origin.pages, start.coming_fd)
    os.close(start.coming_fd)
    round_trip_seconds = min(start.round_trip_seconds, client.best_round_trip_seconds)
    is_near = client.is_on_this_host and round_trip_seconds < NEAR_SECONDS
    work = Fill(
        client,
        pristine,
        origin.pages,
        guesses,
        last_demand,
        coming,
        pipe.tell_kept,
        round_trip_seconds,
        NEAR_BYTES_PER_SECOND if is_near else 0.0,
    )
    pristine.wire_bytes_per_second = lambda: work.bytes_per_second
    nursery.start_soon(work.run)
    watch = _Watch(client, work, pristine, guesses, pipe)
    await (watch.wait_all_held() if order.everything else watch.wait_idle())


def _check_same(daemons_map_fd: int, cache: CacheFolder) -> None:
    """Raises StoreError: both found a damaged cache, say, and one of them set aside what the other had made. Or nobody
    knows."""
    try:
        is_same = os.path.sameopenfile(daemons_map_fd, cache.held.fileno())
    except OSError as error:
        raise StoreError(f"cannot look at the daemon's cache: {error.strerror}") from error
    finally:
        os.close(daemons_map_fd)
    if not is_same:
        raise StoreError("it opened another cache than the daemon, which was made anew meanwhile")


def _maybe_head_start(settings: MountSettings, welcome: Welcome) -> HeadStart | None:
    name = settings.servers[0].name or welcome.name
    return maybe_head_start(settings.servers, name, settings.link)


class _Sums:
    """The leaves', fetched while nothing else is. Without them, each page is verified by itself. `digest`: the
    manifest's, of all of them; empty: it names none."""

    def __init__(self, client: Client, digest: bytes) -> None:
        self._client = client
        self._digest = digest
        self._maybe_sums: bytes | None = None
        self._maybe_pristine: PristinePages | None = None

    async def fetch(self) -> None:
        if not self._digest:
            return
        try:
            self._maybe_sums = await self._client.maybe_sums()
        except LazymemError as error:
            _warn_of(error)
        self._tell()

    def tell(self, pristine: PristinePages) -> None:
        """Have it know them, once they are here."""
        self._maybe_pristine = pristine
        self._tell()

    def _tell(self) -> None:
        if self._maybe_pristine is None or self._maybe_sums is None:
            return
        try:
            self._maybe_pristine.know_sums(self._maybe_sums, self._digest)
        except LazymemError as error:
            _warn_of(error)


def _warn_of(error: LazymemError) -> None:
    log.warning("the leaves' sums are of no use, so each page is verified by itself: %s", error)


class _Watch:
    """Looks every few milliseconds; reports less often."""

    def __init__(self, client: Client, work: Fill, pristine: PristinePages, guesses: Prepager, pipe: FillPipe) -> None:
        self._client = client
        self._work = work
        self._pristine = pristine
        self._guesses = guesses
        self._pipe = pipe
        self._reported_at = 0.0
        self._hurries = guesses.set_is_coming

    async def wait_idle(self) -> None:
        """Until what was asked for is here."""
        while self._guesses.set_is_coming or self._work.is_busy:
            await self._look_again()
        self._finish()

    async def wait_all_held(self) -> None:
        """Until no page is missing.

        Raises:
            StoreError: nothing is on its way any more, and some still are.
        """
        whole = PageRange(0, self._pristine.total_pages)
        start, moved_at = 0, trio.current_time()
        while (
            found := self._pristine.next_missing(PageRange(start, whole.end - start), 1)
            or self._pristine.next_missing(whole, 1)
        ) is not None:
            now = trio.current_time()
            if found.start != start or self._work.is_busy or self._work.has_left_out:
                start, moved_at = found.start, now
            elif now - moved_at > STUCK_SECONDS:
                raise StoreError(f"page {found.start} and maybe more cannot be brought")
            await self._look_again()
        self._finish()

    async def _look_again(self) -> None:
        now = trio.current_time()
        if self._hurries and not self._guesses.set_is_coming:
            self._hurries = False
            give_way()
        if now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            self._pipe.report(self._report())
            self._work.look_at_left_out()
        await trio.sleep(LOOK_SECONDS)

    def _finish(self) -> None:
        self._pipe.tell_end(structs.replace(self._report(), done=True))

    def _report(self) -> FillReport:
        link = self._client.statistics()
        return FillReport(
            held_pages=self._pristine.recount(),
            brought_pages=self._work.brought_pages,
            in_flight_pages=self._work.in_flight_pages,
            wire_received_bytes=link.wire_received_bytes,
            wire_sent_bytes=link.wire_sent_bytes,
            set_is_coming=self._guesses.set_is_coming,
        )


async def _end_with_daemon(pipe: FillPipe, scope: trio.CancelScope) -> None:
    await pipe.wait_daemon_gone()
    scope.cancel()
