"""The kernel's knobs on real mounts: set for this one, other mounts' untouched, gone when it goes.

Those that not even root of a user namespace may turn stay as they are, and the mount's log names them.
"""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from lazymem.cli.host import Host
from lazymem.fs import mountinfo, tuning
from lazymem.fs.session import MAX_READ_BYTES
from lazymem.pages import PAGE_SIZE
from tests.support import skips
from tests.support.mounts import Mounted, Stage, wait_until
from tests.support.skips import needs_resend
from tests.support.snapshots import BuiltSnapshot

pytestmark = [
    pytest.mark.system,
    pytest.mark.needs_root("nobody else may turn the kernel's knobs", else_in_place=True),
]

QUIET = ("--prefetch", "none")


def _minor(mount: Mounted) -> int:
    mounted = mountinfo.maybe_mount_at(str(mount.path))
    assert mounted is not None
    return mounted.minor


def _knobs(minor: int, *, ours: bool = True) -> list[tuning.Knob]:
    """Those that are ours to turn, or the others."""
    return [knob for knob in tuning.knobs(0, minor) if os.access(knob.path, os.W_OK) is ours]


def _values(minor: int) -> dict[Path, str]:
    return {knob.path: knob.path.read_text().strip() for knob in _knobs(minor)}


def _wanted(minor: int) -> dict[Path, str]:
    return {knob.path: knob.value for knob in _knobs(minor)}


@pytest.fixture
def others(request: pytest.FixtureRequest, mounts: Stage, snapshot: BuiltSnapshot) -> list[str]:
    """Names of the knobs that are not ours to turn: whether the mount's log says so is looked at here."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, name="before")
    found = _knobs(_minor(mount), ours=False)
    said = mount.log.read_text()
    for knob in found:
        assert f"{knob.meaning} ({knob.path}: " in said
    mount.unmount()
    names = [knob.path.name for knob in found]
    if names:
        skips.stood_in(
            request.node, f"the log's word for the knobs {' '.join(names)}: only root of the machine has them"
        )
    return names


def _max_read(mount: Mounted) -> str:
    line = next(line for line in mountinfo.read("self").splitlines() if f" {mount.path} " in line)
    return next(option for option in line.split(",") if option.startswith("max_read=")).partition("=")[2]


def test_each_mount_has_its_own(mounts: Stage, snapshot: BuiltSnapshot, others: list[str]) -> None:
    server = mounts.serve(snapshot.folder)
    first = mounts.mount(server.address, *QUIET, name="first")
    assert _values(_minor(first)) == _wanted(_minor(first))
    assert len(_values(_minor(first))) + len(others) == len(tuning.knobs(0, 0))
    assert _max_read(first) == str(MAX_READ_BYTES)
    # Somebody turned the first one's otherwise: what another mount does must not undo that.
    odd = {"strict_limit": "1", "max_ratio": "7", "read_ahead_kb": "64", "max_background": "9"}
    for path in _values(_minor(first)):
        if path.name in odd:
            path.write_text(odd[path.name])
    before = _values(_minor(first))
    assert {path.name for path, value in _wanted(_minor(first)).items() if before[path] != value} == {*odd} - {*others}
    second = mounts.mount(server.address, *QUIET, "-o", "max_read=65536", name="second")
    assert _minor(second) != _minor(first)
    assert _values(_minor(second)) == _wanted(_minor(second))
    assert _max_read(second) == "65536"
    assert _values(_minor(first)) == before
    gone = [knob.path for knob in tuning.knobs(0, _minor(second))]
    second.unmount()
    wait_until(lambda: not any(path.exists() for path in gone), "they are gone with their mount")
    assert _values(_minor(first)) == before


def test_a_new_mount_starts_with_the_kernels_own_knobs_whatever_was_before(
    mounts: Stage, snapshot: BuiltSnapshot, others: list[str]
) -> None:
    """A device number is used again; its knobs are not."""
    server = mounts.serve(snapshot.folder)
    turned = "max_ratio" if "max_ratio" not in others else "max_background"
    for _ in range(2):
        mount = mounts.mount(server.address, *QUIET)
        minor = _minor(mount)
        assert _values(minor) == _wanted(minor)
        for path in _values(minor):
            if path.name == turned:
                path.write_text("3")
        mount.unmount()


IO_FLUSHER = 0x0018_0000
"""PF_LOCAL_THROTTLE and PF_MEMALLOC_NOIO (<linux/sched.h>), which PR_SET_IO_FLUSHER sets: the kernel then holds a write
back for what is dirty of the file's own disk, and for nothing else."""

CAP_SYS_RESOURCE = 24
REFUSED = "no I/O flusher (Operation not permitted)"


def _flags(pid: int) -> dict[str, int]:
    """Of each thread of a process, what /proc/PID/task/TID/stat has as flags."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
            name, _, fields = (path / "stat").read_text().rpartition(")")
            found[name] = int(fields.split()[6])
    return found


def _assert_not_held_back(mount: Mounted, daemons: int) -> None:
    """After the daemon has written and synced, so that the threads that do so are there; the how manieth it is."""
    with mount.open_map() as mapped:
        mapped[:: 16 * PAGE_SIZE] = b"w" * -(-len(mapped) // (16 * PAGE_SIZE))
        mapped.flush()
    assert mount.status()["store"]["writes"] > 0
    flags = _flags(mount.status()["pid"])
    assert len(flags) > 1, "it has threads that write"
    if Host().can(CAP_SYS_RESOURCE):
        assert {thread: bits & IO_FLUSHER for thread, bits in flags.items()} == dict.fromkeys(flags, IO_FLUSHER)
    else:
        assert mount.log.read_text().count(REFUSED) == daemons, "it asked"


@needs_resend
def test_what_a_daemon_writes_is_not_held_back_for_what_its_guest_has_dirtied(
    mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each thread of the daemon, and of the one that goes on when it is killed.

    A host that has reached its limit of dirty memory is nobody's to make in a test: the limit is the whole machine's
    (`vm.dirty_bytes`), and what is dirty of a FUSE file counts in no memory control group's.
    """
    if not Host().can(CAP_SYS_RESOURCE):
        skips.stood_in(
            request.node, "the daemon's asking to be an I/O flusher, for being one: no CAP_SYS_RESOURCE here"
        )
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--state", tmp_path / "state", "-v")
    _assert_not_held_back(mount, 1)
    before = mount.status()["pid"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: mount.status()["pid"] != before, "another daemon goes on")
    _assert_not_held_back(mount, 2)
