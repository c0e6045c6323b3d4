"""A link as a process: a TCP relay with one wire a direction for all its connections. `bench/README.md` has its limits.

    python -m bench.relay --target 127.0.0.1:7411 --rate 125e6 --round-trip 0.001

It says `{"listening": PORT}` on stdout, and for each line that it reads on stdin what it has carried so far; it ends
when stdin does. A connection's first bytes wait one round trip, as they would for a SYN and its answer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import select
import socket
import sys
from collections import deque
from dataclasses import dataclass, field
from time import monotonic

from bench.wire import Wire

MAX_PENDING_BYTES = 256 * 1024
"""Arrived, but not taken by the receiver; then its sender is not read any more, as a closed TCP window has it."""

MAX_READS = 4
"""Of one connection in a turn: then it is another one's, if it has something."""

BUSY_PIECES = 8
BUSY_SECONDS = 0.0002
"""While so much is under way the relay looks only so often: late by a fifth of a millisecond at most, and the rate is
kept by the wire's own books."""

SOCKET_BUFFER_SECONDS = 0.006
MOST_SOCKET_BUFFER_BYTES = 64 * 1024
LEAST_SOCKET_BUFFER_BYTES = 8 * 1024
"""Of the sender's bytes in the kernel on this side, beyond the queue: a few milliseconds of a slow link."""

SEGMENT_BYTES = 1448
"""An Ethernet's: loopback's own, of 64 KiB, would wait for as much room in a small buffer."""

_PR_SET_TIMERSLACK = 29
_STDIN = 0


def socket_buffer_bytes(rate_bytes: float) -> int:
    """For a socket in which what comes waits for a link of so many bytes a second."""
    return int(max(LEAST_SOCKET_BUFFER_BYTES, min(MOST_SOCKET_BUFFER_BYTES, rate_bytes * SOCKET_BUFFER_SECONDS)))


@dataclass(eq=False, slots=True)
class End:
    """One socket of a connection; `peer` is its other one. `wire` carries what is read here."""

    socket: socket.socket
    wire: Wire[Piece]
    readable_from: float = 0.0
    ended: bool = False
    closing: bool = False
    under_way: int = 0
    pending: deque[memoryview] = field(default_factory=deque)
    pending_bytes: int = 0
    peer: End | None = None

    def fileno(self) -> int:
        return self.socket.fileno()


Piece = tuple[End, bytes]
"""Where it goes, and what; no bytes: the sender's stream ended."""


class Relay:
    """Serves `listener`; every connection goes to `target`."""

    def __init__(
        self, listener: socket.socket, target: tuple[str, int], rate_bytes: float, round_trip_seconds: float
    ) -> None:
        self._listener = listener
        self._target = target
        self._round_trip = round_trip_seconds
        self.forth: Wire[Piece] = Wire(rate_bytes, round_trip_seconds / 2)
        self.back: Wire[Piece] = Wire(rate_bytes, round_trip_seconds / 2)
        self.ends: list[End] = []

    def run(self) -> None:
        """Until stdin ends."""
        while True:
            now = monotonic()
            self._deliver(now)
            readers = [end for end in self.ends if self.wants_read(end, now)]
            writers = [end for end in self.ends if end.pending]
            asked: list[End | socket.socket | int] = [_STDIN, self._listener, *readers]
            readable, writable, _ = select.select(asked, writers, [], self._timeout(now))
            for end in writable:
                self._flush(end)
            for found in readable:
                if isinstance(found, End):
                    self._read(found)
                elif found is self._listener:
                    self._accept()
                elif not self._report():
                    return
            if len(readable) > 1:  # whoever was first comes last: room in the queue goes round
                self.ends.append(self.ends.pop(0))

    def wants_read(self, end: End, now: float) -> bool:
        peer, wire = end.peer, end.wire
        assert peer is not None
        if end.ended or end.readable_from > now or peer.pending_bytes >= MAX_PENDING_BYTES:
            return False
        return wire.room(now) >= wire.piece_bytes

    def _timeout(self, now: float) -> float | None:
        at = self.wake_at(now)
        if self.forth.under_way + self.back.under_way > BUSY_PIECES:
            at = max(at, now + BUSY_SECONDS)
        return None if at == math.inf else max(0.0, at - monotonic())

    def wake_at(self, now: float) -> float:
        """When to look again. `now` is the moment at which `wants_read` was asked: by a later one, an end that has
        become readable in between would be in neither, and wait for ever.
        """
        at = min(self.forth.next_event(now), self.back.next_event(now))
        for end in self.ends:
            if end.readable_from > now:
                at = min(at, end.readable_from)
        return at

    def _accept(self) -> None:
        ours, _ = self._listener.accept()
        try:
            theirs = self._connected()
        except OSError:
            ours.close()
            return
        for one in (ours, theirs):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MOST_SOCKET_BUFFER_BYTES)
        client = End(ours, self.forth, monotonic() + self._round_trip)
        server = End(theirs, self.back, peer=client)
        client.peer = server
        self.ends += [client, server]

    def _connected(self) -> socket.socket:
        """To the target, whose answers are what fills a link."""
        size = socket_buffer_bytes(self.back.rate_bytes)
        theirs = socket.socket()
        try:
            if size < MOST_SOCKET_BUFFER_BYTES:
                theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            theirs.connect(self._target)
        except OSError:
            theirs.close()
            raise
        return theirs

    def _read(self, end: End) -> None:
        """As much as the queue has room for, up to some pieces, so that a sender of small ones costs few turns."""
        wire, peer = end.wire, end.peer
        assert peer is not None
        for _ in range(MAX_READS):
            now = monotonic()
            if wire.room(now) < wire.piece_bytes:
                return
            try:
                data = end.socket.recv(wire.piece_bytes)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            wire.put(now, len(data), (peer, data))
            if not data:
                end.ended = True
            if len(data) < wire.piece_bytes:
                return

    def _deliver(self, now: float) -> None:
        for wire in (self.forth, self.back):
            while (piece := wire.arrived(now)) is not None:
                end, data = piece
                if data:
                    end.pending.append(memoryview(data))
                    end.pending_bytes += len(data)
                else:
                    end.closing = True
                self._flush(end)

    def _flush(self, end: End) -> None:
        try:
            while end.pending:
                first = end.pending[0]
                sent = end.socket.send(first)
                end.pending_bytes -= sent
                if sent < len(first):
                    end.pending[0] = first[sent:]
                    return
                end.pending.popleft()
        except BlockingIOError:
            return
        except OSError:
            end.pending.clear()
            end.pending_bytes = 0
            end.closing = True
            if end.peer is not None:  # what the receiver does not take any more, the sender should not send
                end.peer.closing = True
                end.ended = True
        if end.closing and not end.pending:
            self._finish(end)

    def _finish(self, end: End) -> None:
        """The stream towards this end is over; with both directions over, the connection is."""
        with contextlib.suppress(OSError):
            end.socket.shutdown(socket.SHUT_WR)
        peer = end.peer
        assert peer is not None
        if peer.closing and not peer.pending:
            for one in (end, peer):
                one.socket.close()
                if one in self.ends:
                    self.ends.remove(one)

    def _report(self) -> bool:
        if not os.read(_STDIN, 4096):
            return False
        spent = os.times()
        report = {
            "forth_bytes": self.forth.carried_bytes,
            "back_bytes": self.back.carried_bytes,
            "cpu_seconds": spent.user + spent.system,
        }
        print(json.dumps(report), flush=True)
        return True


def _hurry() -> None:
    """Be late as seldom as possible: a link does not compete with those at its ends for a processor."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1000))  # sleeps end 50 us late by default
    gc.disable()
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main(arguments: list[str] | None = None) -> int:
    """Runs the relay; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.relay", description="A TCP relay with a rate and a delay.")
    parser.add_argument("--target", metavar="HOST:PORT", required=True)
    parser.add_argument("--rate", metavar="BYTES", type=float, required=True, help="bytes a second, each direction")
    parser.add_argument("--round-trip", metavar="SECONDS", type=float, required=True)
    found = parser.parse_args(arguments)
    host, _, port = found.target.rpartition(":")
    _hurry()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps({"listening": listener.getsockname()[1]}), flush=True)
        Relay(listener, (host, int(port)), found.rate, found.round_trip).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
