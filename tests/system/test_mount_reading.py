"""A real mount reads as the published file does, and asks for a page once."""

import mmap
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.fs.session import MAX_READ_WITHOUT_ROOT_BYTES
from lazymem.pages import PAGE_SIZE
from tests.support.mounts import Stage, drop_kernel_cache, page_of, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")


def test_the_whole_file_reads_as_published(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    assert mount.ram_path.read_bytes() == snapshot.ram
    assert sorted(os.listdir(mount.path)) == ["manifest.json", "pc.ram", "vmstate"]
    assert (mount.path / "vmstate").read_bytes() == snapshot.vmstate
    assert snapshot.manifest is not None
    assert (mount.path / "manifest.json").read_bytes() == snapshot.manifest.to_json()


READ_PAST_THE_PAGE_CACHE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, int(sys.argv[2]))
os.preadv(fd, [buffer], 0)
sys.stdout.buffer.write(buffer)
"""


def test_the_largest_read_of_a_small_file_is_answered(mounts: Stage, tmp_path: Path) -> None:
    """It passes a socket to and from pyfuse3, which takes no message larger than its buffer."""
    size = 1 << 20 if os.geteuid() == 0 else MAX_READ_WITHOUT_ROOT_BYTES
    snapshot = make_snapshot(tmp_path / "snapshot", vmstate=random.Random(5).randbytes(size))
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, "-o", f"max_read={size}")
    command = [sys.executable, "-c", READ_PAST_THE_PAGE_CACHE, str(mount.path / "vmstate"), str(size)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=True).stdout == snapshot.vmstate


def test_random_touches_through_a_shared_map(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    for number in random.Random(1).sample(range(snapshot.pages), snapshot.pages):
        assert page_of(mapped, number) == snapshot.page(number), number
    mapped.close()


def test_a_folder_with_just_a_ram_file(mounts: Stage, tmp_path: Path) -> None:
    bare = make_snapshot(tmp_path / "bare", pages=300, hashed=False, vmstate=b"")
    mount = mounts.mount(mounts.serve(bare.folder).address, *QUIET)
    assert os.listdir(mount.path) == ["pc.ram"]
    assert mount.ram_path.read_bytes() == bare.ram


def test_a_vmstate_that_the_manifest_does_not_name_is_not_shown(mounts: Stage, tmp_path: Path) -> None:
    """Nothing could tell whether it is right, or of this RAM (rules 3 and 6)."""
    made = make_snapshot(tmp_path / "made", pages=16, vmstate=b"")
    (made.folder / "vmstate").write_bytes(b"of another guest")
    mount = mounts.mount(mounts.serve(made.folder).address, *QUIET)
    assert sorted(os.listdir(mount.path)) == ["manifest.json", "pc.ram"]
    assert not (mount.path / "vmstate").exists()
    assert "does not name" in mount.log.read_text()


def test_one_of_several_by_name_over_a_unix_socket(mounts: Stage, tmp_path: Path) -> None:
    one = make_snapshot(tmp_path / "one", pages=16, seed=1)
    two = make_snapshot(tmp_path / "two", pages=16, seed=2)
    path = tmp_path / "s"
    mounts.serve(one.folder, two.folder, arguments=("--listen", f"unix:{path}"))
    assert mounts.mount(f"unix:{path}:/two", *QUIET).ram_path.read_bytes() == two.ram
    assert mounts.mount(f"unix:{path}:/one", *QUIET, name="other").ram_path.read_bytes() == one.ram


def test_prefetch_brings_everything_without_a_touch(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address)
    wait_until(lambda: bool(mount.status()["pages_held"] == snapshot.pages), "every page held")
    server.stop()
    assert mount.ram_path.read_bytes() == snapshot.ram
    assert mount.status()["demand_faults"] == 0


def test_resident_pages_make_no_request(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """After a second open, and after write, msync and stat, reading resident pages again asks nobody (rule 11)."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    assert mapped[:] == snapshot.ram
    before = mount.requests()
    assert before > 0
    mapped[5 * PAGE_SIZE] = 1
    mapped.flush()
    os.stat(mount.ram_path)
    second = mount.open_map()
    expected = bytearray(snapshot.ram)
    expected[5 * PAGE_SIZE] = 1
    assert second[:] == expected
    assert mapped[:] == expected
    assert mount.requests() == before
    # The counter is one that moves: forgotten pages are asked for again.
    mapped.close()
    second.close()
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == expected
    assert mount.requests() > before


def test_status_opens_nothing_and_works_while_the_server_is_away(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    wait_until(lambda: not mount.status()["connected"], "the loss is noticed")
    status = mount.status()
    assert status["store"]["reads"] == 0
    assert status["demand_faults"] == 0
    assert status["pages_total"] == snapshot.pages
    assert os.path.basename(os.readlink(f"/proc/{status['pid']}/exe")).startswith("python")


def test_a_deadline_ends_a_fault_in_an_error(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET, "--deadline", "0.2")
    server.kill()
    descriptor = os.open(mount.ram_path, os.O_RDONLY)
    with pytest.raises(OSError, match=r"timed out"):
        os.pread(descriptor, 10, 0)
    os.close(descriptor)


def test_a_fault_outlives_a_lost_server(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 7's first half: without a deadline a touch waits, and goes on when the server is back."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    port = server.port
    server.kill()
    reader = _start_reader(mount.ram_path)
    wait_until(lambda: bool(mount.status()["demand_faults"]), "the read reached the daemon")
    mounts.serve(snapshot.folder, port=port)
    with reader:
        assert reader.makefile("rb").read() == snapshot.page(3)


def _start_reader(path: Path) -> socket.socket:
    """A child that reads page 3 and sends it: a Python thread here would hold the GIL in the fault."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        descriptor = os.open(path, os.O_RDONLY)
        theirs.sendall(os.pread(descriptor, PAGE_SIZE, 3 * PAGE_SIZE))
        os._exit(0)
    theirs.close()
    return ours


def test_two_mounts_share_one_cache_at_the_same_time(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    first = mounts.mount(server.address, *QUIET)
    second = mounts.mount(server.address, *QUIET, name="second")
    half = snapshot.pages // 2 * PAGE_SIZE
    with open(first.ram_path, "rb") as file:
        assert file.read(half) == snapshot.ram[:half]
    fetched = second.status()["wire_received_bytes"]
    first.wait_kept()
    descriptor = os.open(second.ram_path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    assert os.pread(descriptor, half // 2, 0) == snapshot.ram[: half // 2]
    os.close(descriptor)
    assert second.status()["wire_received_bytes"] - fetched < PAGE_SIZE, "pings only"
    # What one writes is not the other's.
    mapped = first.open_map()
    mapped[0:4] = b"mine"
    mapped.flush()
    mapped.close()
    assert second.ram_path.read_bytes() == snapshot.ram


def test_a_private_map_leaves_the_file_alone(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map(private=True)
    mapped[0:3] = b"own"
    assert mount.ram_path.read_bytes() == snapshot.ram
    mapped.close()
    assert mount.status()["pages_written"] == 0


def test_the_dirty_throttle_is_lifted(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Where that is permitted; elsewhere the log says that it was not."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    device = os.stat(mount.path).st_dev
    folder = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    if not os.access(folder / "strict_limit", os.W_OK):  # not root, or a container's, where /sys is read-only
        assert "throttle stays on" in mount.log.read_text()
        return
    assert (folder / "strict_limit").read_text().strip() == "0"
    assert (folder / "max_ratio").read_text().strip() == "100"
    assert "throttle stays" not in mount.log.read_text()


def test_requests_are_small_enough_for_a_waiting_guest(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """One touch under a huge-page hint waits for 128 KiB, not for a whole MiB (max_read)."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    with open(mount.ram_path, "rb", buffering=0) as file:
        file.read(1 << 20)
    status = mount.status()["store"]
    assert status["reads"] >= (1 << 20) // (128 * 1024)


def test_mapped_and_read_views_agree(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    mapped[100:104] = b"abcd"
    descriptor = os.open(mount.ram_path, os.O_RDWR)
    assert os.pread(descriptor, 4, 100) == b"abcd"
    os.pwrite(descriptor, b"efgh", 102)
    assert mapped[100:106] == b"abefgh"
    os.fsync(descriptor)
    os.close(descriptor)
    mapped.close()
    assert isinstance(mapped, mmap.mmap)
    assert mount.status()["pages_written"] == 1
