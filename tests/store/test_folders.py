"""Cache and state folders: made once, opened again, and refused or begun again when anything in them is wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lazymem.errors import BusyError, IdentityError, StoreError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store import cachefolder, folders, statefiles
from lazymem.store.cachefolder import open_cache
from lazymem.store.origin import RamOrigin
from lazymem.store.statefolder import open_private_state, open_state
from tests.support.descriptors import open_descriptors

ORIGIN = RamOrigin(bytes(range(32)), 300 * PAGE_SIZE, None)
OTHER = RamOrigin(bytes(32), 300 * PAGE_SIZE, None)


def write_page(path: Path, origin: RamOrigin = ORIGIN) -> None:
    """A state folder with one written page."""
    state = open_state(path, origin)
    state.written.set(PageRange(7, 1), 1)
    state.close()


def test_everything_in_them_is_private(tmp_path: Path) -> None:
    open_cache(tmp_path / "new" / "cache", ORIGIN).close()
    open_state(tmp_path / "state", ORIGIN).close()
    for root in (tmp_path / "new", tmp_path / "state"):
        for path in (root, *root.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_files_are_sparse(tmp_path: Path) -> None:
    huge = RamOrigin(bytes(32), 64 << 30, None)
    open_cache(tmp_path / "cache", huge).close()
    open_state(tmp_path / "state", huge).close()
    maps = 3 * huge.pages  # a byte a page, and allocated
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file()) < maps + 100_000


def truncated(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 5)


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to(folder / "elsewhere")

    return change


def open_to_others(folder: Path) -> None:
    folder.chmod(0o777)


def newer(folder: Path) -> None:
    record = json.loads((folder / cachefolder.META_NAME).read_text())
    (folder / cachefolder.META_NAME).write_text(json.dumps({**record, "version": 99}))


def nonsense(folder: Path) -> None:
    (folder / cachefolder.META_NAME).write_bytes(b"\xff" * 70000)


def other_size(folder: Path) -> None:
    record = json.loads((folder / cachefolder.META_NAME).read_text())
    (folder / cachefolder.META_NAME).write_text(json.dumps({**record, "size_bytes": 4096}))


CACHE_NAMES = (cachefolder.PAGES_NAME, cachefolder.MAP_NAME, cachefolder.DIGESTS_NAME, cachefolder.META_NAME)
WRONG: dict[str, Callable[[Path], None]] = {
    **{
        f"{change.__name__} {name}": change(name) for change in (truncated, missing, linked) for name in CACHE_NAMES[:3]
    },
    "missing meta": missing(cachefolder.META_NAME),
    **{f.__name__: f for f in (open_to_others, newer, nonsense, other_size)},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_cache_is_set_aside(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = open_cache(tmp_path, ORIGIN)
    cache.held.set(PageRange(0, 300), 1)
    WRONG[name](cache.path)
    again = open_cache(tmp_path, ORIGIN)
    assert again.held.count == 0, "nothing of it is believed"
    assert "not usable" in caplog.text
    assert len(list(tmp_path.glob("*.set-aside-*"))) == 1
    again.close()
    caplog.clear()
    open_cache(tmp_path, ORIGIN).close()
    assert not caplog.text
    cache.close()


def test_a_cache_that_is_no_folder_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / ORIGIN.identity.hex()).write_text("mine")
    open_cache(tmp_path, ORIGIN).close()
    (aside,) = tmp_path.glob("*.set-aside-*")
    assert aside.read_text() == "mine"


def test_a_draft_whose_maker_was_killed_goes_with_the_next_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing that only looks like one: a run's, which another mount may be at, and the user's own."""

    def killed(path: Path, record: object, *, durable: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, ORIGIN)
    (draft,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".new-0123456789abcdef", ".new-cache-mine", ".new-cache-0123456789abcdef")]
    for other in others:
        folders.make_folder(other)
    (others[-1] / "letters").touch()
    open_cache(tmp_path, OTHER).close()
    assert not draft.exists()
    assert set(tmp_path.iterdir()) == {tmp_path / OTHER.identity.hex(), *others}


@pytest.mark.parametrize("has_locks", [True, False])
def test_where_locks_are_not_known_a_draft_may_be_somebodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_locks: bool
) -> None:
    draft = tmp_path / ".new-cache-0123456789abcdef"
    folders.make_folder(draft)

    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    open_cache(tmp_path, ORIGIN).close()
    assert draft.exists() is not has_locks


def test_a_disk_that_does_not_list_the_folder_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft stays for whoever comes next."""
    draft = tmp_path / ".new-cache-0123456789abcdef"
    folders.make_folder(draft)
    real = os.listdir

    def listed(path: str | Path) -> list[str]:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listed)
        open_cache(tmp_path, ORIGIN).close()
    assert draft.exists()
    open_cache(tmp_path, OTHER).close()
    assert not draft.exists()


def test_what_another_made_anew_meanwhile_is_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the wrong one. A mount and its filling process then had a cache each, and nothing that one brought was
    seen by the other."""
    open_cache(tmp_path, ORIGIN).close()
    nonsense(tmp_path / ORIGIN.identity.hex())
    really = cachefolder._open
    others: list[cachefolder.CacheFolder] = []

    def open_and_be_overtaken(path: Path, origin: RamOrigin) -> cachefolder.CacheFolder:
        try:
            return really(path, origin)
        except StoreError:
            if not others:
                monkeypatch.setattr(cachefolder, "_open", really)
                others.append(open_cache(tmp_path, origin))
            raise

    monkeypatch.setattr(cachefolder, "_open", open_and_be_overtaken)
    ours = open_cache(tmp_path, ORIGIN)
    others[0].held.set(PageRange(5, 1), 1)
    assert ours.held.recount() == 1
    assert len(list(tmp_path.glob("*.set-aside-*"))) == 1
    ours.close()
    others[0].close()


def test_a_wrong_cache_is_set_aside_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache(tmp_path, ORIGIN).close()
    nonsense(tmp_path / ORIGIN.identity.hex())
    really = cachefolder._set_aside

    def look(path: Path, reason: StoreError) -> None:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        really(path, reason)

    monkeypatch.setattr(cachefolder, "_set_aside", look)
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        open_cache(tmp_path, ORIGIN).close()
        assert len(list(tmp_path.glob("*.set-aside-*"))) == 1
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was given back
    finally:
        os.close(other)


def test_a_right_cache_is_opened_again(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, ORIGIN)
    cache.held.set(PageRange(5, 10), 1)
    cache.close()
    again = open_cache(tmp_path, ORIGIN)
    assert again.held.count == 10
    again.close()


def test_processes_that_make_a_cache_at_once_get_the_same_one(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lazymem.pages import PageRange\n"
        "from lazymem.store.cachefolder import open_cache; from lazymem.store.origin import RamOrigin\n"
        "number = int(sys.argv[2]); origin = RamOrigin(bytes(range(32)), 300 * 4096, None)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "open_cache(Path(sys.argv[1]), origin).held.set(PageRange(number, 1), 1)\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "cache"), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for number in range(4)
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write(b"go\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    cache = open_cache(tmp_path / "cache", ORIGIN)
    assert cache.held.count == 4
    cache.close()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [ORIGIN.identity.hex()]


def test_a_state_folder_is_one_mounts(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state", ORIGIN)
    with pytest.raises(BusyError, match="another mount"):
        open_state(tmp_path / "state", ORIGIN)
    state.close()
    open_state(tmp_path / "state", ORIGIN).close()


def test_opening_waits_for_the_mount_before(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state", ORIGIN)
    closing = threading.Timer(0.1, state.close)
    closing.start()
    open_state(tmp_path / "state", ORIGIN, wait_seconds=30).close()
    closing.join()


def test_a_state_folder_is_one_snapshots(tmp_path: Path) -> None:
    write_page(tmp_path / "state")
    with pytest.raises(IdentityError, match="another snapshot"):
        open_state(tmp_path / "state", OTHER)
    state = open_state(tmp_path / "state", ORIGIN)
    assert state.written.count == 1, "the refusal changed nothing"
    state.close()


@pytest.mark.parametrize(
    "name", [f"{change} {name}" for change in ("truncated", "missing", "empty") for name in ("pc.ram", "written")]
)
def test_a_damaged_state_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Never begun again: it was the guest's only copy."""
    folder = tmp_path / "state"
    write_page(folder)
    with open(folder / "pc.ram", "r+b") as file:
        os.pwrite(file.fileno(), b"page", 7 * PAGE_SIZE)
    change, file_name = name.split()
    if change == "missing":
        (folder / file_name).unlink()
    else:
        os.truncate(folder / file_name, 0 if change == "empty" else PAGE_SIZE // 2)
    for _ in range(2):
        with pytest.raises(StoreError, match=file_name):
            open_state(folder, ORIGIN)


@pytest.mark.parametrize("name", ["pc.ram", "written"])
def test_a_state_folder_half_made_by_a_killed_mount_is_completed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "state"
    open_state(folder, ORIGIN).close()
    (folder / "pc.ram").unlink()
    if name == "written":
        (folder / "written").unlink()
    state = open_state(folder, ORIGIN)
    assert state.written.count == 0
    assert (folder / "pc.ram").stat().st_size == ORIGIN.size_bytes
    state.close()


def test_a_snapshots_folder_is_never_taken_for_a_state_folder(tmp_path: Path) -> None:
    (tmp_path / "pc.ram").write_bytes(b"a guest")
    with pytest.raises(StoreError, match=r"not a state folder: it holds pc\.ram"):
        open_state(tmp_path, ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == ["pc.ram"]
    assert (tmp_path / "pc.ram").read_bytes() == b"a guest"


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"format": "other"}', b"\xff"])
def test_a_damaged_state_record_is_refused(tmp_path: Path, text: bytes) -> None:
    write_page(tmp_path / "state")
    (tmp_path / "state" / statefiles.META_NAME).write_bytes(text)
    with pytest.raises(StoreError, match="damaged"):
        open_state(tmp_path / "state", ORIGIN)


def test_a_newer_state_folder_is_refused(tmp_path: Path) -> None:
    write_page(tmp_path / "state")
    newer_record = tmp_path / "state" / statefiles.META_NAME
    newer_record.write_text(json.dumps({**json.loads(newer_record.read_text()), "version": 2}))
    with pytest.raises(StoreError, match="version 2"):
        open_state(tmp_path / "state", ORIGIN)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (lambda: open_cache(tmp_path / "file", ORIGIN), lambda: open_state(tmp_path / "file" / "x", ORIGIN)):
        with pytest.raises(StoreError, match="cannot make the folder"):
            attempt()


@pytest.mark.parametrize("name", ["run-2024", "run-1", "run-" + "a" * 16])
def test_a_private_run_clears_away_nothing_of_the_users(tmp_path: Path, name: str) -> None:
    """Whoever names a folder of his as the cache has other things in it, perhaps a state folder called run-1."""
    (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / name / "precious").write_text("bytes")
    open_private_state(tmp_path, ORIGIN).close()
    assert os.listdir(tmp_path / name) == ["precious"]


def test_a_state_folder_beside_private_runs_is_kept(tmp_path: Path) -> None:
    write_page(tmp_path / "run-1")
    open_private_state(tmp_path, ORIGIN).close()
    state = open_state(tmp_path / "run-1", ORIGIN)
    assert state.written.count == 1
    state.close()


def test_a_killed_runs_folder_that_the_disk_does_not_give_keeps_no_mount_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is left alone: nobody knows what is in it."""
    killed = open_private_state(tmp_path, ORIGIN)
    killed.kept = True
    killed.close()
    real = os.listdir

    def listdir(path: Path) -> list[str]:
        if path == killed.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as dying:
        dying.setattr(os, "listdir", listdir)
        open_private_state(tmp_path, ORIGIN).close()
    assert killed.path.exists()
    open_private_state(tmp_path, ORIGIN).close()
    assert not killed.path.exists(), "it was one that goes where it can be looked at"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOLCK])
def test_a_folder_that_cannot_be_locked_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    before = open_descriptors(collect=True)
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        with pytest.raises(StoreError, match="cannot lock"):
            open_state(tmp_path / "state", ORIGIN)
    assert open_descriptors() == before, "and nothing is left open"
    open_state(tmp_path / "state", ORIGIN).close()
