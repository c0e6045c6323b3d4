"""Room for filling: the host's, and that of control groups of both versions, from files as the kernel writes them."""

import math
from pathlib import Path

import pytest

from lazymem.fs import hostmemory, mountinfo

MIB = 1 << 20


def _proc(root: Path, *, available_mib: int, total_mib: int = 16 * 1024, cgroup: str = "") -> Path:
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(
        f"MemTotal: {total_mib << 10} kB\nMemFree: 1 kB\nMemAvailable:  {available_mib << 10} kB\nHugePages_Total: 0\n"
    )
    (root / "self/cgroup").write_text(cgroup)
    return root


def _mount(path: Path, fs_type: str) -> mountinfo.Mount:
    return mountinfo.Mount(1, "0:30", str(path), fs_type, "cgroup", None)


def test_the_host_keeps_its_reserve_and_what_was_filled_counts_as_used(tmp_path: Path) -> None:
    proc = _proc(tmp_path, available_mib=8 * 1024)
    assert hostmemory.room_bytes(0, proc=proc, mounts=[]) == 7 * 1024 * MIB
    assert hostmemory.room_bytes(6 * 1024 * MIB, proc=proc, mounts=[]) == 1024 * MIB
    assert hostmemory.room_bytes(7 * 1024 * MIB, proc=proc, mounts=[]) <= 0


def test_a_host_that_tells_nothing_does_not_hold_us_back(tmp_path: Path) -> None:
    assert hostmemory.room_bytes(0, proc=tmp_path / "none", mounts=[]) == math.inf


@pytest.mark.parametrize("limited", ["memory.max", "memory.high"])
@pytest.mark.parametrize("folder", ["unit", "."])
def test_version_2_of_a_group_or_of_one_above_it(tmp_path: Path, limited: str, folder: str) -> None:
    proc = _proc(tmp_path / "proc", available_mib=8 * 1024, cgroup="0::/unit/inner\n")
    root = tmp_path / "cgroup"
    for name in ("unit/inner", "unit", "."):
        (root / name).mkdir(parents=True, exist_ok=True)
        for limit in ("memory.max", "memory.high"):
            (root / name / limit).write_text("max\n")
        (root / name / "memory.current").write_text(f"{200 * MIB}\n")
    (root / folder / limited).write_text(f"{320 * MIB}\n")
    assert hostmemory.room_bytes(0, proc=proc, mounts=[_mount(root, "cgroup2")]) == 100 * MIB


def test_version_1(tmp_path: Path) -> None:
    proc = _proc(tmp_path / "proc", available_mib=8 * 1024, cgroup="9:cpu:/other\n4:memory:/unit\n0::/\n")
    root = tmp_path / "memory"
    (root / "unit").mkdir(parents=True)
    for folder, limit in ((root, 9223372036854771712), (root / "unit", 160 * MIB)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{50 * MIB}\n")
    mounts = [_mount(tmp_path / "cpu", "cgroup"), _mount(root, "cgroup"), _mount(tmp_path / "empty", "cgroup2")]
    assert hostmemory.room_bytes(0, proc=proc, mounts=mounts) == 100 * MIB


@pytest.mark.parametrize(
    ("version", "stat"),
    [
        (2, "anon {0}\ninactive_file {1}\nactive_file {1}\nfile_dirty {2}\nfile_writeback {2}\n"),
        (1, "inactive_file 7\ntotal_inactive_file {1}\ntotal_active_file {1}\ntotal_dirty {2}\ntotal_writeback {2}\n"),
    ],
)
def test_a_groups_clean_cache_is_room_but_what_was_filled_is_not(tmp_path: Path, version: int, stat: str) -> None:
    """A group that has run for a while is full of page cache, always."""
    line, names = {
        2: ("0::/unit\n", ("memory.max", "memory.current")),
        1: ("4:memory:/unit\n", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    }[version]
    proc = _proc(tmp_path / "proc", available_mib=8 * 1024, cgroup=line)
    unit = tmp_path / "memory" / "unit"
    unit.mkdir(parents=True)
    for name, mib in zip(names, (320, 310), strict=True):
        (unit / name).write_text(f"{mib * MIB}\n")
    (unit / "memory.stat").write_text(stat.format(100 * MIB, 105 * MIB, 5 * MIB))
    mounts = [_mount(tmp_path / "memory", "cgroup2" if version == 2 else "cgroup")]
    assert hostmemory.room_bytes(0, proc=proc, mounts=mounts) == (320 - 20 - 110) * MIB
    assert hostmemory.room_bytes(50 * MIB, proc=proc, mounts=mounts) == (320 - 20 - 160) * MIB
    assert hostmemory.room_bytes(900 * MIB, proc=proc, mounts=mounts) == (320 - 20 - 310) * MIB, "it was reclaimed"


def test_a_group_whose_folder_is_not_to_be_seen_here(tmp_path: Path) -> None:
    """In a container /proc/self/cgroup may name a path outside of what is mounted."""
    proc = _proc(tmp_path / "proc", available_mib=8 * 1024, cgroup="0::/../../elsewhere\n")
    (tmp_path / "cgroup").mkdir()
    assert hostmemory.room_bytes(0, proc=proc, mounts=[_mount(tmp_path / "cgroup", "cgroup2")]) == 7 * 1024 * MIB


def test_this_host_answers() -> None:
    assert hostmemory.room_bytes(1 << 60) < 0
