"""A killed or replaced daemon: its guest waits for a moment, and nothing is lost."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lazymem.cli.daemonprocess import Starter
from lazymem.cli.mountrecording import RECORDING_NOTE
from lazymem.fs import lock, mountinfo
from lazymem.fs.sessionrecord import SessionRecord
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot import workingset
from tests.support import skips
from tests.support.mounts import WAIT_SECONDS, Mounted, Stage, command, drop_kernel_cache, page_of, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stopping import stop
from tests.support.writers import Writer

pytestmark = [
    pytest.mark.system,
    skips.needs_resend,
]

QUIET = ("--prefetch", "none")


def kill_and_wait(mount: Mounted) -> int:
    """SIGKILL the daemon that serves now; the next one's pid, once it answers."""
    before = mount.status()["pid"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: mount.status()["pid"] != before, "another daemon answers")
    after: int = mount.status()["pid"]
    return after


def supervisor_of(mount: Mounted) -> int:
    pid: int = mount.status()["survival"]["supervisor_pid"]
    return pid


def saved_runs(mount: Mounted) -> list[tuple[int, int]]:
    """What the next daemon would find of the recording."""
    for link in Path(f"/proc/{supervisor_of(mount)}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it closes one, too
            if "lazymem-session" not in os.readlink(link):
                continue
            with link.open("rb") as file:
                saved = SessionRecord.read(file.fileno()).contents.notes.get(RECORDING_NOTE)
            return msgspec.msgpack.decode(saved, type=tuple[float, list[tuple[int, int]]])[1] if saved else []
    return []


def is_gone(pid: int) -> bool:
    """Ended; whoever should have waited for it may not have."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def ends_with(mapped: mmap.mmap, page: int) -> int:
    """The signal that a process ends with which touches `page`."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(mapped[page * PAGE_SIZE] & 0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def writing(mount: Mounted, seed: int) -> Iterator[Writer]:
    writer = Writer(mount.ram_path, seed)
    try:
        writer.wait_for_more()
        yield writer
    finally:
        writer.stop()


def everything(mount: Mounted) -> bytes:
    """The RAM as the daemon has it: not what the kernel remembers."""
    drop_kernel_cache(mount.ram_path)
    return mount.ram_path.read_bytes()


def test_a_reader_on_a_missing_page(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Killed while the page is on its way: the next daemon is asked for it again, the guest gets it."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    stop(server.pid)
    found: list[bytes] = []
    descriptor = os.open(mount.ram_path, os.O_RDONLY)
    # Not a map: a thread that stands on one holds Python's lock.
    reader = threading.Thread(target=lambda: found.append(os.pread(descriptor, PAGE_SIZE, 5 * PAGE_SIZE)))
    reader.start()
    try:
        wait_until(lambda: mount.status()["demand_faults"] >= 1, "somebody stands on a page")
        kill_and_wait(mount)
        wait_until(lambda: mount.status()["demand_faults"] >= 1, "the next daemon is asked for it")
        assert not found
    finally:
        os.kill(server.pid, signal.SIGCONT)
        reader.join(30)
    os.close(descriptor)
    assert found == [snapshot.page(5)]


def test_ten_kills_under_a_verifying_writer(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Rule 2 across deaths: every msync that returned is there, in the mount and in the state folder."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--state", tmp_path / "state")
    pids = {mount.pid}
    with writing(mount, seed=1) as writer:
        for _ in range(10):
            pids.add(kill_and_wait(mount))
            writer.wait_for_more(1)
    assert len(pids) == 11
    assert mount.status()["survival"]["restarts"] == 10
    assert everything(mount) == writer.expected(snapshot.ram)
    mount.unmount()
    again = mounts.mount(mounts.serve(snapshot.folder).address, "--state", tmp_path / "state", name="again")
    assert again.ram_path.read_bytes() == writer.expected(snapshot.ram)


def test_upgrades_under_a_verifying_writer(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Also without a state folder: the private one stays with the run."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address)
    before = mount.pid
    with writing(mount, seed=2) as writer:
        for _ in range(2):
            done = subprocess.run(
                command("lazymem.cli.main", "mount", "--upgrade", mount.path),
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            assert f"daemon {before} " in done.stdout
            before = mount.status()["pid"]
            writer.wait_for_more()
    assert everything(mount) == writer.expected(snapshot.ram)
    assert "a next daemon goes on" in mount.log.read_text()


def test_an_upgrade_that_does_not_start_changes_nothing(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    for python, why in (("/bin/false", "does not start"), ("/nowhere/python3", "cannot be started")):
        os.setxattr(mount.path, "user.lazymem.upgrade", python.encode())
        wait_until(lambda: mount.status()["survival"]["upgrade_refused"] is not None, "it is refused")
        assert why in mount.status()["survival"]["upgrade_refused"]
        assert mount.status()["pid"] == mount.pid
    kill_and_wait(mount)
    assert mount.ram_path.read_bytes() == snapshot.ram


def test_while_everything_is_fetched(mounts: Stage) -> None:
    big = make_snapshot(mounts.folder / "big", pages=8192, seed=3)
    mount = mounts.mount(mounts.serve(big.folder).address)
    held = 0
    while held < big.pages:
        kill_and_wait(mount)
        wait_until(lambda least=held: mount.status()["pages_held"] > least, "more is held")  # type: ignore[misc]
        held = min(mount.status()["pages_held"] + 4096, big.pages)
    wait_until(lambda: mount.status()["pages_held"] == big.pages, "all is held")
    assert everything(mount) == big.ram


@pytest.mark.parametrize("where", ["taken", "unanswered", "answered"])
def test_at_each_request(
    mounts: Stage, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    """The first daemon dies at its first request, the next one at its second, and so on."""
    deaths = 6
    file = tmp_path / "dies"
    file.write_text(f"{1:8} {deaths:8}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support/dying"))
    monkeypatch.setenv("LAZYMEM_TEST_DIES", str(file))
    monkeypatch.setenv("LAZYMEM_TEST_WHERE", where)
    server = mounts.serve(snapshot.folder)
    # The first one would tell the command that it died at its start: it begins to count when it is mounted.
    file.write_text(f"{1:8} {0:8}")
    mount = mounts.mount(server.address, *QUIET)
    monkeypatch.delenv("PYTHONPATH")
    file.write_text(f"{1:8} {deaths:8}")
    os.kill(mount.pid, signal.SIGKILL)
    expected = bytearray(snapshot.ram)
    mapped = mount.open_map()
    number = 0
    while file.read_text().split()[1] != "0" or number < 3 * deaths:
        at = number % snapshot.pages * PAGE_SIZE
        assert mapped[at + PAGE_SIZE : at + PAGE_SIZE + 64] == expected[at + PAGE_SIZE : at + PAGE_SIZE + 64]
        mapped[at : at + 8] = expected[at : at + 8] = f"write{number:3}".encode()
        mapped.flush(at, PAGE_SIZE)
        assert sorted(os.listdir(mount.path)) in (["manifest.json", "pc.ram"], ["manifest.json", "pc.ram", "vmstate"])
        with pytest.raises(PermissionError):
            os.truncate(mount.ram_path, 0)
        number += 1
    mapped.close()
    assert mount.status()["survival"]["restarts"] == deaths + 1
    assert everything(mount) == expected


def test_before_it_was_ready(
    mounts: Stage, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The daemon dies at its first request, INIT, before it has noted that; the command hears of the next one."""
    file = tmp_path / "dies"
    file.write_text(f"{1:8} {1:8}")
    server = mounts.serve(snapshot.folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support/dying"))
    monkeypatch.setenv("LAZYMEM_TEST_DIES", str(file))
    monkeypatch.setenv("LAZYMEM_TEST_WHERE", "taken")
    mount = mounts.mount(server.address, *QUIET)
    assert (mount.result.stderr, file.read_text().split()) == ("", ["2", "0"])
    assert mount.status()["survival"]["restarts"] == 1
    assert everything(mount) == snapshot.ram


DIES_BEHIND_MOUNT = """
import os, signal, sys
from lazymem.cli import mount
from lazymem.fs import session

mounts = session.mount

def dies(*words):
    mounts(*words)
    os.kill(os.getpid(), signal.SIGKILL)

session.mount = dies
sys.exit(mount.main(sys.argv[1:]))
"""


def test_before_anybody_else_had_the_connection(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Nobody can ever serve that mount; whoever looked at it would get an error, and whoever mounts again, too."""
    server = mounts.serve(snapshot.folder)
    (tmp_path / "mnt").mkdir()
    words = map(str, (server.address, tmp_path / "mnt", "--cache", mounts.cache, "--log", tmp_path / "mnt.log"))
    done = subprocess.run(
        [sys.executable, "-c", DIES_BEHIND_MOUNT, *words],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 70
    assert done.stderr == "lazymem-mount: the daemon died at its start; run with -f to see why\n"
    wait_until(lambda: mountinfo.maybe_mount_at(str(tmp_path / "mnt")) is None, "the supervisor takes it away")
    mount = mounts.mount(server.address, *QUIET)
    assert everything(mount) == snapshot.ram
    assert "its daemon died while it mounted; the dead mount is taken away" in mount.log.read_text()


def test_what_somebody_serves_is_no_dead_mount(
    mounts: Stage, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whose lock is in another folder: another user's, or one's own without a session. He may have mounted between a
    daemon's first look at the mount point and its failure."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    before = mountinfo.maybe_mount_at(str(mount.path))
    monkeypatch.setattr(lock, "runtime_dir", lambda: tmp_path / "others")
    Starter(["--", "server", str(mount.path)]).clear_dead_mount()
    assert mountinfo.maybe_mount_at(str(mount.path)) == before
    assert everything(mount) == snapshot.ram


def test_as_a_thread_of_its_own_opens_the_ram(
    mounts: Stage, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That thread, dying, waits for the next daemon's answer and then closes the file, and no write is stored before
    it has gone: so its close must not wait for writes."""
    file = tmp_path / "dies"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support/dying"))
    monkeypatch.setenv("LAZYMEM_TEST_DIES", str(file))
    monkeypatch.setenv("LAZYMEM_TEST_WHERE", "opening")
    server = mounts.serve(snapshot.folder)
    file.write_text(f"{1:8} {0:8}")
    mount = mounts.mount(server.address, *QUIET)
    monkeypatch.delenv("PYTHONPATH")
    with writing(mount, seed=5) as writer:
        for _ in range(3):
            before = mount.status()["survival"]["restarts"]
            file.write_text(f"{1:8} {1:8}")  # the next one, at its first
            os.kill(mount.status()["pid"], signal.SIGKILL)
            wait_until(lambda least=before + 2: mount.status()["survival"]["restarts"] == least, "two have died")  # type: ignore[misc]
            writer.wait_for_more()
    assert everything(mount) == writer.expected(snapshot.ram)


def test_the_kernel_keeps_what_it_has(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 11 across a death: numbers, sizes and times are the same, and no resident page is asked for again."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    assert mapped[:] == snapshot.ram
    names = ("pc.ram", "manifest.json", "vmstate")
    before = [os.stat(mount.path / name) for name in names]
    content = [(mount.path / name).read_bytes() for name in names[1:]]
    kill_and_wait(mount)
    assert [os.stat(mount.path / name) for name in names] == before
    assert [(mount.path / name).read_bytes() for name in names[1:]] == content
    assert mapped[:] == mount.ram_path.read_bytes() == snapshot.ram
    assert mount.requests() == 0
    mapped.close()


def test_a_recording_goes_on(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """What was touched before the death, but for the last second, and after it, in this order."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, "--record", tmp_path / "set")
    mapped = mount.open_map()
    early, late = range(700, 100, -100), range(50, 650, 100)
    assert all(page_of(mapped, page) == snapshot.page(page) for page in early)
    wait_until(lambda: len(saved_runs(mount)) == len(early), "they are saved")
    kill_and_wait(mount)
    assert all(page_of(mapped, page) == snapshot.page(page) for page in late)
    mapped.close()
    mount.unmount()
    found = workingset.decode((tmp_path / "set").read_bytes(), snapshot.identity, snapshot.pages)
    assert [run.start for run in found.runs] == [*early, *late]


def test_a_template_goes_on(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """It has no state folder to hand over."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, "--template")
    assert mount.ram_path.read_bytes() == snapshot.ram
    kill_and_wait(mount)
    assert everything(mount) == snapshot.ram


def test_without_the_server(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """A next daemon starts all the same: what is here is here, and the rest is waited for."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    with open(mount.ram_path, "rb") as ram:
        assert ram.read(64 * PAGE_SIZE) == snapshot.ram[: 64 * PAGE_SIZE]
    mount.wait_kept()
    server.kill()
    kill_and_wait(mount)
    drop_kernel_cache(mount.ram_path)
    mapped = mount.open_map()
    assert page_of(mapped, 7) == snapshot.page(7)
    mounts.serve(snapshot.folder, port=server.port)
    assert mapped[:] == snapshot.ram
    mapped.close()


def test_a_next_daemon_is_loaded_beforehand(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """A copy of the first, and then one of that, and so on: nobody waits for one to be loaded."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    assert mount.ram_path.read_bytes() == snapshot.ram
    for _ in range(3):
        wait_until(lambda: mount.status()["survival"]["next_is_loaded"], "there is a next one")
        expected = mount.status()["survival"]["next_pid"]
        assert kill_and_wait(mount) == expected
        assert everything(mount) == snapshot.ram
        line = f"lazymem-mount[{expected}]: INFO: {mount.path} is ready (pid {expected})"
        wait_until(lambda line=line: line in mount.log.read_text(), "it says so: it answers before")  # type: ignore[misc]


def test_a_killed_next_daemon_is_followed_by_one_that_is_loaded(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    wait_until(lambda: mount.status()["survival"]["next_is_loaded"], "there is a next one")
    os.kill(mount.status()["survival"]["next_pid"], signal.SIGKILL)
    wait_until(lambda: not mount.status()["survival"]["next_is_loaded"], "nobody is told that there is one")
    assert mount.status()["survival"]["next_pid"] is None
    kill_and_wait(mount)
    assert everything(mount) == snapshot.ram
    wait_until(lambda: mount.status()["survival"]["next_is_loaded"], "there is a next one again")


def test_a_killed_supervisor_is_replaced(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    first = supervisor_of(mount)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: supervisor_of(mount) != first, "there is another one")
    kill_and_wait(mount)
    # And one that did not start the daemon it looks after, whose own supervisor dies as well.
    second = supervisor_of(mount)
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: supervisor_of(mount) != second, "there is another one again")
    assert mount.ram_path.read_bytes() == snapshot.ram
    last = supervisor_of(mount)
    mount.unmount()
    wait_until(lambda: is_gone(first) and is_gone(second) and is_gone(last), "all are gone")


def test_both_killed_is_the_mounts_end(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """The fallback, as docs/failures.md tells it: SIGBUS at a missing page, ENOTCONN, and nothing stored is lost."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET, "--state", tmp_path / "state")
    mapped = mount.open_map()
    mapped[:4] = b"kept"
    mapped.flush(0, PAGE_SIZE)
    supervisor = supervisor_of(mount)
    stop(supervisor)  # so that it sees nothing before both are dead
    os.kill(mount.pid, signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    mount.wait_ended()
    assert ends_with(mapped, 100) == signal.SIGBUS
    mapped.close()
    with pytest.raises(OSError, match="not connected"):
        os.stat(mount.ram_path)
    mount.clean_up()
    again = mounts.mount(server.address, *QUIET, "--state", tmp_path / "state", name="again")
    assert again.ram_path.read_bytes() == b"kept" + snapshot.ram[4:]


@pytest.mark.parametrize("by_signal", [False, True])
def test_after_a_death_an_end_is_an_end(mounts: Stage, snapshot: BuiltSnapshot, by_signal: bool) -> None:
    """Daemon, supervisor and private folder are gone, the lock is free."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    with writing(mount, seed=4):
        kill_and_wait(mount)
    private = list(mounts.cache.glob("run-*"))
    assert len(private) == 1
    pid, supervisor = mount.status()["pid"], supervisor_of(mount)
    if by_signal:
        os.kill(pid, signal.SIGTERM)
        mount.wait_ended()
    else:
        mount.unmount()
    wait_until(lambda: is_gone(pid) and is_gone(supervisor), "both are gone")
    assert mountinfo.maybe_mount_at(str(mount.path)) is None
    assert not private[0].exists()


def test_a_wish_to_end_outlives_the_daemon_too(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    os.kill(mount.pid, signal.SIGTERM)
    wait_until(lambda: "still in use" in mount.log.read_text(), "it says who holds it")
    kill_and_wait(mount)
    assert mapped[:] == snapshot.ram
    mapped.close()
    mount.wait_ended()
    assert mountinfo.maybe_mount_at(str(mount.path)) is None


def test_an_end_while_there_is_no_daemon(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Unmounted in between: nobody starts one, and the private folder goes all the same."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    supervisor = supervisor_of(mount)
    stop(supervisor)
    os.kill(mount.pid, signal.SIGKILL)
    subprocess.run(["umount", "-l", mount.path], check=True, timeout=30)
    os.kill(supervisor, signal.SIGCONT)
    mount.wait_ended()
    wait_until(lambda: is_gone(supervisor), "the supervisor is gone")
    assert not list(mounts.cache.glob("run-*"))


def test_a_named_folder_is_whole_then_too(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Synced, and noted so: else a later crash of the host would cost what was written since the last sync."""
    state = tmp_path / "state"
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, "--state", state)
    descriptor = os.open(mount.ram_path, os.O_WRONLY)
    os.pwrite(descriptor, b"k" * PAGE_SIZE, 5 * PAGE_SIZE)
    os.close(descriptor)
    assert (state / "synced").read_bytes()[5] == 0
    supervisor = supervisor_of(mount)
    stop(supervisor)
    os.kill(mount.pid, signal.SIGKILL)
    subprocess.run(["umount", "-l", mount.path], check=True, timeout=30)
    os.kill(supervisor, signal.SIGCONT)
    mount.wait_ended()
    wait_until(lambda: is_gone(supervisor), "the supervisor is gone")
    assert json.loads((state / "state.json").read_text())["whole"]
    assert (state / "synced").read_bytes()[5] == 1


def test_without_a_supervisor(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, "--no-supervisor")
    assert mount.status()["survival"]["kept_by"] is None
    refused = subprocess.run(
        command("lazymem.cli.mount", "--upgrade", mount.path), capture_output=True, text=True, check=False, timeout=30
    )
    assert refused.returncode == 3
    assert "started without a supervisor" in refused.stderr


OLDER_KERNEL = """
import os
now = os.uname()
os.uname = lambda: os.uname_result((now.sysname, now.nodename, "6.8.0-31-generic", now.version, now.machine))
"""


def test_on_an_older_kernel(
    mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said at the start, and no upgrade leads into it; the rest is as `test_both_killed_is_the_mounts_end`."""
    (tmp_path / "older").mkdir()
    (tmp_path / "older/sitecustomize.py").write_text(OLDER_KERNEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "older"), prepend=os.pathsep)  # of all commands that are started
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET, "--state", tmp_path / "state")
    assert "6.8.0-31-generic" in mount.result.stderr
    survival = mount.status()["survival"]
    assert (survival["kept_by"], survival["supervisor_pid"]) == (None, None)
    assert "6.8.0-31-generic" in survival["hindered_by"]
    words = command("lazymem.cli.mount", "--upgrade", mount.path)
    refused = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert refused.returncode == 3
    assert "6.8.0-31-generic" in refused.stderr
    assert mount.status()["pid"] == mount.pid
    mapped = mount.open_map()
    mapped[:4] = b"kept"
    mapped.flush(0, PAGE_SIZE)
    os.kill(mount.pid, signal.SIGKILL)
    mount.wait_ended()
    assert ends_with(mapped, 100) == signal.SIGBUS
    mapped.close()
    mount.clean_up()
    again = mounts.mount(server.address, *QUIET, "--state", tmp_path / "state", name="again")
    assert again.ram_path.read_bytes() == b"kept" + snapshot.ram[4:]
