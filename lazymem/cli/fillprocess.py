"""The process that brings what nobody waits for yet: forked by the daemon, told what to fill, ended with it.

The daemon's own process keeps what a guest waits for: faults, writes, what surrounds them. The recorded working set and
the sweep take hundreds of times as much processor time, and here they do not take it from the daemon's event loop and
interpreter lock; nor, being nicer, from a guest and the host's other work.

Forked before the daemon has an event loop, threads or descriptors of its own, so it shares the daemon's memory until
either writes there. It hears of the daemon's end by its socket's, also when the daemon was killed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio
from msgspec import structs

from lazymem.cli.background import let_go_of_inherited
from lazymem.errors import LazymemError
from lazymem.fetch.coming import Coming, shared_memory
from lazymem.fetch.lastdemand import LastDemand
from lazymem.pages import PageRange

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4096
"""A report has some 200."""

MAX_ERROR_CHARS = 500
"""Of what ended it, which is somebody else's text: a report has to fit into its message."""

NICENESS = 10
"""A tenth of a busy core's time: a fill that goes on, and that a guest does not feel. Idle cores are all its own."""


class FillOrder(msgspec.Struct, frozen=True):
    """What to fill, as soon as that is known: `root` names the hashed snapshot's digest tree, `identity` the cache's
    folder. `everything`: also what is not in the working set."""

    identity: bytes
    size_bytes: int
    root: bytes
    everything: bool
    template: bool = False
    """Nothing is ever written, so there is no map of it."""
    sums: bytes = b""
    """The manifest's digest of the leaves' sums, if it names some."""
    welcome: bytes = b""
    """The server's first word to the mount (`Welcome` as msgpack): the server may be away when this begins."""


class FillReport(msgspec.Struct, frozen=True):
    """How far it is. `held_pages` counts what anybody held; the rest is this process's own."""

    held_pages: int = 0
    brought_pages: int = 0
    in_flight_pages: int = 0
    wire_received_bytes: int = 0
    wire_sent_bytes: int = 0
    set_is_coming: bool = False
    """Recorded pages are still to be asked for."""
    done: bool = False
    maybe_error: str | None = None


class FillStart(NamedTuple):
    """That it may fill now: the recorded working set, and descriptors of the run's written map and of `Coming`."""

    recorded: tuple[PageRange, ...]
    round_trip_seconds: float
    """The best that the daemon has seen; infinite: none. What is told of the link by the first answers alone, beside an
    emulator that starts, may be many times as much."""
    written_fd: int
    coming_fd: int
    maybe_held_fd: int | None = None
    """The map of the cache that the daemon has open."""


class FillPipe:
    """The child's end: one order comes, then the word to start; reports go."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def maybe_order(self) -> FillOrder | None:
        """Blocking; None: the daemon ended before."""
        maybe_received = self._maybe_receive(1)
        if maybe_received is None:
            return None
        data, _ = maybe_received
        return msgspec.msgpack.decode(data, type=FillOrder)

    async def maybe_start(self) -> FillStart | None:
        """Once, after the order; None: the daemon ended before. Who brings no recorded set gives way from then on."""
        await trio.lowlevel.wait_readable(self._end)
        maybe_received = self._maybe_receive(4)
        if maybe_received is None:
            return None
        data, (written_fd, coming_fd, *held) = maybe_received
        (round_trip_seconds,) = _SECONDS.unpack_from(data)
        recorded = tuple(PageRange(start, count) for start, count in _RUN.iter_unpack(data[_SECONDS.size :]))
        if not recorded:
            give_way()
        return FillStart(recorded, round_trip_seconds, written_fd, coming_fd, held[0] if held else None)

    def _maybe_receive(self, descriptors: int) -> tuple[bytes, list[int]] | None:
        """What is in the file whose descriptor comes first, and the others."""
        data, found, _, _ = socket.recv_fds(self._end, 1, descriptors)
        if not data:
            return None
        for descriptor in found:
            os.set_inheritable(descriptor, False)  # which received ones are, whatever recv_fds is told (Python 3.11)
        with os.fdopen(found[0], "rb") as file:
            file.seek(0)
            return file.read(), found[1:]

    def report(self, report: FillReport) -> None:
        """Said or, where the daemon is too busy to listen, left out: the next one says it."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._end.send(msgspec.msgpack.encode(report), socket.MSG_DONTWAIT)

    def tell_kept(self) -> None:
        """As `report`: pages that somebody waits for may be held now."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._end.send(_KEPT, socket.MSG_DONTWAIT)

    def tell_end(self, report: FillReport) -> None:
        """Blocking: the last one must arrive."""
        with contextlib.suppress(OSError):
            self._end.send(msgspec.msgpack.encode(report))

    async def wait_daemon_gone(self) -> None:
        """Nothing is said to us any more: what can be read is the end."""
        await trio.lowlevel.wait_readable(self._end)


Fill = Callable[[FillOrder, FillPipe, LastDemand], None]
"""The child's work: blocking; returns when all is held."""

_KEPT = b"k"
"""No report is so short."""

_SECONDS = struct.Struct("<d")
_RUN = struct.Struct("<QQ")


class FillProcess:
    """The daemon's end. Made before `trio.run`, by fork."""

    def __init__(self, fill: Fill, keep: tuple[int, ...] = ()) -> None:
        """`keep`: the child's log needs these descriptors; it closes all others."""
        self.last_demand = LastDemand()
        self.latest = FillReport()
        self._begun = False
        self._maybe_coming_fd: int | None = None
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self._end.close()
            _run_child(fill, theirs, self.last_demand, keep)
        theirs.close()
        self._end.setblocking(False)

    @property
    def is_filling(self) -> bool:
        """Whether it has its order and has not ended."""
        return self._begun and self._pid > 0

    def share(self, pages: int) -> Coming:
        """What it will have on its way, and who demands, of a RAM of `pages` pages; at most once, before `begin`."""
        self._maybe_coming_fd = shared_memory(pages)
        return Coming(pages, self._maybe_coming_fd)

    def prepare(self, order: FillOrder) -> None:
        """Once: have it open what it needs, and connect."""
        self._send(msgspec.msgpack.encode(order))

    def begin(
        self,
        pages: int,
        recorded: Sequence[PageRange],
        maybe_written_fd: int | None,
        round_trip_seconds: float = math.inf,
        maybe_held_fd: int | None = None,
    ) -> None:
        """Once, after `prepare`: a RAM of `pages` pages. `maybe_written_fd`: the run's written map, which stays the
        caller's; None for a template. `round_trip_seconds`: as `FillStart`'s. `maybe_held_fd`: the cache's map, the
        caller's too: with another cache it ends early. None: with any."""
        if self._maybe_coming_fd is None:
            self.share(pages)
        assert self._maybe_coming_fd is not None
        written_fd = self._maybe_coming_fd if maybe_written_fd is None else maybe_written_fd  # one, in any case
        runs = [_RUN.pack(part.start, part.count) for part in recorded]
        held = () if maybe_held_fd is None else (maybe_held_fd,)
        self._send(b"".join([_SECONDS.pack(round_trip_seconds), *runs]), written_fd, self._maybe_coming_fd, *held)
        self._close_coming()
        self.latest = FillReport(set_is_coming=bool(recorded))
        self._begun = True

    def _send(self, data: bytes, *descriptors: int) -> None:
        with os.fdopen(os.memfd_create("order"), "wb") as file:  # a message has no room for it
            file.write(data)
            file.flush()
            with contextlib.suppress(OSError):  # it died: `run` sees that, and says so
                socket.send_fds(self._end, [b"!"], [file.fileno(), *descriptors])

    async def run(self, on_report: Callable[[FillReport], None], on_kept: Callable[[], None] = lambda: None) -> bool:
        """Hear its reports until its end; whether it held all that it was to. `latest` then says what it brought, and
        that nothing more comes. `on_kept`: called when it says that it kept pages."""
        while data := await self._next():
            if data == _KEPT:
                on_kept()
                continue
            report = msgspec.msgpack.decode(data, type=FillReport)
            if report.maybe_error is not None:
                report = structs.replace(self.latest, maybe_error=report.maybe_error)
            self.latest = report
            on_report(report)
            if report.done or report.maybe_error is not None:
                break
        self.latest = structs.replace(self.latest, in_flight_pages=0, set_is_coming=False)
        await self.end()
        return self.latest.done

    async def _next(self) -> bytes:
        while True:
            try:
                return self._end.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._end)
            except ConnectionResetError:  # told once: it ended without having read our last word; what it said, we read
                continue

    async def end(self) -> None:
        """As `close`, and others go on meanwhile: it ends when the disk lets it, in the time that others leave it."""
        if self._pid > 0:
            self._end.close()
            os.kill(self._pid, signal.SIGKILL)  # ours until it is waited for
            with contextlib.suppress(OSError):  # no descriptor to be had: then it is waited for below
                pidfd = os.pidfd_open(self._pid)
                try:
                    await trio.lowlevel.wait_readable(pidfd)
                finally:
                    os.close(pidfd)
            self.close()

    def close(self) -> None:
        """Blocking: end it, wherever it is: pages are in the cache before its map says so, so nothing can be half."""
        if self._pid > 0:
            pid, self._pid = self._pid, 0
            self._end.close()
            self._close_coming()
            os.kill(pid, signal.SIGKILL)  # ours until it is waited for
            os.waitpid(pid, 0)

    def _close_coming(self) -> None:
        """It stays mapped wherever it is in use."""
        if self._maybe_coming_fd is not None:
            fd, self._maybe_coming_fd = self._maybe_coming_fd, None
            os.close(fd)


def _run_child(fill: Fill, end: socket.socket, last_demand: LastDemand, keep: tuple[int, ...]) -> None:
    """Does not return. Whatever happens here is told, and is not the daemon's end."""
    try:
        _become_background(keep=(end.fileno(), *keep))
        pipe = FillPipe(end)
        maybe_order = pipe.maybe_order()
        if maybe_order is not None:
            try:
                fill(maybe_order, pipe, last_demand)
            except LazymemError as error:
                pipe.tell_end(FillReport(maybe_error=_clipped(str(error))))
            except BaseException as error:
                log.exception("the filling process ends: a bug in lazymem")
                pipe.tell_end(FillReport(maybe_error=_clipped(f"{type(error).__name__}: {error}")))
    finally:
        os._exit(0)


def _clipped(text: str) -> str:
    """It may name a file with a name that is no UTF-8."""
    return text[:MAX_ERROR_CHARS].encode(errors="backslashreplace").decode()


def _become_background(keep: tuple[int, ...]) -> None:
    """Ctrl-C is the daemon's to hear; a lock or pipe of its must not stay open here."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    let_go_of_inherited(*keep)
    with contextlib.suppress(OSError):  # a fill can be had again, and a guest cannot
        Path("/proc/self/oom_score_adj").write_text("500")


def give_way() -> None:
    """In the child, once, when it brings what nobody is about to need: take the time that others leave. Until then it
    shares the processors as the daemon does: a recorded set is what a guest that has just been resumed waits for."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
