"""A connection that was begun before the event loop: with the real server, and where there is none."""

from __future__ import annotations

import math
import os
import select
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.serving import Serving, serve

from lazymem.errors import RemoteProtocolError, ServerRefusedError, ServerUnreachableError
from lazymem.fetch.client import Client, connect, resume
from lazymem.fetch.headstart import HeadStart, maybe_head_start
from lazymem.fetch.transport import is_on_this_host
from lazymem.pages import PageRange
from lazymem.settings import LinkSettings, ServerAddress, TlsSettings, parse_server, parse_servers
from tests.support.snapshots import BuiltSnapshot, make_snapshot

LINK = LinkSettings()


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "snapshot", 40)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110  # many things may change it
            await trio.sleep(0.001)


async def started(nursery: trio.Nursery, folder: Path, address: str) -> Serving:
    serving: Serving = await nursery.start(partial(serve, [folder], [address]))
    return serving


def begun(server: ServerAddress, name: str = "", link: LinkSettings = LINK) -> HeadStart:
    found = maybe_head_start((server,), name, link)
    assert found is not None
    return found


def wait_connected(early: HeadStart) -> None:
    """A socket of this host's: its connect(2) is over in a moment."""
    _, writable, _ = select.select([], [early.connecting], [], 60)
    assert writable


async def works(client: Client, snapshot: BuiltSnapshot) -> None:
    page = next(page for page in range(40) if snapshot.page(page).strip(b"\0"))
    fetched = await client.fetch([PageRange(page, 1)], want_leaves=True)
    assert [run.data for run in fetched.runs] == [snapshot.page(page)]


@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:{}/socket"])
@pytest.mark.parametrize("says", [True, False], ids=["said hello", "said nothing"])
async def test_the_first_session_goes_on_with_it(
    address: str, says: bool, snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery
) -> None:
    serving = await started(nursery, snapshot.folder, address.format(tmp_path))
    server = parse_server(serving.addresses[0])
    early = begun(server)
    wait_connected(early)
    if says:
        early.say_hello()
        assert early.maybe_greeted is not None
        early.say_hello()  # once
    ours = early.connecting.fileno()
    client = await connect(nursery, server, LINK, maybe_head_start=early)
    assert client._demand.fileno() in (-1, ours)
    await works(client, snapshot)
    assert client._demand.fileno() == ours, "it was never lost"
    await until(lambda: client.best_round_trip_seconds < math.inf)  # of what was said early nobody knows it
    nursery.cancel_scope.cancel()


async def test_a_process_that_brings_guesses_goes_on_with_it(
    snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery
) -> None:
    serving = await started(nursery, snapshot.folder, "127.0.0.1:0")
    server = parse_server(serving.addresses[0])
    first = await connect(nursery, server, LINK)
    early = begun(server, first.welcome.name)
    wait_connected(early)
    early.say_hello()
    client = resume(nursery, server, first.welcome, LINK, guesses_only=True, maybe_head_start=early)
    await client.fetch([PageRange(3, 1)], want_leaves=True, background=True)
    assert client.is_on_this_host
    await until(lambda: client.best_round_trip_seconds < math.inf)
    assert client._background.fileno() == early.connecting.fileno() or early.connecting.fileno() == -1
    assert client._demand.fileno() == -1
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("says", [True, False])
async def test_one_that_the_server_gave_up_is_followed_by_another(
    says: bool, snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """A mount may wait for half a minute before it comes to its connection."""
    path = tmp_path / "socket"
    server = parse_server(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        early = begun(server)
        if says:
            early.say_hello()
    path.unlink()
    await started(nursery, snapshot.folder, f"unix:{path}")
    client = await connect(nursery, server, LINK, maybe_head_start=early)
    await works(client, snapshot)
    assert early.connecting.fileno() == -1
    nursery.cancel_scope.cancel()


async def test_what_somebody_else_says_is_not_lost_by_his_going(nursery: trio.Nursery) -> None:
    """He hears our hello, and resets the connection: then it is he who is the mistake, and not the link."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = parse_server(f"127.0.0.1:{listening.getsockname()[1]}")
        early = begun(server)
        wait_connected(early)
        with listening.accept()[0] as accepted:
            early.say_hello()
            accepted.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n" * 4)
            assert accepted.recv(1)
        with pytest.raises(RemoteProtocolError):
            await connect(nursery, server, LINK, maybe_head_start=early)
    assert early.connecting.fileno() == -1


async def test_nobody_there_is_said_as_without_it(nursery: trio.Nursery) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        server = parse_server(f"127.0.0.1:{nobody.getsockname()[1]}")
        texts = []
        for maybe_early in (None, maybe_head_start((server,), "", LINK)):
            with pytest.raises(ServerUnreachableError) as raised:
                await connect(nursery, server, LINK, maybe_head_start=maybe_early)
            texts.append(str(raised.value))
    assert texts[0] == texts[1]


async def test_a_refusal_is_the_servers_word(snapshot: BuiltSnapshot, nursery: trio.Nursery) -> None:
    serving = await started(nursery, snapshot.folder, "127.0.0.1:0")
    server = parse_server(f"{serving.addresses[0]}/other")
    early = begun(server, "other")
    wait_connected(early)
    early.say_hello()
    with pytest.raises(ServerRefusedError):
        await connect(nursery, server, LINK, maybe_head_start=early)
    nursery.cancel_scope.cancel()


async def test_another_name_is_asked_for_on_another_connection(snapshot: BuiltSnapshot, nursery: trio.Nursery) -> None:
    serving = await started(nursery, snapshot.folder, "127.0.0.1:0")
    server = parse_server(serving.addresses[0])
    early = begun(server, "other")
    client = await connect(nursery, server, LINK, maybe_head_start=early)
    assert early.connecting.fileno() == -1
    await works(client, snapshot)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("servers", ["ram.example:7411", "127.0.0.1:7411,127.0.0.2:7411", "unix:/no/such/socket"])
def test_what_takes_time_or_a_choice_has_none(servers: str) -> None:
    assert maybe_head_start(parse_servers(servers), "", LINK) is None


def test_ahead_of_tls_nothing_is_said(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = parse_server(f"127.0.0.1:{listening.getsockname()[1]}")
        early = begun(server, link=LinkSettings(tls=TlsSettings(tmp_path / "c", tmp_path / "k", tmp_path / "ca")))
        wait_connected(early)
        early.say_hello()
        assert early.maybe_greeted is None
        early.close()
        with listening.accept()[0] as accepted:
            assert accepted.recv(1) == b""


def test_it_is_nothing_to_a_child() -> None:
    """Whose descriptor of that number is something else by now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = parse_server(f"127.0.0.1:{listening.getsockname()[1]}")
        early = begun(server)
        assert early.is_for(server, "")
        pid = os.fork()
        if not pid:
            early.close()
            os._exit(early.is_for(server, "") or early.connecting.fileno() < 0)
        assert os.waitpid(pid, 0)[1] == 0
        early.close()
        assert early.connecting.fileno() == -1


def test_who_is_on_this_host() -> None:
    with socket.socket() as listening, socket.socket() as ours:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        assert not is_on_this_host(ours.fileno()), "nobody is at its other end"
        ours.bind(("127.0.0.2", 0))
        ours.connect(listening.getsockname())
        assert not is_on_this_host(ours.fileno()), "another address"
    left, right = socket.socketpair()
    with left, right:
        assert is_on_this_host(left.fileno())
        assert left.fileno() >= 0, "it stays open"
    assert not is_on_this_host(-1)
