"""The client of a snapshot's servers: two lanes, one identity, connections that come back. A `store.source.PageSource`.

Demand and guesses have a connection each, so that on ours side nothing demanded queues behind a guess (rule 5). The
background one is opened when the first guess is made. A lost server stalls requests and never fails them (rule 7);
a server that publishes other RAM at the same address is not the one that was lost, and is refused as long as it does.
Which of several servers is tried next: `servers`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from lazymem.digests import DIGEST_BYTES, TreeShape
from lazymem.errors import LazymemError, RemoteProtocolError, ServerRefusedError, ServerUnreachableError
from lazymem.fetch.backoff import Backoff
from lazymem.fetch.headstart import HeadStart
from lazymem.fetch.lane import Lane, Turn
from lazymem.fetch.requests import DigestRequest, FetchRequest, FileRequest, LeafRequest, StoreRequest
from lazymem.fetch.servers import DialAddress, Servers, dial_endpoint
from lazymem.fetch.session import Session
from lazymem.fetch.starter import OnEarly, OnFetched, OnHere
from lazymem.fetch.stats import LinkCounters, LinkStatistics
from lazymem.pages import PAGE_SHIFT, Fetched, PageRange
from lazymem.settings import LinkSettings, ServerAddress
from lazymem.wire.messages import Capability, PublishedFile, Welcome

INLINE_DECODE_PAGES = 32
"""zstd gives back 128 KiB in about 80 us; the way to a thread and back costs as much. Larger answers go there."""

R = TypeVar("R", DigestRequest, FileRequest, LeafRequest, StoreRequest)

FILE_PIECE_BYTES = 1 << 20
"""One READ_FILE: the wire's largest answer."""


class FetchHandle:
    """One fetch that was started."""

    __slots__ = ("_client", "_request")

    def __init__(self, client: Client, request: FetchRequest) -> None:
        self._client = client
        self._request = request

    def cancel(self) -> None:
        """The answer is not wanted any more; `on_done` is not called. After the end: nothing."""
        self._client._cancel(self._request)

    def promote(self, pages: PageRange, on_early: OnEarly) -> None:
        """As `Handle.promote`. A guess that is not on the background connection yet changes the lane."""
        self._client._promote(self._request)
        self._request.tell_early(pages, on_early)


class Client:
    """Made by `connect` or `resume`. All methods belong to trio's thread."""

    def __init__(
        self,
        welcome: Welcome,
        servers: Servers,
        link: LinkSettings,
        counters: LinkCounters,
        maybe_open: tuple[Session, ServerAddress] | None = None,
        wait_turn: Turn = trio.lowlevel.checkpoint,
        *,
        guesses_only: bool = False,
    ) -> None:
        """`maybe_open`: a session to begin with, and whom it is with. `wait_turn`: awaited before each other try.
        `guesses_only`: nobody here demands, so guesses wait for no demand connection."""
        self.welcome = welcome
        self._servers = servers
        self._link = link
        self._counters = counters
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        rng = random.Random()
        self._demand = Lane("demand", self._connect, self._backoff(rng), maybe_open, wait_turn=wait_turn)
        self._background = Lane(
            "background",
            self._connect,
            self._backoff(rng),
            on_lost=self._rescue_promoted,
            # What nobody waits for comes back behind what somebody does.
            wait_turn=wait_turn if guesses_only else self._demand.wait_connected,
        )

    # ---- what is published

    @property
    def identity(self) -> bytes:
        """32 bytes; equal for equal RAM only."""
        return self.welcome.identity

    @property
    def total_pages(self) -> int:
        return self.welcome.ram_bytes >> PAGE_SHIFT

    @property
    def best_round_trip_seconds(self) -> float:
        """Shortest time that a handshake or ping took."""
        return min(self._demand.best_round_trip_seconds, self._background.best_round_trip_seconds)

    @property
    def is_on_this_host(self) -> bool:
        """Whether guesses have a connection, and its other end is here."""
        return self._background.is_on_this_host

    def connect_for_guesses(self) -> None:
        """Without waiting for the first: over a slow link it would come two round trips later."""
        self._background.connect_soon()

    @property
    def wire_received_bytes(self) -> int:
        return self._counters.wire_received_bytes

    # ---- pages

    def start_fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool, background: bool, on_done: OnFetched
    ) -> FetchHandle:
        """Send a fetch now, from the calling task; `on_done` gets the answer, or the error that ended it.

        `ranges`: ascending, not overlapping, inside the RAM. Waits without limit for a lost server.
        """

        def ended(request: FetchRequest, maybe_error: LazymemError | None) -> None:
            self._ended(request, maybe_error, on_done)

        request = FetchRequest(ranges, want_leaves, background, ended)
        (self._background if background else self._demand).submit(request)
        return FetchHandle(self, request)

    def start_lone(self, pages: PageRange, want_leaves: bool, on_here: OnHere, on_done: OnFetched) -> None:
        """As `FetchStarter.start_lone`."""

        def ended(request: FetchRequest, maybe_error: LazymemError | None) -> None:
            self._ended(request, maybe_error, on_done)

        self._demand.submit_lone(FetchRequest((pages,), want_leaves, False, ended, on_here))

    def ask(self, pages: PageRange) -> bool:
        """As `FetchStarter.ask`."""
        return self._demand.ask(pages)

    def maybe_asked_answer(self) -> bytes | memoryview | None:
        """As `FetchStarter.maybe_asked_answer`."""
        return self._demand.maybe_asked_answer()

    def end_asked(self) -> None:
        """As `FetchStarter.end_asked`."""
        self._demand.end_asked()

    def enter_asked(self, on_here: OnHere, on_done: OnFetched) -> None:
        """As `FetchStarter.enter_asked`."""

        def ended(request: FetchRequest, maybe_error: LazymemError | None) -> None:
            self._ended(request, maybe_error, on_done)

        self._demand.enter_asked(lambda pages: FetchRequest((pages,), False, False, ended, on_here))

    def fileno(self) -> int:
        """The demand connection's socket, readable when answers came; -1 without one."""
        return self._demand.fileno()

    def receive_nowait(self) -> bool:
        """Act on what came on the demand connection; whether there was something. Between awaits of any task."""
        return self._demand.receive_nowait()

    def doubt(self, why: str) -> None:
        """As `FetchStarter.doubt`: the demand connection goes to the next server, if there is one."""
        if self._servers.are_several:
            self._demand.drop(ServerUnreachableError(f"left for another server: {why}"))

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        """As `PageSource.fetch`. A cancelled call cancels the request at the server too.

        Raises:
            VerificationError: the server itself says that the bytes changed.
            RemoteProtocolError: data that does not decode.
            ServerRefusedError, LocalProtocolError: the server refuses the request for good.
        """
        result: list[Fetched | LazymemError] = []
        arrived = trio.Event()

        def on_done(answer: Fetched | LazymemError) -> None:
            result.append(answer)
            arrived.set()

        handle = self.start_fetch(ranges, want_leaves=want_leaves, background=background, on_done=on_done)
        try:
            await arrived.wait()
        finally:
            handle.cancel()
        if isinstance(result[0], LazymemError):
            raise result[0]
        return result[0]

    def _ended(self, request: FetchRequest, maybe_error: LazymemError | None, on_done: OnFetched) -> None:
        if maybe_error is not None:
            on_done(maybe_error)
        elif request.compressed_pages() <= INLINE_DECODE_PAGES or self._nursery is None:
            on_done(_decoded(request))
        else:
            self._nursery.start_soon(self._decode_in_thread, request, on_done)

    async def _decode_in_thread(self, request: FetchRequest, on_done: OnFetched) -> None:
        try:
            decoded = await trio.to_thread.run_sync(_decoded, request)
        except RuntimeError:  # the host has no thread for us: others wait a millisecond
            decoded = _decoded(request)
        if not request.cancelled:
            on_done(decoded)

    def _cancel(self, request: FetchRequest) -> None:
        request.cancelled = True
        self._demand.cancel(request)
        self._background.cancel(request)

    def _promote(self, request: FetchRequest) -> None:
        request.background = False
        if self._background.take_unsent(request):
            self._demand.submit(request)

    def _rescue_promoted(self) -> None:
        for request in self._background.requests:
            if not request.background and self._background.take_unsent(request):
                self._demand.submit(request)

    # ---- what stands beside the pages

    async def fetch_upper(self) -> bytes:
        """The upper level of a hashed snapshot's digest tree: 16 bytes a leaf. Not verified.

        Raises:
            RemoteProtocolError: not of the size that the RAM needs.
        """
        leaves = TreeShape(self.welcome.ram_bytes).leaves
        request = await self._complete(lambda on_done: DigestRequest(leaves, on_done))
        if len(request.data) != leaves * DIGEST_BYTES:
            raise RemoteProtocolError(f"the server sent {len(request.data)} bytes of leaf digests for {leaves} leaves")
        return bytes(request.data)

    @property
    def tells_leaves(self) -> bool:
        """Whether the server tells leaves of an unhashed snapshot (`leaf_digests`)."""
        return not self.welcome.hashed and bool(self.welcome.capabilities & Capability.VOUCH)

    async def leaf_digests(self, leaf: int) -> bytes:
        """What the server of an unhashed snapshot vouches for of a leaf: 16 bytes a page, zeros where it does not say.
        Behind every demand, and waits without limit for a lost server.

        Raises:
            VerificationError: the server itself says that the bytes changed.
            RemoteProtocolError: not as many digests as the leaf has pages.
            ServerRefusedError, LocalProtocolError: the server refuses the request for good.
        """
        count = TreeShape(self.welcome.ram_bytes).leaf_pages(leaf)
        request = await self._complete(lambda on_done: LeafRequest(leaf, on_done))
        if len(request.data) == DIGEST_BYTES:
            return request.data * count
        if len(request.data) != count * DIGEST_BYTES:
            raise RemoteProtocolError(f"the server sent {len(request.data)} bytes of digests for {count} pages")
        return request.data

    async def read_file(self, file: PublishedFile, size_limit: int, begin: int = 0) -> bytes:
        """A whole published file, at most `size_limit` bytes, from `begin` on.

        Raises:
            ServerRefusedError: there is none, or it is larger.
            RemoteProtocolError: it ends before its size.
        """
        size = self._published_bytes(file)
        if size > size_limit:
            raise ServerRefusedError(f"the server's {file.name.lower()} has {size} bytes, more than {size_limit}")
        pieces = [
            await self.read_file_piece(file, offset, min(FILE_PIECE_BYTES, size - offset))
            for offset in range(begin, size, FILE_PIECE_BYTES)
        ]
        return b"".join(pieces)

    async def maybe_sums(self) -> bytes | None:
        """The leaves' sums of a hashed snapshot, 16 bytes a leaf, if its server has them. Not verified. On the guesses'
        connection, and waits without limit for a lost server.

        Raises:
            ServerRefusedError: it does not have them any more.
            RemoteProtocolError: fewer than it said.
        """
        if not self.welcome.capabilities & Capability.SUMS:
            return None
        size = TreeShape(self.welcome.ram_bytes).upper_bytes
        pieces = [
            await self.read_file_piece(PublishedFile.SUMS, at, min(FILE_PIECE_BYTES, size - at), background=True)
            for at in range(0, size, FILE_PIECE_BYTES)
        ]
        return b"".join(pieces)

    async def read_file_piece(
        self, file: PublishedFile, offset: int, length: int, *, background: bool = False
    ) -> bytes:
        """Exactly `length` bytes (at most 1 MiB) of a published file.

        Raises:
            ServerRefusedError: there is no such file.
            RemoteProtocolError: the file ends before.
        """
        request = await self._complete(
            lambda on_done: FileRequest(file, offset, length, on_done, background=background)
        )
        if len(request.data) != length:
            raise RemoteProtocolError(
                f"the server's {file.name.lower()} ends {length - len(request.data)} bytes before its size"
            )
        return request.data

    async def store_file(self, file: PublishedFile, data: bytes) -> None:
        """Have the server keep a file that it said it wants (`Capability.LEARN` in its welcome), of 1 MiB at most.

        Raises:
            ServerRefusedError: it does not want it any more.
            LocalProtocolError: it never did, or finds that the file makes no sense.
        """
        await self._complete(lambda on_done: StoreRequest(file, data, on_done))

    async def _complete(self, make: Callable[[Callable[[LazymemError | None], None]], R]) -> R:
        done = trio.Event()
        errors: list[LazymemError] = []

        def on_done(maybe_error: LazymemError | None) -> None:
            if maybe_error is not None:
                errors.append(maybe_error)
            done.set()

        request = make(on_done)
        lane = self._background if request.background else self._demand
        lane.submit(request)
        try:
            await done.wait()
        finally:
            lane.cancel(request)
        if errors:
            raise errors[0]
        return request

    def _published_bytes(self, file: PublishedFile) -> int:
        return {
            PublishedFile.MANIFEST: len(self.welcome.manifest),
            PublishedFile.VMSTATE: self.welcome.vmstate_bytes,
            PublishedFile.WORKING_SET: self.welcome.working_set_bytes,
        }[file]

    # ---- the connections

    def statistics(self) -> LinkStatistics:
        best = self.best_round_trip_seconds
        return LinkStatistics(
            connection=self._demand.state,
            maybe_server=str(self._demand.maybe_server) if self._demand.connected else None,
            connected=self._demand.connected,
            reconnects=self._demand.reconnects + self._background.reconnects,
            wire_received_bytes=self._counters.wire_received_bytes,
            wire_sent_bytes=self._counters.wire_sent_bytes,
            open_requests=self._demand.open_requests + self._background.open_requests,
            round_trip_seconds=None if best == math.inf else best,
        )

    async def wait_connected(self) -> None:
        """Until demands can be sent."""
        await self._demand.wait_connected()

    async def wait_lost(self) -> None:
        """Until they cannot."""
        await self._demand.wait_lost()

    def close(self) -> None:
        """End the connections; requests that are open are never answered."""
        self._scope.cancel()

    async def _run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._demand.run)
                    nursery.start_soon(self._background.run)
        finally:
            self._nursery = None
            self._demand.close()
            self._background.close()
            self._servers.close()

    async def _connect(self, maybe_lost: ServerAddress | None) -> tuple[Session, ServerAddress]:
        """One try at each server for a session with the same RAM as the first one's."""
        return await self._servers.open_again(self.welcome, maybe_lost)

    def _backoff(self, rng: random.Random) -> Backoff:
        return Backoff(self._link.backoff_base_seconds, self._link.backoff_cap_seconds, rng)


async def connect(
    nursery: trio.Nursery,
    server: ServerAddress | Sequence[ServerAddress],
    link: LinkSettings | None = None,
    *,
    dial_address: DialAddress = dial_endpoint,
    maybe_head_start: HeadStart | None = None,
) -> Client:
    """Connect for the first time; the connections then live in `nursery` until `close` or its end.

    `server`: one, or several of the same snapshot; the first that answers says which that is. One that is full is asked
    again for `link.connect_timeout_seconds`; everything else fails at once. `maybe_head_start`: taken over.

    Raises:
        ServerUnreachableError: nobody there, or gone before its welcome.
        ServerRefusedError: no such snapshot, several and none named, full, another wire version.
        RemoteProtocolError: whoever listens there speaks something else.
        TlsError: the two do not come to believe each other.
    """
    link = link or LinkSettings()
    counters = LinkCounters()
    servers = Servers(_several(server), link, counters, dial_address, maybe_head_start)
    backoff = Backoff(link.backoff_base_seconds, link.backoff_cap_seconds, random.Random())
    give_up_at = trio.current_time() + link.connect_timeout_seconds
    while True:
        try:
            session, address = await servers.open_first()
            break
        except ServerRefusedError as error:
            if not error.temporary or trio.current_time() > give_up_at:
                raise
        await trio.sleep(backoff.next_delay())
    client = Client(session.welcome, servers, link, counters, (session, address))
    nursery.start_soon(client._run)
    return client


def resume(
    nursery: trio.Nursery,
    server: ServerAddress | Sequence[ServerAddress],
    welcome: Welcome,
    link: LinkSettings | None = None,
    *,
    wait_turn: Turn = trio.lowlevel.checkpoint,
    guesses_only: bool = False,
    dial_address: DialAddress = dial_endpoint,
    maybe_head_start: HeadStart | None = None,
) -> Client:
    """As `connect`, for a mount that goes on: `welcome` is its first one, and a server that is away is waited for.
    `wait_turn`: awaited before each try to connect. `guesses_only`: for a process where nobody waits for pages; it has
    the background connection, and the other one only if something else is asked for. `maybe_head_start`: for the first
    of them; taken over."""
    link = link or LinkSettings()
    counters = LinkCounters()
    servers = Servers(_several(server), link, counters, dial_address, maybe_head_start)
    client = Client(welcome, servers, link, counters, wait_turn=wait_turn, guesses_only=guesses_only)
    (client._background if guesses_only else client._demand).connect_soon()
    nursery.start_soon(client._run)
    return client


def _several(server: ServerAddress | Sequence[ServerAddress]) -> Sequence[ServerAddress]:
    return (server,) if isinstance(server, ServerAddress) else server


def _decoded(request: FetchRequest) -> Fetched | LazymemError:
    try:
        return request.fetched()
    except RemoteProtocolError as error:
        return error
