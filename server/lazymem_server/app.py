"""`lazymem-serve`: puts catalog, listeners and sessions together.

For tests and other programs, inside a trio nursery::

    serving = await nursery.start(partial(serve, [folder], ["127.0.0.1:0"]))
    serving.addresses           # ("127.0.0.1:40123",): where it really listens
    serving.stop("reason")      # goodbye to all clients; `serve` returns when they are answered

`snapshots` are folders or ``NAME=FOLDER`` texts, or an open `Catalog`; `listeners` are ``HOST:PORT`` or ``unix:PATH``
texts, or an open `Listeners`. `learn` is the folder of `--learn`. Cancelling `serve` cuts all connections at once, as
a crash would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import trio

from lazymem.errors import LazymemError
from lazymem.timeslice import ask_for_short_slices
from lazymem.wire.connection import ServerConnection
from lazymem.wire.messages import Error, ErrorCode
from lazymem_server.catalog import Catalog
from lazymem_server.counters import Counters
from lazymem_server.learning import Learning
from lazymem_server.limits import ServerLimits
from lazymem_server.listeners import DEFAULT_LISTEN, Listeners, parse_listen, spoken_address, tune
from lazymem_server.pace import Pace
from lazymem_server.session import RECEIVE_BYTES, Session

log = logging.getLogger("lazymem.server")

EXIT_INTERRUPTED = 130

UNIX_HOST = "unix"

SWITCH_SECONDS = 0.0005
"""After so long a session's thread gives another one its turn (Python's own 5 ms would be a whole fault's waiting)."""


Divert = Callable[[trio.SocketStream], Awaitable[bool]]
"""Gets a connection that nothing was read from. True: it speaks something else, and was served to its end."""


class Serving:
    """A server that runs. What `serve` hands to the one that started it."""

    def __init__(
        self,
        catalog: Catalog,
        listeners: Listeners,
        limits: ServerLimits,
        maybe_learning: Learning | None = None,
        maybe_divert: Divert | None = None,
    ) -> None:
        """`maybe_divert`: looks at each connection first."""
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
        self._sessions: dict[Session, str] = {}
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
        if self._maybe_divert is not None and await self._maybe_divert(stream):
            await trio.aclose_forcefully(stream)
            return
        host, peer = _peer(stream)
        tune(stream, self._limits.socket_unsent_bytes)
        if self._is_full(host):
            log.warning("%s: refused, too many clients", peer)
            frame = ServerConnection().send(Error(0, ErrorCode.BUSY, "too many clients: try again later"))
            await say_last(stream, frame, self._limits.farewell_seconds)
        else:
            await self._serve(stream, host, peer)
        await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream, host: str, peer: str) -> None:
        fd = stream.socket.fileno()
        session = Session(
            fd,
            self._catalog,
            self._limits,
            self._disks,
            peer,
            self._pace(host),
            self._bulk_turns,
            maybe_learning=self._maybe_learning,
        )
        self._sessions[session] = host
        try:
            if self._stop_reason is not None:
                session.stop(self._stop_reason)
            farewell = await _run(session, self._threads)
            if farewell:
                await say_last(stream, farewell, self._limits.farewell_seconds)
        except Exception:  # a bug met by one client must not end the others' connections
            log.exception("%s: lazymem-serve failed", peer)
        finally:
            del self._sessions[session]
            self._ended.add(session.counters)
            session.close()

    def _pace(self, host: str) -> Pace:
        """All connections of a host share what is seen of its link; a Unix socket is none: nothing is compressed."""
        if len(self._paces) > self._limits.max_clients:
            self._paces = {host: self._paces[host] for host in self._sessions.values()}
        if host not in self._paces:
            self._paces[host] = Pace(level=0) if host == UNIX_HOST else Pace()
        return self._paces[host]

    def _is_full(self, host: str) -> bool:
        if len(self._sessions) >= self._limits.max_clients:
            return True
        return Counter(self._sessions.values())[host] >= self._limits.max_clients_per_host


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


async def say_last(stream: trio.SocketStream, frame: bytes, seconds: float) -> None:
    """Send a last frame to a client that is dropped, if it takes it within so many seconds.

    Reads what the client still sends for as long: closing a socket with unread data is a reset, which would overtake
    the frame. Behind an answer that was cut the frame is noise, but such a client was too slow to listen anyway.
    """
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(seconds):
        await stream.send_all(frame)
        await stream.send_eof()
        while await stream.receive_some(RECEIVE_BYTES):
            pass


async def serve(
    snapshots: Iterable[str | Path] | Catalog,
    listeners: Iterable[str] | Listeners = (DEFAULT_LISTEN,),
    *,
    limits: ServerLimits | None = None,
    learn: Path | None = None,
    task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `Serving.stop` or cancellation; see the top of this module. Closes what it opened.

    Raises:
        LazymemError: a snapshot or a listener cannot be opened; nothing was published.
    """
    maybe_learning = Learning(learn) if learn is not None else None
    with contextlib.ExitStack() as stack:
        if not isinstance(snapshots, Catalog):
            snapshots = stack.enter_context(Catalog(snapshots))
        if not isinstance(listeners, Listeners):
            addresses = [parse_listen(text) for text in listeners]
            listeners = stack.enter_context(Listeners())
            listeners.open(addresses)
        serving = Serving(snapshots, listeners, limits or ServerLimits(), maybe_learning)
        await serving.run(task_status=task_status)


# ---- the command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = _parser().parse_args(argv)
    level = logging.WARNING if options.quiet else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=level, format="lazymem-serve: %(message)s")
    try:
        with Catalog(options.snapshot, options.parent) as catalog, Listeners() as listeners:
            adopted = listeners.adopt()
            if options.listen or not adopted:
                listeners.open(parse_listen(text) for text in options.listen or [DEFAULT_LISTEN])
            sys.setswitchinterval(SWITCH_SECONDS)
            ask_for_short_slices()  # a session's thread that is put aside while it has the interpreter stops them all
            return trio.run(_serve_until_signal, catalog, listeners, options.json, options.learn)
    except LazymemError as error:
        print(f"lazymem-serve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


async def _serve_until_signal(catalog: Catalog, listeners: Listeners, as_json: bool, learn: Path | None) -> int:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            serving: Serving = await nursery.start(partial(serve, catalog, listeners, learn=learn))
            _announce(serving, as_json)
            number = await anext(signals)
            _notify("STOPPING=1")
            serving.stop()
    return EXIT_INTERRUPTED if number == signal.SIGINT else 0


def _announce(serving: Serving, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"listening": serving.addresses, "snapshots": serving.names}), flush=True)
    else:
        print(f"serving {', '.join(serving.names)} on {', '.join(serving.addresses)}", flush=True)
    _notify("READY=1")


def _notify(state: str) -> None:
    import sdnotify  # only needed here; outside of systemd it does nothing

    sdnotify.SystemdNotifier().notify(state)


_EPILOG = """examples:
  lazymem-serve --listen 0.0.0.0:7411 /var/lib/lazymem/web db=/srv/snapshots/db-3
  lazymem-serve --learn /var/lib/lazymem/learned /var/lib/lazymem/web
                                      what the first resume touches is fetched first by the next ones
  lazymem-serve --parent /srv/snapshots/web /srv/deltas/web-2
                                      a delta (lazymem snapshot --delta), served as all that it makes of its parent
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lazymem-serve",
        description="Publish the RAM of snapshots, read-only, for lazymem-mount to resume guests from.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "snapshot",
        nargs="+",
        metavar="[NAME=]DIR",
        help="a snapshot folder, or one that just holds pc.ram; published by its base name unless NAME is given",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help=f"HOST:PORT (port 0: any free one) or unix:PATH (mode 0600); may be repeated; default {DEFAULT_LISTEN}, "
        "or the sockets that systemd hands over",
    )
    parser.add_argument(
        "--learn",
        metavar="DIR",
        type=Path,
        help="take a recording from the first client of a snapshot that has no working-set, keep it in DIR, and give "
        "it to later ones: whoever may connect may so decide what is fetched first",
    )
    parser.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="DIR",
        type=Path,
        help="the snapshot that a delta was made over, where it is not beside the delta; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print the line that says it is ready as JSON")
    parser.add_argument("--quiet", action="store_true", help="log only what went wrong")
    return parser


if __name__ == "__main__":
    sys.exit(main())
