"""Rule 9 on a real mount: reading equals the published file with the guest's writes over it, whatever the order.

Hypothesis draws map writes, plain writes of any part of a page, msync, fsync, dropped kernel caches and remounts; the
model is a bytearray. Each example begins with nothing fetched. With the background on the link is slow, so that pages
come on demand and ahead of that while the example runs.
"""

import mmap
import os
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from bench.links import Link, through
from lazymem.pages import PAGE_SIZE
from tests.support.mounts import Mounted, Stage, drop_kernel_cache
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

PAGES = 300  # more than a leaf's 256
SIZE = PAGES * PAGE_SIZE
offsets = st.integers(0, SIZE - 1) | st.builds(lambda page: page * PAGE_SIZE, st.integers(0, PAGES - 1))
lengths = st.integers(1, 3 * PAGE_SIZE) | st.sampled_from([PAGE_SIZE, 2 * PAGE_SIZE, 10])


SLOW = Link("slow", "2 ms, 4 Mb/s", 0.002, 5e5)
"""The RAM takes two seconds: longer than an example needs for its first operations, also on a busy machine."""


@dataclass
class Seen:
    """What an example's mounts did."""

    demanded: int = 0
    prefetched: int = 0
    writes: int = 0
    reads: int = 0


class MountMachine(RuleBasedStateMachine):
    """One run over one snapshot; each remount keeps its state folder, and its cache, which nobody else has had."""

    def __init__(self, stage: Stage, snapshot: BuiltSnapshot, address: str, number: int, prefetch: str) -> None:
        super().__init__()
        self.seen = Seen()
        self._prefetch = prefetch
        stage.cache = stage.folder / f"cache{number}"
        self._stage = stage
        self._address = address
        self._number = number
        self._model = bytearray(snapshot.ram)
        self._stamp = 0
        self._mount: Mounted | None = None
        self._map: mmap.mmap | None = None
        self._descriptor = -1

    @initialize(offset=offsets, length=lengths)
    def begin(self, offset: int, length: int) -> None:
        """With a write that is stored and forgotten while hardly a page is here."""
        self._enter()
        self.write_through_the_map(offset, length)
        self.store_and_forget()

    def _enter(self) -> None:
        arguments = ["--state", self._stage.folder / f"state{self._number}", "--prefetch", self._prefetch]
        self._mount = self._stage.mount(self._address, *arguments)
        self._map = self._mount.open_map()
        self._descriptor = os.open(self._mount.ram_path, os.O_RDWR)

    def _leave(self) -> None:
        assert self._map is not None
        assert self._mount is not None
        self._map.close()
        os.close(self._descriptor)
        status = self._mount.status()
        self.seen.demanded += status["pages_demanded"]
        self.seen.prefetched += status["pages_prefetched"]
        self.seen.writes += status["store"]["writes"]
        self.seen.reads += status["store"]["reads"]
        self._mount.unmount()
        self._mount = None

    def _bytes(self, length: int) -> bytes:
        self._stamp += 1
        return (self._stamp.to_bytes(4, "big") * (length // 4 + 1))[:length]

    @rule(offset=offsets, length=lengths)
    def write_through_the_map(self, offset: int, length: int) -> None:
        assert self._map is not None
        data = self._bytes(min(length, SIZE - offset))
        self._map[offset : offset + len(data)] = data
        self._model[offset : offset + len(data)] = data

    @rule(offset=offsets, length=lengths)
    def write_plainly(self, offset: int, length: int) -> None:
        data = self._bytes(min(length, SIZE - offset))
        assert os.pwrite(self._descriptor, data, offset) == len(data)
        self._model[offset : offset + len(data)] = data

    @rule(offset=offsets, length=lengths)
    def read_plainly(self, offset: int, length: int) -> None:
        assert os.pread(self._descriptor, length, offset) == self._model[offset : offset + length]

    @rule(offset=offsets, length=lengths)
    def read_through_the_map(self, offset: int, length: int) -> None:
        assert self._map is not None
        assert self._map[offset : offset + length] == self._model[offset : offset + length]

    @rule()
    def msync(self) -> None:
        assert self._map is not None
        self._map.flush()

    @rule()
    def fsync(self) -> None:
        os.fsync(self._descriptor)

    @rule()
    def drop_the_kernels_cache(self) -> None:
        assert self._mount is not None
        drop_kernel_cache(self._mount.ram_path)

    @rule()
    def store_and_forget(self) -> None:
        """Written back and dropped: what is read next comes from the daemon."""
        self.msync()
        self.drop_the_kernels_cache()

    @rule()
    def remount(self) -> None:
        self._leave()
        self._enter()

    @rule()
    def read_all(self) -> None:
        assert self._mount is not None
        assert self._mount.ram_path.read_bytes() == self._model

    @invariant()
    def size_is_constant(self) -> None:
        if self._mount is not None:
            assert os.fstat(self._descriptor).st_size == SIZE

    def teardown(self) -> None:
        if self._mount is not None:
            self.store_and_forget()
            self.read_all()
            self._leave()


def _run(mounts: Stage, address: str, snapshot: BuiltSnapshot, prefetch: str) -> list[Seen]:
    machines: list[MountMachine] = []

    def machine() -> MountMachine:
        machines.append(MountMachine(mounts, snapshot, address, len(machines), prefetch))
        return machines[-1]

    run_state_machine_as_test(
        machine,  # type: ignore[arg-type] # a factory will do
        settings=settings(
            max_examples=5,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=bool(os.environ.get("CI")),  # what CI finds, it must find again
            database=None,
        ),
    )
    return [machine.seen for machine in machines]


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


@pytest.fixture
def published(mounts: Stage) -> BuiltSnapshot:
    return make_snapshot(mounts.folder / "rule9", pages=PAGES, seed=9)


def test_reading_equals_the_file_with_the_writes_over_it(mounts: Stage, published: BuiltSnapshot) -> None:
    address = mounts.serve(published.folder, arguments=("--quiet",)).address
    seen = _run(mounts, address, published, "none")
    assert all(found.prefetched == 0 for found in seen)
    assert _share([found.demanded > 0 for found in seen]) > 0.5


@pytest.mark.timeout(300)
def test_reading_equals_it_while_the_background_brings_pages(mounts: Stage, published: BuiltSnapshot) -> None:
    """Most examples see pages demanded and pages that came ahead; all, writes and reads that got to the daemon."""
    server = mounts.serve(published.folder, arguments=("--quiet",))
    with through(SLOW, server.address) as slow:
        seen = _run(mounts, slow.address, published, "all")
    assert _share([found.demanded > 0 and found.prefetched > 0 for found in seen]) > 0.5, seen
    assert all(found.writes > 0 and found.reads > 0 for found in seen), seen
