"""The daemon's own descriptors of its mount hold up no unmount, and no death of the daemon."""

import select
import threading
from pathlib import Path

import pytest

from lazymem.fs import mountinfo
from lazymem.fs.mountinfo import Mount
from lazymem.fs.ownfile import OwnFile
from lazymem.fs.writeback import WritebackPace
from lazymem.pages import PAGE_SIZE
from tests.support.mounts import Mounted, Stage, kill_daemon, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = [
    pytest.mark.system,
    pytest.mark.needs_root("a copy of a mount needs it (open_tree(2)): no pace is set without"),
]


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "write-back"]


def _started(mounts: Stage, snapshot: BuiltSnapshot) -> tuple[WritebackPace, Mounted, mountinfo.Mount]:
    """One here too, beside the daemon's own."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--prefetch", "none")
    mounted = mountinfo.maybe_mount_at(str(mount.path))
    assert mounted is not None
    pace = WritebackPace(mounted)
    pace.start()
    return pace, mount, mounted


def test_an_unmount_ends_it(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    _, mount, _ = _started(mounts, snapshot)
    assert _threads()
    mapped = mount.open_map()
    mapped[0:PAGE_SIZE] = bytes(PAGE_SIZE)
    mapped.close()
    mount.unmount()
    wait_until(lambda: not _threads(), "the thread ends")


def test_it_can_be_stopped_and_the_mount_lives_on(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    pace, mount, mounted = _started(mounts, snapshot)
    pace.stop()
    wait_until(lambda: not _threads(), "the thread ends")
    assert mount.ram_path.read_bytes() == snapshot.ram
    assert mountinfo.maybe_mount_at(mounted.path) == mounted


def test_of_a_mount_that_is_gone_nothing_is_asked(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    _, mount, mounted = _started(mounts, snapshot)
    mount.unmount()
    wait_until(lambda: not _threads(), "the first one ends")
    late = WritebackPace(mounted)
    late.start()
    wait_until(lambda: not _threads(), "the second one found nothing")


def test_another_mount_that_got_its_number_is_not_taken_for_it(
    mounts: Stage, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives a mount's id to the next one at once; who took that for it kept the daemon from its end."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--prefetch", "none")
    mounted = mountinfo.maybe_mount_at(str(mount.path))
    assert mounted is not None
    file = OwnFile(mounted)
    never = select.epoll()  # its descriptor is not readable
    try:
        assert file.wait_mounted(0, never.fileno())
        another = Mount(mounted.mount_id, "0:1", "/elsewhere", "tmpfs", "none", None)
        monkeypatch.setattr(mountinfo, "current", lambda: [another])
        mounts.mount(mounts.serve(snapshot.folder).address, "--prefetch", "none", name="other")
        assert not file.wait_mounted(30, never.fileno()), "the table changed, and it is not there any more"
    finally:
        never.close()
        file.close()


def test_a_killed_daemon_does_not_wait_for_itself(mounts: Stage, tmp_path: Path) -> None:
    """It has the mount's file open, as its guest has, and with pages that the guest dirtied: to close such a file is to
    store them, which nobody can any more."""
    big = make_snapshot(tmp_path / "big", pages=8192, seed=3)
    server = mounts.serve(big.folder)
    for round_ in range(4):
        mount = mounts.mount(server.address, "--no-supervisor", name=f"mnt{round_}")
        mapped = mount.open_map()
        for number in range(0, big.pages, 5):
            mapped[number * PAGE_SIZE] = 1
        wait_until(lambda mount=mount: mount.status()["fill"]["asked_pages"] > 0, "it fills")  # type: ignore[misc]
        kill_daemon(mount)  # returns once its connection is dead
        mapped.close()
        mount.clean_up()
