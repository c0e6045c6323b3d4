"""Held pages go into the kernel's cache before the guest asks: on a real mount, under a guest that reads and writes."""

import itertools
import mmap
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lazymem.cli.status import read_status
from lazymem.fs.pagecache import FILLED
from lazymem.pages import PAGE_SIZE
from tests.support import skips
from tests.support.disks import folder_on_disk
from tests.support.mounts import Mounted, Stage, drop_kernel_cache, stage, wait_until
from tests.support.residency import cached_pages
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = [
    pytest.mark.system,
    pytest.mark.needs_root("a copy of a mount needs it (open_tree(2)): nothing is filled without"),
]


def _filled(mount: Mounted) -> bool:
    return bool(mount.status()["fill"]["state"] == FILLED)


def _seen_filling(mount: Mounted) -> dict[str, Any]:
    """What it tells once it has filled something; on a busy machine that may be all of it."""
    seen: list[dict[str, Any]] = []

    def fills() -> bool:
        seen.append(mount.status()["fill"])
        return bool(seen[-1]["asked_pages"])

    wait_until(fills, "it fills")
    return seen[-1]


def _has_filled_more(mount: Mounted, asked_pages: int) -> bool:
    fill = mount.status()["fill"]
    return bool(fill["asked_pages"] > asked_pages or fill["state"] != "filling")


def _nonzero(snapshot: BuiltSnapshot) -> list[int]:
    return [number for number in range(snapshot.pages) if any(snapshot.page(number))]


def test_touching_what_was_filled_asks_nobody(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address)
    wait_until(lambda: _filled(mount), "all is held, and the kernel has it")
    before = mount.status()
    numbers = _nonzero(snapshot)
    assert before["fill"]["asked_pages"] == len(numbers) == cached_pages(mount.ram_path), "no zero page among them"
    assert before["store"]["reads"] == 0, "the READs so far were ours"
    server.kill()
    mapped = mount.open_map()
    for number in random.Random(3).sample(numbers, len(numbers)):
        assert mapped[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] == snapshot.page(number)
    after = mount.status()
    assert (after["store"], after["fill"]) == (before["store"], before["fill"])
    # Zero pages are the guest's own to ask for, and the counter is one that moves.
    zero = next(number for number in range(snapshot.pages) if number not in set(numbers))
    assert mapped[zero * PAGE_SIZE] == 0
    assert mount.requests() == before["store"]["reads"] + 1
    mapped.close()


def test_what_only_we_made_the_kernel_read_is_not_demanded_on_the_map(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address)
    wait_until(lambda: _filled(mount), "the kernel has it all")
    assert mount.status()["fill"]["reads"] > 0
    untouched = read_status(str(mount.path), with_map=True)["map"]
    assert not any(untouched["demanded"]), "nobody has touched anything"
    assert set(untouched["guessed"]) == {1.0}
    drop_kernel_cache(mount.ram_path)
    with open(mount.ram_path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        last = _nonzero(snapshot)[-1]
        assert os.pread(file.fileno(), PAGE_SIZE, last * PAGE_SIZE) == snapshot.page(last)
    touched = read_status(str(mount.path), with_map=True)["map"]
    cells = [cell for cell, share in enumerate(touched["demanded"]) if share]
    assert cells == [last // touched["pages_per_cell"]]


def test_without_guessing_nothing_is_filled(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    first = mounts.mount(server.address)
    wait_until(lambda: _filled(first), "all is held")
    second = mounts.mount(server.address, "--prefetch", "none", name="second")
    status = second.status()
    assert status["pages_held"] == status["pages_total"], "the cache has it all"
    assert status["fill"] is None
    assert cached_pages(second.ram_path) == 0


def test_a_second_mount_fills_from_the_cache_without_a_server(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    first = mounts.mount(server.address)
    wait_until(lambda: _filled(first), "all is held")
    first.unmount()
    second = mounts.mount(server.address)
    server.kill()
    wait_until(lambda: _filled(second), "the kernel has it again")
    assert second.ram_path.read_bytes() == snapshot.ram
    assert second.status()["pages_demanded"] == 0


@pytest.fixture
def cached_on_disk(tmp_path: Path) -> Iterator[Stage]:
    """Mounts whose cache is not in memory."""
    with folder_on_disk(tmp_path) as folder, stage(tmp_path) as made:
        if folder is None:
            skips.skip_without(skips.DISK)
        made.cache = folder / "cache"
        yield made


def test_rule_12_holds_for_what_was_filled(cached_on_disk: Stage, snapshot: BuiltSnapshot) -> None:
    """Once the guest's kernel has the pages, the cache's file is in no page cache besides."""
    mounts = cached_on_disk
    mount = mounts.mount(mounts.serve(snapshot.folder).address)
    wait_until(lambda: _filled(mount), "all is held")
    cached = next(mounts.cache.glob("*/pages"))
    wait_until(lambda: cached_pages(cached) == 0, "the second copy goes")
    assert cached.read_bytes() == snapshot.ram


def test_an_unmount_works_while_it_is_filling(mounts: Stage, tmp_path: Path) -> None:
    """Held pages are read, and the READs not answered: the daemon is stopped in the middle of it."""
    big = make_snapshot(tmp_path / "big", pages=16384, seed=5)
    server = mounts.serve(big.folder)
    first = mounts.mount(server.address)
    wait_until(lambda: first.status()["pages_held"] == big.pages, "all is held")
    first.unmount()
    unfinished = 0
    for round_ in itertools.count():
        assert round_ < 50, "we are always too late"
        mount = mounts.mount(server.address, name=f"again{round_}")
        unfinished += _seen_filling(mount)["state"] == "filling"
        mount.unmount()  # umount(8), once: EBUSY would fail
        assert "Traceback" not in mount.log.read_text()
        if unfinished >= 3:
            return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_is_filling(mounts: Stage, tmp_path: Path, number: int) -> None:
    big = make_snapshot(tmp_path / "big", pages=16384, seed=5)
    mount = mounts.mount(mounts.serve(big.folder).address)
    wait_until(lambda: mount.status()["fill"]["asked_pages"] > 0, "it fills")
    os.kill(mount.pid, number)
    mount.wait_ended()
    assert "is unmounted" in mount.log.read_text()


def test_a_guest_that_maps_the_file_keeps_it_whatever_is_filled(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 13: our own descriptor is no reason to wait, a guest's map is."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address)
    mapped = mount.open_map()
    os.kill(mount.pid, signal.SIGTERM)
    wait_until(lambda: "still in use" in mount.log.read_text(), "it says who holds it")
    assert f"(pid {mount.pid})" not in mount.log.read_text().partition("still in use")[2], "not itself"
    assert mapped[:] == snapshot.ram
    mapped.close()
    mount.wait_ended()


def test_pages_that_the_guest_wrote_are_never_overwritten(mounts: Stage, tmp_path: Path) -> None:
    """Rule 1, with a guest that writes, has it written back and dropped, while pages come and are filled around it."""
    big = make_snapshot(tmp_path / "big", pages=4096, seed=11)
    mount = mounts.mount(mounts.serve(big.folder).address, "--state", tmp_path / "state")
    expected = bytearray(big.ram)
    rng = random.Random(1)
    mapped = mount.open_map()
    descriptor = os.open(mount.ram_path, os.O_RDWR)
    for stamp in range(1, 501):
        at = rng.randrange(big.pages) * PAGE_SIZE + rng.randrange(0, PAGE_SIZE, 8)
        data = stamp.to_bytes(8, "big")
        expected[at : at + 8] = data
        if stamp % 2:
            mapped[at : at + 8] = data
        else:
            os.pwrite(descriptor, data, at)
        if stamp % 50 == 0:
            mapped.flush(0, rng.randrange(1, big.pages) * PAGE_SIZE)
            drop_kernel_cache(mount.ram_path)
            asked = mount.status()["fill"]["asked_pages"]
            wait_until(partial(_has_filled_more, mount, asked), "it fills on")
    os.close(descriptor)
    assert mapped[:] == expected
    mapped.flush()
    drop_kernel_cache(mount.ram_path)
    assert mapped[:] == expected
    mapped.close()
    assert mount.ram_path.read_bytes() == expected


def test_a_kernel_that_drops_what_it_gets_is_left_alone(mounts: Stage, tmp_path: Path) -> None:
    """As where the guest's RAM is larger than the host's memory: each page is filled at most once, not in a circle."""
    big = make_snapshot(tmp_path / "big", pages=8192, seed=12)
    mount = mounts.mount(mounts.serve(big.folder).address)
    mapped = mmap.mmap(os.open(mount.ram_path, os.O_RDONLY), len(big.ram), prot=mmap.PROT_READ)
    wait_until(lambda: _filled(mount), "all is held")
    numbers = _nonzero(big)
    for _ in range(3):
        drop_kernel_cache(mount.ram_path)
        assert all(mapped[number * PAGE_SIZE] == big.page(number)[0] for number in numbers)
    fill = mount.status()["fill"]
    assert fill["dropped_reads"] > 0, "it notices"
    assert fill["asked_pages"] == len(numbers)
    mapped.close()
