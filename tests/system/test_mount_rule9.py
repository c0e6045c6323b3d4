"""Rule 9 on a real mount: reading equals the published file with the guest's writes over it, whatever the order.

Hypothesis draws map writes, plain writes of any part of a page, msync, fsync, dropped kernel caches and remounts; the
model is a bytearray.
"""

import mmap
import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lazymem.pages import PAGE_SIZE
from tests.support.mounts import Mounted, Stage, drop_kernel_cache
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

PAGES = 300  # more than a leaf's 256
SIZE = PAGES * PAGE_SIZE
offsets = st.integers(0, SIZE - 1) | st.builds(lambda page: page * PAGE_SIZE, st.integers(0, PAGES - 1))
lengths = st.integers(1, 3 * PAGE_SIZE) | st.sampled_from([PAGE_SIZE, 2 * PAGE_SIZE, 10])


class MountMachine(RuleBasedStateMachine):
    """One run over one snapshot; each remount keeps its state folder."""

    def __init__(self, stage: Stage, snapshot: BuiltSnapshot, address: str, number: int) -> None:
        super().__init__()
        self._stage = stage
        self._address = address
        self._number = number
        self._model = bytearray(snapshot.ram)
        self._stamp = 0
        self._mount: Mounted | None = None
        self._map: mmap.mmap | None = None
        self._descriptor = -1

    @initialize(quiet=st.booleans())
    def begin(self, quiet: bool) -> None:
        self._quiet = quiet
        self._enter()

    def _enter(self) -> None:
        arguments: list[object] = ["--state", self._stage.folder / f"state{self._number}"]
        if self._quiet:
            arguments += ["--prefetch", "none"]
        self._mount = self._stage.mount(self._address, *arguments)
        self._map = self._mount.open_map()
        self._descriptor = os.open(self._mount.ram_path, os.O_RDWR)

    def _leave(self) -> None:
        assert self._map is not None
        assert self._mount is not None
        self._map.close()
        os.close(self._descriptor)
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
            self.read_all()
            self._leave()


def test_reading_equals_the_file_with_the_writes_over_it(mounts: Stage) -> None:
    snapshot = make_snapshot(mounts.folder / "rule9", pages=PAGES, seed=9)
    address = mounts.serve(snapshot.folder, arguments=("--quiet",)).address
    numbers = iter(range(1_000_000))
    run_state_machine_as_test(
        lambda: MountMachine(mounts, snapshot, address, next(numbers)),  # type: ignore[arg-type] # a factory will do
        settings=settings(
            max_examples=12,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=bool(os.environ.get("CI")),  # what CI finds, it must find again
            database=None,
        ),
    )
