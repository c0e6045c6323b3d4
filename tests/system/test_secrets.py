"""RAM is secrets: who may see what is stored of it, who may use a mount, and that no log or error has any of it."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.cli import verify
from lazymem.pages import PAGE_SIZE
from lazymem.store import cachefolder
from tests.support.mounts import Mounted, Stage, drop_kernel_cache, kill_daemon, wait_until
from tests.support.patientreader import PatientReaders
from tests.support.privileges import NOBODY, root_may_become_nobody
from tests.support.skips import stood_in
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

SECRET = b"correct horse battery staple "
_OPEN_AS = """
import os, sys
folder, user = int(sys.argv[1]), int(sys.argv[2])
os.setgroups([]); os.setgid(user); os.setuid(user)
try:
    os.read(os.open("pc.ram", os.O_RDONLY, dir_fd=folder), 1)
except OSError as error:
    print(error.errno)
else:
    print(0)
"""


def errno_for(mount: Mounted, user: int) -> int:
    """Of another user's look at the RAM, who got past all folders above it."""
    folder = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _OPEN_AS, str(folder), str(user)],
            pass_fds=[folder],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        os.close(folder)
    return int(done.stdout)


@pytest.mark.needs_root
def test_a_mount_is_not_open_to_others_by_default(
    mounts: Stage, snapshot: BuiltSnapshot, request: pytest.FixtureRequest
) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address)
    if not root_may_become_nobody():
        stood_in(request.node, "the mount's options, for another user's look: a user namespace has no other user")
        (line,) = (line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {mount.path} " in line)
        assert "allow_other" not in line
        return
    assert errno_for(mount, NOBODY) == errno.EACCES
    open_to_all = mounts.mount(server.address, "-o", "allow_other", name="open")
    assert errno_for(open_to_all, NOBODY) == 0, "that was the mount's refusal, and no folder's above it"


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_what_is_stored_is_private_whatever_the_umask(
    mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path, umask: int
) -> None:
    server = mounts.serve(snapshot.folder)
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt.log").touch()
    before = os.umask(umask)
    try:
        mount = mounts.mount(server.address, "--state", state)
    finally:
        os.umask(before)
    wait_until(lambda: bool(mount.status()["pages_held"] == snapshot.pages), "all fetched")
    with open(mount.ram_path, "r+b") as file:
        file.write(b"written")
        file.flush()
        os.fsync(file.fileno())
    found = [state, *state.rglob("*"), mounts.cache, *mounts.cache.rglob("*")]
    assert len(found) > 10
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def refused(path: Path, offset: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="error"):
        os.pread(fd, PAGE_SIZE, offset)
    os.close(fd)


def test_no_log_and_no_error_has_anything_of_a_page(
    mounts: Stage, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With all that says what is wrong with pages: a changed one, a damaged cache, digests that do not fit, a bad
    device state; as talkative as can be."""
    page = (SECRET * 200)[:PAGE_SIZE]
    ram = b"".join(bytes([number]) * 8 + page[8:] for number in range(64))
    snapshot = make_snapshot(tmp_path / "snap", ram=ram, vmstate=SECRET * 100)
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, "-v", "--prefetch", "none", "--no-supervisor")
    (snapshot.folder / "vmstate").write_bytes(SECRET[::-1] * 100)
    refused(mount.path / "vmstate", 0)
    with open(mount.ram_path, "r+b", buffering=0) as file:
        assert file.read(8 * PAGE_SIZE) == ram[: 8 * PAGE_SIZE]
        file.seek(0)
        file.write(page)
    wait_until(lambda: bool(mount.status()["pages_held"]), "kept")
    cache = mounts.cache / snapshot.identity.hex()
    for path in (cache / cachefolder.PAGES_NAME, snapshot.folder / "pc.ram"):
        with path.open("r+b") as other:
            for number in range(2, 40):
                other.seek(number * PAGE_SIZE)
                other.write(SECRET)
    drop_kernel_cache(mount.ram_path)
    reader = PatientReaders(mount, [4])
    wait_until(lambda: "page 4 " in mount.log.read_text(), "it says which is wrong")
    assert verify.main([str(mount.path)]) != 0
    assert verify.main([str(snapshot.folder)]) != 0
    said = json.dumps(mount.status())
    kill_daemon(mount)
    assert isinstance(reader.finish()[4], OSError)
    out, err = capfd.readouterr()
    told = said + mount.log.read_text() + mount.result.stdout + mount.result.stderr + out + err
    assert "page 4 " in told, "it says which"
    for part in (SECRET, SECRET[::-1], SECRET[:12], SECRET.hex().encode(), SECRET[5:20]):
        assert part.decode() not in told
