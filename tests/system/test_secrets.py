"""RAM is secrets: who may see what is stored of it, who may use a mount, and that no log or error has any of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.cli import verify
from lazymem.pages import PAGE_SIZE
from lazymem.store import cachefolder
from lazymem.vm.guests import build_guest
from tests.support.handover import pair
from tests.support.mounts import Mounted, Stage, command, drop_kernel_cache, kill_daemon, wait_until
from tests.support.patientreader import PatientReaders
from tests.support.privileges import NOBODY, root_may_become_nobody
from tests.support.skips import stood_in
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.vmprocess import starting

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
    mount.wait_kept()
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
    assert_no_secret(told)


def assert_no_secret(told: str) -> None:
    for part in (SECRET, SECRET[::-1], SECRET[:12], SECRET.hex().encode(), SECRET[5:20]):
        assert part.decode() not in told


RAM_MIB = 8
SECRET_AT = 4 << 20
SECRET_BYTES = SECRET * ((2 << 20) // len(SECRET))


def kept_by_commands(folder: Path) -> str:
    """All that they wrote for people and for each other: logs, outputs, journals; not what holds pages."""
    held = ("ram", "pc.ram", "pages", "vmstate")
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not os.path.ismount(Path(parent, name))]
        files += [Path(parent, name) for name in names if name not in held]
    return "".join(file.read_bytes().decode(errors="replace") for file in files if file.is_file())


@pytest.mark.timeout(180)
def test_no_log_of_a_hand_over_has_anything_of_a_page(tmp_path: Path) -> None:
    """A guest is saved by `lazymem snapshot` and given by `lazymem send` to `lazymem receive`, which takes it with an
    emulator of its own. In between: a name that is taken, a killed source, a damaged state, one who comes too late."""
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(SECRET_AT) + SECRET_BYTES)
    os.truncate(ram, RAM_MIB << 20)
    with starting(tmp_path, RAM_MIB) as start:
        guest = start("--pcram-file", ram, "-kernel", build_guest("heartbeat", tmp_path))
        guest.wait_ticks(2)
        saved = [command("lazymem.cli.main", "snapshot", guest.monitor, tmp_path / "saved", "--resume")] * 2
        taken = [subprocess.run(words, capture_output=True, text=True, timeout=120, check=False) for words in saved]
        assert [done.returncode == 0 for done in taken] == [True, False], taken
        damaged = start("--pcram-file", copy_of(ram, tmp_path), "-incoming", f"file:{damaged_state(tmp_path)}")
        code, complaint = damaged.end()
        assert code != 0
        with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
            two.begin(source_dies="RECORDED given")
            assert two.wait_settled() == (False, True)
            assert two.receive.run("--journal", tmp_path / "late.journal").returncode != 0
            assert two.send.wait() == 0, two.tell()
            with open(two.mountpoint / "pc.ram", "rb") as file:
                file.seek(SECRET_AT)
                assert file.read(len(SECRET)) == SECRET, "it went along"
            told = [two.tell(), json.dumps(two.report()), kept_by_commands(tmp_path)]
        told += [said for done in taken for said in (done.stdout, done.stderr)]
        told += [complaint, guest.end()[1]]
    text = "\n".join(told)
    for part in (
        "!RECORDED given",
        "lazymem-mount[",
        "runs at the destination",
        "lazymem-vm: ",
        str(tmp_path / "saved"),
    ):
        assert part in text
    assert_no_secret(text)


def copy_of(ram: Path, folder: Path) -> Path:
    return Path(shutil.copy(ram, folder / "pc.ram"))


def damaged_state(folder: Path) -> Path:
    """The saved one with a secret in the midst of it, where one page too many in a stream would be."""
    state = (folder / "saved" / "vmstate").read_bytes()
    damaged = folder / "vmstate"
    damaged.write_bytes(state[: len(state) // 2] + SECRET_BYTES + state[len(state) // 2 :])
    return damaged
