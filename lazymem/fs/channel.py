"""The kernel's end of the mount: READ and WRITE of the RAM are answered here, everything else is pyfuse3's.

pyfuse3 sits at one end of a socket pair as if that were `/dev/fuse` (`libraryend`); we read the real one and hand over
what is not ours, and its answers back (record 0006). So a page fault meets no library on its way: from the kernel's
request to its answer it is ordinary function calls in trio's thread, with the demand connection's socket looked at in
between.

Tasks: `run` waits for requests and serves bursts of them; one task hands pyfuse3's answers to the kernel; each READ
that cannot be answered the short way, and each WRITE, has one. All state belongs to trio's thread.

Bursts: whoever touches one missing page mostly touches the next at once. While requests keep coming the processor is
not given up between them (to sleep and be woken costs as much as all our work), but other tasks get a turn each few
milliseconds, at once when a request of the burst has one that it waits for, and when waiting has not paid lately there
is none.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
from time import perf_counter

import trio

from lazymem.errors import EnvironmentRefusedError, LazymemError
from lazymem.fs import fuseabi
from lazymem.fs.agreement import Agreement
from lazymem.fs.asidetime import AsideTime
from lazymem.fs.channelends import Link, RamFile, Taken, Written
from lazymem.fs.failures import told_errno
from lazymem.fs.libraryend import LibraryEnd
from lazymem.fs.openrequests import OpenRequests, OpenWrite
from lazymem.fs.readorder import ReadOrder
from lazymem.fs.syscalls import lock_in_memory
from lazymem.fs.tree import RAM_INODE, Tree
from lazymem.pages import PAGE_SIZE

log = logging.getLogger(__name__)

TURN_SECONDS = 0.004
"""So long a burst is served before other tasks get a turn."""

MAX_LINGER_SECONDS = 0.0002
MIN_LINGER_SECONDS = 0.00001
"""How long the next request is waited for on the processor: halved each time it did not come, and all of it again when
one came that would have been worth it."""

CROWDED_SECONDS = 0.05
PUT_ASIDE_SECONDS = 0.001
"""Who waits on the processor while others want it is put behind them when it has something to do. So after it was taken
from us for the second of these times, nothing is waited for on it for the first: what is worth all of
`MAX_LINGER_SECONDS` is waited for in poll(2), for a millisecond."""

NEAR_SECONDS = 0.0004
"""Where an answer has come so fast, answers are waited for on the processor, for `MAX_LINGER_SECONDS`."""

DRAIN_LOOK_SECONDS = 0.005


def _resident_buffer(size: int) -> mmap.mmap:
    """Memory that is here and stays: where the kernel has to bring a page first while we are being killed, it ends the
    request that it was about to hand over with EIO, and the guest gets that."""
    buffer = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    buffer.madvise(mmap.MADV_DONTFORK)  # or the next write to each page would find it shared with a child
    lock_in_memory(buffer)
    return buffer


class Channel:
    """Serves the mount behind `descriptor`, which stays the caller's and becomes non-blocking; nobody else reads it.

    `close` lets go of our end of the socket pair. With `maybe_agreement` another daemon can go on
    with the mount after our death; or we are that one, and `run` begins with it.
    """

    def __init__(
        self,
        descriptor: int,
        tree: Tree,
        ram: RamFile,
        link: Link,
        maybe_taken: Taken | None = None,
        maybe_written: Written | None = None,
        maybe_agreement: Agreement | None = None,
        *,
        maybe_order: ReadOrder | None = None,
        takes_back: bool = True,
    ) -> None:
        """`takes_back`: a write whose writer is killed may be given up. Only where we served this mount from its
        beginning, and so know what the kernel has seen. `maybe_order`: without it READs are started as they come."""
        os.set_blocking(descriptor, False)  # a request may be taken back between poll and read
        self._fd = descriptor
        self._ram = ram
        self._maybe_taken = maybe_taken
        self._maybe_written = maybe_written
        self._ram_bytes = tree.ram.size
        self._writable = bool(tree.ram.mode & 0o222)
        self._link = link
        self._link_fd = -1
        self._library = LibraryEnd(maybe_agreement, self._send)
        self._agreement = maybe_agreement
        self._takes_back = takes_back
        self._closed_to_new = False
        self._buffer = _resident_buffer(fuseabi.REQUEST_BYTES)
        self._view = memoryview(self._buffer)
        self._into = [self._view]
        self._maybe_order = maybe_order
        self._aside = maybe_order.aside if maybe_order is not None else {}
        self._waiting = OpenRequests(ram.is_unseen, self._send, self._start_due)
        self._open = self._waiting.reads
        self._open_writes = self._waiting.writes
        self._aside_time = AsideTime(maybe_order, self._open, self._start_read)
        self._linger = MIN_LINGER_SECONDS
        self._answered_at = 0.0
        self._crowded_until = 0.0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._nursery: trio.Nursery | None = None
        self._turn_wanted = False  # a request of this burst waits for a task's turn
        self._over = False

    def take_library_end(self) -> int:
        """The descriptor that pyfuse3 takes for `/dev/fuse`; it closes it. To be called once."""
        return self._library.take_descriptor()

    async def run(self) -> None:
        """Serve until cancelled, or until the mount is gone."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._library.bring_answers)
                await self._take_over()
                while not self._over:
                    await trio.lowlevel.wait_readable(self._fd)
                    if self._closed_to_new:
                        await trio.sleep_forever()
                    self._serve_burst()
                self._nursery.cancel_scope.cancel()
        finally:
            self._over = True
            self._nursery = None

    async def drain(self) -> None:
        """Take no more requests, and return once those that were taken are answered. What comes meanwhile waits in the
        kernel, for who comes after us."""
        self._closed_to_new = True
        self._start_due(everything=True)
        await trio.sleep(DRAIN_LOOK_SECONDS)  # the tasks of requests taken just now begin
        while self._open or self._open_writes:  # noqa: ASYNC110  # once in a mount's life; no fault pays for an event
            await trio.sleep(DRAIN_LOOK_SECONDS)

    async def _take_over(self) -> None:
        """Where a daemon died before us: agree with the library on what it agreed on, then have the kernel send again
        what it had taken and not answered (all of it, be it INIT)."""
        agreement = self._agreement
        if agreement is None or not agreement.begun:
            return
        maybe_init = agreement.maybe_repeat()
        if maybe_init is not None:
            self._library.repeat(maybe_init)
            await agreement.wait_agreed()
        self._resend()

    def _resend(self) -> None:
        try:
            os.write(self._fd, fuseabi.NOTIFY_RESEND)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EPERM):  # the mount is gone, which the reader finds too
                raise EnvironmentRefusedError(
                    f"the kernel does not send again what the daemon before had taken: {error.strerror}"
                ) from error

    def close(self) -> None:
        """After `run`."""
        self._library.close()

    # ---- bursts

    def _serve_burst(self) -> None:
        try:
            self._serve_until_quiet()
        finally:
            self._link.unwatch()
        if self._aside:
            self._start_due()

    def _serve_until_quiet(self) -> None:
        begun = perf_counter()
        turn_ends = begun + TURN_SECONDS
        if begun - self._answered_at < MAX_LINGER_SECONDS:  # it would have paid to wait
            self._linger = MAX_LINGER_SECONDS
        self._watch_link()
        poll, fd = self._poll.poll, self._fd
        spins = begun >= self._crowded_until
        near = self._link.best_answer_seconds < NEAR_SECONDS
        if near:
            self._start_due(everything=True)
            self._link.watch()
        self._turn_wanted = False
        linger, now = self._linger, begun
        linger_ends = begun + linger
        while True:
            found = poll(0 if spins or linger < MAX_LINGER_SECONDS else 1)
            before, now = now, perf_counter()
            for ready, _ in found:
                if ready == fd:
                    if len(found) == 1:
                        self._take_request()
                elif not self._link.receive_nowait():
                    self._watch_link()
            if found:
                if now > turn_ends or self._over:
                    return
                linger = self._worth_waiting(near)
                linger_ends = now + linger
            elif spins and now <= linger_ends:
                os.sched_yield()
            else:
                if linger:
                    self._linger = max(self._linger / 2, MIN_LINGER_SECONDS)
                return
            if spins and now - before > PUT_ASIDE_SECONDS:
                spins = False
                self._crowded_until = now + CROWDED_SECONDS

    def _worth_waiting(self, near: bool) -> float:
        """How many seconds to wait for what comes next, while no task of ours gets a turn."""
        if self._turn_wanted:
            return 0.0
        return MAX_LINGER_SECONDS if near and self._open else self._linger

    def _watch_link(self) -> None:
        link_fd = self._link.fileno()
        if link_fd == self._link_fd:
            return
        if self._link_fd >= 0:
            self._poll.unregister(self._link_fd)
        if link_fd >= 0:
            self._poll.register(link_fd, select.POLLIN)
        self._link_fd = link_fd

    def _take_request(self) -> None:
        try:
            length = os.readv(self._fd, self._into)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                self._over = True
            elif error.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOENT):  # ENOENT: it was taken back
                raise
            return
        _, opcode, unique, inode, _, _, thread, _, _ = fuseabi.IN_HEADER.unpack_from(self._buffer)
        if inode == RAM_INODE and opcode == fuseabi.READ:
            _, offset, size, _, _, flags, _ = fuseabi.READ_IN.unpack_from(self._buffer, fuseabi.READ_IN_AT)
            self._take_read(unique, thread, offset, size, flags)
            return
        self._link.settle()
        if inode == RAM_INODE and opcode == fuseabi.WRITE:
            self._take_write(unique, thread)
        elif inode == RAM_INODE and opcode == fuseabi.OPEN and self._only_reads():
            # Some are our own, or a killed daemon's before us, whose close must not wait for our answers (`ownfile`).
            self._send((fuseabi.open_answer(unique, RAM_INODE),))
        elif opcode != fuseabi.INTERRUPT or not self._take_interrupt():
            self._turn_wanted = True
            self._library.hand_over(opcode, bytes(self._view[:length]), self._nursery)

    def _take_interrupt(self) -> bool:
        """Whether it is about one of ours."""
        (unique,) = fuseabi.INTERRUPT_IN.unpack_from(self._buffer, fuseabi.IN_BYTES)
        return self._waiting.interrupt(unique, self._nursery)

    def _only_reads(self) -> bool:
        """Of the OPEN in the buffer. To truncate is refused elsewhere."""
        flags, _ = fuseabi.OPEN_IN.unpack_from(self._buffer, fuseabi.IN_BYTES)
        return not flags & (os.O_ACCMODE | os.O_TRUNC)

    # ---- the RAM

    def _take_read(self, unique: int, thread: int, offset: int, size: int, flags: int) -> None:
        size = min(size, self._ram_bytes - offset)
        if size <= 0:
            self._answer_read(unique, b"")
            return
        refused = self._maybe_taken is not None and self._maybe_taken(thread, offset, size)
        if refused and not flags & os.O_DIRECT:  # which is nobody's read-ahead: who reads so would get the error
            self._send((fuseabi.error_answer(unique, errno.EAGAIN),))
            return
        self._open[unique] = thread
        try:
            order = self._maybe_order
            if size > PAGE_SIZE and order is not None and order.puts_aside(unique, thread, offset, size, self._open):
                self._aside_time.watch(self._nursery)
                return  # until no more come, or what somebody waits for has
        except Exception:  # noqa: BLE001  # as in `_start_read`; and an order is nothing that a guest needs
            self._give_order_up()
        self._start_read(unique, offset, size)

    def _start_due(self, *, everything: bool = False) -> None:
        """Of the READs that are put aside. `everything`: all of them."""
        while self._aside and self._maybe_order is not None:
            try:
                maybe_due = self._maybe_order.maybe_due(self._open, everything=everything)
            except Exception:  # noqa: BLE001  # as above
                self._give_order_up()
                return
            if maybe_due is None:
                return
            self._start_read(maybe_due.unique, maybe_due.offset, maybe_due.size)

    def _give_order_up(self) -> None:
        """For an exception's handler: from now on READs go as they come."""
        log.exception("READs have no order any more: a bug in lazymem")
        left, self._maybe_order = list(self._aside.values()), None
        self._aside.clear()
        for read in left:
            if read.unique in self._open:
                self._start_read(read.unique, read.offset, read.size)

    def _start_read(self, unique: int, offset: int, size: int) -> None:
        try:

            def done(answer: bytes | memoryview | LazymemError | None) -> None:
                self._done(unique, offset, size, answer)

            found = self._ram.read_soon(offset, size, done)
            if found is False:
                self._read_long_way(unique, offset, size)
            elif found is not True:
                del self._open[unique]
                self._answer_read(unique, found)
        except Exception as error:  # noqa: BLE001  # the guest of another page must outlive a bug in this one's way
            self._fail("read", unique, error)

    def _done(self, unique: int, offset: int, size: int, answer: bytes | memoryview | LazymemError | None) -> None:
        if unique not in self._open:
            return
        if answer is None:
            self._read_long_way(unique, offset, size)
        elif isinstance(answer, LazymemError):
            self._fail("read", unique, answer)
        else:
            del self._open[unique]
            self._answer_read(unique, answer)
        if self._aside:
            self._start_due()

    def _read_long_way(self, unique: int, offset: int, size: int) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._read, unique, offset, size)
            self._turn_wanted = True

    async def _read(self, unique: int, offset: int, size: int) -> None:
        try:
            data = await self._ram.read(offset, size)
        except Exception as error:  # noqa: BLE001  # as above
            self._fail("read", unique, error)
        else:
            if self._open.pop(unique, None) is not None:
                self._answer_read(unique, data)
        if self._aside:
            self._start_due()

    def _take_write(self, unique: int, thread: int) -> None:
        _, offset, size, flags, _, _, _ = fuseabi.WRITE_IN.unpack_from(self._buffer, fuseabi.IN_BYTES)
        room = self._ram_bytes - offset
        if not self._writable or room <= 0:  # RAM does not grow
            self._send((fuseabi.error_answer(unique, errno.ENOSPC if self._writable else errno.EROFS),))
            return
        size = min(size, room)
        if self._maybe_written is not None:
            self._maybe_written(offset, size)
        end = fuseabi.WRITE_DATA_AT + size
        if self._nursery is not None:
            kept = flags & fuseabi.WRITE_CACHE or not self._takes_back
            write = self._open_writes[unique] = OpenWrite(offset, size, 0 if kept else thread)
            self._nursery.start_soon(self._write, unique, write, bytes(self._view[fuseabi.WRITE_DATA_AT : end]))
            self._turn_wanted = True

    async def _write(self, unique: int, write: OpenWrite, data: bytes) -> None:
        try:
            with write.scope:
                await self._ram.write(write.offset, data, write.begin_storing)
        except Exception as error:  # noqa: BLE001  # as above
            self._fail("write", unique, error)
        else:
            killed = write.scope.cancelled_caught
            answer = fuseabi.error_answer(unique, errno.EINTR) if killed else fuseabi.write_answer(unique, len(data))
            self._send((answer,))
        finally:
            del self._open_writes[unique]

    def _fail(self, name: str, unique: int, error: Exception) -> None:
        self._open.pop(unique, None)
        self._send((fuseabi.error_answer(unique, told_errno(name, error)),))
        if self._aside:  # none of them is to wait for what does not come
            self._start_due(everything=True)

    # ---- answers

    def _answer_read(self, unique: int, data: bytes | memoryview) -> None:
        self._send((fuseabi.answer_head(unique, len(data)), data))
        self._answered_at = perf_counter()

    def _send(self, pieces: tuple[bytes | memoryview, ...]) -> None:
        try:
            os.writev(self._fd, pieces)
        except OSError as error:
            # ENOENT: nobody waits any more. ENODEV, EPERM: the mount is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EPERM):
                log.error("the kernel does not take an answer: %s", error)
