"""What a mount says of itself: the record behind `lazymem status` and the extended attributes of its root."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from msgspec import structs, to_builtins

from lazymem import __version__
from lazymem.cli.fillprocess import FillProcess, FillReport
from lazymem.cli.survival import Survival
from lazymem.fetch.client import Client
from lazymem.fetch.scheduler import Scheduler
from lazymem.fetch.stats import FetchStatistics, LinkStatistics
from lazymem.fs.pagecache import PageCache
from lazymem.settings import MountSettings, servers_text
from lazymem.store.coarsemap import CoarseMap
from lazymem.store.guestram import GuestRam
from lazymem.store.touches import Touches

MAP_XATTR = b"user.lazymem.map"
"""Apart from the rest: it costs a millisecond or two of the loop that serves the guest's faults."""


class MountStatus:
    """Reads the parts' statistics when asked; costs nothing in between."""

    def __init__(
        self,
        settings: MountSettings,
        client: Client,
        scheduler: Scheduler,
        ram: GuestRam,
        look: Callable[[], CoarseMap],
        maybe_page_cache: PageCache | None = None,
        maybe_touches: Touches | None = None,
        maybe_filler: FillProcess | None = None,
        maybe_survival: Survival | None = None,
    ) -> None:
        """`maybe_touches`: where a working set was there to be used."""
        self._maybe_filler = maybe_filler
        self._settings = settings
        self._client = client
        self._scheduler = scheduler
        self._ram = ram
        self._maybe_page_cache = maybe_page_cache
        self._maybe_touches = maybe_touches
        self._look = look
        self._maybe_survival = maybe_survival

    def to_json(self) -> bytes:
        """The whole record: names, pages, waits in seconds, bytes on the wire, connection."""
        store, fetch, link = self._ram.statistics(), self._scheduler.statistics(), self._client.statistics()
        if self._maybe_filler is not None:
            fetch, link = _with_fill(fetch, link, self._maybe_filler.latest)
        maybe_fill = self._maybe_page_cache.statistics() if self._maybe_page_cache is not None else None
        if maybe_fill is not None:  # a guest's READs are counted apart from those that the kernel sent for us
            guests = store.reads - maybe_fill.reads
            at_hand = max(store.reads_at_hand - maybe_fill.reads, 0)
            store = structs.replace(store, reads=guests, reads_at_hand=min(at_hand, guests))
        return json.dumps(
            {
                "pid": os.getpid(),
                "version": __version__,
                "survival": to_builtins(self._maybe_survival.statistics()) if self._maybe_survival else None,
                "mountpoint": str(self._settings.mountpoint),
                "server": servers_text(self._settings.servers),
                "servers": [str(server) for server in self._settings.servers],
                "served_by": link.maybe_server,
                "snapshot": self._client.welcome.name,
                "identity": self._client.identity.hex(),
                "hashed": self._client.welcome.hashed,
                "template": self._ram.template,
                "cache": str(self._settings.cache_dir),
                "state": str(self._settings.state_dir) if self._settings.state_dir else None,
                "pages_total": store.total_pages,
                "pages_held": store.held_pages,
                "pages_written": store.written_pages,
                "candidates_used": store.candidates_used,
                "candidates_refused": store.candidates_refused,
                "pages_in_flight": fetch.in_flight_pages,
                "demand_faults": fetch.demand_faults,
                "demand_wait_p50_seconds": fetch.wait_p50_seconds,
                "demand_wait_p99_seconds": fetch.wait_p99_seconds,
                "pages_demanded": fetch.demand_pages,
                "pages_prefetched": fetch.background_pages,
                "wire_received_bytes": link.wire_received_bytes,
                "wire_sent_bytes": link.wire_sent_bytes,
                "connection": link.connection,
                "connected": link.connected,
                "reconnects": link.reconnects,
                "not_kept_because": self._scheduler.maybe_not_kept,
                "fill": to_builtins(maybe_fill) if maybe_fill is not None else None,
                "working_set": to_builtins(self._maybe_touches.statistics()) if self._maybe_touches else None,
                "store": to_builtins(store),
                "fetch": to_builtins(fetch),
                "link": to_builtins(link),
            }
        ).encode()

    def map_to_json(self) -> bytes:
        """The RAM in cells (`CoarseMap`)."""
        return json.dumps(to_builtins(self._look())).encode()

    def run_to_json(self) -> bytes:
        """What an emulator must know before it believes a vmstate (rule 6)."""
        return json.dumps(
            {
                "identity": self._client.identity.hex(),
                "written_pages": self._ram.written_pages,
                "template": self._ram.template,
                "whole": self._ram.is_whole,
                "not_kept_because": self._scheduler.maybe_not_kept,
                "hashed": self._client.welcome.hashed,
            }
        ).encode()


def _with_fill(
    fetch: FetchStatistics, link: LinkStatistics, fill: FillReport
) -> tuple[FetchStatistics, LinkStatistics]:
    """What the filling process did, added: to a user it is one mount."""
    return structs.replace(
        fetch,
        background_pages=fetch.background_pages + fill.brought_pages,
        in_flight_pages=fetch.in_flight_pages + fill.in_flight_pages,
        background_in_flight_pages=fetch.background_in_flight_pages + fill.in_flight_pages,
        prefetching=fetch.prefetching or fill.in_flight_pages > 0,
    ), structs.replace(
        link,
        wire_received_bytes=link.wire_received_bytes + fill.wire_received_bytes,
        wire_sent_bytes=link.wire_sent_bytes + fill.wire_sent_bytes,
    )
