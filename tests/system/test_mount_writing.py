"""What a guest writes: its own, stored before it is acknowledged, and never in the snapshot or its cache."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lazymem.pages import PAGE_SIZE
from tests.support.mounts import Stage, drop_kernel_cache, kill_daemon, page_of, wait_until
from tests.support.snapshots import BuiltSnapshot

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")


def _write(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, data, offset)
    os.close(descriptor)


def _errno_of(attempt: Callable[[], object]) -> int | None:
    try:
        attempt()
    except OSError as error:
        return error.errno
    return None


def test_resume_write_unmount_resume_again_sees_the_snapshot(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    mapped = mount.open_map()
    mapped[0:PAGE_SIZE] = bytes(PAGE_SIZE)
    mapped.flush()
    mapped.close()
    assert mount.ram_path.read_bytes()[:PAGE_SIZE] == bytes(PAGE_SIZE)
    mount.unmount()
    again = mounts.mount(server.address, *QUIET)
    assert again.ram_path.read_bytes() == snapshot.ram
    assert again.status()["pages_written"] == 0


def test_with_a_state_folder_the_same_run_goes_on(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    server = mounts.serve(snapshot.folder)
    state = ("--state", tmp_path / "state")
    mount = mounts.mount(server.address, *QUIET, *state)
    mapped = mount.open_map()
    mapped[10 : 10 + PAGE_SIZE] = b"x" * PAGE_SIZE  # dirty only: no msync, no close before the unmount
    mapped.close()
    mount.unmount()
    again = mounts.mount(server.address, *QUIET, *state)
    expected = bytearray(snapshot.ram)
    expected[10 : 10 + PAGE_SIZE] = b"x" * PAGE_SIZE
    assert again.ram_path.read_bytes() == expected
    assert again.status()["pages_written"] == 2
    assert sorted(os.listdir(again.path)) == ["manifest.json", "pc.ram"], "the vmstate belongs to other RAM now"


def test_a_part_of_a_missing_page_is_merged_with_what_is_fetched(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 1, second half: the ten bytes arrive at the daemon without a READ before them."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    _write(mount.ram_path, 5 * PAGE_SIZE + 100, b"0123456789")
    drop_kernel_cache(mount.ram_path)
    expected = bytearray(snapshot.page(5))
    expected[100:110] = b"0123456789"
    with open(mount.ram_path, "rb") as file:
        file.seek(5 * PAGE_SIZE)
        assert file.read(PAGE_SIZE) == expected


def test_a_part_write_waits_for_a_lost_server(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    port = server.port
    server.kill()
    child = os.fork()
    if child == 0:
        _write(mount.ram_path, 7, b"late")
        os._exit(0)
    wait_until(lambda: mount.status()["demand_faults"] == 1, "the write asked for its page")
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "not acknowledged"
    assert mount.status()["pages_written"] == 0
    mounts.serve(snapshot.folder, port=port)
    assert os.waitpid(child, 0)[1] == 0
    assert mount.ram_path.read_bytes() == snapshot.ram[:7] + b"late" + snapshot.ram[11:]


def test_a_killed_daemon_loses_no_acknowledged_write(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Rule 2: what msync acknowledged is in the state file when the daemon is killed right after it."""
    server = mounts.serve(snapshot.folder)
    state = ("--state", tmp_path / "state")
    expected = bytearray(snapshot.ram)
    for round_ in range(3):
        mount = mounts.mount(server.address, *QUIET, *state, "--no-supervisor")
        mapped = mount.open_map()
        for number in range(round_, snapshot.pages, 97):
            at = number * PAGE_SIZE + round_
            mapped[at : at + 8] = expected[at : at + 8] = f"round {round_:02}".encode()
        mapped.flush()
        kill_daemon(mount)
        mapped.close()
        mount.clean_up()
    again = mounts.mount(server.address, *QUIET, *state)
    assert again.ram_path.read_bytes() == expected


def test_fetched_and_written_pages_are_in_their_files(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Rule 12: read from the files while the mount lives."""
    server = mounts.serve(snapshot.folder)
    state = tmp_path / "state"
    mount = mounts.mount(server.address, *QUIET, "--state", state, "--reserve", "0")
    assert mount.ram_path.read_bytes() == snapshot.ram
    _write(mount.ram_path, 3 * PAGE_SIZE, b"w" * PAGE_SIZE)
    mount.wait_kept()
    cached = next(mounts.cache.glob("*/pages")).read_bytes()
    assert cached == snapshot.ram
    assert (state / "pc.ram").read_bytes()[3 * PAGE_SIZE : 4 * PAGE_SIZE] == b"w" * PAGE_SIZE
    assert (state / "pc.ram").stat().st_blocks * 512 <= 2 * PAGE_SIZE, "written pages only"


def test_nothing_but_the_guest_changes_the_file(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 11, tried with everything a shell has, over a guest's dirty pages."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    mapped[0:5] = b"dirty"
    before = os.stat(mount.ram_path)
    path, other = str(mount.ram_path), str(mount.path / "other")
    attempts: dict[str, Callable[[], object]] = {
        "open with O_TRUNC": lambda: os.open(path, os.O_RDWR | os.O_TRUNC),
        "truncate": lambda: os.truncate(path, 0),
        "grow": lambda: os.truncate(path, len(snapshot.ram) * 2),
        "unlink": lambda: os.unlink(path),
        "rename": lambda: os.rename(path, other),
        "create": lambda: os.open(other, os.O_CREAT | os.O_RDWR),
        "mkdir": lambda: os.mkdir(other),
        "symlink": lambda: os.symlink("x", other),
        "link": lambda: os.link(path, other),
        "utime": lambda: os.utime(path, (1, 1)),
        "chmod": lambda: os.chmod(path, 0o644),
        "setxattr": lambda: os.setxattr(path, "user.x", b"1"),
    }
    for what, attempt in attempts.items():
        assert _errno_of(attempt) == errno.EPERM, what
    with pytest.raises(OSError, match=r"Read-only|Permission"):
        os.open(mount.path / "vmstate", os.O_RDWR)
    mapped.flush()
    after = os.stat(mount.ram_path)
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    assert mapped[:] == b"dirty" + snapshot.ram[5:]
    mapped.close()


def test_ram_does_not_grow(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    descriptor = os.open(mount.ram_path, os.O_RDWR)
    with pytest.raises(OSError, match=r"No space"):
        os.pwrite(descriptor, b"beyond", len(snapshot.ram))
    os.close(descriptor)
    assert os.stat(mount.ram_path).st_size == len(snapshot.ram)


def test_written_ram_is_told_to_emulators(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 6's source: once a run has written, its mount says so and takes the vmstate away."""
    import json

    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    told = json.loads(os.getxattr(mount.ram_path, "user.lazymem.run"))
    assert told == {
        "identity": snapshot.identity.hex(),
        "written_pages": 0,
        "template": False,
        "not_kept_because": None,
        "hashed": True,
        "whole": False,
    }
    assert (mount.path / "vmstate").exists()
    _write(mount.ram_path, 0, b"x" * PAGE_SIZE)
    assert json.loads(os.getxattr(mount.path, "user.lazymem.run"))["written_pages"] == 1
    assert not (mount.path / "vmstate").exists()


def test_wrong_bytes_are_an_error_never_data(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 3: a page that was changed under the server is refused; its neighbours are served. A reader waits for it
    (until a minute or two are over, or his deadline), and is shown an error in the end."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET, "--deadline", "5")
    number = next(n for n in range(snapshot.pages) if any(snapshot.page(n)))
    with open(snapshot.folder / "pc.ram", "r+b") as file:
        file.seek(number * PAGE_SIZE + 9)
        byte = file.read(1)[0]
        file.seek(number * PAGE_SIZE + 9)
        file.write(bytes([byte ^ 1]))
    descriptor = os.open(mount.ram_path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    with pytest.raises(OSError, match=r"timed out|Input/output error"):
        os.pread(descriptor, PAGE_SIZE, number * PAGE_SIZE)
    other = (number + 3) % snapshot.pages
    assert os.pread(descriptor, PAGE_SIZE, other * PAGE_SIZE) == snapshot.page(other)
    os.close(descriptor)
    assert "failed" in mount.log.read_text()


def test_a_damaged_cache_is_fetched_again(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 3: the cache folder is not believed either."""
    server = mounts.serve(snapshot.folder)
    first = mounts.mount(server.address)
    wait_until(lambda: bool(first.status()["pages_held"] == snapshot.pages), "every page held")
    first.unmount()
    pages = next(mounts.cache.glob("*/pages"))
    with open(pages, "r+b") as file:
        for number in range(0, snapshot.pages, 10):
            file.seek(number * PAGE_SIZE)
            file.write(b"damage")
    second = mounts.mount(server.address, *QUIET)
    assert second.ram_path.read_bytes() == snapshot.ram
    assert second.status()["store"]["dropped_pages"] > 0


def test_a_guest_may_go_on_after_part_of_its_ram_was_written(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """A mapped child is killed in the middle of writing: what it dirtied is stored by the unmount."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET, "--state", mounts.folder / "state")
    child = os.fork()
    if child == 0:
        mapped = mount.open_map()
        for number in range(64):
            mapped[number * PAGE_SIZE] = 255
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    mount.unmount()
    again = mounts.mount(server.address, *QUIET, "--state", mounts.folder / "state")
    mapped = again.open_map()
    assert [page_of(mapped, number)[0] for number in range(64)] == [255] * 64
    assert page_of(mapped, 3)[1:] == snapshot.page(3)[1:]
    mapped.close()
