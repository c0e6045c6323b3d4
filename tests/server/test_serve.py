"""The server from outside: what a client gets, over real sockets."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.serving import Serving, serve

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.frame import HEADER_BYTES
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Digests,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    Goodbye,
    Hello,
    Level,
    Pages,
    Ping,
    Pong,
    PublishedFile,
    Welcome,
)
from tests.support.snapshots import make_snapshot
from tests.support.wireclient import ClosedByServerError, WireClient, connected, open_stream, page_bytes

HASHED = pytest.mark.parametrize("hashed", [True, False], ids=["hashed", "unhashed"])


async def start(nursery: trio.Nursery, *snapshots: Path | str) -> Serving:
    serving: Serving = await nursery.start(partial(serve, snapshots, ["127.0.0.1:0"]))
    return serving


def spoil(path: Path, offset: int) -> None:
    """Change one byte."""
    with open(path, "r+b") as file:
        before = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([before[0] ^ 1]), offset)


@HASHED
async def test_every_page_arrives_as_it_is_on_disk(tmp_path: Path, nursery: trio.Nursery, hashed: bool) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=700, hashed=hashed)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0], "web") as client:
        assert client.welcome.hashed is hashed
        assert client.welcome.ram_bytes == len(snapshot.ram)
        assert await client.read(PageRange(0, 700)) == snapshot.ram
        ranges = (PageRange(3, 1), PageRange(250, 20), PageRange(699, 1))
        wanted = b"".join(snapshot.ram[r.offset_bytes : r.offset_bytes + r.length_bytes] for r in ranges)
        assert await client.read(*ranges) == wanted


@HASHED
async def test_zero_pages_never_cross_as_data(tmp_path: Path, nursery: trio.Nursery, hashed: bool) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=300, hashed=hashed)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        for answer in await client.fetch(PageRange(0, 300)):
            assert isinstance(answer, Pages)
            data = page_bytes(answer)
            zeros = [not any(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE)]
            assert zeros == [answer.encoding == Encoding.ZERO] * answer.pages.count


async def test_a_huge_hole_costs_a_few_bytes(tmp_path: Path, nursery: trio.Nursery) -> None:
    """64 GiB, published at once, and a whole request's 64 MiB of it read for less than one page."""
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "pc.ram").touch()
    os.truncate(tmp_path / "huge" / "pc.ram", 64 << 30)
    serving = await start(nursery, tmp_path / "huge")
    async with connected(serving.addresses[0]) as client:
        pages = client.welcome.limits.max_request_pages
        answers = await client.fetch(PageRange(1 << 20, pages), flags=FetchFlag.BACKGROUND)
        assert sum(a.pages.count for a in answers if isinstance(a, Pages) and a.encoding == Encoding.ZERO) == pages
        assert len(answers) * (HEADER_BYTES + 16) <= 2 * PAGE_SIZE


async def test_leaves_come_before_the_pages_below_them(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=600)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        seen: dict[int, bytes] = {}
        flags = FetchFlag.WANT_DIGESTS
        for answer in await client.fetch(PageRange(0, 1), PageRange(255, 2), PageRange(599, 1), flags=flags):
            if isinstance(answer, Digests):
                seen[answer.index] = answer.data
            else:
                assert isinstance(answer, Pages)
                assert answer.pages.start // LEAF_PAGES in seen
        assert seen == {leaf: snapshot.leaf(leaf) for leaf in range(3)}


async def test_pages_of_an_unhashed_snapshot_bring_their_digests(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=64, hashed=False)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        for answer in await client.fetch(PageRange(0, 64), flags=FetchFlag.WANT_DIGESTS):
            assert isinstance(answer, Pages)
            first, end = answer.pages.start * DIGEST_BYTES, answer.pages.end * DIGEST_BYTES
            assert answer.digests == (b"" if answer.encoding == Encoding.ZERO else snapshot.digests[first:end])


async def test_digests_alone(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=600)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.send(FetchDigests(1, Level.UPPER, 0, 3))
        upper = await client.answers(1)
        assert upper == [Digests(1, Level.UPPER, 0, snapshot.upper, final=True)]
        await client.send(FetchDigests(2, Level.LEAF, 1, 2))
        leaves = await client.answers(2)
        assert [answer.data for answer in leaves if isinstance(answer, Digests)] == [snapshot.leaf(1), snapshot.leaf(2)]


async def test_small_files(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", vmstate=b"0123456789")
    (snapshot.folder / "working-set").write_bytes(b"0 5\n")
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        assert (client.welcome.vmstate_bytes, client.welcome.working_set_bytes) == (10, 4)
        assert await client.read_file(PublishedFile.VMSTATE, 3, 4) == FileData(1, b"3456")
        assert await client.read_file(PublishedFile.VMSTATE, 8, 400) == FileData(2, b"89")
        assert await client.read_file(PublishedFile.VMSTATE, 10, 400) == FileData(3, b"")
        assert await client.read_file(PublishedFile.WORKING_SET, 0, 99) == FileData(4, b"0 5\n")
        manifest = await client.read_file(PublishedFile.MANIFEST, 0, 99999)
        assert manifest == FileData(5, client.welcome.manifest)


async def test_a_file_that_is_not_there_is_said(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", hashed=False, vmstate=b"")
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        for file in PublishedFile:
            answer = await client.read_file(file, 0, 10)
            assert isinstance(answer, Error)
            assert answer.code == ErrorCode.NO_SUCH_FILE
        assert await client.read(PageRange(0, 1)) == snapshot.page(0)


async def test_several_snapshots_by_name(tmp_path: Path, nursery: trio.Nursery) -> None:
    web = make_snapshot(tmp_path / "web", seed=1)
    data = make_snapshot(tmp_path / "db", seed=2, hashed=False)
    serving = await start(nursery, web.folder, f"store={data.folder}")
    assert serving.names == ("web", "store")
    for name, snapshot in (("web", web), ("store", data)):
        async with connected(serving.addresses[0], name) as client:
            assert client.welcome.name == name
            assert await client.read(PageRange(0, 64)) == snapshot.ram
    for name in ("", "db", "we", "web "):
        async with await open_stream(serving.addresses[0]) as stream:
            answer = await WireClient(stream).hello(name)
            assert isinstance(answer, Error)
            assert (answer.id, answer.code) == (0, ErrorCode.NO_SUCH_SNAPSHOT)


async def test_the_only_snapshot_needs_no_name(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web")
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        assert client.welcome.name == "web"
        assert client.welcome.identity == snapshot.identity


async def test_an_unhashed_file_has_another_identity_on_each_server(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", hashed=False)
    identities = set()
    for _ in range(2):
        serving = await start(nursery, snapshot.folder)
        async with connected(serving.addresses[0]) as client, connected(serving.addresses[0]) as other:
            assert client.welcome.identity == other.welcome.identity
            identities.add(client.welcome.identity)
    assert len(identities) == 2


async def test_wrong_version_is_refused_with_the_reason(tmp_path: Path, nursery: trio.Nursery) -> None:
    serving = await start(nursery, make_snapshot(tmp_path / "web").folder)
    async with await open_stream(serving.addresses[0]) as stream:
        client = WireClient(stream)
        await client.send(Hello("web", version_min=7, version_max=9))
        answer = await client.receive()
        assert isinstance(answer, Error)
        assert (answer.id, answer.code) == (0, ErrorCode.UNSUPPORTED_VERSION)
        with pytest.raises(ClosedByServerError):
            await client.receive()


@HASHED
async def test_a_page_that_changes_while_served_is_refused(tmp_path: Path, nursery: trio.Nursery, hashed: bool) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=64, hashed=hashed)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.read(PageRange(0, 64))
        spoil(snapshot.folder / "pc.ram", 7 * PAGE_SIZE + 100)
        answer = (await client.fetch(PageRange(7, 1)))[-1]
        assert isinstance(answer, Error)
        assert answer.code == ErrorCode.PAGE_CHANGED
        assert "page 7 " in answer.text
        assert await client.read(PageRange(6, 1)) == snapshot.page(6)
        assert await client.read(PageRange(8, 1)) == snapshot.page(8)
    assert serving.counters.refused_pages == 1


async def test_an_unread_page_of_a_touched_unhashed_file_is_refused(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Nobody can tell any more whether it is the page that was published."""
    snapshot = make_snapshot(tmp_path / "web", pages=64, hashed=False)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.read(PageRange(0, 8))
        spoil(snapshot.folder / "pc.ram", 40 * PAGE_SIZE)
        os.utime(snapshot.folder / "pc.ram", ns=(1, 1))  # whatever the clock's grain, the signature moved
        for page in (40, 41):
            answer = (await client.fetch(PageRange(page, 1)))[-1]
            assert isinstance(answer, Error)
            assert answer.code == ErrorCode.PAGE_CHANGED
        assert await client.read(PageRange(0, 8)) == snapshot.ram[: 8 * PAGE_SIZE]


@HASHED
async def test_a_file_that_is_cut_while_served_is_refused(tmp_path: Path, nursery: trio.Nursery, hashed: bool) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=64, hashed=hashed)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.read(PageRange(0, 64))
        os.truncate(snapshot.folder / "pc.ram", 10 * PAGE_SIZE)
        answer = (await client.fetch(PageRange(9, 20)))[-1]
        assert isinstance(answer, Error)
        assert answer.code == ErrorCode.PAGE_CHANGED
        assert await client.read(PageRange(3, 1)) == snapshot.page(3)


async def test_a_deleted_folder_is_served_on(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=64)
    serving = await start(nursery, snapshot.folder)
    for path in snapshot.folder.iterdir():
        path.unlink()
    async with connected(serving.addresses[0]) as client:
        assert await client.read(PageRange(0, 64)) == snapshot.ram
        assert await client.read_file(PublishedFile.VMSTATE, 0, 99) == FileData(2, snapshot.vmstate)


async def test_cancel_ends_a_request(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=4096, seed=3)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.send(Fetch(77, (PageRange(0, 4096),), FetchFlag.BACKGROUND))
        await client.receive()
        await client.send(Cancel(77))
        answers = await client.answers(77)
        assert isinstance(answers[-1], Cancelled)
        assert len(answers) < 200
        assert await client.read(PageRange(0, 1)) == snapshot.page(0)


async def test_ping(tmp_path: Path, nursery: trio.Nursery) -> None:
    serving = await start(nursery, make_snapshot(tmp_path / "web").folder)
    async with connected(serving.addresses[0]) as client:
        await client.send(Ping(5))
        assert await client.receive() == Pong(5)


async def test_stop_answers_what_is_open_and_says_goodbye(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=2048)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.send(Fetch(1, (PageRange(0, 2048),)))
        first = await client.receive()
        serving.stop("see you")
        answers = [first, *await client.answers(1)]
        assert Goodbye("see you") in answers
        data = b"".join(page_bytes(answer) for answer in answers if not isinstance(answer, Goodbye))
        assert data == snapshot.ram
        with pytest.raises(ClosedByServerError):
            await client.receive()


async def test_a_new_request_after_the_goodbye_is_turned_down(tmp_path: Path, nursery: trio.Nursery) -> None:
    """It may have crossed the goodbye. Nothing is lost: the client sends it to the next server."""
    snapshot = make_snapshot(tmp_path / "web", pages=4096)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.send(Fetch(1, (PageRange(0, 4096),), FetchFlag.BACKGROUND))
        await client.receive()
        serving.stop()
        await client.send(Fetch(2, (PageRange(0, 1),)))
        answers = await client.answers(1)
        errors = [answer for answer in answers if isinstance(answer, Error)]
        assert [(error.id, error.code) for error in errors] == [(2, ErrorCode.SHUTTING_DOWN)]


async def test_goodbye_of_a_client_lets_it_have_its_answers(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=2048)
    serving = await start(nursery, snapshot.folder)
    async with connected(serving.addresses[0]) as client:
        await client.send(Fetch(1, (PageRange(0, 2048),)))
        await client.send(Goodbye("done"))
        answers = await client.answers(1)
        assert b"".join(page_bytes(answer) for answer in answers) == snapshot.ram
        with pytest.raises(ClosedByServerError):
            await client.receive()


async def test_over_a_unix_socket(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=64)
    path = tmp_path / "serve.sock"
    serving: Serving = await nursery.start(partial(serve, [snapshot.folder], [f"unix:{path}", "127.0.0.1:0"]))
    assert serving.addresses[0] == f"unix:{path}"
    assert path.stat().st_mode & 0o777 == 0o600
    for address in serving.addresses:
        async with connected(address) as client:
            assert isinstance(client.welcome, Welcome)
            assert await client.read(PageRange(0, 64)) == snapshot.ram
