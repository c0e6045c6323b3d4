"""Readers and writers that wait for a page that cannot come: killed ones end, interrupted ones get their page later."""

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, Server, Stage, wait_until
from tests.support.snapshots import BuiltSnapshot

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")


def _touch(path: Path, page: int) -> int:
    """One byte, as a guest touches it: the request is for this page alone."""
    descriptor = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped[page << 12]


def _child(mount: Mounted, page: int, *, threads: int = 1) -> int:
    """A process that touches `page` and ends with that byte; the signal SIGUSR1 does nothing to it."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGUSR1, lambda *_: None)
    others = [threading.Thread(target=_touch, args=(mount.ram_path, page + number)) for number in range(1, threads)]
    for other in others:
        other.start()
    os._exit(_touch(mount.ram_path, page))


def _waiting(mount: Mounted, server: Server, *, threads: int = 1) -> int:
    before = mount.status()["demand_faults"]
    child = _child(mount, 5, threads=threads)
    wait_until(lambda: bool(mount.status()["demand_faults"] >= before + 1), "the reader waits for its page")
    return child


@pytest.mark.parametrize("threads", [1, 3])
def test_a_killed_reader_ends_though_its_page_cannot_come(mounts: Stage, snapshot: BuiltSnapshot, threads: int) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    child = _waiting(mount, server, threads=threads)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the killed reader's end")
    mounts.serve(snapshot.folder, port=server.port)
    assert _touch(mount.ram_path, 5) == snapshot.page(5)[0], "the next reader gets the page"


def test_an_interrupted_reader_gets_its_page(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """An emulator's vCPUs are kicked by signals all the time; to end their READs would be SIGBUS to them."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    child = _waiting(mount, server)
    for _ in range(3):
        os.kill(child, signal.SIGUSR1)
    wait_until(lambda: _has_pending(child, signal.SIGUSR1), "the signal waits with the reader")
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    mounts.serve(snapshot.folder, port=server.port)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == snapshot.page(5)[0]


def test_a_reader_that_is_interrupted_first_and_killed_later_ends(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """The kernel tells of the first signal only."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    child = _waiting(mount, server)
    os.kill(child, signal.SIGUSR1)
    wait_until(lambda: _has_pending(child, signal.SIGUSR1), "the signal waits with the reader")
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the killed reader's end")


def _has_pending(process: int, number: int) -> bool:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_signals_that_nobody_waits_for_are_no_business_of_the_mount(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Many interrupted reads of pages that are here or come at once: each is right."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    libc = ctypes.CDLL(None, use_errno=True)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        descriptor = os.open(mount.ram_path, os.O_RDONLY)
        page = ctypes.create_string_buffer(4096)
        for number in range(snapshot.pages):
            done = libc.pread(descriptor, page, ctypes.c_size_t(4096), ctypes.c_long(number << 12))
            assert done == 4096, os.strerror(ctypes.get_errno())
            assert page.raw == snapshot.page(number), number
        os.close(descriptor)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- writers: pwrite(2) of a part of a page, which is to be merged with what the server has


def _writer(mount: Mounted, page: int, data: bytes = b"never") -> int:
    """A process that writes `data` into `page`; signals SIGUSR1 do nothing to it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        descriptor = os.open(mount.ram_path, os.O_RDWR)
        os._exit(os.pwrite(descriptor, data, (page << 12) + 10))
    return child


def _waiting_writer(mount: Mounted, page: int, data: bytes = b"never") -> int:
    before = mount.status()["demand_faults"]
    child = _writer(mount, page, data)
    wait_until(lambda: bool(mount.status()["demand_faults"] >= before + 1), "the writer waits for its page")
    return child


def _ended(child: int) -> Callable[[], bool]:
    return lambda: os.waitpid(child, os.WNOHANG)[0] == child


@pytest.mark.parametrize("signals", [(signal.SIGKILL,), (signal.SIGUSR1, signal.SIGKILL)])
def test_a_killed_writer_ends_and_wrote_nothing(
    mounts: Stage, snapshot: BuiltSnapshot, signals: tuple[signal.Signals, ...]
) -> None:
    """Also one that was interrupted before: the kernel tells of the first signal only. So an unmount need not wait."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    child = _waiting_writer(mount, 5)
    for number in signals:
        os.kill(child, number)
    wait_until(_ended(child), "the killed writer's end")
    assert mount.status()["pages_written"] == 0
    mounts.serve(snapshot.folder, port=server.port)
    assert mount.ram_path.read_bytes() == snapshot.ram
    mount.unmount()


def test_one_of_two_writers_of_a_page_is_killed(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """The other one, who waits for it, goes on, and only its bytes are there."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    killed, other = _waiting_writer(mount, 5), _writer(mount, 5, b"good")
    os.kill(killed, signal.SIGKILL)
    wait_until(_ended(killed), "the killed writer's end")
    mounts.serve(snapshot.folder, port=server.port)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == len(b"good")
    at = (5 << 12) + 10
    assert mount.ram_path.read_bytes() == snapshot.ram[:at] + b"good" + snapshot.ram[at + 4 :]


def test_an_interrupted_writer_is_no_killed_one(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    child = _waiting_writer(mount, 5, b"later")
    os.kill(child, signal.SIGUSR1)
    wait_until(lambda: _has_pending(child, signal.SIGUSR1), "the signal waits with the writer")
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    mounts.serve(snapshot.folder, port=server.port)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    at = (5 << 12) + 10
    assert mount.ram_path.read_bytes() == snapshot.ram[:at] + b"later" + snapshot.ram[at + 5 :]


def _mapping(mount: Mounted, page: int, data: bytes) -> tuple[int, int]:
    """A process that changes `page` through a map, which nobody but the kernel has for a while; and what to close for
    it to look at that once more, and to end with 0 if all is as it was."""
    told, tell = os.pipe()
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(tell)
        with mount.open_map() as mapped:
            at = page << 12
            mapped[at : at + len(data)] = data
            os.write(say, b"x")
            os.read(told, 1)
            os._exit(mapped[at : at + len(data)] != data)
    os.close(told)
    assert os.read(said, 1) == b"x"
    os.close(said)
    os.close(say)
    return child, tell


def test_a_killed_writer_waits_where_the_kernel_may_have_its_page(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """A WRITE that fails may have the kernel call its page outdated, and read it anew: with it would go what others
    changed there through a map. (The cache has lost the page, so the writer waits.)"""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    mapping, tell = _mapping(mount, 5, b"mapped")
    mount.wait_kept()
    for pages in mounts.cache.glob("*/pages"):
        os.truncate(pages, 0)
        os.truncate(pages, len(snapshot.ram))
    server.kill()
    child = _waiting_writer(mount, 5)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: _has_pending(child, signal.SIGKILL), "the killed writer waits")
    mount.status()
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    mounts.serve(snapshot.folder, port=server.port)
    wait_until(_ended(child), "its end")
    mount.ram_path.read_bytes()  # reads what the kernel calls outdated
    os.close(tell)
    assert os.waitpid(mapping, 0)[1] == 0
    expected = bytearray(snapshot.ram)
    expected[5 << 12 : (5 << 12) + 6] = b"mapped"
    expected[(5 << 12) + 10 : (5 << 12) + 15] = b"never"  # which it did write, in the end
    assert mount.ram_path.read_bytes() == expected
