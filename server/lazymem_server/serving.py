"""A page server that runs: catalog, listeners and sessions put together.

For tests and other programs, inside a trio nursery::

    serving = await nursery.start(partial(serve, [folder], ["127.0.0.1:0"]))
    serving.addresses           # ("127.0.0.1:40123",): where it really listens
    serving.stop("reason")      # goodbye to all clients; `serve` returns when they are answered

`snapshots` are folders or ``NAME=FOLDER`` texts, or an open `Catalog`; `listeners` are ``HOST:PORT`` or ``unix:PATH``
texts, or an open `Listeners`. `learn` is the folder of `--learn`. Cancelling `serve` cuts all connections at once, as
a crash would.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import trio

from lazymem.settings import TlsSettings
from lazymem.tls.stream import TlsStream
from lazymem.wire.connection import ServerConnection
from lazymem.wire.messages import Error, ErrorCode
from lazymem_server.allowed import parse_allowed
from lazymem_server.catalog import Catalog
from lazymem_server.counters import Counters
from lazymem_server.ending import say_last
from lazymem_server.fewlines import FewLines
from lazymem_server.gate import Admitted, Gate
from lazymem_server.learning import Learning
from lazymem_server.limits import ServerLimits
from lazymem_server.listeners import DEFAULT_LISTEN, Listeners, allow_unsent, parse_listen, spoken_address, tune
from lazymem_server.pace import Pace
from lazymem_server.session import Session

log = logging.getLogger("lazymem.server")

UNIX_HOST = "unix"

Divert = Callable[[trio.SocketStream | TlsStream], Awaitable[bool]]
"""Gets a connection that nothing was read from, or one that said that it speaks something else. True: it does, and was
served to its end."""


class Serving:
    """A server that runs. What `serve` hands to the one that started it."""

    def __init__(
        self,
        catalog: Catalog,
        listeners: Listeners,
        limits: ServerLimits,
        maybe_learning: Learning | None = None,
        maybe_divert: Divert | None = None,
        maybe_gate: Gate | None = None,
    ) -> None:
        """`maybe_divert`: looks at each connection first. `maybe_gate`: decides who comes in; None: everybody."""
        self._maybe_gate = maybe_gate
        self._maybe_divert = maybe_divert
        self._ended = Counters()
        self._catalog = catalog
        self._limits = limits
        self._maybe_learning = maybe_learning
        self._sockets = listeners.sockets
        self.addresses = tuple(spoken_address(listener) for listener in listeners.sockets)
        self._threads = trio.CapacityLimiter(limits.max_clients)
        self._disks = ThreadPoolExecutor(limits.max_threads, "lazymem-disk")
        self._bulk_turns = threading.Lock()
        self._linger_turn = threading.Lock()
        self._sessions: dict[Session, str] = {}
        self._farewells = 0
        self._few = FewLines()
        self._paces: dict[str, Pace] = {}
        self._accepting = trio.CancelScope()
        self._stop_reason: str | None = None

    @property
    def clients(self) -> int:
        """Connections at this moment."""
        return len(self._sessions)

    @property
    def counters(self) -> Counters:
        """Of all clients that came so far."""
        found = Counters()
        for counters in (self._ended, *(session.counters for session in self._sessions)):
            found.add(counters)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._catalog)

    def stop(self, reason: str = "the server is ending") -> None:
        """Accept no more, say goodbye to all clients, end when their open requests are answered."""
        self._stop_reason = reason
        self._accepting.cancel()
        if self._maybe_gate is not None:
            self._maybe_gate.stop()
        for session in self._sessions:
            session.stop(reason)

    def look_again(self) -> None:
        """A snapshot serves more, or less, than a moment ago (`SnapshotReader.serves`)."""
        for session in self._sessions:
            session.look_again()

    async def run(self, *, task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, or until cancelled."""
        with self._disks:
            async with trio.open_nursery() as nursery:
                streams = [trio.SocketListener(trio.socket.from_stdlib_socket(found)) for found in self._sockets]
                task_status.started(self)
                with self._accepting:
                    await trio.serve_listeners(self._client, streams, handler_nursery=nursery)
                nursery.cancel_scope.deadline = trio.current_time() + self._limits.goodbye_seconds

    async def _client(self, stream: trio.SocketStream) -> None:
        plain = self._maybe_gate is None or stream.socket.family == socket.AF_UNIX
        if plain and self._maybe_divert is not None and await self._maybe_divert(stream):
            await trio.aclose_forcefully(stream)
            return
        host, peer = _peer(stream)
        tune(stream, self._limits.socket_unsent_bytes)
        maybe_admitted = await self._maybe_admitted(stream, host, peer)
        if maybe_admitted is not None and maybe_admitted.maybe_stream is not None:
            if self._maybe_divert is not None:
                await self._maybe_divert(maybe_admitted.maybe_stream)
        elif maybe_admitted is not None:
            await self._serve(stream, host, maybe_admitted)
        await trio.aclose_forcefully(stream)

    async def _maybe_admitted(self, stream: trio.SocketStream, host: str, peer: str) -> Admitted | None:
        """A client that has a place."""
        admitted: Admitted | None = Admitted(peer, self._catalog)
        try:
            if self._maybe_gate is not None:
                admitted = await self._maybe_gate.maybe_admitted(stream, host, peer, self._catalog)
        except Exception:  # a bug met by a stranger must not end the others' connections
            log.exception("%s: lazymem-serve failed", peer)
            return None
        if admitted is None or admitted.maybe_stream is not None or not self._is_full(host):
            return admitted
        self._few.warning("%s: refused, too many clients", admitted.peer)
        frame = ServerConnection().send(Error(0, ErrorCode.BUSY, "too many clients: try again later"))
        await self._say_last(stream, admitted.sealed(frame))
        return None

    async def _say_last(self, stream: trio.SocketStream, frame: bytes) -> None:
        """If there are not too many already that are told something: each keeps a descriptor for as long."""
        if self._farewells < self._limits.max_farewells:
            self._farewells += 1
            try:
                await say_last(stream, frame, self._limits.farewell_seconds)
            finally:
                self._farewells -= 1

    async def _serve(self, stream: trio.SocketStream, host: str, admitted: Admitted) -> None:
        try:
            session = self._session(stream, host, admitted)
        except OSError as error:  # no descriptor for it: the others have theirs
            self._few.warning("%s: refused: %s", admitted.peer, error.strerror)
            return
        self._sessions[session] = host
        try:
            if self._stop_reason is not None:
                session.stop(self._stop_reason)
            farewell = await _run(session, self._threads)
            if farewell:
                await self._say_last(stream, admitted.sealed(farewell))
        except Exception:  # a bug met by one client must not end the others' connections
            log.exception("%s: lazymem-serve failed", admitted.peer)
        finally:
            del self._sessions[session]
            self._ended.add(session.counters)
            session.close()

    def _session(self, stream: trio.SocketStream, host: str, admitted: Admitted) -> Session:
        return Session(
            stream.socket.fileno(),
            admitted.published,
            self._limits,
            self._disks,
            admitted.peer,
            self._pace(host),
            self._bulk_turns,
            writev=admitted.writev,
            maybe_learning=self._maybe_learning,
            read=admitted.read,
            begun=admitted.begun,
            maybe_linger_turn=self._linger_turn,
            allow_unsent=partial(allow_unsent, stream),
        )

    def _pace(self, host: str) -> Pace:
        """All connections of a host share what is seen of its link; a Unix socket is none: nothing is compressed."""
        if len(self._paces) > self._limits.max_clients:
            self._paces = {host: self._paces[host] for host in self._sessions.values()}
        if host not in self._paces:
            self._paces[host] = Pace.of_this_host() if _is_here(host) else Pace()
        return self._paces[host]

    def _is_full(self, host: str) -> bool:
        if len(self._sessions) >= self._limits.max_clients:
            return True
        return Counter(self._sessions.values())[host] >= self._limits.max_clients_per_host


def _is_here(host: str) -> bool:
    return host == UNIX_HOST or host.startswith("127.") or host == "::1"


def _peer(stream: trio.SocketStream) -> tuple[str, str]:
    """The client's host, for counting, and its address, for the log."""
    try:
        name = stream.socket.getpeername()
    except OSError:
        return "", "a client that left"
    if isinstance(name, tuple):
        return str(name[0]), f"{name[0]} port {name[1]}"
    return UNIX_HOST, "a local client"


async def _run(session: Session, threads: trio.CapacityLimiter) -> bytes:
    """`Session.run` in a thread; a cancellation cuts it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cut_when_cancelled, session)
        farewell = await trio.to_thread.run_sync(session.run, limiter=threads)
        nursery.cancel_scope.cancel()
    return farewell


async def _cut_when_cancelled(session: Session) -> None:
    try:
        await trio.sleep_forever()
    finally:
        session.cut()


async def serve(
    snapshots: Iterable[str | Path] | Catalog,
    listeners: Iterable[str] | Listeners = (DEFAULT_LISTEN,),
    *,
    limits: ServerLimits | None = None,
    learn: Path | Learning | None = None,
    maybe_gate: Gate | None = None,
    insecure: bool = False,
    task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `Serving.stop` or cancellation; see the top of this module. Closes what it opened.

    `maybe_gate`: made by `open_gate`; without one, only this host is listened to unless `insecure`.

    Raises:
        LazymemError: a snapshot or a listener cannot be opened; nothing was published.
    """
    with contextlib.ExitStack() as stack:
        maybe_learning = stack.enter_context(Learning(learn)) if isinstance(learn, Path) else learn
        if not isinstance(snapshots, Catalog):
            snapshots = stack.enter_context(Catalog(snapshots))
        if not isinstance(listeners, Listeners):
            addresses = [parse_listen(text) for text in listeners]
            listeners = stack.enter_context(Listeners(private=maybe_gate is None and not insecure))
            listeners.open(addresses)
        serving = Serving(snapshots, listeners, limits or ServerLimits(), maybe_learning, maybe_gate=maybe_gate)
        await serving.run(task_status=task_status)


def open_gate(
    tls: TlsSettings, allow: Iterable[str], names: Collection[str], limits: ServerLimits | None = None
) -> Gate:
    """For TLS, and `--allow`s over what is published.

    Raises:
        UsageError: a file cannot be used, a rule makes no sense, or nobody may have one of `names`.
    """
    allowed = parse_allowed(allow)
    allowed.check(names)
    return Gate(tls, allowed, limits or ServerLimits())
