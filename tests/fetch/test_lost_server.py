"""A server that is lost in each way that there is, over real sockets: readers wait, and go on by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from lazymem_server.serving import Serving, serve
from msgspec import structs

from lazymem.cli.fillwatch import tell_link
from lazymem.errors import IdentityError, ServerRefusedError, ServerUnreachableError
from lazymem.fetch.client import Client, connect, resume
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PageRange
from lazymem.settings import LinkSettings, ServerAddress, parse_servers
from lazymem.store.cachefolder import open_cache
from lazymem.store.pristine import PristinePages
from tests.fetch.conftest import ADDRESS, Joined, Network
from tests.support import skips
from tests.support.badlink import BadLink, Mode
from tests.support.peer import Peer, is_background, make_ram
from tests.support.privileges import maybe_own_network
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import origin_of

PAGES = 600
HASTY = LinkSettings(
    backoff_base_seconds=0.01,
    backoff_cap_seconds=0.05,
    ping_interval_seconds=0.1,
    ping_timeout_seconds=0.5,
    trickle_seconds=0.5,
    next_server_seconds=0.5,
    handshake_timeout_seconds=20.0,
)
"""A server that is silent for a moment, as any is on a busy machine, is lost: for tests that this is no harm to."""

PATIENT = structs.replace(HASTY, ping_timeout_seconds=20.0, trickle_seconds=20.0, next_server_seconds=20.0)
"""Only a connection that ends is lost."""

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "web", PAGES, seed=4)


@asynccontextmanager
async def serving(folder: Path, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        made: Serving = await nursery.start(partial(serve, [folder], [address]))
        yield made.addresses[0]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(addresses: str, link: LinkSettings = HASTY) -> AsyncIterator[Client]:
    async with trio.open_nursery() as nursery:
        yield await connect(nursery, parse_servers(addresses), link)
        nursery.cancel_scope.cancel()


async def check(client: Client, snapshot: BuiltSnapshot, start: int, *, background: bool = False) -> None:
    """All bytes of some pages, however long they take: a test's time limit is the only one."""
    pages = PageRange(start, 64)
    fetched = await client.fetch([pages], background=background)
    got = b"".join(bytes(run.pages.length_bytes) if run.data is None else bytes(run.data) for run in fetched.runs)
    assert got == snapshot.ram[pages.offset_bytes : pages.offset_bytes + pages.length_bytes]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # threads and sockets change it
        await trio.sleep(0.01)


def _silent(link: BadLink) -> None:
    link.mode = Mode.SILENT


def _trickling(link: BadLink) -> None:
    link.mode = Mode.TRICKLE


def _refusing(link: BadLink) -> None:
    link.mode = Mode.REFUSED
    link.reset()


FAULTS: dict[str, Callable[[BadLink], None]] = {
    "cut": BadLink.cut,
    "reset": BadLink.reset,
    "half-open": BadLink.forget,
    "silent": _silent,
    "slow to death": _trickling,
    "gone for a while": _refusing,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_reader_that_waits_goes_on(fault: str, snapshot: BuiltSnapshot) -> None:
    """The answer is on its way when it happens; nobody does anything but to mend the link."""
    async with serving(snapshot.folder) as address:
        with BadLink(address) as link:
            async with connected(link.address) as client:
                await check(client, snapshot, 0)
                await check(client, snapshot, 0, background=True)
                link.mode = Mode.SILENT  # so that the answer is still to come
                async with trio.open_nursery() as readers:
                    readers.start_soon(check, client, snapshot, 100)
                    readers.start_soon(partial(check, client, snapshot, 200, background=True))
                    await until(lambda: client.statistics().open_requests == 2)
                    link.mode = Mode.GOOD if fault in ("cut", "reset", "half-open") else link.mode
                    FAULTS[fault](link)
                    if fault not in ("cut", "reset"):
                        await client.wait_lost()
                    link.mode = Mode.GOOD
                await check(client, snapshot, 300)


@pytest.mark.parametrize("fault", ["half-open", "silent"])
async def test_a_dead_connection_is_noticed_though_nobody_asks(fault: str, snapshot: BuiltSnapshot) -> None:
    async with serving(snapshot.folder) as address:
        with BadLink(address) as link:
            async with connected(link.address) as client:
                await check(client, snapshot, 0)
                FAULTS[fault](link)
                await client.wait_lost()
                link.mode = Mode.GOOD
                await client.wait_connected()
                assert client.statistics().open_requests == 0
                await check(client, snapshot, 100)


async def test_a_server_that_trickles_is_left_for_another(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Each byte says that it lives, and it is of no use."""
    other = f"unix:{tmp_path}/other"
    async with serving(snapshot.folder) as address:
        with BadLink(address) as slow:
            async with connected(f"{slow.address},{other}") as client:
                await check(client, snapshot, 0)
                assert client.statistics().maybe_server == slow.address, "nobody else is there yet"
                async with serving(snapshot.folder, other):
                    slow.mode = Mode.TRICKLE
                    await check(client, snapshot, 100)
                    assert client.statistics().maybe_server == other


async def test_a_server_that_is_slow_and_not_dead_is_left_alone(snapshot: BuiltSnapshot) -> None:
    """Its answer takes longer than a silence may last."""
    settings = structs.replace(HASTY, ping_timeout_seconds=3.0, trickle_seconds=3.0)
    async with serving(snapshot.folder) as address:
        with BadLink(address) as link:
            link.piece_bytes = 6144
            async with connected(link.address, settings) as client:
                link.delay_seconds = 0.2
                asked_at = trio.current_time()
                await check(client, snapshot, 0)
                assert trio.current_time() > asked_at + settings.ping_timeout_seconds
                assert client.statistics().reconnects == 0
                assert link.accepted == 1


async def test_a_restarted_server_is_found_again(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    async with trio.open_nursery() as nursery:
        async with serving(snapshot.folder, address):
            client = await connect(nursery, parse_servers(address), PATIENT)
        async with trio.open_nursery() as readers:
            for number in range(3):
                readers.start_soon(check, client, snapshot, 100 * number)
                await client.wait_lost()
                async with serving(snapshot.folder, address):
                    await until(lambda: client.statistics().open_requests == 0)
        assert client.statistics().reconnects == 3
        nursery.cancel_scope.cancel()


async def test_a_server_that_moved_is_found_at_its_other_address(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """There and back again; the folder there may have another name."""
    elsewhere = tmp_path / "copy-of-web"
    snapshot.folder.rename(elsewhere)
    elsewhere.joinpath("x").touch()
    first, second = f"unix:{tmp_path}/a", f"unix:{tmp_path}/b"
    web = make_snapshot(tmp_path / "web", PAGES, seed=4)
    async with trio.open_nursery() as nursery:
        async with serving(web.folder, first):
            client = await connect(nursery, parse_servers(f"{first},{second}"), PATIENT)
            await check(client, snapshot, 0)
            assert client.statistics().maybe_server == first
        async with serving(elsewhere, second):
            await check(client, snapshot, 100)
            assert client.statistics().maybe_server == second
        async with serving(web.folder, first):
            await check(client, snapshot, 200)
            assert client.statistics().maybe_server == first
        nursery.cancel_scope.cancel()


async def test_other_ram_is_passed_by(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """The middle address publishes another snapshot under the same name: none of its bytes is taken."""
    other = make_snapshot(tmp_path / "o" / "web", PAGES, seed=5)
    first, second, third = (f"unix:{tmp_path}/{name}" for name in "abc")
    async with trio.open_nursery() as nursery, serving(other.folder, second):
        async with serving(snapshot.folder, first):
            client = await connect(nursery, parse_servers(f"{first},{second},{third}"), PATIENT)
        async with trio.open_nursery() as readers:
            readers.start_soon(check, client, snapshot, 100)
            await client.wait_lost()
            await until(lambda: "publishes another snapshot" in client.statistics().connection)
            async with serving(snapshot.folder, third):
                await client.wait_connected()
                assert client.statistics().maybe_server == third
                await until(lambda: client.statistics().open_requests == 0)
        nursery.cancel_scope.cancel()


async def test_a_server_behind_a_link_that_flips_bits_is_left_for_another(
    snapshot: BuiltSnapshot, tmp_path: Path
) -> None:
    other = f"unix:{tmp_path}/other"
    async with serving(snapshot.folder) as address:
        with BadLink(address) as link:
            async with connected(f"{link.address},{other}") as client, trio.open_nursery() as nursery:
                upper = await client.fetch_upper()
                origin = origin_of(snapshot)
                folder = open_cache(tmp_path / "cache", origin)
                pristine = PristinePages(origin, folder, upper)
                scheduler = Scheduler(client, pristine, nursery)
                link.flip_share = 1.0
                async with serving(snapshot.folder, other):
                    for page in range(0, PAGES, 50):
                        (run,) = await scheduler.demand(PageRange(page, 1))
                        assert bytes(run.data or bytes(4096)) == snapshot.page(page)
                    assert link.flips > 1
                    assert client.statistics().maybe_server == other
                    await scheduler.wait_kept()
                    nursery.cancel_scope.cancel()
                    pristine.close()


async def test_nobody_of_several(tmp_path: Path, nursery: trio.Nursery) -> None:
    text = f"unix:{tmp_path}/a,unix:{tmp_path}/b"
    with pytest.raises(ServerUnreachableError, match=r"/a: No such file.*; unix:.*/b: No such file"):
        await connect(nursery, parse_servers(text), HASTY)


async def test_a_refusal_is_final_only_if_nobody_else_may_come(
    snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """systemd, for one, does not try again after a refusal."""
    none, away = f"unix:{tmp_path}/a:/none", f"unix:{tmp_path}/b"
    async with serving(snapshot.folder, f"unix:{tmp_path}/a"):
        with pytest.raises(ServerUnreachableError, match=r"/a:/none.*; unix:.*/b: No such file"):
            await connect(nursery, parse_servers(f"{none},{away}"), HASTY)
        with pytest.raises(ServerRefusedError, match=r"/a:/none.*; unix:.*/a:/neither"):
            await connect(nursery, parse_servers(f"{none},unix:{tmp_path}/a:/neither"), HASTY)


async def test_one_that_never_welcomes_keeps_nobody_from_the_next(snapshot: BuiltSnapshot) -> None:
    async with serving(snapshot.folder) as address:
        with BadLink(address) as link:
            link.mode = Mode.SILENT
            async with connected(f"{link.address},{address}") as client:
                await check(client, snapshot, 0)
                assert client.statistics().maybe_server == address


async def test_demands_come_back_before_guesses(
    autojump_clock: trio.testing.MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    """Whatever the two back-offs say: nothing is asked ahead before what somebody waits for is."""
    peer.answers = lambda peer, request: None
    client = await network.connect(LinkSettings(backoff_base_seconds=5, backoff_cap_seconds=5))
    got: list[bytes] = []

    async def read(page: int, background: bool) -> None:
        got.append(joined((await client.fetch([PageRange(page, 1)], background=background)).runs))

    for _ in range(20):
        peer.answers, peer.requests = (lambda peer, request: None), []
        async with trio.open_nursery() as readers:
            for page in range(5):
                readers.start_soon(read, page, True)
            await trio.testing.wait_all_tasks_blocked()
            readers.start_soon(read, 9, False)
            await trio.testing.wait_all_tasks_blocked()
            network.peer = None
            await network.cut()
            await trio.sleep(60)
            peer.answers, peer.requests, network.peer = None, [], peer
        assert not is_background(peer.fetches[0])
        assert len(peer.fetches) == 6


async def test_nothing_is_brought_ahead_while_demands_of_another_process_have_no_connection(
    autojump_clock: trio.testing.MockClock, network: Network, peer: Peer, nursery: trio.Nursery, joined: Joined
) -> None:
    """As the filling process does it: told by the daemon over shared memory, it waits for its turn."""
    last_demand = LastDemand()
    daemon = await network.connect(LinkSettings(backoff_base_seconds=5, backoff_cap_seconds=5))
    nursery.start_soon(tell_link, daemon, last_demand)

    async def wait_turn() -> None:
        while not last_demand.can_be_sent:  # noqa: ASYNC110  # as another process sees it
            await trio.sleep(0.05)

    filling = resume(
        nursery, ADDRESS, daemon.welcome, wait_turn=wait_turn, guesses_only=True, dial_address=network.dial
    )
    await network.dialled(2)
    for _ in range(10):
        network.peer = None
        await network.cut()
        await daemon.wait_lost()
        await trio.sleep(30)
        network.peer = peer
        with trio.fail_after(60):
            fetched = await filling.fetch([PageRange(0, 1)], background=True)
            assert daemon.statistics().connected
        assert joined(fetched.runs) == peer.bytes_of(PageRange(0, 1))
    assert not filling.statistics().connected, "nobody demands there"


async def test_a_connection_that_was_lost_before_anybody_looked_is_told_as_lost(
    autojump_clock: trio.testing.MockClock, network: Network, nursery: trio.Nursery
) -> None:
    """The filling process connects as soon as it has its order, while the daemon opens its folders."""
    last_demand = LastDemand()
    daemon = await network.connect(LinkSettings(backoff_base_seconds=5, backoff_cap_seconds=5))
    last_demand.can_be_sent = True
    maybe_peer, network.peer = network.peer, None
    await network.cut()
    await daemon.wait_lost()
    nursery.start_soon(tell_link, daemon, last_demand)
    await trio.testing.wait_all_tasks_blocked()
    assert not last_demand.can_be_sent
    network.peer = maybe_peer
    await daemon.wait_connected()
    await trio.testing.wait_all_tasks_blocked()
    assert last_demand.can_be_sent


async def test_an_identity_is_an_error_only_where_nobody_has_the_right_one(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, peer: Peer
) -> None:
    other = replace(peer, identity=b"\1" * 32, ram=make_ram(), requests=[])
    network = Network(nursery, peer)

    async def dial(address: ServerAddress, link: LinkSettings) -> object:
        network.peer = {"a:1": peer, "b:1": other}[str(address)]
        return await network.dial(address, link)

    client = await connect(nursery, parse_servers("a:1,b:1"), dial_address=dial)  # type: ignore[arg-type]
    assert client.statistics().maybe_server == "a:1"
    await network.cut()
    await client.fetch([PageRange(0, 1)])
    assert client.statistics().maybe_server == "a:1"
    assert other.requests == []
    assert other.hellos
    unknown = structs.replace(client.welcome, identity=b"\2" * 32)
    with pytest.raises(IdentityError):
        await client._servers.open_again(unknown, None)


DROPPED = """
import fcntl, json, socket, struct, sys
from pathlib import Path
import trio
from tests.fetch.test_lost_server import HASTY, check, connected, serving
from tests.support.snapshots import make_snapshot

def loopback(up):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # SIOCSIFFLAGS with IFF_UP, or not
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", int(up)))

async def main():
    snapshot = make_snapshot(Path(sys.argv[1]) / "web", 600, seed=4)
    loopback(True)
    seen = []
    async with serving(snapshot.folder) as address, connected(address) as client:
        await check(client, snapshot, 0)
        for waiting in (False, True):
            loopback(False)
            async with trio.open_nursery() as readers:
                if waiting:
                    readers.start_soon(check, client, snapshot, 100)
                await client.wait_lost()
                seen.append(client.statistics().open_requests)
                loopback(True)
                await client.wait_connected()
        await check(client, snapshot, 200)
        seen.append(client.statistics().reconnects)
    print(json.dumps(seen))

trio.run(main)
"""
"""Runs in a network of its own, whose only route it drops: no packet says that anything ended."""


def test_a_dropped_route(tmp_path: Path) -> None:
    """Half-open for the kernel too, with and without a request that is open."""
    alone = maybe_own_network()
    if alone is None:
        skips.skip_without(skips.OWN_ROOT, "a network of its own to drop a route of")
    done = subprocess.run(
        [*alone, sys.executable, "-c", DROPPED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, 1, 2]
