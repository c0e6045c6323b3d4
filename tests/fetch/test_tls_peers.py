"""Our client and servers that are not the one it means: one line that says what is wrong, and nothing believed."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec import structs

from lazymem.errors import LazymemError, ServerUnreachableError, TlsError, UsageError
from lazymem.fetch.client import connect
from lazymem.fetch.tlstransport import TlsTransport
from lazymem.fetch.transport import dial
from lazymem.settings import LinkSettings, TcpEndpoint, TlsSettings, parse_server
from lazymem.tls.authority import Wanted
from lazymem.tls.contexts import make_context
from lazymem.tls.failures import Side
from tests.support.certificates import OVER, Pki

Answer = Callable[[socket.socket], None]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("certificates") / "pki")


async def answered_by(answer: Answer, tls: TlsSettings, seconds: float = 60.0) -> LazymemError:
    """What our client says of a server that does `answer` with its first connection."""
    found: list[LazymemError] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_one() -> None:
            connected, _ = listener.accept()
            with connected, contextlib.suppress(OSError):
                connected.settimeout(60)
                answer(connected)

        address = parse_server(f"127.0.0.1:{listener.getsockname()[1]}")
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, serve_one)
                link = LinkSettings(tls=tls, handshake_timeout_seconds=seconds)
                try:
                    await connect(nursery, address, link)
                except LazymemError as error:
                    found.append(error)
    assert str(address) in str(found[0])
    assert "\n" not in str(found[0])
    return found[0]


def tls_server(tls: TlsSettings, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Answer:
    def answer(connected: socket.socket) -> None:
        context = make_context(tls, Side.SERVER)
        context.minimum_version = context.maximum_version = version
        with context.wrap_socket(connected, server_side=True) as secured:
            secured.recv(100)

    return answer


async def test_another_authority(pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")
    error = await answered_by(tls_server(other.server(ca=pki.ca)), pki.client())
    assert isinstance(error, TlsError)
    assert "the server's certificate is not of the authority in our --tls-ca" in str(error)


async def test_an_expired_certificate(pki: Pki) -> None:
    error = await answered_by(tls_server(pki.server(lifetime=OVER)), pki.client())
    assert isinstance(error, TlsError)
    assert "the server's certificate has expired" in str(error)


async def test_a_certificate_for_another_host(pki: Pki) -> None:
    error = await answered_by(tls_server(pki.server()), structs.replace(pki.client(), name="db.example"))
    assert isinstance(error, TlsError)
    assert "for another name" in str(error)
    assert "'db.example'" in str(error)
    assert "--tls-name" in str(error)


async def test_a_certificate_for_another_address(pki: Pki) -> None:
    error = await answered_by(
        tls_server(pki.write("named", pki.issued(Wanted("ram.example", server=True, client=False)))), pki.client()
    )
    assert isinstance(error, TlsError)
    assert "127.0.0.1" in str(error)
    assert "for another name" in str(error)


async def test_a_clients_certificate(pki: Pki) -> None:
    error = await answered_by(tls_server(pki.client("127.0.0.1")), pki.client())
    assert isinstance(error, TlsError)
    assert "not one for a server" in str(error)


async def test_tls_1_2_alone(pki: Pki) -> None:
    error = await answered_by(tls_server(pki.server(), ssl.TLSVersion.TLSv1_2), pki.client())
    assert isinstance(error, TlsError)
    assert "the server does not speak TLS 1.3" in str(error)


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2p1\r\n", bytes(300), b"\x0a" + bytes(40)])
async def test_plaintext(pki: Pki, said: bytes) -> None:
    def answer(connected: socket.socket) -> None:
        connected.recv(100)
        connected.sendall(said)
        connected.recv(10_000)

    error = await answered_by(answer, pki.client())
    assert isinstance(error, TlsError)
    assert "the server does not speak TLS" in str(error)


async def test_silence(pki: Pki) -> None:
    def answer(connected: socket.socket) -> None:
        while connected.recv(1000):
            pass

    error = await answered_by(answer, pki.client(), seconds=0.5)
    assert isinstance(error, ServerUnreachableError)
    assert "no TLS handshake within 0.5 s" in str(error)


async def test_an_end_instead_of_an_answer(pki: Pki) -> None:
    error = await answered_by(lambda connected: None, pki.client())
    assert isinstance(error, ServerUnreachableError)


async def test_a_file_that_went_missing(pki: Pki) -> None:
    link = LinkSettings(tls=structs.replace(pki.client(), key=pki.folder / "none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = TcpEndpoint("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(UsageError, match="--tls-key"):
            await dial(endpoint, link)


# ---- the transport itself


Pair = tuple[TlsTransport, trio.SSLStream[trio.SocketStream]]


@pytest.fixture
async def pair(pki: Pki, nursery: trio.Nursery) -> AsyncIterator[Pair]:
    """Ours, and a server's end by trio's own TLS."""
    accepted: list[trio.SSLStream[trio.SocketStream]] = []
    done = trio.Event()

    async def take(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, make_context(pki.server(), Side.SERVER), server_side=True)
        await secured.do_handshake()
        accepted.append(secured)
        done.set()
        await trio.sleep_forever()

    open_listeners = partial(trio.serve_tcp, take, 0, host="127.0.0.1")
    listeners: list[trio.SocketListener] = await nursery.start(open_listeners)
    port = listeners[0].socket.getsockname()[1]
    transport = await dial(TcpEndpoint("127.0.0.1", port), LinkSettings(tls=pki.client()))
    assert isinstance(transport, TlsTransport)
    await done.wait()
    with contextlib.closing(transport):
        yield transport, accepted[0]
    nursery.cancel_scope.cancel()


async def test_what_is_inside_is_taken_without_the_socket(pair: Pair) -> None:
    """The descriptor tells of new bytes only: after `receive_nowait` none that came may wait inside."""
    transport, server = pair
    with trio.fail_after(60):
        assert transport.receive_nowait() is None
        for at in range(0, 100_000, 1000):
            await server.send_all(bytes([at // 1000]) * 1000)
        received = b""
        while len(received) < 100_000:
            await trio.lowlevel.wait_readable(transport.fileno())
            while (data := transport.receive_nowait()) is not None:
                received += data
            assert not transport._pipe._incoming.pending
    assert received == b"".join(bytes([number]) * 1000 for number in range(100))


async def test_a_full_socket_and_everything_at_last(pair: Pair) -> None:
    transport, server = pair
    block = bytes(range(256)) * 65536
    sent = transport.send_nowait(block)
    assert 0 < sent < len(block)
    received = bytearray()

    async def drain() -> None:
        while len(received) < len(block):
            received.extend(await server.receive_some(1 << 20))

    with trio.fail_after(60):
        async with trio.open_nursery() as inner:
            inner.start_soon(drain)
            await transport.send_all(block[sent:])
    assert received == block


async def test_close_ends_every_wait(pair: Pair) -> None:
    transport, _ = pair
    ended = 0

    async def wait(sends: bool) -> None:
        nonlocal ended
        with pytest.raises(ServerUnreachableError):
            await (transport.send_all(bytes(1 << 24)) if sends else transport.receive())
        ended += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as inner:
            inner.start_soon(wait, False)
            inner.start_soon(wait, True)
            await trio.testing.wait_all_tasks_blocked()
            transport.close()
            transport.close()
    assert ended == 2
    with pytest.raises(ServerUnreachableError):
        transport.send_nowait(b"x")


async def test_the_servers_end_is_an_end(pair: Pair) -> None:
    transport, server = pair
    with trio.fail_after(60):
        await server.send_all(b"last words")
        await server.aclose()
        assert await transport.receive() == b"last words"
        assert await transport.receive() == b""
