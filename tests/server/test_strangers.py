"""Strangers at a server with TLS: each is refused with one line in its log, learns nothing, and stops nobody."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.limits import ServerLimits
from lazymem_server.serving import Serving, open_gate, serve
from msgspec import structs

from lazymem.errors import LazymemError, ServerRefusedError, TlsError
from lazymem.fetch.client import connect
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.settings import LinkSettings, TlsSettings, parse_server
from lazymem.tls.contexts import make_context
from lazymem.tls.failures import Side
from lazymem.tls.pipe import TlsPipe
from lazymem.wire.connection import NEED_DATA, ClientConnection
from lazymem.wire.messages import Hello, Welcome
from tests.support.certificates import OVER, Pki
from tests.support.snapshots import BuiltSnapshot, make_snapshot

PAGES = 600

PATIENCE_SECONDS = 60.0
"""On a busy machine, for what takes milliseconds."""

BRIEF = ServerLimits(handshake_seconds=0.3, farewell_seconds=0.3)
"""For strangers only: an honest client on a busy machine may take longer."""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("certificates") / "pki")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Somebody else's authority."""
    return Pki(tmp_path_factory.mktemp("certificates") / "other")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("strangers") / "web", pages=PAGES)


@asynccontextmanager
async def served(
    snapshot: BuiltSnapshot, tls: TlsSettings, limits: ServerLimits | None = None, allow: str = "web=host-b"
) -> AsyncIterator[Serving]:
    gate = open_gate(tls, [allow], ["web"], limits)
    async with trio.open_nursery() as nursery:
        start = partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits, maybe_gate=gate)
        serving: Serving = await nursery.start(start)
        yield serving
        nursery.cancel_scope.cancel()


async def assert_is_served(serving: Serving, snapshot: BuiltSnapshot, tls: TlsSettings | None) -> None:
    """A client of ours comes, reads pages on both of its connections, and goes."""
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            client = await connect(nursery, parse_server(serving.addresses[0]), LinkSettings(tls=tls))
            lone = await client.fetch([PageRange(7, 1)])
            assert bytes(lone.runs[0].data or bytes(PAGE_SIZE)) == snapshot.page(7)
            fetched = await client.fetch([PageRange(0, PAGES)], background=True)
            data = b"".join(bytes(run.data or bytes(run.pages.count * PAGE_SIZE)) for run in fetched.runs)
            assert data == snapshot.ram
            nursery.cancel_scope.cancel()


async def refusal(serving: Serving, tls: TlsSettings | None, name: str = "") -> LazymemError:
    """What our client says that is not let in."""
    address = serving.addresses[0] + (f"/{name}" if name else "")
    with trio.fail_after(PATIENCE_SECONDS):
        try:
            async with trio.open_nursery() as nursery:
                await connect(nursery, parse_server(address), LinkSettings(tls=tls))
        except BaseExceptionGroup as group:
            (error,) = group.exceptions
            assert isinstance(error, LazymemError), error
            assert "\n" not in str(error)
            assert serving.addresses[0] in str(error)
            return error
    raise AssertionError("it was let in")


async def wait_said(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Until the server's log has the line."""
    with trio.fail_after(PATIENCE_SECONDS):
        while not any(text in record.getMessage() for record in caplog.records):  # noqa: ASYNC110  # a log has no event
            await trio.sleep(0.01)
    assert all("\n" not in record.getMessage() and record.exc_info is None for record in caplog.records)


def raw_stream(serving: Serving) -> socket.socket:
    host, _, port = serving.addresses[0].rpartition(":")
    return socket.create_connection((host, int(port)))


def client_hello(tls: TlsSettings) -> bytes:
    """What a TLS client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = make_context(tls, Side.CLIENT).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    return outgoing.read()


async def test_who_has_a_certificate_is_served(snapshot: BuiltSnapshot, pki: Pki) -> None:
    async with served(snapshot, pki.server()) as serving:
        await assert_is_served(serving, snapshot, pki.client())


async def test_a_hello_that_comes_with_the_end_of_the_handshake(snapshot: BuiltSnapshot, pki: Pki) -> None:
    """The thread that serves is woken by nothing for it: the socket has been read."""
    pipe = TlsPipe(make_context(pki.client(), Side.CLIENT), Side.CLIENT, "localhost")
    async with served(snapshot, pki.server()) as serving:
        host, _, port = serving.addresses[0].rpartition(":")
        with trio.fail_after(PATIENCE_SECONDS):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                while not pipe.handshake():
                    await stream.send_all(pipe.outgoing)
                    pipe.feed(bytes(await stream.receive_some(65536)))
                connection = ClientConnection()
                await stream.send_all(pipe.outgoing + pipe.sealed(connection.send(Hello("web"))))
                while (event := connection.next_event()) is NEED_DATA:
                    pipe.feed(bytes(await stream.receive_some(65536)))
                    if data := pipe.take():
                        connection.receive_data(data)
        assert isinstance(event, Welcome)


# ---- our own client, with what is wrong

REFUSED: dict[str, tuple[Callable[[Pki, Pki], TlsSettings | None], type[LazymemError], str, str]] = {
    "no TLS": (lambda pki, _: None, ServerRefusedError, "this server speaks TLS", "it does not speak TLS"),
    "another authority's certificate": (
        lambda pki, other: other.client(ca=pki.ca),
        TlsError,
        "does not know the authority of our certificate",
        "not of the authority in our --tls-ca",
    ),
    "an expired certificate": (
        lambda pki, _: pki.client("late", lifetime=OVER),
        TlsError,
        "says that our certificate has expired",
        "the client's certificate has expired",
    ),
    "a server's certificate": (
        lambda pki, _: pki.server(),
        TlsError,
        "does not take our certificate",
        "not one for a client",
    ),
    "a certificate that may have nothing": (
        lambda pki, _: pki.client("host-z"),
        ServerRefusedError,
        "there is none, or more than one snapshot here for host-z",
        "(host-z)",
    ),
    "the server of another authority": (
        lambda pki, other: pki.client("host-b", ca=other.ca),
        TlsError,
        "the server's certificate is not of the authority in our --tls-ca",
        "does not know the authority of our certificate",
    ),
}


@pytest.mark.parametrize(("made", "kind", "told", "logged"), REFUSED.values(), ids=REFUSED)
async def test_our_client_says_why_it_is_refused(
    snapshot: BuiltSnapshot,
    pki: Pki,
    other: Pki,
    caplog: pytest.LogCaptureFixture,
    made: Callable[[Pki, Pki], TlsSettings | None],
    kind: type[LazymemError],
    told: str,
    logged: str,
) -> None:
    caplog.set_level(logging.INFO)
    async with served(snapshot, pki.server()) as serving:
        error = await refusal(serving, made(pki, other))
        assert type(error) is kind
        assert told in str(error)
        await wait_said(caplog, logged)
        await assert_is_served(serving, snapshot, pki.client())


async def test_a_name_that_exists_is_refused_as_one_that_does_not(
    snapshot: BuiltSnapshot, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(snapshot, pki.server()) as serving:
        texts = [str(await refusal(serving, pki.client("host-z"), name)) for name in ("web", "nix")]
        assert texts[0].replace("web", "nix") == texts[1]
        await wait_said(caplog, "asks for 'web', which it may not have (--allow web=...)")
        assert str(await refusal(serving, pki.client("host-b"), "nix")).endswith("no snapshot 'nix' here for host-b")
        await assert_is_served(serving, snapshot, pki.client())


async def test_our_client_with_tls_at_a_server_without(
    snapshot: BuiltSnapshot, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with trio.open_nursery() as nursery:
        serving: Serving = await nursery.start(serve, [snapshot.folder], ["127.0.0.1:0"])
        error = await refusal(serving, pki.client())
        assert type(error) is TlsError
        assert "the server does not speak TLS: both sides need --tls-cert" in str(error)
        await wait_said(caplog, "it speaks TLS, and this server has none")
        await assert_is_served(serving, snapshot, None)
        nursery.cancel_scope.cancel()


# ---- what is no client of ours


async def closed_by_server(stream: trio.SocketStream) -> bytes:
    """What the server says until it closes."""
    said = b""
    with trio.fail_after(PATIENCE_SECONDS), contextlib.suppress(trio.BrokenResourceError):
        while data := bytes(await stream.receive_some(65536)):
            said += data
    return said


STRANGERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "silent": (lambda hello: b"", "no TLS in 0.3 s"),
    "one byte": (lambda hello: hello[:1], "no TLS in 0.3 s"),
    "half a record": (lambda hello: hello[: len(hello) // 2], "no TLS in 0.3 s"),
    "half a handshake": (lambda hello: hello, "no TLS in 0.3 s"),
    "plaintext": (lambda hello: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "it does not speak TLS"),
    "a hello of ours": (lambda hello: ClientConnection().send(Hello("web")), "it does not speak TLS"),
    "a hello of 22 bytes": (lambda hello: ClientConnection().send(Hello("secret")), "it does not speak TLS"),
    "zeros": (lambda hello: bytes(5000), "it does not speak TLS"),
    "a record of nonsense": (lambda hello: b"\x16\x03\x01\x02\x00" + b"\xff" * 512, "refused"),
    "a cut hello and nonsense": (lambda hello: hello[:60] + bytes(2000), "refused"),
}


@pytest.mark.parametrize(("says", "logged"), STRANGERS.values(), ids=STRANGERS)
async def test_strangers_end_soon_and_stop_nobody(
    snapshot: BuiltSnapshot, pki: Pki, caplog: pytest.LogCaptureFixture, says: Callable[[bytes], bytes], logged: str
) -> None:
    limits = BRIEF if logged.startswith("no TLS in") else None  # a busy machine may take longer to hear of the others
    async with served(snapshot, pki.server(), limits) as serving:
        host, _, port = serving.addresses[0].rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            data = says(client_hello(pki.client()))
            if data:
                await stream.send_all(data)
            said = await closed_by_server(stream)
        await wait_said(caplog, logged)
        assert b"web" not in said
    async with served(snapshot, pki.server()) as serving:
        streams = [raw_stream(serving) for _ in range(10)]
        for each in streams:
            each.sendall(data)
        await assert_is_served(serving, snapshot, pki.client())
        for each in streams:
            each.close()


async def raw_tls(serving: Serving, context: ssl.SSLContext) -> None:
    """Shakes hands and says hello as whoever `context` makes us; raises ssl.SSLError as OpenSSL does."""

    def blocking() -> None:
        with raw_stream(serving) as plain, context.wrap_socket(plain, server_hostname="localhost") as secured:
            secured.sendall(ClientConnection().send(Hello("web")))
            while secured.recv(65536):
                pass

    with trio.fail_after(PATIENCE_SECONDS):
        await trio.to_thread.run_sync(blocking)


async def test_a_client_of_tls_1_2_alone(snapshot: BuiltSnapshot, pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    context = make_context(pki.client(), Side.CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with served(snapshot, pki.server()) as serving:
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
            await raw_tls(serving, context)
        await wait_said(caplog, "the client does not speak TLS 1.3")
        await assert_is_served(serving, snapshot, pki.client())


async def test_a_client_without_a_certificate(
    snapshot: BuiltSnapshot, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.create_default_context(cafile=str(pki.ca))
    async with served(snapshot, pki.server()) as serving:
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
            await raw_tls(serving, context)
        await wait_said(caplog, "a client without a certificate")
        await assert_is_served(serving, snapshot, pki.client())


async def test_a_crowd_in_its_handshakes_keeps_nobody_out(
    snapshot: BuiltSnapshot, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    """More silent connections than there are places, and more come all the time."""
    async with served(snapshot, pki.server(), ServerLimits(max_handshakes=4)) as serving:
        crowd = [raw_stream(serving) for _ in range(20)]
        await assert_is_served(serving, snapshot, pki.client())
        await wait_said(caplog, "too many handshakes")
        crowd += [raw_stream(serving) for _ in range(20)]
        await assert_is_served(serving, snapshot, pki.client())
        for each in crowd:
            each.close()


async def test_a_full_server_says_so_through_tls(
    snapshot: BuiltSnapshot, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(snapshot, pki.server(), ServerLimits(max_clients=1)) as serving, trio.open_nursery() as nursery:
        await connect(nursery, parse_server(serving.addresses[0]), LinkSettings(tls=pki.client()))
        # So long it is asked again; and so long it may take to connect.
        link = LinkSettings(tls=pki.client(), connect_timeout_seconds=5.0)
        with trio.fail_after(PATIENCE_SECONDS), pytest.raises(ServerRefusedError, match="too many clients"):
            await connect(nursery, parse_server(serving.addresses[0]), link)
        nursery.cancel_scope.cancel()


async def test_stopping_waits_for_no_stranger(snapshot: BuiltSnapshot, pki: Pki) -> None:
    """Those in their handshakes go at once; `goodbye_seconds` are for clients."""
    async with trio.open_nursery() as nursery:
        gate = open_gate(pki.server(), ["*"], ["web"])
        limits = ServerLimits(goodbye_seconds=1000)
        start = partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits, maybe_gate=gate)
        serving: Serving = await nursery.start(start)
        with raw_stream(serving):
            with trio.fail_after(PATIENCE_SECONDS):
                while not len(gate.handshakes):  # noqa: ASYNC110  # the server has no event for tests
                    await trio.sleep(0.01)
            serving.stop()
            nursery.cancel_scope.deadline = trio.current_time() + PATIENCE_SECONDS
    assert not nursery.cancel_scope.cancelled_caught


async def test_a_revoked_client_is_refused_from_its_next_connection_on(
    snapshot: BuiltSnapshot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the list in the authority's file, without a restart; others are served, and so is its new certificate."""
    caplog.set_level(logging.INFO)
    pki = Pki(tmp_path / "pki")
    stolen, good = pki.client("host-b"), pki.client("host-c")
    async with served(snapshot, pki.server(), allow="web=host-b,host-c") as serving:
        await assert_is_served(serving, snapshot, stolen)
        pki.revoke(stolen)
        error = await refusal(serving, stolen)
        assert isinstance(error, TlsError)
        assert "says that our certificate was revoked" in str(error)
        await wait_said(caplog, "the client's certificate was revoked by its authority")
        await assert_is_served(serving, snapshot, good)
        await assert_is_served(serving, snapshot, pki.client("host-b"))


async def test_a_revoked_server_is_believed_by_nobody(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    stolen, client = pki.server(), pki.client()
    async with served(snapshot, stolen) as serving:
        pki.revoke(stolen)
        assert "the server's certificate was revoked by its authority" in str(await refusal(serving, client))


async def test_a_list_of_another_authority_says_nothing_of_ours(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """A file with two authorities, and the list of one: of the other one nobody knows what it took back."""
    pki, other = Pki(tmp_path / "pki"), Pki(tmp_path / "other", name="others")
    other.revoke(other.client())
    both = tmp_path / "both.crt"
    both.write_bytes(pki.ca.read_bytes() + other.ca.read_bytes())
    client = structs.replace(pki.client(), ca=both)
    async with served(snapshot, pki.server()) as serving:
        assert "the list of revoked ones in our --tls-ca file is not of its" in str(await refusal(serving, client))
