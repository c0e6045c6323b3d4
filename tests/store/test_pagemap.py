"""PageMap against a plain bytearray; and what two of them over one file do to each other."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.errors import StoreError
from lazymem.pages import PageRange
from lazymem.store.folders import create_file, open_file
from lazymem.store.pagemap import SET, SET_ZERO, UNSET, PageMap

PAGES = 200


def open_map(path: Path, pages: int = PAGES) -> PageMap:
    if not path.exists():
        create_file(path, pages)
    return PageMap(open_file(path, pages), pages)


ranges = st.builds(
    lambda start, count: PageRange(start, min(count, PAGES - start)), st.integers(0, PAGES - 1), st.integers(1, PAGES)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ranges, st.sampled_from((UNSET, SET, SET_ZERO)), st.booleans()), max_size=20), ranges)
def test_behaves_as_a_bytearray(changes: list[tuple[PageRange, int, bool]], asked: PageRange) -> None:
    with tempfile.TemporaryDirectory() as folder:
        maps = [open_map(Path(folder) / "map"), open_map(Path(folder) / "map")]
        model = bytearray(PAGES)
        for pages, state, which in changes:
            maps[which].set(pages, state)
            model[pages.start : pages.end] = bytes([state]) * pages.count
        for page_map in maps:
            assert page_map.states(asked) == model[asked.start : asked.end]
            assert page_map.all_unset(asked) == (not any(model[asked.start : asked.end]))
            unset = [page for run in page_map.unset_runs(asked) for page in range(run.start, run.end)]
            assert unset == [page for page in range(asked.start, asked.end) if not model[page]]
            assert page_map.recount() == page_map.count == PAGES - model.count(0)
            page_map.close()


def test_count_is_kept_without_counting_again(tmp_path: Path) -> None:
    page_map = open_map(tmp_path / "map")
    for pages, state in ((PageRange(0, 10), SET), (PageRange(5, 10), SET_ZERO), (PageRange(2, 1), UNSET)):
        page_map.set(pages, state)
        kept = page_map.count
        assert page_map.recount() == kept
    page_map.close()


def test_a_page_outside_is_refused(tmp_path: Path) -> None:
    page_map = open_map(tmp_path / "map")
    with pytest.raises(ValueError, match="map of 200"):
        page_map.set(PageRange(PAGES - 1, 2), SET)
    assert os.stat(tmp_path / "map").st_size == PAGES
    page_map.close()


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    """Both store every second page of the same map at once; all of them count."""
    path = tmp_path / "map"
    open_map(path, 4096).close()
    program = (
        "import sys; from pathlib import Path; from lazymem.pages import PageRange\n"
        "from lazymem.store.folders import open_file; from lazymem.store.pagemap import PageMap\n"
        "m = PageMap(open_file(Path(sys.argv[1]), 4096), 4096); sys.stdin.readline()\n"
        "for page in range(int(sys.argv[2]), 4096, 2): m.set(PageRange(page, 1), 1)\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(first)], stdin=subprocess.PIPE)
        for first in (0, 1)
    ]
    for child in children:
        assert child.stdin
        child.stdin.write(b"go\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    page_map = open_map(path, 4096)
    assert page_map.count == 4096
    page_map.close()


def test_a_huge_map_costs_what_is_touched(tmp_path: Path) -> None:
    """The map of 64 GiB of RAM: 16 MiB that have their room on the disk and are not read."""
    pages = (64 << 30) // 4096
    before = _resident_kib()
    page_map = open_map(tmp_path / "map", pages)
    page_map.set(PageRange(pages - 1, 1), SET)
    page_map.set(PageRange(0, 300), SET)
    assert page_map.recount() == 301
    assert _resident_kib() - before < 2048
    page_map.close()


def _resident_kib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_a_refusing_disk_is_an_error_and_the_count_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_map = open_map(tmp_path / "map")
    page_map.set(PageRange(0, 3), SET)

    def refuse(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(StoreError, match="page map"):
        page_map.set(PageRange(0, 5), SET)
    assert page_map.count == 3
    page_map.close()


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    open_map(tmp_path / "map").close()
    with pytest.raises(StoreError, match="page map"):
        PageMap(os.open(tmp_path / "map", os.O_RDONLY | os.O_CLOEXEC), PAGES)


def test_a_page_that_another_process_sets_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map is looked at twice for a run; the process that fills may be faster."""
    made = open_map(tmp_path / "map", 64)
    first_set = made.first_set

    def slow(start: int, end: int) -> int:
        if start == 0:
            made.set(PageRange(0, 1), SET)
        return first_set(start, end)

    monkeypatch.setattr(made, "first_set", slow)
    assert list(made.unset_runs(PageRange(0, 64))) == [PageRange(1, 63)]
    made.close()
