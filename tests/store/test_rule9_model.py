"""Rule 9: reads equal the published file with the guest's writes over it, always. Random histories against a bytearray.

Two runs share one cache at once, each with a state folder of its own. In between: the cache is dropped or damaged, runs
are closed and opened again, the source fails, and reads and writes happen at the same time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazymem.errors import ServerUnreachableError
from lazymem.pages import PAGE_SIZE, Fetched, PageRange
from lazymem.store.cachefolder import DIGESTS_NAME, MAP_NAME, PAGES_NAME
from lazymem.store.layers import Layer
from lazymem.store.localsource import LocalSource
from tests.support.shortway import read_as_channel
from tests.support.snapshots import make_snapshot
from tests.support.stores import OpenStore, build_store, local_source

PAGES = 270
"""Two leaves, the second one short."""
SIZE = PAGES * PAGE_SIZE

T = TypeVar("T")

# Around page and leaf edges more often than anywhere else.
offsets = st.one_of(
    st.integers(0, SIZE - 1),
    st.builds(
        lambda page, by: min(max(page * PAGE_SIZE + by, 0), SIZE - 1),
        st.one_of(st.integers(0, 12), st.integers(250, PAGES)),
        st.integers(-2, 2),
    ),
)
lengths = st.one_of(st.integers(1, 3 * PAGE_SIZE), st.sampled_from((1, PAGE_SIZE, 2 * PAGE_SIZE, 40 * PAGE_SIZE)))
which = st.integers(0, 1)
ranges = st.builds(
    lambda start, count: PageRange(start, min(count, PAGES - start)), st.integers(0, PAGES - 1), st.integers(1, PAGES)
)


class Switch(Layer):
    """A source that fails while `broken`."""

    broken = False

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        if self.broken:
            await trio.lowlevel.checkpoint()
            raise ServerUnreachableError("injected")
        return await super().fetch(ranges, want_leaves=want_leaves, background=background)


class Runs(RuleBasedStateMachine):
    @initialize(hashed=st.booleans())
    def begin(self, hashed: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lazymem-rule9-"))
        self.snapshot = make_snapshot(self.folder / "snapshot", PAGES, seed=1, hashed=hashed)
        self.models = [bytearray(self.snapshot.ram), bytearray(self.snapshot.ram)]
        self.written: list[set[int]] = [set(), set()]
        self.sources: list[LocalSource] = [local_source(self.snapshot) for _ in range(2)]
        self.switches = [Switch(source) for source in self.sources]
        self.stores = [self._open(number) for number in range(2)]

    def _open(self, number: int) -> OpenStore:
        state = self.folder / f"state{number}"
        return build_store(self.snapshot, self.folder / "cache", self.switches[number], state)

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            for number in range(2):
                self.switches[number].broken = False
                self._check(number, 0, SIZE)
                trio.run(self.stores[number].ram.close)
                self.sources[number].close()
            shutil.rmtree(self.folder)

    def _run(self, number: int, operation: Callable[[], object]) -> bool:
        """Whether it succeeded; it may fail only while the source does."""

        async def main() -> None:
            with trio.fail_after(60):
                await operation()  # type: ignore[misc]

        try:
            trio.run(main)
        except ServerUnreachableError:
            assert self.switches[number].broken
            return False
        return True

    def _check(self, number: int, offset: int, length: int) -> None:
        async def read() -> None:
            data = await read_as_channel(self.stores[number].ram, offset, length)
            assert data == self.models[number][offset : offset + length]

        self._run(number, read)

    def _note(self, number: int, offset: int, data: bytes) -> None:
        self.models[number][offset : offset + len(data)] = data
        self.written[number].update(range(offset // PAGE_SIZE, (offset + len(data) - 1) // PAGE_SIZE + 1))

    @rule(number=which, offset=offsets, length=lengths)
    def read(self, number: int, offset: int, length: int) -> None:
        self._check(number, offset, length)

    @rule(number=which, offset=offsets, length=lengths, value=st.integers(0, 255))
    def write(self, number: int, offset: int, length: int, value: int) -> None:
        data = bytes([value]) * min(length, SIZE - offset)

        async def write() -> None:
            await self.stores[number].ram.write(offset, data)

        if self._run(number, write):
            self._note(number, offset, data)

    @rule(number=which, first=offsets, second=offsets, length=lengths)
    def write_two_at_a_time(self, number: int, first: int, second: int, length: int) -> None:
        """They may overlap; each byte is then either's, and what a read shows later is what the first one showed."""
        ram = self.stores[number].ram
        writes = [(at, bytes([value]) * min(length, SIZE - at)) for at, value in ((first, 0xA1), (second, 0xB2))]
        done: list[tuple[int, bytes]] = []

        async def write(offset: int, data: bytes) -> None:
            try:
                await ram.write(offset, data)
            except ServerUnreachableError:
                assert self.switches[number].broken
            else:
                done.append((offset, data))

        async def both() -> None:
            async with trio.open_nursery() as nursery:
                for offset, data in writes:
                    nursery.start_soon(write, offset, data)
                nursery.start_soon(ram.read, first, length) if not self.switches[number].broken else None

        assert self._run(number, both)
        for offset, data in done:  # in the order of the acknowledgements
            self._note(number, offset, data)

    @rule(pages=ranges)
    def drop_cache(self, pages: PageRange) -> None:
        self.stores[0].pristine.drop(pages)

    @rule(name=st.sampled_from((PAGES_NAME, MAP_NAME, DIGESTS_NAME)), at=st.floats(0, 0.999), value=st.integers(0, 255))
    def damage_cache(self, name: str, at: float, value: int) -> None:
        """Not the digests of an unhashed snapshot: nothing else vouches for those, so pages below them are lost."""
        if name == DIGESTS_NAME and not self.snapshot.manifest:
            return
        path = self.stores[0].cache.path / name
        with open(path, "r+b") as file:
            file.seek(int(path.stat().st_size * at))
            file.write(bytes([value]))

    @rule(number=which)
    def remount(self, number: int) -> None:
        trio.run(self.stores[number].ram.close)
        self.stores[number] = self._open(number)

    @rule(number=which)
    def remount_without_cache(self, number: int) -> None:
        trio.run(self.stores[number].ram.close)
        shutil.rmtree(self.folder / "cache")  # the other run goes on with what it has open
        self.stores[number] = self._open(number)

    @rule(number=which, broken=st.booleans())
    def source(self, number: int, broken: bool) -> None:
        self.switches[number].broken = broken

    @rule(number=which)
    def sync(self, number: int) -> None:
        assert self._run(number, self.stores[number].ram.sync)

    @precondition(lambda self: hasattr(self, "stores"))
    @invariant()
    def written_pages_are_counted(self) -> None:
        for store, written in zip(self.stores, self.written, strict=True):
            assert store.ram.written_pages == len(written)


Runs.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestRuns = Runs.TestCase
